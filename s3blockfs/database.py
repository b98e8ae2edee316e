"""The engine: one database as this process sees it. Everything the faces share is defined here and only here.

It decides when a transaction is published (docs/SEMANTICS.md). The faces translate system calls or VFS methods into
these methods and errors back into errnos; they decide nothing.

Publishing needs: something dirty, no hot journal, no write lock held by anybody but the caller, and a call that asks
for durability (journal finalised, fsync without a journal, close). After a commit that failed, the writer that holds
the lock is in *discard mode*: whatever it writes (SQLite's play-back) is dropped until it finalises its journal or
releases its lock, because the committed state is already right and may even have moved on.

Threads: see `state.py`, which says which committed state is shown."""

import errno
import logging
from collections.abc import Callable, Collection, Hashable

from s3blockfs import header
from s3blockfs.commit import SUPERSEDED, Publisher
from s3blockfs.config import Config
from s3blockfs.errors import (
    AccessDenied,
    Busy,
    CommitLost,
    DatabaseGone,
    NotSupported,
    ReadOnly,
    S3BlockFSError,
    StoreUnavailable,
)
from s3blockfs.head import Unsettled
from s3blockfs.holdback import HoldBack
from s3blockfs.housekeeping import Housekeeper
from s3blockfs.journal import is_hot, restores_committed, super_journal
from s3blockfs.lease import Lease, Stale
from s3blockfs.locks import PENDING_BYTE, RESERVED_BYTE, SHARED_FIRST, SHARED_LAST, Kind, Level, RangeLocks, reserves
from s3blockfs.prefetch import Readahead
from s3blockfs.sidefiles import JOURNAL_SUFFIX, SideFile, SideFiles
from s3blockfs.snapshot import Snapshot, Source, Version
from s3blockfs.state import RECOVER_EVERY_S, State
from s3blockfs.view import View

log = logging.getLogger(__name__)


class Database(State):
    """One database of a mount or process. Made by `catalog.py`."""

    def __init__(
        self, source: Source, lease: Lease, config: Config, version: Version, side_files: SideFiles, path: str
    ) -> None:
        """`path` is where its side files lie; `version` a head that is no tombstone."""
        super().__init__(source, lease.heads, config, version)
        self._lease, self._publisher, self._side_files = lease, Publisher(source, lease), side_files
        self._housekeeper = Housekeeper(source, lease.heads, config)
        self._wrote = self.publishing = False
        self._discarding: Hashable | None = None
        self._abandoned = False  # by `owner_closes`: no call has failed yet, SQLite may believe in its transaction
        self._journal_images_committed = True
        self._behind_s: float | None = None
        self._hold = HoldBack()
        self._refused: tuple[Hashable, float] | None = None  # a writer, for being behind, and since when
        self._began: tuple[Hashable, bytes] = (None, b"")  # who took RESERVED last, and on which commit
        self.locks, self.path = RangeLocks(), path

    @property
    def is_writing(self) -> bool:
        """Whether a write transaction is open here."""
        return bool(self.locks.writers())

    def read(self, offset: int, length: int, readahead: Readahead | None = None) -> bytes:
        """Uncommitted bytes over committed ones; fewer at the end of the file, none past it."""
        if self._doubt is not None or self._unloaded is not None:
            self._require_settled()
        try:
            data = self._view.read(offset, length, readahead)
            return data if offset else self._presented(offset, data)
        except DatabaseGone:  # sqlite-s3vfs overwrote what was to be read: the next transaction looks again
            self.checked_s = float("-inf")
            raise

    def _presented(self, offset: int, data: bytes) -> bytes:
        return header.in_rollback_mode(offset, data)

    # --- changing --------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes, owners: Collection[Hashable] | None = None) -> None:
        """Remember `data` as uncommitted; `owners`: the lock owners that the writing handle served, if that is known.
        Raises ReadOnly, NotSupported, DatabaseGone, OSError (spill folder full)."""
        with self._writing:  # nothing is shown that was not written here, so `_changing` has nothing to do
            if header.sets_wal(offset, data):
                self._before_wal(offset, data)
            if self._takes_writes(owners):
                self._convert()
                self._view.write(offset, data)

    def _before_wal(self, offset: int, data: bytes) -> None:
        committed = self._view.snapshot.read(0, header.HEADER_BYTES)
        if self.locks.writers() and header.switches_to_wal(offset, data, committed):
            raise NotSupported(f"{self._label}: journal_mode=WAL works on a mount only; stay with DELETE")

    def truncate(self, size: int, owners: Collection[Hashable] | None = None) -> None:
        """Cut or extend. Raises as `write` does."""
        with self._changing():
            if self._takes_writes(owners) and size != self.size:
                self._convert()
                self._view.truncate(size)

    def _takes_writes(self, owners: Collection[Hashable] | None) -> bool:
        """False in discard mode, for the owner in it; bytes of others must not vanish silently meanwhile."""
        self._require_writable()
        if self._discarding is not None and owners is not None and self._discarding not in owners:
            raise StoreUnavailable(f"{self._label}: another program's failed transaction is being undone; try again")
        if owners and not any(self.locks.level(owner) >= Level.RESERVED for owner in owners):
            raise StoreUnavailable(f"{self._label}: its locks were let go; two SQLites in one process?")
        return self._discarding is None

    def journal_begins(self) -> None:
        """A journal's first header is being written: are its images going to be those of the committed state?"""
        self._journal_images_committed = not self.is_dirty

    def finalise_journal(self, pid: int) -> None:
        """The journal is about to be unlinked, truncated or zeroed by process `pid`: SQLite's commit point. Returns
        when the transaction is durable, or rolled back. Raises when it is neither: then the finalisation must fail."""
        with self._changing():
            self._require_settled()
            if any(writer != pid for _, writer in self.locks.writers()):
                raise OSError(errno.EBUSY, f"{self._label}: another process is in mid-transaction")
            if self._abandoned:
                raise StoreUnavailable(f"{self._label}: a handle was closed in mid-transaction; it is lost")
            if self._discarding is not None:
                self._end_discard(remove_journal=False)
                return
            if self._is_clean():
                return
            if (journal := self._journal()) is not None and self._was_rolled_back(journal):
                self._view.drop()
                self._moved = True  # the change counter in the kernel's copy may be another one
                return
            self._publish(pid)

    def finalise_super_journal(self, name: str, pid: int) -> None:
        """The super-journal `name` is about to be unlinked: the commit point of every database whose journal names it.
        SQLite ignores every error after that unlink, so the transaction is published now. If it has to be rolled back
        because another database failed, the play-back is published as a compensating commit."""
        journal = self._journal()  # looked at without a lock, which the slow commit of another transaction may hold
        if journal is not None and super_journal(journal.read, journal.size) == name:
            with self._changing():
                self.finalise_journal(pid)
                self._journal_images_committed = False

    def sync(self, pid: int, commits: Callable[[str | None], bool] = lambda name: False) -> None:
        """fsync of the database file by process `pid`: the commit point when there is no journal. Also when `commits`
        says so of the super-journal that the journal names, or None: it has its images, and its end comes next."""
        self._require_settled()
        if (journal := self._journal()) is not None and is_hot(journal.read(0, 1)) and not self._abandoned:
            if self._discarding is None and commits(super_journal(journal.read, journal.size)):
                with self._changing():
                    self.finalise_journal(pid)
                    self._journal_images_committed = False
            return
        self.close_handle(pid)

    def close_handle(self, pid: int) -> None:
        """A handle that wrote is closing: what no transaction protects (`cp`, journal_mode=OFF) is published."""
        with self._changing():
            self._require_settled()
            if self._discarding is not None:
                raise StoreUnavailable(f"{self._label}: an earlier commit of this transaction failed; roll back")
            others = any(writer != pid for _, writer in self.locks.writers())
            if not (self._is_clean() or others or self._journal_is_hot()):
                self._publish(pid)

    def _is_clean(self) -> bool:
        """Whether there is nothing to publish. Raises DatabaseGone when that is because of `delete`."""
        if self._gone is not None and self.locks.writers():
            raise DatabaseGone(self._gone)
        return not self.is_dirty

    def _publish(self, pid: int | None = None) -> None:
        """`pid`: the process whose commit this is, if it has yet to cut the file."""
        try:
            if pid is not None:
                self._shrink_to_header(pid)
            if self._view.uploads is not None:  # else what was beyond the end was all there was
                self._moved |= self._put(self._view)
        except Unsettled:
            raise
        except Exception as error:  # also what nobody foresaw, such as no more threads: half a state must not stay
            log.warning("%s: commit failed: %s", self._label, error)
            self._fail(remove_journal=False)
            raise

    def _put(self, view: View) -> bool:
        """Make what is dirty in `view` the next state; whether other bytes are shown now than were written."""
        now = self._source.runtime.monotonic()
        try:
            self.publishing = True
            version, snapshot, counter_set = self._publisher.publish(view)
        except Unsettled as error:
            self._doubts(error)
            raise
        finally:
            self.publishing = False
        self._wrote = True
        self.checked_s = float("-inf") if version.etag == SUPERSEDED else now
        self._adopt(version, snapshot)
        return counter_set or snapshot is None

    def _was_rolled_back(self, journal: SideFile) -> bool:
        """Whether SQLite just put back what is committed. Judged from the journal's page images, not by GETs."""
        dirty = self._view.dirty
        if not self._journal_images_committed or dirty.size != self._view.snapshot.head.size or dirty.cut < dirty.size:
            return False
        return restores_committed(journal.read, journal.size, dirty.ranges, dirty.read)

    def _shrink_to_header(self, pid: int) -> None:
        """SQLite truncates the file only after the commit point, so the header's page count, if valid, goes first."""
        exclusive = [writer for owner, writer in self.locks.writers() if self.locks.level(owner) is Level.EXCLUSIVE]
        size = header.file_size(self.read(0, header.HEADER_BYTES)) if pid in exclusive else None
        if size is not None and size < self.size:
            self.truncate(size)

    # --- locks -----------------------------------------------------------------------------------------

    def lock(self, owner: Hashable, kind: Kind, start: int, end: int, pid: int) -> None:
        """F_SETLK of a READ or WRITE lock. Raises Busy, and whatever a refresh raises."""
        try:
            if reserves(kind, start, end):
                self._lease.ask(owner)
            with self._gate:
                before = self.locks.level(owner)
                self._before_grant(owner, before, kind, start, end)
                if self.locks.try_lock(owner, kind, start, end, pid) is not None:
                    raise Busy(f"{self._label}: locked")
                self._after_change(owner, before)
        except Busy:
            self._lease.refused(owner)
            raise

    def wait_lock(
        self, owner: Hashable, kind: Kind, start: int, end: int, pid: int, interrupted: Callable[[], bool]
    ) -> None:
        """F_SETLKW. Raises InterruptedError, and whatever a refresh raises."""
        before = self.locks.level(owner)
        self.locks.wait_lock(owner, kind, start, end, pid, interrupted)
        try:
            with self._gate:
                self._before_grant(owner, before, kind, start, end)
                self._after_change(owner, before)
        except BaseException:
            self.unlock(owner, start, end)
            raise

    def unlock(self, owner: Hashable, start: int, end: int) -> None:
        """The commit point if nothing is synced or finalised. Raises what publishing raises, with the lock released."""
        try:
            if start <= RESERVED_BYTE <= end and self.is_dirty and self._discarding is self._doubt is None:
                for pid in [pid for writer, pid in self.locks.writers() if writer == owner]:
                    self.close_handle(pid)
        finally:
            with self._gate:
                before = self.locks.level(owner)
                self.locks.unlock(owner, start, end)
                if before >= Level.RESERVED:
                    self._after_change(owner, before)

    def owner_closes(self, owner: Hashable) -> bool:
        """A handle of `owner` closes. True if that ends a write transaction in its middle: its process died, or closed
        a second descriptor, which drops POSIX locks. The transaction is discarded."""
        with self._gate, self._changing():
            if self.locks.level(owner) < Level.RESERVED:
                return False
            if self._doubt is None and self._discarding is None:
                self._view.drop()
                self._discarding, self._abandoned = owner, True
            return True

    def _before_grant(self, owner: Hashable, level: Level, kind: Kind, start: int, end: int) -> None:
        if (start, end) == (SHARED_FIRST, SHARED_LAST) and kind is Kind.READ:
            if not level:
                self._require_settled()
                self._refresh(self._config.refresh_s, owner)
        elif reserves(kind, start, end) and level is Level.SHARED:
            self._require_writable()
            if self.locks.test(owner, kind, start, end) is None:
                self._begin_write(owner)
                self._lease.granted(owner)
                self._began = owner, self.version.head.commit
        elif (kind, start, end, level) == (Kind.WRITE, PENDING_BYTE, PENDING_BYTE, Level.NONE) and (
            self._began != (owner, self.version.head.commit)  # SQLite holds SHARED here, and believes so
        ):
            text = "another SQLite library of its process gave up the locks of this transaction; run it again"
            raise CommitLost(f"{self._label}: {text}")

    def _after_change(self, owner: Hashable, before: Level) -> None:
        if before < Level.RESERVED or self.locks.level(owner) >= Level.RESERVED:
            return
        self._give_lease()
        if self._discarding == owner:
            with self._changing():
                self._end_discard(remove_journal=True)

    def _give_lease(self) -> None:
        """To whoever wants it, soon: no write transaction is open."""
        self._lease.done(self)

    def refresh(self, max_age_s: float) -> None:
        """Look for a newer head if the last look is older than this, and move to it if nobody is in a transaction."""
        with self._gate:
            self._refresh(max_age_s, None)

    def _refresh(self, max_age_s: float, owner: Hashable) -> None:
        """For `owner`, whose transaction begins or was just dropped; everybody else's goes by what is shown. Raises
        Busy when a newer state has waited too long for readers to finish: like PENDING, which lets no new ones in."""
        with self._writing:  # nearly always there is nothing to do, whatever is dirty; `_changing` takes its time
            if self._behind_s is None and self._is_current(max_age_s):
                return
        with self._changing():
            self._require_settled()
            if self._gone is not None:
                if self.checked_s == float("inf"):
                    return  # deleted here: who has it open still reads
                raise DatabaseGone(self._gone)  # a successor under its name is another database
            if self._discarding is not None or self.is_dirty:
                return
            now = self._source.runtime.monotonic()
            known = self._heads.latest  # perhaps by another connection of this process
            newer = known is not None and known.head.rev > self.version.head.rev
            fresh = self.is_cut_off or now - self.checked_s < max_age_s
            if self._behind_s is None and fresh and not newer:
                return
            reading = self._is_read(owner)
            if self._behind_s is None or not reading:
                version = known if known and newer and fresh else self._newest(now)
                if not reading:
                    self._behind_s = self._refused = None
                    if version is not self.version:
                        self._move(version)
                    return
                if (version.head.id, version.head.commit) == (self.version.head.id, self.version.head.commit):
                    return
                self._fall_behind(now)
            behind_s = now - (now if self._behind_s is None else self._behind_s)
            is_due = owner is not None and (self._refused or behind_s >= 2 * self._config.refresh_s)
            if is_due and self._makes_wait(now):
                raise Busy(f"{self._label}: a newer state waits for readers to finish")

    def _makes_wait(self, now: float) -> bool:
        """Who begins to read, for a newer state's sake; without an interval nobody is shown an old one."""
        return self._config.refresh_s == 0 or self._hold.holds(now)

    def _is_read(self, owner: Hashable) -> bool:
        """Whether somebody else than `owner` is in a transaction."""
        return any(self.locks.level(other) >= Level.SHARED for other in self.locks if other != owner)

    def _newest(self, now: float) -> Version:
        """`self.version` itself when there is nothing newer, or when that cannot be told now."""
        if self._lease.is_held and self._heads.latest is not None:
            return self._heads.latest
        try:
            version = self._heads.read_if_changed(self.version)
            self.checked_s = now
            return version
        except (StoreUnavailable, AccessDenied) as error:
            if self._config.refresh_s == 0:
                raise
            log.warning("%s: showing the last known state: %s", self._label, error)
            self._heads.cut_off_s = self._source.runtime.monotonic()
            return self.version

    def _fall_behind(self, now: float) -> None:
        """A newer state is known that cannot be shown yet."""
        if self._behind_s is None:
            self._behind_s, self._hold = now, HoldBack()
        self.checked_s = float("-inf")

    def _begin_write(self, owner: Hashable) -> None:
        """It must start on the newest state, and hold the lease; the snapshot cannot move under the caller's SHARED."""
        with self._changing():
            if self.is_dirty:
                return  # bytes of journal_mode=OFF that were never synced: the commit will tell
            now = self._source.runtime.monotonic()
            self._convert()
            try:
                self._lease.take(self, self.version)
                self.checked_s = now
            except Stale:
                self._fall_behind(now)
                if self._refused is None or self._refused[0] != owner:
                    self._refused = owner, now
                raise

    def _convert(self) -> None:
        """Before the first change. The bytes stay as they are."""
        try:
            version = self._heads.convert(self.version)
        except Busy:
            self.checked_s = float("-inf")
            raise
        if version is not self.version:
            self._adopt(version, None)

    # --- states ----------------------------------------------------------------------------------------

    def delete(self, here: bool = True) -> None:
        """It was deleted: handles that are open still read if that was `here`, and cannot write or commit."""
        with self._changing():
            if self.is_dirty:
                self._view.drop()
            self._vanish(f"{self._label}: was deleted")
            self.checked_s = float("inf" if here else "-inf")  # a refresh would find the tombstone and fail reads

    def _leave_name(self) -> None:
        self._side_files.remove(self.path + JOURNAL_SUFFIX)  # or a successor would be rolled back by it
        self._lease.done(self)

    def close(self) -> None:
        """Forget uncommitted bytes, and the journal that would undo them; nobody has it open."""
        with self._changing():
            if self.is_dirty and not self.is_gone:
                self._side_files.remove(self.path + JOURNAL_SUFFIX)
            self._view.drop()
        self._lease.done(self)  # an interrupt between lease and lock may have left it in use
        self._lease.give_back()

    def tick(self) -> None:
        """What is due now and then, without a request while the database is idle."""
        now, cut_off_s = self._source.runtime.monotonic(), self._heads.cut_off_s
        if cut_off_s is not None and now - cut_off_s >= RECOVER_EVERY_S:
            self._heads.cut_off_s = now  # of all connections one asks
            self._recover_soon()
        elif self._doubt is not None:
            self._recover_soon()
        self._lease.tick()
        if self._wrote:
            self._housekeeper.tick()

    def _fail(self, remove_journal: bool) -> None:
        """The uncommitted bytes count no more. A writer that still holds its lock does not know yet."""
        self._view.drop()
        writers = self.locks.writers()
        if writers:
            self._discarding = writers[0][0]
        else:
            self._end_discard(remove_journal)

    def _end_discard(self, remove_journal: bool) -> None:
        """The writer let go: the committed state is what counts, wherever it is now."""
        owner, self._discarding, self._abandoned = self._discarding, None, False
        self._view.drop()
        if remove_journal and not self.is_gone:
            self._side_files.remove(self.path + JOURNAL_SUFFIX)
        self.checked_s = float("-inf")  # the next transaction looks again
        self._moved = True
        try:
            if owner is not None:  # without its lock or `_gate` a transaction may begin any moment
                self._refresh(0, owner)
        except S3BlockFSError as error:
            log.warning("%s: %s", self._label, error)

    def _move(self, version: Version) -> None:
        if version.head.deleted:
            self._vanish(f"{self._label}: was deleted by {version.head.writer or 'somebody else'}")
            raise DatabaseGone(self._gone)
        shown = self._latest.snapshot
        if (version.head.id, version.head.commit) == (shown.head.id, shown.head.commit):
            self._adopt(version, shown.with_version(version))  # a lease, a floor, a fold: the same bytes
            return
        snapshot = Snapshot.load(self._source, version)
        self._leave()
        self._adopt(version, snapshot)
        self._moved = True
        if self._journal_is_hot() and not self.locks.writers():  # its images would undo the commits of others
            self._side_files.remove(self.path + JOURNAL_SUFFIX)

    def _leave(self) -> None:
        """Another state is about to be shown; nobody is in a transaction."""

    def _journal(self) -> SideFile | None:
        return None if self.is_gone else self._side_files.get(self.path + JOURNAL_SUFFIX)  # else a successor's

    def _journal_is_hot(self) -> bool:
        return (journal := self._journal()) is not None and is_hot(journal.read(0, 1))


class Past(Database):
    """A database as it was once: nothing moves it, and nobody changes it."""

    def _refresh(self, max_age_s: float, owner: Hashable) -> None:
        """There is nothing newer that it should show."""

    def _require_writable(self) -> None:
        raise ReadOnly(f"{self._label}: as it was at commit {self.version.head.seq}; restore that to change it")


class Plain(Past):
    """A plain object, as it was found."""

    def _require_writable(self) -> None:
        raise ReadOnly(f"{self._label}: a plain object, read-only; `s3blockfs import` makes a database of it")
