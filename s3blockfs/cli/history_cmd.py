"""`s3blockfs history BUCKET/NAME`."""

import json

import click

from s3blockfs.cli import options


@options.command("history", short_help="list the commits that can be restored")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@options.json_option
def run(database: options.Target, as_json: bool) -> None:
    """List the commits that `restore` can go back to, newest first: number, time, size in bytes, id."""
    from s3blockfs.history import commits

    with options.opened(database) as (catalog, _, _):
        source, heads, _ = catalog.find(database.name)
        found = commits(source, heads)
    for seq, name, time_ms, size, _ in found:
        if as_json:
            fields = {"seq": seq, "committed": options.utc(time_ms), "size_bytes": size, "commit": name.hex()}
            print(json.dumps(fields))
        else:
            print(f"{seq:>10}  {options.utc(time_ms)}  {size:>14}  {name.hex()}")
