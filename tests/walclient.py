"""A connection in WAL mode on the engine alone. The bytes are SQLite's own: it is given the file and the log as the
engine shows them, does its work on a disk, and what it changed there is done to the engine, with the calls and locks of
a mount in SQLite's order. So it also sees whether it can go on from what the engine left after a failure."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from engine import Process, World

from s3blockfs.catalog import Catalog
from s3blockfs.errors import Busy, OutcomeUnknown
from s3blockfs.locks import Kind
from s3blockfs.wal import FRAME_HEADER_BYTES, HEADER_BYTES
from s3blockfs.walmode import CHECKPOINT, FIRST_READ, WRITE, WalDatabase

NAME, PAGE = "a.db", 1024
FRAME = FRAME_HEADER_BYTES + PAGE
MY_READ = FIRST_READ + 1

T = TypeVar("T")
Files = tuple[bytes, bytes]  # a database, and its log


def ran(files: Files, *statements: str) -> tuple[Files, str]:
    """SQLite on a disk that holds these: what is there afterwards, with nobody gone, and what it reads."""
    with TemporaryDirectory(prefix="wal-faults-") as folder:
        path, log = Path(folder, NAME), Path(folder, f"{NAME}-wal")
        path.write_bytes(files[0])
        if files[1]:
            log.write_bytes(files[1])
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as run:
            run.execute("PRAGMA synchronous=OFF")  # of the copy
            run.execute("PRAGMA wal_autocheckpoint=0")
            for statement in statements:
                run.execute(statement).fetchall()
            found = run.execute("PRAGMA integrity_check").fetchall()
            if found == [("ok",)]:
                found = run.execute(
                    "SELECT a, length(b), b FROM t UNION ALL SELECT -1, n, '' FROM u ORDER BY a"
                ).fetchall()
            after = path.read_bytes(), log.read_bytes() if log.exists() else b""
    return after, repr(found)


def first() -> bytes:
    """A small database in WAL mode, without a log."""
    with TemporaryDirectory(prefix="wal-faults-") as folder:
        with contextlib.closing(sqlite3.connect(Path(folder, NAME), isolation_level=None)) as run:
            for statement in (
                f"PRAGMA page_size={PAGE}",
                "PRAGMA journal_mode=WAL",
                "CREATE TABLE t(a PRIMARY KEY, b)",
                "CREATE TABLE u AS SELECT 1 AS n",
            ):
                run.execute(statement).fetchall()
        return Path(folder, NAME).read_bytes()


class Connection:
    """The one process that has the database open on a machine."""

    def __init__(self, machine: Catalog) -> None:
        self.machine = machine
        database = machine.open(NAME)
        assert isinstance(database, WalDatabase)
        self.database, self.process = database, Process(machine, database, 1)
        self.process.shared()
        self.machine.side_files.create(f"{NAME}-shm")

    def files(self) -> Files:
        log = self.machine.side_files.get(f"{NAME}-wal")
        return self.database.read(0, self.database.size), b"" if log is None else log.read(0, log.size)

    def rows(self) -> str:
        """What a transaction that begins now reads."""
        with self.locked(Kind.READ, MY_READ):
            return ran(self.files())[1]

    @contextlib.contextmanager
    def locked(self, kind: Kind, start: int, end: int | None = None, thread: int = 1) -> Iterator[None]:
        self.database.lock_index(self.process, kind, start, end or start, 1, thread)
        try:
            yield
        finally:
            self.database.unlock_index(self.process, start, end or start)

    def commit(self, *statements: str, sync: bool) -> None:
        with self.locked(Kind.READ, MY_READ):
            before = self.files()
            (_, log), _ = ran(before, *statements)
            with self.locked(Kind.WRITE, WRITE):
                self.append(before[1], log, sync)

    def append(self, before: bytes, log: bytes, sync: bool) -> None:
        side = self.machine.side_files.create(f"{NAME}-wal")
        if log[:HEADER_BYTES] != before[:HEADER_BYTES]:
            self.database.log_write(0)
            side.write(0, log[:HEADER_BYTES])
        for offset in range(HEADER_BYTES, len(log), FRAME):
            if log[offset : offset + FRAME] != before[offset : offset + FRAME]:
                self.database.log_write(offset)
                side.write(offset, log[offset : offset + FRAME])
        if sync:
            self.database.log_sync(1, 1)

    def checkpoint(self, mode: str, *statements: str, sync: bool) -> None:
        """And, if nothing changes and SQLite still knows that the log begins anew, a commit."""
        with contextlib.ExitStack() as locks:
            locks.enter_context(self.locked(Kind.WRITE, CHECKPOINT))
            if mode != "PASSIVE":
                locks.enter_context(self.locked(Kind.WRITE, WRITE))
            before = self.files()
            (content, log), _ = ran(before, f"PRAGMA wal_checkpoint({mode})", *statements)
            self._backfill(before[0], content, sync)
            if mode == "TRUNCATE":
                self.database.log_truncate(0)
                self.machine.side_files.create(f"{NAME}-wal").truncate(0)
        if statements:
            with self.locked(Kind.READ, MY_READ), self.locked(Kind.WRITE, WRITE):
                if self.files() != (content, before[1]):
                    raise Busy("another state came in between")
                self.append(before[1], log, sync=True)

    def _backfill(self, before: bytes, content: bytes, sync: bool) -> None:
        if sync:
            self.database.log_sync(1, 1)
        for offset in range(0, len(content), PAGE):
            if content[offset : offset + PAGE] != before[offset : offset + PAGE]:
                self.database.write(offset, content[offset : offset + PAGE], {self.process})
        if len(content) != self.database.size:
            self.database.truncate(len(content), {self.process})
        if sync:
            self.database.sync(1)

    def close(self) -> None:
        """As the last one: everything goes into the file, and the log goes."""
        try:
            self.process.exclusive()
            before = self.files()
            if before[1]:
                self._backfill(before[0], ran(before, "PRAGMA wal_checkpoint(PASSIVE)")[0][0], sync=True)
                self.database.log_unlink()
                self.machine.side_files.remove(f"{NAME}-wal")
            self.machine.side_files.remove(f"{NAME}-shm")
        finally:
            self.process.unlock()
            self.machine.release(self.database)


def insert(start: int, count: int, length: int) -> str:
    numbers = f"WITH n(i) AS (SELECT {start} UNION ALL SELECT i+1 FROM n WHERE i < {start + count - 1}) SELECT i"
    return f"INSERT INTO t {numbers}, substr(hex(i * 7919 * 7919 * 104729), 1, 9) || printf('%0{length}d', i) FROM n"


def wait(connection: Connection) -> None:
    """What NORMAL left is published in the background."""
    runtime = connection.machine._runtime
    runtime.sleep(1.5)
    runtime.tick()


def wal_machine(world: World) -> Catalog:
    made = world.machine(block_size=4096, lease_s=10.0)
    made.kind = WalDatabase
    return made


def make(machine: Catalog) -> None:
    database = machine.create(NAME, exclusive=True)
    database.write(0, first())
    database.close_handle(1)
    machine.release(database)


def when_settled(world: World, do: Callable[[], T]) -> T:
    """By itself: a call that fails sets it going."""
    for _ in range(5):
        try:
            return do()
        except OutcomeUnknown:
            world.runtime.sleep(3)
    raise AssertionError("never settled")


def elsewhere(world: World) -> str:
    """What a machine that knows nothing reads."""
    return ran((world.content(NAME), b""))[1]
