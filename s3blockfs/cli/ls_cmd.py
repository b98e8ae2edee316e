"""`s3blockfs ls BUCKET[/PREFIX]`."""

import json
from datetime import datetime, timezone
from functools import partial

import click

from s3blockfs.cli import options
from s3blockfs.errors import DatabaseNotFound
from s3blockfs.format.keys import join


@options.command("ls", short_help="list databases and folders")
@click.argument("target", type=options.target, metavar="BUCKET[/PREFIX]")
@click.option("-l", "--long", is_flag=True, help="size in bytes and time of the last commit as well")
@options.json_option
def run(target: options.Target, long: bool, as_json: bool) -> None:
    """List the databases and folders under BUCKET/PREFIX, as a mount would show them."""
    with options.opened(options.Target(target.bucket, "")) as (catalog, _, runtime):
        rows = catalog.listing(target.prefix)
        if not rows and catalog.lookup(target.prefix) is None:
            raise DatabaseNotFound(f"{target}: nothing there; `s3blockfs ls {target.bucket}` shows what is")
        if long or as_json:
            looked_up = [runtime.submit(partial(catalog.lookup, join(target.prefix, name))) for name, _ in rows]
            rows = [(name, future.result() or row) for (name, row), future in zip(rows, looked_up, strict=True)]
    for name, entry in rows:
        if as_json:
            kind = "folder" if entry.is_folder else "database"
            fields = {"name": name, "type": kind, "size_bytes": entry.size, "modified_s": entry.modified_s}
            print(json.dumps(fields))
        elif long:
            time = datetime.fromtimestamp(entry.modified_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
            print(f"{'-' if entry.is_folder else entry.size:>14}  {'' if entry.is_folder else time:19}  {name}")
        else:
            print(name + "/" if entry.is_folder else name)
