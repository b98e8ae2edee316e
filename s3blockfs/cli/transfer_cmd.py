"""Databases to and from files and objects: `s3blockfs import FILE BUCKET/NAME`, `s3blockfs export BUCKET/NAME FILE`."""

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO

import click

from s3blockfs import header
from s3blockfs.cli import options
from s3blockfs.config import MIB
from s3blockfs.errors import DamagedObject, DatabaseExists, ObjectNotFound, S3BlockFSError, UsageError


@options.command("import", short_help="make a SQLite file a database in a bucket")
@click.argument("file", metavar="FILE|s3://BUCKET/KEY|-")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@options.force_option
def import_(file: str, database: options.Target, force: bool) -> None:
    """Store a SQLite database by one commit, and verify what was stored. FILE may be in use: its newest committed state
    is taken, and its writers wait meanwhile (in WAL mode they need not). From stdin, or from an object in S3, come the
    bytes of such a file; an object that is replaced meanwhile is not imported."""
    with (
        _stream(file) as stream,
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
        entry = catalog.lookup(name)
        exists = entry is not None and not entry.is_fixed  # an object stays, and the database is what is shown
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
            written, size = held.uncommitted, held.size
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
            at = 0
            for piece in state.pieces(config.readahead_size):
                if piece != header.in_rollback_mode(at, written.read(at, at + len(piece))):
                    break
                at += len(piece)
            if not at == state.head.size == size:
                raise DamagedObject(f"{database}: what was stored is not what was read from {file}, at byte {at}")


@contextmanager
def _stream(file: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, of stdin, or of one version of an object."""
    if not file.startswith("s3://"):
        with click.open_file(file, "rb") as stream:
            yield stream
        return
    where = options.database(file)
    with options.opened(options.Target(where.bucket, "")) as (catalog, _, _):
        from s3blockfs.files import Reader
        from s3blockfs.objectfile import as_database, find
        from s3blockfs.snapshot import Snapshot

        source = catalog.at(where.key)[0]
        if (found := find(source)) is None:
            raise ObjectNotFound(f"{file}: no such object; `s3blockfs cp` copies databases")
        state = Snapshot.load(source, as_database(source, found))
        with io.BufferedReader(Reader(catalog, options.settings().config, state, False, file), MIB) as stream:
            yield stream


@options.command("export", short_help="write a database to a file")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@click.argument("file", metavar="FILE|-")
@options.force_option
@click.option("--layout", type=click.Choice(["sqlite-s3vfs"]), help="FILE is BUCKET/NAME: keys as that library's")
def export(database: options.Target, file: str, force: bool, layout: str | None) -> None:
    """Write a database to a regular file, or to stdout: one committed state, whoever writes meanwhile, every block
    verified. FILE appears when it is complete. With --layout, blocks have 4096 bytes unless --block-size is given."""
    if layout is not None:
        return _export_layout(database, options.database(file))
    target = Path(file).resolve()
    sides = [Path(f"{target}{suffix}") for suffix in ("-journal", "-wal", "-shm")]
    if file == "-" and sys.stdout.isatty():
        raise UsageError("stdout is a terminal; name a file, or redirect it")
    if file != "-" and not force:
        _refuse(target, *sides[:2])
    with options.opened(database) as (catalog, _, _), options.progress(f"{target.name} <-") as report:
        from s3blockfs.snapshot import Snapshot

        source, _, version = catalog.find(database.name)
        state = Snapshot.load(source, version)

        def pieces() -> Iterator[bytes]:
            done = 0
            for piece in state.pieces(options.settings().config.readahead_size):
                yield piece
                report(done := done + len(piece), state.head.size)

        if file == "-":
            sys.stdout.buffer.writelines(pieces())
            sys.stdout.buffer.flush()
        else:
            _replace(target, sides, pieces(), force)
    return None


def _export_layout(database: options.Target, to: options.Target) -> None:
    from s3blockfs.legacy import export_layout
    from s3blockfs.snapshot import Snapshot

    given = click.get_current_context().get_parameter_source("block_size") is not click.core.ParameterSource.DEFAULT
    block_size = options.settings().config.block_size if given else 4096
    with ExitStack() as stack:
        catalog, _, _ = stack.enter_context(options.opened(database))
        there = catalog if to.bucket == database.bucket else stack.enter_context(options.opened(to))[0]
        report = stack.enter_context(options.progress(f"{to} <-"))
        source, _, version = catalog.find(database.name)
        export_layout(Snapshot.load(source, version), there.at(to.key)[0], block_size, report)


def _refuse(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink() or path.exists():
            raise DatabaseExists(f"{path}: exists; move it away, or overwrite it with --force")


def _replace(target: Path, sides: list[Path], pieces: Iterator[bytes], force: bool) -> None:
    """Under another name first. The old FILE goes before its side files, which must not be played into the new one."""
    descriptor, name = tempfile.mkstemp(".partial", f".{target.name}.", target.parent)
    new = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.writelines(pieces)
            out.flush()
            os.fsync(descriptor)
        if not force:
            _refuse(*sides[:2])
            try:
                os.link(new, target)
            except OSError:  # it is there; or no hard links here, so nobody can tell in the same instant
                _refuse(target)
                new.rename(target)
        else:
            for path in (target, *sides) if any(side.exists() for side in sides) else ():
                path.unlink(missing_ok=True)
            new.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        new.unlink(missing_ok=True)
