"""A database of a mount, which SQLite may use in WAL mode: what its `-wal` and `-shm` mean for what is published.

Two states at once. `_view` is the file as SQLite on this machine made it: the base, and what was checkpointed, which is
never published. `_ahead` is what is published: that and the committed frames of the log. Everybody elsewhere sees the
second; here, SQLite puts the log over the first. They are one again when the log restarts or is unlinked.

A transaction is *committed* when the writer syncs the log or lets go of the write lock; *pending* until published. A
commit that failed is cut off the log: what follows would continue its checksums if it began with the same frames. When
log and index (`-shm`, which daemons see only after the kernel wrote it back) may differ, the index's header is zeroed:
SQLite then recovers it from the log.

Invariant: while `_ahead` is set only SQLite's checkpoints write to `_view`. Threads: as in `state.py`. Readers that
have it open never wait for a commit that is on its way."""

import contextlib
import errno
import logging
from collections.abc import Callable, Collection, Hashable
from typing import Any

from s3blockfs import header, wal
from s3blockfs.backlog import Backlog
from s3blockfs.errors import Busy, CommitLost, DatabaseGone, S3BlockFSError
from s3blockfs.holdback import HELD_BACK_S, HoldBack
from s3blockfs.lease import Stale
from s3blockfs.locks import RESERVED_BYTE, SHARED_FIRST, SHARED_LAST, Kind, Level, RangeLocks
from s3blockfs.overlap import LOOK_EVERY_S, MountedDatabase
from s3blockfs.sidefiles import INDEX_SUFFIX, LOG_SUFFIX, SideFile
from s3blockfs.snapshot import Version
from s3blockfs.view import View

log = logging.getLogger(__name__)

#: Bytes of `-shm` that SQLite locks: https://sqlite.org/walformat.html#wal_locks
WRITE, CHECKPOINT, FIRST_READ, LAST_READ = 120, 121, 123, 127

#: A writer that recovered the index asks for its read lock a hundred times within 10 s, and then gives up with
#: SQLITE_PROTOCOL (https://sqlite.org/rescode.html#protocol). The lease of a machine that died takes longer to end.
RECOVERED_S = 0.5


class WalDatabase(MountedDatabase):
    """Made by `catalog.py` for a mount that may write."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.index_locks = RangeLocks()
        self._pending = Backlog(self._source.runtime)
        self._doubtful: wal.Position | None = None  # the end of what was published last, or not: see `_doubt`
        self._broken = False  # a commit failed, and its writer perhaps does not know yet
        self._unsynced = 0  # transactions of an exclusive session since the last fsync of the log
        self._header: tuple[bytes, float] | None = None  # what was taken from the index to hold readers back, and when
        self._begun, self._threads = False, dict[int, int]()  # who has the write lock writes; who took which lock
        self.forget_pages: Callable[[SideFile], None] = lambda side: None  # the kernel's, after it wrote them back

    # --- the database file -----------------------------------------------------------------------------

    @property
    def is_writing(self) -> bool:
        return self._writer() is not None or super().is_writing

    def write(self, offset: int, data: bytes, owners: Collection[Hashable] | None = None) -> None:
        if not self.is_logged:
            return super().write(offset, data, owners)
        self._require_checkpoint()
        return self._view.write(offset, data, publish=False)

    def truncate(self, size: int, owners: Collection[Hashable] | None = None) -> None:
        if not self.is_logged:
            return super().truncate(size, owners)
        self._require_checkpoint()
        return self._view.truncate(size, publish=False)

    def sync(self, pid: int, commits: Callable[[str | None], bool] = lambda name: False) -> None:
        return self._require_settled() if self.is_logged else super().sync(pid, commits)

    def close_handle(self, pid: int) -> None:
        if not self.is_logged:
            return super().close_handle(pid)
        with self._changing():
            self._require_settled()
            return self._flush()

    def owner_closes(self, owner: Hashable) -> bool:
        return False if self.is_logged else super().owner_closes(owner)

    def _presented(self, offset: int, data: bytes) -> bytes:
        """As it is; but nobody may open it in another mode than those who have a log open."""
        return header.with_versions(header.WAL_VERSION, data) if offset == 0 and self._log() else data

    def _before_wal(self, offset: int, data: bytes) -> None:
        """Not refused here."""

    def _require_checkpoint(self) -> None:
        self._require_writable()
        if not (self._is_checkpointing() or self._is_exclusive()):
            raise OSError(errno.EBUSY, f"{self._label}: is in use in WAL mode; only SQLite may write to it")

    def _is_checkpointing(self) -> bool:
        return self.index_locks.test(None, Kind.READ, CHECKPOINT, CHECKPOINT) is not None

    def _is_exclusive(self) -> bool:
        """Whether somebody has the database alone: then SQLite takes no locks of the index, and may have none."""
        return any(self.locks.level(owner) is Level.EXCLUSIVE for owner in self.locks)

    def _before_grant(self, owner: Hashable, level: Level, kind: Kind, start: int, end: int) -> None:
        super()._before_grant(owner, level, kind, start, end)
        wants_all = kind is Kind.WRITE and (start, end) == (SHARED_FIRST, SHARED_LAST)
        if wants_all and not (self._journal_is_hot() or self.locks.holds(owner, RESERVED_BYTE, RESERVED_BYTE)):
            # locking_mode=EXCLUSIVE: from inside a transaction, or before there is an index. Not the last close.
            in_wal = header.sets_wal(0, self._view.read(0, header.HEADER_BYTES))
            opens = in_wal and self._side_files.get(self.path + INDEX_SUFFIX) is None
            if opens or self.index_locks.holds(owner, FIRST_READ, LAST_READ):
                self._begin_write_in_log(owner)

    def _after_change(self, owner: Hashable, before: Level) -> None:
        if before is Level.EXCLUSIVE and self.is_logged and not self._is_exclusive():
            if self._broken:
                with self._changing():
                    self._leave()
                    self._moved = True
            else:
                self._scan()  # nobody syncs them: they are published soon
        super()._after_change(owner, before)

    def _give_lease(self) -> None:
        if not (self._pending or self.is_writing):
            super()._give_lease()

    def _is_read(self, owner: Hashable) -> bool:
        if self._log() is None:
            return super()._is_read(owner)
        if not self._is_unbegun(owner) or self.index_locks.holds(owner, CHECKPOINT, LAST_READ):
            owner = None  # its own locks count, too
        return bool(self.index_locks.test(owner, Kind.WRITE, FIRST_READ, LAST_READ)) or self._is_changed(owner)

    def _is_changed(self, owner: Hashable) -> bool:
        """Whether anybody else may be writing to the index."""
        return bool(self.index_locks.test(owner, Kind.READ, WRITE, LAST_READ)) or self._is_exclusive()

    def _makes_wait(self, now: float) -> bool:
        return self._log() is not None or super()._makes_wait(now)

    def _refresh(self, max_age_s: float, owner: Hashable) -> None:
        if self._log() is None:
            super()._refresh(max_age_s, owner)
        elif self._writing.acquire(blocking=False):  # else a commit is on its way, which may take long
            self._writing.release()
            with contextlib.suppress(Busy):  # those that overlap are held back otherwise, see `_hold_back`
                super()._refresh(max_age_s, owner)

    # --- the index -------------------------------------------------------------------------------------

    def lock_index(self, owner: Hashable, kind: Kind, start: int, end: int, pid: int, thread: int) -> None:
        """F_SETLK on `-shm` by a thread of `owner`. Raises as `lock` does."""
        try:
            self._lock_index(owner, kind, start, end, pid, thread)
        except Busy:
            if kind is Kind.READ and self._is_unbegun(owner, thread):
                self._source.runtime.sleep(RECOVERED_S)
            raise

    def _lock_index(self, owner: Hashable, kind: Kind, start: int, end: int, pid: int, thread: int) -> None:
        """The write lock without a read lock is for a recovery, a checkpoint, or a transaction of a SQLite that waits
        for it before it reads (SQLITE_ENABLE_SETLK_TIMEOUT)."""
        writes, reads = kind is Kind.WRITE and start == end == WRITE, kind is Kind.READ and start >= FIRST_READ
        reads, holds = reads and end <= LAST_READ, self.index_locks.holds
        shares, checks = holds(owner, FIRST_READ, LAST_READ), holds(owner, CHECKPOINT, CHECKPOINT)
        held = writes and not shares and self._writer() is not None  # so it is not known what this is for
        begins = writes and (shares or (not held and not checks and wal.has_index(self._index_header())))
        if begins and self._header is None:
            self._lease.ask(owner)
            if self._writer() is None:
                self._await_commit()
        with self._gate:
            self._require_settled()
            if reads or (writes and not shares):
                self._refresh(self._config.refresh_s, owner)  # SQLite looks at the index's header again after this
            if self._header is not None and start <= CHECKPOINT:  # to recover the index, which has to wait
                if self._is_read(owner):
                    raise Busy(f"{self._label}: a newer state waits for readers to finish")
                self._header = None  # also if no newer state can be had
            shares, reads = holds(owner, FIRST_READ, LAST_READ), reads and not checks
            begins = begins or (writes and shares) or (reads and self._is_unbegun(owner, thread))
            if held or self.index_locks.try_lock(owner, kind, start, end, pid) is not None:
                raise Busy(f"{self._label}: locked")
            self._threads[start] = thread
            if begins:  # locked already: a commit in the background must not give the lease away any more
                try:
                    self._begin_write_in_log(owner)
                    self._begun = True
                except BaseException:
                    self.index_locks.unlock(owner, start, end)
                    raise

    def unlock_index(self, owner: Hashable, start: int, end: int) -> None:
        with self._gate:
            ends = start <= WRITE <= end and (writer := self._writer()) is not None and writer.owner == owner
            if ends:
                self._scan()  # nobody syncs them: they are published soon
                self._broken = self._begun = False
            self.index_locks.unlock(owner, start, end)
            if ends:
                self._give_lease()

    def index_closes(self, owner: Hashable) -> None:
        """A handle of `owner` closes. If it is writing, its process died: what it had not committed is cut off."""
        if (writer := self._writer()) is None or writer.owner != owner:
            return
        with self._alone():
            if wal.indexed(self._index_header()) > (self._pending.end.frames if self._pending.end else 0):
                self._scan()  # others may have read it
            self._cut(self._pending.end)
            self._spoil_index()  # it may not know what the last sync has published

    def _writer(self) -> Any:
        return self.index_locks.test(None, Kind.READ, WRITE, WRITE)

    def _index_header(self) -> bytes:
        """As SQLite will find it. Nobody is writing."""
        if (index := self._side_files.get(self.path + INDEX_SUFFIX)) is None:
            return b""
        self.forget_pages(index)
        return index.read(0, wal.INDEX_HEADERS_BYTES)

    def _is_unbegun(self, owner: Hashable, thread: int | None = None) -> bool:
        """Whether it (by this thread: others may only read meanwhile) has the write lock, and no transaction yet."""
        writes = not self._begun and self.index_locks.holds(owner, WRITE, WRITE)
        return writes and thread in (None, self._threads.get(WRITE))

    def _begin_write_in_log(self, owner: Hashable) -> None:
        self._require_writable()
        with self._changing():
            now = self._source.runtime.monotonic()
            self._convert()
            try:
                self._lease.take(self, self.version)
            except Stale:
                self._fall_behind(now)
                self._refused = self._refused or (owner, now)
                raise
            self.checked_s = now
        self._lease.granted(owner)

    def _spoil_index(self, start: bytes = bytes(wal.INDEX_HEADERS_BYTES)) -> None:
        """Without a header SQLite will recover it."""
        self._header = None
        if (index := self._side_files.get(self.path + INDEX_SUFFIX)) is not None:
            self._write_index(index, start if index.size >= len(start) else b"")

    def _write_index(self, index: SideFile, data: bytes) -> None:
        """The kernel would write what it has over that, and show it."""
        self.forget_pages(index)
        index.write(0, data)
        self.forget_pages(index)

    def _hold_back(self) -> None:
        """For a newer state take the header from the index: who reads has a copy; who begins waits to recover it."""
        if self._log() is None:
            super()._hold_back()
            return
        with self._gate, contextlib.suppress(S3BlockFSError):
            now, index = self._source.runtime.monotonic(), self._side_files.get(self.path + INDEX_SUFFIX)
            if index is None or self._is_changed(None):
                return  # what SQLite writes there meanwhile, the kernel would write over what is written here
            if self._header is not None and now - self._header[1] >= HELD_BACK_S and self._is_read(None):
                self._write_index(index, self._header[0])
                self._header = None
                self._hold.pause(now)
                return
            self._refresh(max(self._config.refresh_s, LOOK_EVERY_S), None)
            if self._header is None and self._is_due(now):
                self._header = self._index_header(), now
                self._write_index(index, bytes(wal.INDEX_HEADERS_BYTES))

    # --- the log ---------------------------------------------------------------------------------------

    def log_write(self, offset: int) -> None:
        """SQLite is about to write there. Raises what publishing raises, and OSError: then it must not be written."""
        self._require_unbroken()
        if (writer := self._writer()) is not None and not self._begun:  # not seen in `lock_index`, see there
            self._begin_write_in_log(writer.owner)
            self._begun = True
        if offset == 0:
            self._restart(begins=True)
        elif self._pending.end is not None and offset < self._pending.end.end:
            self._rewrite(offset)

    def log_truncate(self, size: int) -> None:
        """The same for truncating it."""
        if size == 0:
            self._restart(begins=False)
        elif self._pending.end is not None and size < self._pending.end.end:
            raise OSError(errno.EIO, f"{self._label}: transactions would be cut off the log")

    def log_sync(self, pid: int, thread: int) -> None:
        """fsync by process `pid`: the commit point of synchronous=FULL, and the first thing a checkpoint does. Returns
        when what is committed is in S3. Raises when it is not: then a commit failed, and never comes back."""
        with self._changing():
            self._require_unbroken()
            writer, before = self._writer(), self._pending.end
            checks = thread and thread == self._threads.get(CHECKPOINT) and self._is_checkpointing()
            # A thread that checkpoints knows nothing of what another of its process is about to commit.
            found = (writer is None or (writer.pid == pid and not checks)) and self._scan()
            # Without a writer it is locking_mode=EXCLUSIVE: there FULL waits for one, NORMAL has several behind it.
            found, self._unsynced = found if writer else self._unsynced == 1, 0
            try:
                self._require_settled()
                self._flush(ends=found)
            except BaseException:
                if found:
                    self._broken = True
                    if writer is not None:
                        self._cut(before)
                raise

    def log_unlink(self) -> None:
        """SQLite is about to remove it, at the last close or to leave WAL mode: everything is in the file. Raises what
        publishing raises: then it must stay."""
        with self._changing():
            if self.is_logged and not self._broken:
                self._scan()
                self._flush()
            self._rebase()
            self.index_locks, self._header = RangeLocks(), None  # as in `_end_log`
            if self.is_logged:
                self._forget_log()
                self._moved = True  # the kernel has the change counter that was written here

    def _require_unbroken(self) -> None:
        if self._broken:
            raise OSError(errno.EIO, f"{self._label}: a commit failed; roll back, or close the connection")

    def _log(self) -> SideFile | None:
        return None if self.is_gone else self._side_files.get(self.path + LOG_SUFFIX)  # else a successor's

    def _scan(self) -> bool:
        """Find what was committed since the last time; whether there was anything."""
        file = self._log()
        found = self._pending.scan(file) if file is not None and self.is_logged and not self._broken else 0
        self._unsynced = (self._unsynced + found) * self._is_exclusive()
        return found > 0

    def _flush(self, ends: bool = False) -> None:
        """Publish all that is pending, as one commit; `ends`: what the current writer commits is in it."""
        pending, file, view = self._pending.take(), self._log(), self._ahead
        if not pending or file is None or view is None:
            return
        try:
            self._require_writable()
            self._doubtful = pending[-1].end
            if not ends and self.is_writing:
                self._lease.stays()
            for each in pending:
                if each.cut < view.size:
                    view.truncate(each.cut)
                for offset, place in sorted(each.pages.items()):
                    view.write(offset, file.read(place, each.end.page_size))
                if view.size != each.size:
                    view.truncate(each.size)
            self._put(view)
        except BaseException:
            view.drop()
            self._pending.failed()
            raise
        self._pending.done(pending[-1].end)

    def _restart(self, begins: bool) -> None:
        """A log begins anew: all that was in the old one is in the file."""
        with self._changing():
            self._require_writable()
            self._flush()
            self._rebase()
            if begins and not self.is_logged:
                if self.is_dirty:
                    self._publish()
                self._ahead = View(self._source, self._config, self._view.snapshot)
            self._pending.restart()

    def _rebase(self) -> None:
        """Both states are the same now: forget what the checkpoints wrote."""
        self._require_settled()
        if self._ahead is not None:
            self._view.move(self._ahead.snapshot)

    def _rewrite(self, offset: int) -> None:
        """SQLite is about to overwrite what looked committed: an error came between the frames and the index."""
        with self._gate, self._changing():
            self._require_settled()
            if not self._pending.rewrite(offset):
                self._spoil_index()
                raise OSError(errno.EIO, f"{self._label}: transactions that were published would be overwritten")

    def _cut(self, end: wal.Position | None) -> None:
        """Back to this end of the log; nothing behind it may ever count."""
        if (file := self._log()) is not None:
            self._pending.cut(file, end)
            self.forget_pages(file)

    def _forget_log(self) -> None:
        if self._ahead is not None:
            self._view.move(self._ahead.snapshot)
        self._pending.clear()
        self._ahead = None
        self._broken, self._begun, self._header, self._unsynced = False, False, None, 0

    def _leave(self) -> None:
        """Another state comes. The log's content is in S3, or lost. Connections find an empty one, and know by
        its salts that what is in their caches is old: nothing else in its index tells them."""
        if self._pending:
            log.error("%s: others committed; transactions that were not yet in S3 are lost", self._label)
        self._forget_log()
        self._hold = HoldBack()
        if (file := self._log()) is not None:
            size = header.page_size(self._view.read(0, header.HEADER_BYTES).ljust(18, b"\0")) or 4096
            file.truncate(0)
            file.write(0, wal.empty(size, salts := self._source.runtime.token(8)))
            self.forget_pages(file)
            self._spoil_index(wal.empty_index(salts))  # no recovery: some writers do that with the write lock

    # --- the end, and time -----------------------------------------------------------------------------

    def tick(self) -> None:
        super().tick()
        now, since_s = self._source.runtime.monotonic(), self._pending.since_s
        if since_s is None and self.is_logged and self._is_exclusive() and not self._broken:
            since_s = self._pending.since_s = now  # there may be something that no lock tells of
        if since_s is not None and now - since_s >= self._config.group_commit_s:
            self._pending.since_s = now
            self._soon(self._flush_soon)
        if self.is_logged and not list(self.locks):
            self._soon(self.tidy)
        if self._gate.acquire(blocking=False):
            try:
                self._give_lease()  # no unlock tells that a checkpoint published the last that waited
            finally:
                self._gate.release()

    def _flush_soon(self) -> bool:
        with self._changing():
            may = self._doubt is None and self.is_logged and not self._broken
            if may and self._is_exclusive():
                self._scan()
            return may and self._has_flushed()

    def _has_flushed(self) -> bool:
        """Whether nothing waits any more, or it can never be published."""
        try:
            self._flush()
        except (CommitLost, DatabaseGone) as error:
            self._pending.since_s = None  # the next transaction finds out
            log.error("%s: transactions that were not yet in S3 are lost: %s", self._label, error)
        except (S3BlockFSError, OSError) as error:
            log.warning("%s: not yet published: %s", self._label, error)
            return False
        return True

    def tidy(self) -> None:
        """Who had the log open died: every connection in WAL mode holds a lock of the file for as long as it lives."""
        if self.is_logged and not list(self.locks) and self._flush_soon():  # who opens it meanwhile need not wait
            with self._alone():
                if self.is_logged and not list(self.locks) and self._doubt is None and self._has_flushed():
                    self._end_log()
                    self._moved = True

    def _go_on(self, version: Version | None) -> None:
        if not self.is_logged:
            super()._go_on(version)
            return
        with self._gate, self._changing():
            doubt, self._doubt, end = self._doubt, None, self._doubtful
            if version and doubt and end and self._pending.done(end) and version.head.commit == doubt.head.commit:
                self._adopt(version, None)  # it applied; a writer may be in its transaction, whose commit comes next
            self.checked_s = float("-inf")  # what others did, or one that failed here, the next transaction finds

    def _leave_name(self) -> None:
        super()._leave_name()
        self._pending.clear()  # and who is reading reads on
        self._remove_log()

    def close(self) -> None:
        if self._pending:
            self._recover_now()
        with self._changing():
            self._scan()
            if self.is_logged and not self._broken and not self._has_flushed():
                log.error("%s: transactions that were not yet in S3 are lost: %s", self._label, "it is closed")
            if self.is_logged:  # else what is there is perhaps of the next one that has it open
                self._end_log()
        super().close()

    def _end_log(self) -> None:
        self._forget_log()
        if not self.is_gone:  # else those are a successor's
            self._remove_log()

    def _remove_log(self) -> None:
        self.index_locks = RangeLocks()  # of a file that is unlinked no unlock arrives any more
        for suffix in (LOG_SUFFIX, INDEX_SUFFIX):
            self._side_files.remove(self.path + suffix)
