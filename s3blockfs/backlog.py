"""Which transactions that are committed in a write-ahead log are not yet published.

Thread rule: any thread; each method is one step, below all other locks. Invariant: what waits are the transactions
between `_published` and `end`."""

import threading

from s3blockfs import wal
from s3blockfs.runtime import Runtime
from s3blockfs.sidefiles import SideFile


class Backlog:
    """Of one log at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._mutex = runtime, threading.Lock()
        self._waiting: list[wal.Committed] = []
        self._published: wal.Position | None = None
        self.end: wal.Position | None = None  # of what was committed when somebody looked
        self.since_s: float | None = None  # when the time of what waits began, or of the next try

    def __len__(self) -> int:
        return len(self._waiting)

    def scan(self, file: SideFile) -> int:
        """Find what was committed since the last time: how many transactions."""
        with self._mutex:
            since = self.end or wal.start(file.read(0, wal.HEADER_BYTES))
            if since is None or (found := wal.committed(file.read, since)) is None:
                return 0
            self._published = self._published or since
            self.end = found.end
            self._waiting.append(found)
            self._wait()
            return found.transactions

    def take(self) -> list[wal.Committed]:
        """All that waits, to be published now; it stays until `done`. What comes meanwhile has a time of its own."""
        with self._mutex:
            self.since_s = None
            return list(self._waiting)

    def failed(self) -> None:
        """It was not published, or perhaps it was."""
        with self._mutex:
            self._wait()

    def done(self, end: wal.Position) -> bool:
        """All up to there is published. Whether the log still has all of it."""
        with self._mutex:
            is_whole = end in [each.end for each in self._waiting]
            self._waiting = [each for each in self._waiting if each.end.frames > end.frames]
            self._published = end if is_whole else self._published
            return is_whole

    def rewrite(self, offset: int) -> bool:
        """What looked committed is overwritten from there. False, and nothing done, if it is published."""
        with self._mutex:
            if self._published is None or offset < self._published.end:
                return False
            self.end = self._published
            self._waiting.clear()
            return True

    def cut(self, file: SideFile, end: wal.Position | None) -> None:
        """Back to this end of the log; nothing behind it may ever count."""
        with self._mutex:
            at = end or wal.start(file.read(0, wal.HEADER_BYTES))
            self._waiting = [each for each in self._waiting if at is not None and each.end.frames <= at.frames]
            self.end, self.since_s = end, self.since_s if self._waiting else None
            file.truncate(0 if at is None else at.end)

    def restart(self) -> None:
        """Another log begins. Nothing waits."""
        with self._mutex:
            self.end = self._published = None

    def clear(self) -> None:
        """Another log begins, whatever waits."""
        with self._mutex:
            self.end = self._published = self.since_s = None
            self._waiting.clear()

    def _wait(self) -> None:
        if self.since_s is None:
            self.since_s = self._runtime.monotonic()
