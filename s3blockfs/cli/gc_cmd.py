"""`s3blockfs gc BUCKET[/PREFIX]`."""

import json
import sys

import click

from s3blockfs.cli import options
from s3blockfs.errors import DamagedObject, DatabaseGone, DatabaseNotFound, NewerFormat


@options.command("gc", short_help="delete what no database needs any more")
@click.argument("target", type=options.target, metavar="BUCKET[/PREFIX]")
@options.json_option
def run(target: options.Target, as_json: bool) -> int:
    """Delete what a database, or all under a prefix, replaced longer ago than --retain, also of deleted ones; merge
    long logs, and objects of which little is needed."""
    from s3blockfs.housekeeping import clean_up

    config, folder = options.settings().config, target.prefix.rpartition("/")[0]
    code = 0
    with options.opened(options.Target(target.bucket, folder)) as (catalog, store, _):
        entry = catalog.lookup(target.prefix[len(folder) :].lstrip("/"))
        prefix = target.prefix if entry is None else entry.prefix
        listed = store.list(f"{prefix}/" if prefix else "", site="gc")
        databases = [each.key[: -len("/head")] for each in listed if each.key.endswith("/head")]
        if prefix and not databases:
            raise DatabaseNotFound(f"{target}: no database there")
        catalog.require_writable()
        for each in databases:
            try:
                report = clean_up(*catalog.at(each), config)
            except (DamagedObject, DatabaseGone, NewerFormat) as error:  # no reason to leave the others alone
                print(f"s3blockfs: {error}", file=sys.stderr)
                code = error.exit_code
                continue
            if as_json:
                print(json.dumps({"prefix": each, **report._asdict(), "sparse": len(report.sparse)}))
            else:
                print(f"{each}: deleted {report.deleted_bytes} bytes in {report.deleted} objects")
    return code
