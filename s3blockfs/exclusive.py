"""A database of a mount with `--exclusive`: this process has its lease for as long as it is open, and the locks of
SQLite stay in the kernel, where they cost nothing.

So nothing tells when a transaction begins or ends. What is known: only this mount changes the database, so the state
shown moves by its own commits alone; and who holds a lock can be looked up when it matters, at a commit point, when a
handle is closed or when the daemon ends. An *owner* is a process, as for the kernel.

* A commit that failed is undone by whoever plays back the hot journal; what is written until that is finalised is
  dropped. Without a journal the handle that wrote fails until it is closed.
* A process that dies holds its locks until its handles were flushed: its transaction is dropped then.
* A lease that was lost ends the database here, as if it was deleted: connections may have pages of the old state and
  could not be told of another one. Who opens it again gets the newest.

Invariant: while `_holders` is not 0 the snapshot shown is of the commit that readers have seen. Threads: as in
`state.py`; `_holding` is above all other locks."""

import errno
import logging
import threading
from collections.abc import Callable, Collection, Hashable
from typing import Any

from s3blockfs import header
from s3blockfs.database import Database
from s3blockfs.errors import Busy, DatabaseGone, NotSupported
from s3blockfs.lease import POLL_S
from s3blockfs.locks import Level, Lock, RangeLocks

log = logging.getLogger(__name__)

COMES_S = 2.0  # how much longer than a dead machine's lease lasts an `open` waits
AGAIN_S = 1.0  # SQLite opens what it was refused once more at once, for reading only; that need not wait again


class KernelLocks(RangeLocks):
    """Those of the kernel, as they are whenever somebody asks. Nobody locks here."""

    def __init__(self) -> None:
        self.look: Callable[[], list[Lock]] = list

    def __getattr__(self, name: str) -> list[Lock]:
        if name == "_held":
            return self.look()
        raise AttributeError(name)

    def writers(self) -> list[tuple[Hashable, int]]:
        now = RangeLocks(self.look())  # all of them at one moment
        return now.writers()


class ExclusiveDatabase(Database):
    """Made by `catalog.py` for a mount."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.locks = self.kernel_locks = KernelLocks()
        self._holding = threading.Lock()
        self._holders = 0
        self._refused_s = float("-inf")
        self.is_lost = False

    # --- open and close --------------------------------------------------------------------------------

    def hold(self, interrupted: Callable[[], bool]) -> None:
        """One more handle; the first one takes the lease. Raises OSError (EBUSY) when somebody else has it for longer
        than a dead machine could, and what taking it raises."""
        with self._holding:
            if self._holders == 0:
                self._take(interrupted)
            self._holders += 1

    def let_go(self) -> None:
        """A handle less; after the last one the lease is given back soon."""
        with self._holding:
            self._holders -= 1
            if self._holders == 0:
                with self._gate, self._changing():
                    if self._discarding is not None:
                        self._end_discard(remove_journal=True)
                self._lease.done(self)

    def _take(self, interrupted: Callable[[], bool]) -> None:
        runtime = self._source.runtime
        began_s = runtime.monotonic()
        patience_s = self._config.lease_s + COMES_S
        if began_s - self._refused_s < AGAIN_S:
            patience_s = 0.0
        while True:
            try:
                with self._gate, self._changing():
                    self._require_writable()
                    self._convert()
                    self._lease.take(self, self.version)
                    self._lease.stays()
                return
            except Busy as error:
                now = runtime.monotonic()
                if interrupted():
                    raise InterruptedError(errno.EINTR, "the wait for the lease was interrupted") from error
                if now - began_s >= patience_s:
                    self._refused_s = now
                    log.error("%s: cannot be opened with --exclusive: %s", self._label, error)
                    raise OSError(errno.EBUSY, f"{self._label}: another machine has it") from error
                runtime.sleep(POLL_S)
                self.refresh(0)

    # --- transactions ----------------------------------------------------------------------------------

    @property
    def may_roll_back(self) -> bool:
        """Whether a transaction that failed is going to be undone, and will say when that is done."""
        return bool(self.locks.writers()) and self._journal_is_hot()

    def read(self, offset: int, length: int, *more: Any) -> bytes:
        if self.is_lost:
            raise DatabaseGone(self._gone)
        return super().read(offset, length, *more)

    def write(self, offset: int, data: bytes, owners: Collection[Hashable] | None = None) -> None:
        super().write(offset, data)

    def truncate(self, size: int, owners: Collection[Hashable] | None = None) -> None:
        super().truncate(size)

    def _before_wal(self, offset: int, data: bytes) -> None:
        committed = self._view.snapshot.read(0, header.HEADER_BYTES)
        if header.switches_to_wal(offset, data, committed) and self.locks.writers():
            text = "journal_mode=WAL is not possible on a mount with --exclusive; stay with DELETE"
            raise NotSupported(f"{self._label}: {text}")

    def owner_closes(self, owner: Hashable) -> bool:
        """The kernel releases its locks when this was answered."""
        with self._gate, self._changing():
            if self.locks.level(owner) < Level.RESERVED:
                return False
            if self._doubt is None:
                self._end_discard(remove_journal=True)
            return True

    def _fail(self, remove_journal: bool) -> None:
        if self.may_roll_back:
            super()._fail(remove_journal)
        else:
            self._end_discard(remove_journal)

    # --- states ----------------------------------------------------------------------------------------

    def _refresh(self, max_age_s: float, owner: Hashable) -> None:
        if self._holders == 0:
            super()._refresh(max_age_s, owner)
        else:
            self._require_settled()

    def _doubts(self, error: Any) -> None:
        super()._doubts(error)
        self._moved = True  # the kernel has pages of the transaction in doubt, and asks nobody whether they may be read

    def tick(self) -> None:
        super().tick()
        if self._holders and self._writing.acquire(blocking=False):
            try:
                self._follow()
            finally:
                self._writing.release()

    def _follow(self) -> None:
        """Of the newest head that is known: are it and the lease still ours?"""
        newest, shown = self._heads.latest, self.version.head
        if newest is None or self._doubt is not None or self.is_gone:
            return
        if self._lease.is_lost(self) or (newest.head.id, newest.head.commit) != (shown.id, shown.commit):
            self._soon(self._lose)
        elif newest.head.rev > shown.rev and not self.is_dirty and self._discarding is None:
            self._adopt(newest, self._view.snapshot.with_version(newest))  # a fold: what it replaced will be collected

    def _lose(self) -> None:
        with self._gate, self._changing():
            if self._doubt is None and not self.is_gone:
                self.delete()
                self._gone, self.is_lost, self._moved = f"{self._label}: the lease was lost; open it again", True, True
                log.error("%s: the lease was lost; open it again", self._label)
