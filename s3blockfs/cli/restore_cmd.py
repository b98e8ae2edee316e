"""`s3blockfs restore BUCKET/NAME --to TIME|SEQ|LABEL [--as BUCKET/NEW]`."""

from datetime import datetime, timedelta

import click

from s3blockfs.cli import options
from s3blockfs.cli.cp_cmd import places
from s3blockfs.errors import TooOld


@options.command("restore", short_help="bring an earlier state of a database back")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@click.option(
    *("--to", "state"), type=options.state, required=True, metavar="TIME|SEQ|LABEL", help="which; see `history`"
)
@click.option("--as", "new", type=options.database, metavar="BUCKET/NAME", help="as a new database; keep this one")
def run(database: options.Target, state: int | str | datetime | timedelta, new: options.Target | None) -> None:
    """Bring back what a database held at a TIME (2026-01-31T23:59:59 in UTC, or 90m for how long ago), right after
    commit SEQ, or in the snapshot LABEL. That is one more commit: it can be undone in the same way."""
    from s3blockfs.history import commits

    folder, name, new_name = places(database, new or database)
    with options.opened(folder) as (catalog, store, _):
        if isinstance(state, (datetime, timedelta)):
            source, heads, _ = catalog.find(name)
            now = store.server_time_s()
            moment = state.timestamp() if isinstance(state, datetime) else now - state.total_seconds()
            found = [commit.seq for commit in commits(source, heads) if commit.time_ms <= moment * 1000]
            if not found:
                raise TooOld(f"{database}: no commit of {options.utc(int(moment * 1000))} or before is kept")
            state = found[0]
        catalog.copy(name, new_name, overwrite=new is None, at=state)
