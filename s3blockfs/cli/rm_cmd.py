"""`s3blockfs rm BUCKET/NAME...`."""

import click

from s3blockfs.cli import options


@options.command("rm", short_help="delete databases")
@click.argument("databases", type=options.database, metavar="BUCKET/NAME...", nargs=-1, required=True)
def run(databases: tuple[options.Target, ...]) -> None:
    """Delete databases, without asking. Stops at the first that cannot be deleted."""
    for database in databases:
        with options.opened(database) as (catalog, _, _):
            catalog.remove(database.name)
