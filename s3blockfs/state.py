"""Which committed state a database shows on this machine, and whether it may be used: loading, moving, doubt, the end.

The rules of transactions are in `database.py`, which builds on this. Threads: `_gate` serialises lock calls, `_writing`
what changes state, `_mutex` protects moments, never during a request to the store. Order: _gate > _writing > _mutex.

Invariants: while `_doubt` or `_unloaded` is set nothing is read, written or published. `on_moved` is called after the
snapshot was switched, holding at most `_gate`, never from a read or write: it waits for those in flight."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from copy import copy

from s3blockfs.config import Config
from s3blockfs.dirty import Dirty
from s3blockfs.errors import DatabaseGone, OutcomeUnknown, ReadOnly, S3BlockFSError, TooOld
from s3blockfs.head import Doubt, HeadFile, Unsettled
from s3blockfs.snapshot import Snapshot, Source, Version
from s3blockfs.view import View

log = logging.getLogger(__name__)

POLL_S = 0.05
RECOVER_EVERY_S = 2.0  # a database in doubt or cut off asks the store again this often


class State:
    """Starts at `version`, a head that is no tombstone."""

    def __init__(self, source: Source, heads: HeadFile, config: Config, version: Version) -> None:
        self._source, self._heads, self._config = source, heads, config
        self._gate, self._writing, self._mutex = threading.RLock(), threading.RLock(), threading.Lock()
        self._depth, self._moved = 0, False
        self._unloaded: Version | None = None
        self._view = View(source, config, Snapshot.load(source, version))
        self._ahead: View | None = None  # in WAL mode what is published; `_view` is what SQLite made of the file here
        self.checked_s = source.runtime.monotonic()  # when `version` was the newest, as far as is known
        self._doubt: Doubt | None = None
        self._recovering, self._recover_after = False, 0.0
        self._gone: str | None = None
        self._jobs: dict[str, Future[object]] = {}
        self.prefix = source.prefix
        self.on_moved: Callable[[], None] = lambda: None  # called when cached copies of any byte may be stale

    @property
    def size(self) -> int:
        unloaded = self._unloaded
        return self._view.size if unloaded is None or self.is_logged else unloaded.head.size

    @property
    def modified_s(self) -> float:
        """The time of the last commit by the store's clock."""
        return self._latest.snapshot.head.time_ms / 1000

    @property
    def is_dirty(self) -> bool:
        """Whether bytes wait to be published. Those of a checkpoint do not: they were published with the log."""
        return self._view.is_dirty and not self.is_logged

    @property
    def uncommitted(self) -> Dirty:
        """Bytes that wait to be published. They can still be read from it afterwards."""
        return copy(self._view.dirty)

    @property
    def is_logged(self) -> bool:
        """Whether commits are in a write-ahead log that is not yet in the file."""
        return self._ahead is not None

    @property
    def is_gone(self) -> bool:
        return self._gone is not None

    @property
    def is_replaced(self) -> bool:
        """Gone, and not by this machine: what comes under its name is the same file for a kernel."""
        return self._gone is not None and self.checked_s != float("inf")

    @property
    def is_cut_off(self) -> bool:
        return self._heads.cut_off_s is not None

    @property
    def in_doubt(self) -> bool:
        return self._doubt is not None

    @property
    def version(self) -> Version:
        """The state that reads show, uncommitted bytes apart; in WAL mode what they and the log together show."""
        return self._latest.snapshot.version

    @property
    def shown(self) -> Snapshot:
        """The file that reads show, uncommitted bytes apart."""
        return self._view.snapshot

    @property
    def _latest(self) -> View:
        return self._ahead or self._view

    def _is_current(self, max_age_s: float) -> bool:
        """Whether it can be used, and nobody has to look for a newer state."""
        if self._doubt is not None or self._unloaded is not None or self._gone is not None:
            return False
        heads = self._heads
        if heads.latest is not None and heads.latest.head.rev > self._latest.snapshot.head.rev:
            return False
        return heads.cut_off_s is not None or self._source.runtime.monotonic() - self.checked_s < max_age_s

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold `_writing`. `on_moved` comes after it was let go: invalidation waits for writes that wait for it."""
        moved = False
        try:
            with self._writing:
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
                    if self._moved and self._depth == 0:
                        self._moved, moved = False, True
        finally:
            if moved:
                self.on_moved()

    def _await_commit(self) -> None:
        """Before `_gate` is taken: readers wait for that, but not for a commit that is on its way."""
        with self._writing:
            pass

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._await_commit()
        with self._gate, self._changing():
            yield

    def _require_settled(self) -> None:
        if self._doubt is not None:
            self._recover_soon()
            raise OutcomeUnknown(f"{self._label}: the outcome of the last commit is unknown until the store answers")
        if (version := self._unloaded) is not None:
            snapshot = Snapshot.load(self._source, version)  # without a lock: a read may wait here, and others for it
            with self._mutex:
                if self._unloaded is version:
                    self._latest.move(snapshot)
                    self._unloaded = None

    def _require_writable(self) -> None:
        self._require_settled()
        if self._gone is not None:
            raise DatabaseGone(self._gone)
        if self._config.read_only:
            raise ReadOnly(f"{self._label}: mounted read-only")

    def _adopt(self, version: Version, snapshot: Snapshot | None) -> None:
        """Show the state of `version`. Never fails for the store's sake: what cannot be loaded now is loaded later."""
        if version.head.deleted:  # right after a commit of ours
            self._vanish(f"{self._label}: was deleted by {version.head.writer or 'somebody else'}")
        if snapshot is None:
            try:
                snapshot = Snapshot.load(self._source, version)
            except (S3BlockFSError, RuntimeError) as error:  # RuntimeError: no more threads
                log.warning("%s: %s", self._label, error)
        with self._mutex:
            if snapshot is None:
                self._unloaded = version
                self._latest.drop()
            else:
                self._latest.move(snapshot)
                self._unloaded = None

    def _doubts(self, error: Unsettled) -> None:
        self._doubt = error.doubt
        self._recover_after = self._source.runtime.monotonic() + RECOVER_EVERY_S
        log.error("%s", error)

    def _recover_soon(self) -> None:
        with self._mutex:
            now = self._source.runtime.monotonic()
            if self._recovering or now < self._recover_after:
                return
            self._recovering = True
            self._recover_after = now + RECOVER_EVERY_S
        try:
            self._source.runtime.submit(self._recover)
        except RuntimeError:  # no more threads: the next call tries again
            self._recovering = False

    def _recover_now(self) -> None:
        """From a doubt, if there is one. Two at a time could take one doubt for another."""
        while self._doubt is not None:
            with self._mutex:
                waits, self._recovering = self._recovering, True
            if waits:
                self._source.runtime.sleep(POLL_S)
            else:
                self._recover()
                return

    def _recover(self) -> None:
        doubt = self._doubt
        try:
            if doubt is None:
                with contextlib.suppress(DatabaseGone):  # the next transaction will meet that
                    self._heads.read_if_changed(self.version)
                self._heads.cut_off_s = None
                return
            version = self._heads.settle(doubt)
            self._go_on(version)
            log.warning("%s: settled: the commit %s", self._label, "applied" if version else "did not apply")
        except DatabaseGone as error:
            with self._gate, self._changing():
                self._vanish(str(error))
                self._go_on(None)
        except S3BlockFSError as error:
            log.warning("%s", error)
            if isinstance(error.__cause__, TooOld):  # nobody can ever tell; it can apply no more, or is applied
                self._go_on(None)
        finally:
            self._recovering = False

    def _go_on(self, version: Version | None) -> None:
        """The commit in doubt is in the past of `version`, or its base is replaced."""
        with self._gate, self._changing():
            if version is not None:
                self._adopt(version, None)
            self._doubt = None
            self._fail(remove_journal=True)

    def _vanish(self, why: str) -> None:
        """It is no more. What comes under its name is another one, and must not find what this one left there."""
        if self._gone is None:
            self._leave_name()
        self._gone = why

    def _leave_name(self) -> None:
        raise NotImplementedError

    def _soon(self, job: Callable[[], object]) -> None:
        """For the ticker: on an I/O thread, unless that of the last time goes on, for which it would mostly wait."""
        if (last := self._jobs.get(job.__name__)) is None or last.done():
            with contextlib.suppress(RuntimeError):  # no more threads: a later tick tries again
                self._jobs[job.__name__] = self._source.runtime.submit(job)

    def tidy(self) -> None:
        """Publish and forget a log that nobody has open any more, if there is one."""

    def _fail(self, remove_journal: bool) -> None:
        """The uncommitted bytes count no more."""
        raise NotImplementedError

    @property
    def _label(self) -> str:
        return self._source.name_of(self._source.prefix)
