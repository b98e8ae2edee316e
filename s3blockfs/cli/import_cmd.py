"""`s3blockfs import FILE BUCKET/NAME`."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

import click

from s3blockfs import header
from s3blockfs.cli import options
from s3blockfs.config import MIB
from s3blockfs.errors import DamagedObject, DatabaseExists, S3BlockFSError, UsageError


@options.command("import", short_help="make a SQLite file a database in a bucket")
@click.argument("file", metavar="FILE|-")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@options.force_option
def run(file: str, database: options.Target, force: bool) -> None:
    """Store a SQLite database by one commit, and verify what was stored. FILE may be in use: its newest committed state
    is taken, and its writers wait meanwhile (in WAL mode they need not). From stdin come the bytes of such a file."""
    with (
        click.open_file(file, "rb") as stream,
        options.opened(database) as (catalog, store, runtime),
        options.progress(f"{file} ->") as report,
    ):
        from s3blockfs.backup import back_up
        from s3blockfs.catalog import Catalog
        from s3blockfs.snapshot import Snapshot
        from s3blockfs.transfer import bury

        config, name = options.settings().config, database.name
        first = stream.read(MIB)
        if not header.is_database(first):
            raise UsageError(f"{file}: no SQLite database; nothing was imported")
        catalog.require_writable()
        exists = catalog.lookup(name) is not None
        if exists and not force:
            raise DatabaseExists(f"{database}: exists; overwrite it with --force")
        held = catalog.open(name) if exists else catalog.create(name, exclusive=True)
        before = held.version
        try:
            held.truncate(0)
            if file != "-" and Path(file).is_file():
                back_up(file, held, report)
            else:
                for piece in chain([first], iter(lambda: stream.read(MIB), b"")):
                    held.write(held.size, piece)
                    report(held.size, None)
                if held.size < (header.file_size(first) or 0):
                    raise UsageError(f"{file}: ends before the database does; nothing was imported")
            expected = _hash(held.read(at, MIB) for at in range(0, held.size, MIB))
            held.close_handle(os.getpid())
        except BaseException:
            with suppress(S3BlockFSError):  # an empty database is left; more important is what went wrong first
                if not exists:
                    place, heads, _ = catalog.find(name)
                    bury(place, heads, before, "import", same_commit=True)
            raise
        finally:
            catalog.release(held)
        with closing(Catalog(store, runtime, config, database.prefix)) as afresh:  # with nothing in its cache
            state = Snapshot.load(afresh.find(name)[0], held.version)
            if _hash(state.pieces(config.readahead_size)) != expected:
                raise DamagedObject(f"{database}: what was stored is not what was read from {file}")


def _hash(pieces: Iterable[bytes]) -> bytes:
    """Of the bytes; the engine sets the change counter."""
    total, at = hashlib.blake2b(), 0
    for piece in pieces:
        total.update(header.without_counter(at, piece))
        at += len(piece)
    return total.digest()
