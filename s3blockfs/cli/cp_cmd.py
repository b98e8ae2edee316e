"""`s3blockfs cp BUCKET/NAME BUCKET/NAME`."""

import os

import click

from s3blockfs.cli import options
from s3blockfs.errors import UsageError


def places(old: options.Target, new: options.Target) -> tuple[options.Target, str, str]:
    """The deepest folder that both are in, and their names below it."""
    if old.bucket != new.bucket:
        raise UsageError(f"{old} and {new} are in two buckets; use s3blockfs export {old} - | s3blockfs import - {new}")
    folder = os.path.commonpath([old.prefix, new.prefix])
    name, new_name = (each.key[len(folder) :].lstrip("/") for each in (old, new))
    return options.Target(old.bucket, folder), name, new_name


@options.command("cp", short_help="copy a database")
@click.argument("old", type=options.database, metavar="BUCKET/NAME")
@click.argument("new", type=options.database, metavar="BUCKET/NAME")
@options.force_option
def run(old: options.Target, new: options.Target, force: bool) -> None:
    """Copy the newest state of a database within a bucket. The bytes do not pass through this machine."""
    folder, name, new_name = places(old, new)
    with options.opened(folder) as (catalog, _, _):
        catalog.copy(name, new_name, overwrite=force)
