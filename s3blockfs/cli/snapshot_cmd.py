"""`s3blockfs snapshot create|list|rm BUCKET/NAME [LABEL]`."""

import json

import click

from s3blockfs.cli import options
from s3blockfs.errors import UsageError


@options.command("snapshot", short_help="keep states of a database under names")
@click.argument("action", type=click.Choice(["create", "list", "rm"]))
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@click.argument("label", type=options.label, required=False)
@options.json_option
def run(action: str, database: options.Target, label: str | None, as_json: bool) -> None:
    """Keep the newest state of a database under LABEL, beyond the retention; list what is kept so; or let it go.
    `restore --to LABEL` brings it back."""
    from s3blockfs import history

    if (label is None) != (action == "list"):
        raise UsageError(f"snapshot {action} takes {'no' if label else 'a'} LABEL")
    with options.opened(database) as (catalog, _, _):
        source, heads, version = catalog.find(database.name)
        if label is None:
            for named in version.head.snapshots:
                head = history.archived(source, named.archive).head
                if as_json:
                    fields = {"label": named.label, "seq": head.seq, "committed": options.utc(head.time_ms)}
                    print(json.dumps({**fields, "size_bytes": head.size}))
                else:
                    print(f"{head.seq:>10}  {options.utc(head.time_ms)}  {head.size:>14}  {named.label}")
            return
        catalog.require_writable()
        change = history.keep if action == "create" else history.forget
        change(source, heads, heads.convert(version), label)
