"""`s3blockfs check BUCKET/NAME...`."""

import json
import sys

import click

from s3blockfs.cli import options
from s3blockfs.errors import DamagedObject


@options.command("check", short_help="verify everything that belongs to databases")
@click.argument("databases", type=options.database, metavar="BUCKET/NAME...", nargs=-1, required=True)
@options.json_option
def run(databases: tuple[options.Target, ...], as_json: bool) -> int:
    """Fetch and verify every object of databases and of the states that they keep, read every page of the newest
    state, then run SQLite's `PRAGMA integrity_check`. Prints what it finds; exit code 6 if there is anything."""
    from s3blockfs.check import findings
    from s3blockfs.legacy import stale_keys
    from s3blockfs.vfs import integrity

    damaged = False
    for database in databases:
        with options.opened(database) as (catalog, _, _), options.progress(str(database)) as report:
            source, heads, version = catalog.find(database.name)
            path = source.prefix[len(database.prefix) :].lstrip("/")
            found = findings(source, heads, version, report)
            if not found and version.head.counter is not None:  # else no SQLite database
                found = integrity(catalog, path)
            stale = stale_keys(source.store, source.prefix) if version.snapshot is None else ()
        damaged |= bool(found)
        if stale:
            print(f"{database}: {len(stale)} keys of sqlite-s3vfs beside it count for nothing", file=sys.stderr)
        if as_json:
            print(json.dumps({"database": str(database), "findings": found}))
        else:
            print(*(f"{database}: {line}" for line in found or ["ok"]), sep="\n")
    return DamagedObject.exit_code if damaged else 0
