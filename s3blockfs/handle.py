"""What a descriptor of a file on the mount is to the daemon, and the state of its own that it may show (`--direct-io`).

SQLite drops its pages when the change counter (16 bytes at 24) is another one, which it reads at the start of each
transaction but its first: https://sqlite.org/fileformat2.html#file_change_counter. Past the kernel's pages that read
arrives here. So each connection moves by itself, whoever else of its process reads, and no lock is in its way.

A file that is shorter than its first page says is damaged for SQLite. It asks for the size after it read the counter,
but in the first transaction before it reads anything, by the same thread: so that one shows what this thread was told.

Thread rule: as for a connection, which one thread uses at a time; `told` from any thread."""

import errno
from collections.abc import Hashable
from dataclasses import dataclass, field

from s3blockfs import header
from s3blockfs.database import Database
from s3blockfs.errors import DatabaseGone
from s3blockfs.fuse_binding import context_thread
from s3blockfs.kernelcache import Shown
from s3blockfs.prefetch import Readahead
from s3blockfs.sidefiles import SideFile
from s3blockfs.snapshot import Snapshot
from s3blockfs.view import committed

FIRST_LOOK = 0, header.HEADER_BYTES  # by which SQLite learns the page size when it opens a file, without a lock
COUNTER = header.COUNTER_AT, 16

TOLD_KEPT = 64


class OwnState:
    """Starts with what `database` shows. Who is not SQLite reads one state from the first byte to the last."""

    def __init__(self, database: Database, refresh_s: float) -> None:
        self._database, self._refresh_s = database, refresh_s
        self._snapshot, self.begun = database.shown, False
        self._told = dict[int, Snapshot]()

    @property
    def size(self) -> int:
        return self._snapshot.head.size

    def told(self, thread: int, state: Snapshot) -> None:
        """This thread is told at least the size of this state."""
        if not self.begun and thread:
            if len(self._told) == TOLD_KEPT:
                self._told.clear()
            self._told[thread] = state

    def read(self, offset: int, length: int, readahead: Readahead) -> bytes:
        """Fewer bytes at the end of the file. Raises what a refresh and reading raise."""
        try:
            if (offset, length) == COUNTER:
                self._database.refresh(self._refresh_s)
                self._snapshot, self.begun = self._database.shown, True
            elif not self.begun and (offset, length) != FIRST_LOOK:
                self._snapshot, self.begun = self._told.get(context_thread(), self._snapshot), True
            if (data := self._snapshot.near(offset, length)) is None:
                data = committed(self._snapshot, offset, length, readahead)
            return header.in_rollback_mode(offset, data)
        except DatabaseGone:  # as in `Database.read`
            self._database.checked_s = float("-inf")
            raise


@dataclass(slots=True, eq=False)
class Handle:
    """`failed`: what was written through this handle is lost, so no later call on it may succeed."""

    file: Database | SideFile
    readahead: Readahead
    shown: Shown | None = None
    wrote: bool = False
    failed: bool = False
    owners: set[Hashable] = field(default_factory=set)
    pid: int = 0  # the process that opened it
    only_reads: bool = False
    own: OwnState | None = None

    def require_sound(self) -> None:
        if self.failed:
            text = "what was written through this descriptor is lost; open it again"
            raise OSError(errno.EIO, f"{self.file.path}: {text}")
