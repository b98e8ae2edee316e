"""`s3blockfs lease show|break BUCKET/NAME`."""

from dataclasses import replace

import click

from s3blockfs.cli import options


@options.command("lease", short_help="show or break the lease of a writer")
@click.argument("action", type=click.Choice(["show", "break"]))
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@options.json_option
def run(action: str, database: options.Target, as_json: bool) -> None:
    """Show which machine holds the right to write a database, or end that right.
    Breaking a lease is safe: if its holder is alive after all, the slower of two commits fails."""
    with options.opened(database) as (catalog, _, _):
        _, heads, version = catalog.find(database.name)
        if action == "break" and version.head.lease is not None:
            catalog.require_writable()
            version = heads.swap(version, lambda head: replace(head, lease=None))
    lease = version.head.lease
    options.show({"owner": lease and lease.owner, "seconds": lease and lease.seconds}, as_json)
