"""Earlier states of a database: `s3blockfs history|restore|snapshot`."""

import click

from s3blockfs.cli import options
from s3blockfs.cli.names_cmd import places
from s3blockfs.errors import UsageError


def _show(as_json: bool, seq: int, time_ms: int, size: int, kind: str, name: str) -> None:
    """A state; `name` is its commit's id, or its label."""
    time = options.utc(time_ms)
    facts = {"seq": seq, "committed": time, "size_bytes": size, kind: name}
    options.show(facts, as_json, f"{seq:>10}  {time}  {size:>14}  {name}")


@options.command("history", short_help="list the commits that can be restored")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@options.json_option
def history(database: options.Target, as_json: bool) -> None:
    """List the commits that `restore` can go back to, newest first: number, time, size in bytes, id."""
    from s3blockfs.history import commits

    with options.opened(database) as (catalog, _, _):
        source, heads, _ = catalog.find(database.name)
        for seq, name, time_ms, size, _ in commits(source, heads):
            _show(as_json, seq, time_ms, size, "commit", name.hex())


@options.command("restore", short_help="bring an earlier state of a database back")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@click.option("--to", "at", required=True, metavar="TIME|SEQ|LABEL", help="which; see `history`")
@click.option("--as", "new", type=options.database, metavar="BUCKET/NAME", help="as a new database; keep this one")
def restore(database: options.Target, at: str, new: options.Target | None) -> None:
    """Bring back what a database held at a TIME (2026-01-31T23:59:59 in UTC, or 90m for how long ago), right after
    commit SEQ, or in the snapshot LABEL. That is one more commit: it can be undone in the same way."""
    folder, name, new_name = places(database, new or database)
    with options.opened(folder) as (catalog, _, _):
        catalog.copy(name, new_name, overwrite=new is None, at=at)


@options.command("snapshot", short_help="keep states of a database under names")
@click.argument("action", type=click.Choice(["create", "list", "rm"]))
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@click.argument("label", type=options.label, required=False)
@options.json_option
def snapshot(action: str, database: options.Target, label: str | None, as_json: bool) -> None:
    """Keep the newest state of a database under LABEL, beyond the retention; list what is kept so; or let it go.
    `restore --to LABEL` brings it back."""
    from s3blockfs.history import archived, forget, keep

    if (label is None) != (action == "list"):
        raise UsageError(f"snapshot {action} takes {'no' if label else 'a'} LABEL")
    with options.opened(database) as (catalog, _, _):
        source, heads, version = catalog.find(database.name)
        if label is not None:
            catalog.require_writable()
            (keep if action == "create" else forget)(source, heads, heads.convert(version), label)
            return
        for named in version.head.snapshots:
            head = archived(source, named.archive).head
            _show(as_json, head.seq, head.time_ms, head.size, "label", named.label)
