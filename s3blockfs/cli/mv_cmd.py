"""`s3blockfs mv BUCKET/NAME BUCKET/NAME`."""

import click

from s3blockfs.cli import options
from s3blockfs.cli.cp_cmd import places
from s3blockfs.errors import UsageError


@options.command("mv", short_help="rename a database")
@click.argument("old", type=options.database, metavar="BUCKET/NAME")
@click.argument("new", type=options.database, metavar="BUCKET/NAME")
@options.force_option
def run(old: options.Target, new: options.Target, force: bool) -> None:
    """Rename a database, or a folder of them, within a bucket. The bytes do not pass through this machine. A database
    loses its history; one with named snapshots is renamed only with --force, and loses them, too."""
    folder, name, new_name = places(old, new)
    with options.opened(folder) as (catalog, _, _):
        entry = catalog.lookup(name)
        if entry and not entry.is_folder and not force and catalog.find(name)[2].head.snapshots:
            raise UsageError(f"{old}: has snapshots, which would be lost; restore them --as others, or use --force")
        catalog.rename(name, new_name, overwrite=force)
