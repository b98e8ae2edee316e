"""`s3blockfs adopt BUCKET/NAME`."""

import click

from s3blockfs.cli import options
from s3blockfs.format.head import MAX_DATABASE_BYTES


@options.command("adopt", short_help="convert a database of sqlite-s3vfs")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@click.option("--keep-legacy", is_flag=True, help="leave that library's keys; they count for nothing any more")
def run(database: options.Target, keep_legacy: bool) -> None:
    """Convert a database in the layout of sqlite-s3vfs, of any size; others are left as they are. Small ones are
    converted by their first write anyway."""
    with options.opened(database) as (catalog, _, _), options.progress(str(database)) as report:
        catalog.require_writable()
        _, heads, version = catalog.find(database.name)
        heads.convert(version, MAX_DATABASE_BYTES, keep_legacy, report)
