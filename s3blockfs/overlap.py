"""A database of a mount whose readers overlap, so that there is never a moment to show a newer state.

Connections of one process share one SHARED lock, and count without a call to the daemon who has it. So the ticker looks
for newer states in their place, and new readers are held back until those under way have finished: by a journal that
is only pretended. SQLite looks for `NAME-journal` before it reads, takes this one for hot, wants EXCLUSIVE to play it
back, is refused, and lets its SHARED go: that is SQLITE_BUSY, for which `busy_timeout` waits. (`walmode.py` does it by
the index.) With a handle that is open read-only SQLite would report SQLITE_READONLY instead, so its process is not held
back, and nobody is if only such processes read.

Invariants: the journal is nowhere but in answers to who asks for its name, and in place of none that is hot; while it
is pretended no write lock is granted, nor is one held; its one byte is no header, so nothing could be played back."""

import contextlib
from collections import Counter
from collections.abc import Hashable
from typing import Any

from s3blockfs.database import Database
from s3blockfs.errors import Busy, CommitLost, S3BlockFSError
from s3blockfs.lease import Stale
from s3blockfs.locks import SHARED_FIRST, SHARED_LAST, Kind, Level
from s3blockfs.sidefiles import JOURNAL_SUFFIX, SideFile

LONG_BEHIND_S = 2.0  # readers that keep an old state so long belong to a process that never gets rid of all of them
LOOK_EVERY_S = 1.0  # for a newer state, in the place of those that overlap


class MountedDatabase(Database):
    """Threads: the face calls `opened` and `closed` one at a time; the rest as in `state.py`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._handles: Counter[int] = Counter()  # by process; replaced, not changed
        self.only_read: Counter[int] = Counter()  # those that are open for reading only
        self._pretended: SideFile | None = None
        self._doomed: tuple[Hashable | None, float] = (None, 0.0)  # a writer that must not commit, and since when

    def opened(self, pid: int, only_reads: bool) -> None:
        """By a process; 0: one that cannot be told from others."""
        self._handles = self._handles + Counter([pid])
        self.only_read = self.only_read + Counter([pid] * only_reads)

    def closed(self, pid: int, only_reads: bool) -> None:
        self._handles = self._handles - Counter([pid])
        self.only_read = self.only_read - Counter([pid] * only_reads)

    @property
    def pretended_journal(self) -> SideFile | None:
        """What is to be shown as the journal, to processes not in `only_read`, if readers are to be held back."""
        if (pretended := self._pretended) is None or not self._holds_back() or self._journal_is_hot():
            return None
        # Kernels remember that there was none, so the time begins here.
        return pretended if self._hold.holds(self._source.runtime.monotonic()) else None

    def _holds_back(self) -> bool:
        if self._pretended is None or self._behind_s is None:
            return False
        return not self._hold.is_paused(self._source.runtime.monotonic())

    def _before_grant(self, owner: Hashable, level: Level, kind: Kind, start: int, end: int) -> None:
        if kind is Kind.WRITE:
            if self._holds_back():
                raise Busy(f"{self._label}: a newer state waits for readers to finish")
            self._pretended = None
            if start <= SHARED_LAST and end >= SHARED_FIRST and self._doomed[0] == owner:
                self._refuse_doomed()
        super()._before_grant(owner, level, kind, start, end)

    def _after_change(self, owner: Hashable, before: Level) -> None:
        if self.locks.level(owner) < Level.RESERVED <= before:
            self._doomed = None, 0.0
        super()._after_change(owner, before)

    def _begin_write(self, owner: Hashable) -> None:
        try:
            super()._begin_write(owner)
        except Stale:
            now, since_s = self._source.runtime.monotonic(), self._refused[1] if self._refused else 0.0
            if not self.locks.pids(owner) & self.only_read.keys() or now - since_s < max(
                2 * self._config.refresh_s, LONG_BEHIND_S
            ):
                raise
            # SQLite's own PENDING keeps new readers of this process out: so let it come to that, and refuse EXCLUSIVE.
            self._doomed = owner, now

    def _refuse_doomed(self) -> None:
        text = f"{self._label}: changed elsewhere; roll back, and run the transaction again"
        if self._source.runtime.monotonic() - self._doomed[1] < LONG_BEHIND_S:
            raise Busy(text)
        with self._changing():  # a long busy_timeout would keep everybody else here waiting for that roll-back
            self._fail(remove_journal=False)
        raise CommitLost(text)

    def _fall_behind(self, now: float) -> None:
        if self._behind_s is None:
            self._pretended = None
        super()._fall_behind(now)

    def tick(self) -> None:
        super().tick()
        # Connections of other processes ask for a lock when they begin to read.
        share = max(self._handles.values(), default=0) > 1
        due = self._source.runtime.monotonic() - self.checked_s >= self._config.refresh_s
        if due and (share or self._behind_s is not None) and self._is_read(None):
            self._soon(self._hold_back)

    def _hold_back(self) -> None:
        """Begin or end that, if it is time."""
        with self._gate, contextlib.suppress(S3BlockFSError, OSError):
            now = self._source.runtime.monotonic()
            if self._pretended is not None and self._behind_s is not None:
                if self._hold.is_over(now):
                    self._hold.pause(now)
                if self._hold.is_paused(now):
                    self._pretended = None
            elif not (self._hold.is_paused(now) or self.is_writing) and self.locks.pids() - self.only_read.keys():
                self._refresh(max(self._config.refresh_s, LOOK_EVERY_S), None)
                if self._is_due(now) and self.size:  # beside an empty file SQLite deletes a journal
                    self._hold.begin()
                    self._pretended = self._side_files.pretended(self.path + JOURNAL_SUFFIX)

    def _is_due(self, now: float) -> bool:
        """Whether new readers should wait, for a newer state's sake."""
        if self._behind_s is None or self._hold.is_paused(now):
            return False
        return bool(self._refused) or now - self._behind_s >= max(2 * self._config.refresh_s, LONG_BEHIND_S)
