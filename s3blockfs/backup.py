"""The committed state of a database that any program has open, by SQLite's backup, which knows WAL and hot journals."""

import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw

from s3blockfs.config import MIB
from s3blockfs.database import Database
from s3blockfs.errors import Busy, UsageError
from s3blockfs.runtime import Progress

PATIENCE_MS = 60_000  # for a program that is writing
STEP_PAGES = 256  # copied at a time
GATHER_BYTES = MIB  # SQLite writes page after page; the engine takes many as fast as one


def back_up(file: str, database: Database, report: Progress) -> None:
    """Make it the uncommitted state of `database`, which is empty. `report` hears of pages (done, in all).
    Raises UsageError, Busy, and what writing raises."""
    sink = _Sink(database)
    try:
        # Not read-only, or a hot journal could not be rolled back. Closing must not run a checkpoint, though.
        with closing(apsw.Connection(str(Path(file).resolve()), flags=apsw.SQLITE_OPEN_READWRITE)) as source:
            source.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            source.set_busy_timeout(PATIENCE_MS)
            source.execute("BEGIN; SELECT * FROM sqlite_schema").fetchall()  # or each writer would start it anew
            with closing(apsw.Connection(sink.name, vfs=sink.name)) as target:
                target.execute("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF")
                with target.backup("main", source, "main") as backup:
                    while not backup.done:
                        backup.step(STEP_PAGES)
                        report(backup.page_count - backup.remaining, backup.page_count)
                sink.flush()
    except apsw.Error as error:
        kind = Busy if isinstance(error, apsw.BusyError) else UsageError
        raise kind(f"{file}: {error}") from error


class _Sink(apsw.VFS):
    """Has one file: what SQLite writes into it becomes uncommitted bytes of a database, and nothing is published."""

    def __init__(self, database: Database) -> None:
        self.name = f"sink-{uuid.uuid4()}"
        self._database = database
        self._gathered, self._end = bytearray(), 0  # written one after the other, up to this offset
        super().__init__(name=self.name, base="")

    def flush(self) -> None:
        """Raises what writing raises."""
        data, self._gathered = bytes(self._gathered), bytearray()
        if data:
            self._database.write(self._end - len(data), data)

    def xOpen(self, name: object, flags: list[int]) -> Any:
        return self

    def xFullPathname(self, name: str) -> str:
        return name

    def xRead(self, amount: int, offset: int) -> bytes:
        self.flush()
        return self._database.read(offset, amount)

    def xWrite(self, data: bytes, offset: int) -> None:
        if offset != self._end or len(self._gathered) >= GATHER_BYTES:
            self.flush()  # what it raises comes out of `Backup.step` as it is
        self._gathered += data
        self._end = offset + len(data)

    def xTruncate(self, size: int) -> None:
        self.flush()
        self._database.truncate(size)

    def xFileSize(self) -> int:
        self.flush()
        return self._database.size

    def _nothing(self, *_: object) -> bool:
        """Nobody else is there, and nothing is durable before the commit."""
        return False

    xAccess = xCheckReservedLock = xClose = xFileControl = xLock = xSync = xUnlock = _nothing  # type: ignore[assignment]
    xDeviceCharacteristics = xSectorSize = _nothing
