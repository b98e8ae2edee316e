"""What keeps databases in good order: `s3blockfs check|gc|adopt`."""

import click

from s3blockfs.cli import options
from s3blockfs.errors import UNUSABLE, DamagedObject, DatabaseNotFound
from s3blockfs.format.head import MAX_DATABASE_BYTES
from s3blockfs.format.keys import is_prefix


@options.command("check", short_help="verify everything that belongs to databases")
@click.argument("databases", type=options.database, metavar="BUCKET/NAME...", nargs=-1, required=True)
@options.json_option
def check(databases: tuple[options.Target, ...], as_json: bool) -> int:
    """Fetch and verify every object of databases and of the states that they keep, read every page of the newest
    state, then run SQLite's `PRAGMA integrity_check`. Prints what it finds; exit code 6 if there is anything."""
    from s3blockfs.check import findings
    from s3blockfs.legacy import stale_keys
    from s3blockfs.vfs import integrity

    code = 0
    for database in databases:
        with options.opened(database) as (catalog, _, _), options.progress(str(database)) as report:
            source, heads, version = catalog.find(database.name)
            path = source.prefix[len(database.prefix) :].lstrip("/")
            found = findings(source, heads, version, report)
            if not found and version.head.counter is not None:  # else no SQLite database
                found = integrity(catalog, path)
            stale = stale_keys(source.store, source.prefix) if version.snapshot is None else ()
        if stale:
            options.complain(f"{database}: {len(stale)} keys of sqlite-s3vfs beside it count for nothing")
        lines = [f"{database}: {line}" for line in found or ["ok"]]
        options.show({"database": str(database), "findings": found}, as_json, *lines)
        code = DamagedObject.exit_code if found else code
    return code


@options.command("gc", short_help="delete what no database needs any more")
@click.argument("target", type=options.target, metavar="BUCKET[/PREFIX]")
@options.json_option
def gc(target: options.Target, as_json: bool) -> int:
    """Delete what a database, or all under a prefix, replaced longer ago than --retain, also of deleted ones; merge
    long logs, and objects of which little is needed."""
    from s3blockfs.catalog import Catalog
    from s3blockfs.housekeeping import clean_up
    from s3blockfs.names import undotted

    config, code = options.settings().config, 0
    with options.opened(target) as (_, store, runtime):
        for prefix in (target.prefix, undotted(target.prefix) or target.prefix):
            keys = (each.key for each in store.list(f"{prefix}/" if prefix else "", site="gc"))
            if databases := [key[:-5] for key in keys if key.endswith("/head") and is_prefix(key[:-5])]:
                break
        if prefix and not databases:
            raise DatabaseNotFound(f"{target}: no database there")
        catalog = Catalog(store, runtime, config, prefix.rpartition("/")[0] if prefix in databases else prefix)
        catalog.require_writable()
        for each in databases:
            try:
                report = clean_up(*catalog.at(each), config)
            except UNUSABLE as error:  # no reason to leave the others alone
                options.complain(error)
                code = error.exit_code
                continue
            facts = {"prefix": each, **report._asdict(), "sparse": len(report.sparse)}
            options.show(facts, as_json, f"{each}: deleted {report.deleted_bytes} bytes in {report.deleted} objects")
    return code


@options.command("adopt", short_help="convert a database of sqlite-s3vfs")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@click.option("--keep-legacy", is_flag=True, help="leave that library's keys; they count for nothing any more")
def adopt(database: options.Target, keep_legacy: bool) -> None:
    """Convert a database in the layout of sqlite-s3vfs, of any size; others are left as they are. Small ones are
    converted by their first write anyway."""
    with options.opened(database) as (catalog, _, _), options.progress(str(database)) as report:
        catalog.require_writable()
        _, heads, version = catalog.find(database.name)
        heads.convert(version, MAX_DATABASE_BYTES, keep_legacy, report)
