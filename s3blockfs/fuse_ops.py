"""The FUSE face: translates file-system calls into calls of catalog.py, database.py and sidefiles.py. Decides nothing.

Threads: libfuse calls from many at once; `_lock` protects the table of handles for moments. The kernel holds the
directory locked during create and unlink, so those never look at the mounted path; calls with a handle may."""

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterable
from fcntl import F_GETLK, F_SETLKW, F_UNLCK, F_WRLCK
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from s3blockfs.catalog import Catalog
from s3blockfs.config import Config
from s3blockfs.database import Database, Past, Plain
from s3blockfs.errors import AccessDenied, DatabaseNotFound, Immutable, S3BlockFSError
from s3blockfs.exclusive import ExclusiveDatabase
from s3blockfs.fuse_binding import Attributes, FileInfo, Flock, LookAgain, Operations, context_pid, context_thread
from s3blockfs.handle import Handle, OwnState
from s3blockfs.journal import HEADER_BYTES, is_hot
from s3blockfs.kernelcache import KernelCache, Shown
from s3blockfs.locks import TO_END, Kind, Level
from s3blockfs.malloc import trim
from s3blockfs.names import Entry
from s3blockfs.overlap import MountedDatabase
from s3blockfs.past import MountedNames
from s3blockfs.prefetch import Readahead
from s3blockfs.runtime import Runtime
from s3blockfs.sidefiles import INDEX_SUFFIX, JOURNAL_SUFFIX, LOG_SUFFIX, SUFFIXES, SideFile, is_side_file
from s3blockfs.walmode import WalDatabase

log = logging.getLogger(__name__)

TRIM_EVERY_S = 30.0  # takes milliseconds
QUIESCE_S = 5.0  # how long a daemon that was asked to end waits for write transactions of applications


class FileSystem(Operations):
    """One mount."""

    def __init__(
        self, catalog: Catalog, config: Config, runtime: Runtime, mountpoint: str, on_ready: Callable[[], None]
    ) -> None:
        """`on_ready` is called once, on a thread of its own, when the mount answers."""
        self._catalog, self._config, self._runtime, self._on_ready = catalog, config, runtime, on_ready
        self._names = MountedNames(catalog)
        if config.exclusive:
            catalog.kind = ExclusiveDatabase
        elif not config.read_only:  # who may not write `-wal` and `-shm` is shown a database in rollback mode
            catalog.kind = WalDatabase
        if config.exclusive or config.direct_io:
            self.lock = None  # type: ignore[assignment]  # so the kernel decides by itself
        self._mountpoint = os.path.realpath(mountpoint)
        self.on_end: Callable[[], None] = lambda: None  # called when it is unmounted
        self._ending, self._lock = False, threading.Lock()
        self._handles, self._numbers = dict[int, Handle](), count(1)
        self._kernel = KernelCache(self, config)
        self.timeouts = self._kernel.timeouts
        uid, gid = config.uid, config.gid
        self._owner = {"st_uid": os.getuid() if uid is None else uid, "st_gid": os.getgid() if gid is None else gid}
        self._umask = config.umask | 0o222 * config.read_only

    def quiesce(self) -> None:
        """Let transactions that are open end, for a while, and commits that are under way in any case: SQLite takes the
        failure of the unlock that follows a commit for a failure of the commit."""
        self._ending = True
        left_s = QUIESCE_S
        while left_s > 0:
            databases = self._catalog.opened()
            if any(database.publishing for database in databases):
                left_s = QUIESCE_S
            elif not any(database.is_writing for database in databases):
                return
            self._runtime.sleep(0.05)
            left_s -= 0.05

    def init(self) -> None:
        self._runtime.every(TRIM_EVERY_S, trim)
        threading.Thread(target=self._announce, name="s3blockfs-ready", daemon=True).start()

    def destroy(self) -> None:
        """Publish what only a close would have published (journal_mode=OFF), then forget everything."""
        self.on_end()
        for database in self._catalog.opened():
            try:
                database.close_handle(0)
            except (S3BlockFSError, OSError) as error:
                log.error("uncommitted changes are lost: %s", error)
        self._catalog.close()

    def _announce(self) -> None:
        Path(self._mountpoint).stat()  # answered by this process: the mount works
        self._on_ready()

    # --- names -----------------------------------------------------------------------------------------

    def getattr(self, path: str | None, info: FileInfo | None) -> Attributes:
        if info is not None:
            return self._attributes(self._handles[info.fh].file)
        assert path is not None
        if len(os.fsencode(path.rpartition("/")[2])) > 255:  # the kernel would let up to 1024 pass
            raise OSError(errno.ENAMETOOLONG, "file names have at most 255 bytes")
        if is_side_file(path):
            return self._attributes(self._side(path))
        database = self._catalog.opened_at(path[1:])
        is_link = database and "." not in path.rpartition("/")[2] and database.version.head.name is None
        found: Database | Entry | None = database
        if database is None or not self._kernel.is_open(database) or database.is_gone or is_link:
            found = self._names.lookup(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        self._kernel.looked_up(path, found.version.head.size if isinstance(found, Database) else found.size)
        return self._attributes(found)

    def readlink(self, path: str) -> str:
        """`acme` is a link to `acme.sqlite`: two names of one inode, so that SQLite and the kernel see one file."""
        if (entry := self._names.lookup(path)) is None or entry.shown_as is None:
            raise OSError(errno.EINVAL, f"{path}: not a link")
        return entry.shown_as

    def readdir(self, path: str) -> Iterable[tuple[str, Attributes]]:
        for name, entry in self._names.listing(path):
            yield name, self._attributes(entry)
        for name in self._catalog.side_files.names_under(path[1:]):
            yield name, {"st_mode": stat.S_IFREG}

    def unlink(self, path: str) -> None:
        if not is_side_file(path):
            return self._catalog.remove(self._names.changeable(path))
        side = self._side(path, changes=True)
        self._before_finalising(side)
        if (logged := self._log_of(side)) is not None:
            logged.log_unlink()
        return self._catalog.side_files.remove(side.path)

    def rename(self, old: str, new: str) -> None:
        from_path, to_path = self._names.changeable(old), self._names.changeable(new)
        if is_side_file(old) or is_side_file(new):
            raise OSError(errno.EXDEV, f"{old}: journals stay on this machine, where they are; mv copies instead")
        shown = self._kernel.before_rename(self._catalog.opened_at(to_path))
        self._catalog.rename(from_path, to_path)
        for database, state in shown:
            state.moved = database.is_gone

    def mkdir(self, path: str, mode: int) -> None:
        self._catalog.make_folder(self._names.changeable(path))

    def rmdir(self, path: str) -> None:
        self._catalog.remove_folder(self._names.changeable(path))

    def mknod(self, path: str, mode: int, device: int) -> None:
        if not stat.S_ISREG(mode):
            self._refuse(path)
        info = SimpleNamespace(flags=os.O_EXCL)
        self.create(path, mode, info)
        self.release(path, info)

    def _refuse(self, path: str, *_: object) -> None:
        raise OSError(errno.EPERM, f"{path}: only files and folders can be made here")

    link = symlink = _refuse

    def _accept(self, path: str, *_: object) -> None:
        """Modes belong to the mount, and mtime is the time of the last commit: `cp -p` and `touch` work, no more."""

    chmod = utimens = _accept

    def chown(self, path: str, uid: int, gid: int) -> None:
        if uid not in (-1, self._owner["st_uid"]) or gid not in (-1, self._owner["st_gid"]):
            raise OSError(errno.EPERM, "the mount says who owns files; see --uid and --gid")

    def statfs(self, path: str) -> Attributes:
        blocks = dict.fromkeys(("f_blocks", "f_bfree", "f_bavail"), 2**50 // 4096)  # S3 has no end, so say 1 PiB
        files = dict.fromkeys(("f_files", "f_ffree", "f_favail"), 2**32)
        return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255, **blocks, **files}

    # --- handles ---------------------------------------------------------------------------------------

    def create(self, path: str, mode: int, info: FileInfo) -> None:
        exclusive, name = bool(info.flags & os.O_EXCL), self._names.changeable(path)
        if not is_side_file(path):
            self._add_database(info, self._catalog.create(name, exclusive))
            return
        if path.endswith((LOG_SUFFIX, INDEX_SUFFIX)):
            database = self._in_wal_mode(path[1:], LOG_SUFFIX, INDEX_SUFFIX)
            if database is None or not self._kernel.is_open(database):
                raise OSError(errno.EPERM, f"{path}: is no file of a database that is open for writing")
        else:
            self._catalog.require_writable()
        side = self._catalog.side_files.create(self._side_path(path), exclusive)
        side.shown_as = path
        self._add_handle(info, side)

    def open(self, path: str, info: FileInfo) -> None:
        writes = info.flags & os.O_ACCMODE != os.O_RDONLY
        if is_side_file(path):
            try:
                handle, writes = self._add_handle(info, self._side(path, writes)), False
            except FileNotFoundError:
                raise LookAgain(path) from None
        else:
            if writes:
                self._names.changeable(path)
            try:
                database = self._names.open(path)
            except DatabaseNotFound as error:
                raise LookAgain(path) from error
            handle = self._add_database(info, database, path)
        try:
            if writes and isinstance(handle.file, Plain):
                raise Immutable(f"{path}: a plain object, read-only; `s3blockfs import` makes a database of it")
            if writes:
                self._catalog.require_writable()
            if info.flags & os.O_TRUNC:
                self._truncate(handle, 0)
        except BaseException:
            self.release(None, info)
            raise

    def read(self, path: str | None, size: int, offset: int, info: FileInfo) -> bytes:
        handle = self._handles[info.fh]
        if isinstance(handle.file, SideFile):
            return handle.file.read(offset, size)
        self._require_not_moved(handle.file, handle.shown)
        return (handle.own or handle.file).read(offset, size, handle.readahead)

    def write(self, path: str | None, data: bytes, offset: int, info: FileInfo) -> int:
        handle = self._handles[info.fh]
        if isinstance(file := handle.file, Database):
            handle.require_sound()
            handle.wrote = True
            file.write(offset, data, handle.owners)
            return len(data)
        if offset == 0 and not is_hot(data[:1]) and len(data) >= HEADER_BYTES:
            self._before_finalising(file)  # journal_mode=PERSIST zeroes the header
        elif offset == 0 and is_hot(data[:1]) and (database := self._database_of(file)):
            self._kernel.inode_of(database)
            database.journal_begins()
        if (logged := self._log_of(file)) is not None:
            logged.log_write(offset)
        file.write(offset, data)
        return len(data)

    def truncate(self, path: str | None, length: int, info: FileInfo | None = None) -> None:
        if info is not None:
            return self._truncate(self._handles[info.fh], length)
        assert path is not None
        if is_side_file(path):
            return self._truncate_side(self._side(path, changes=True), length)
        database = self._catalog.open(self._names.changeable(path))
        self._hold(database)
        try:  # truncate(2): there is no handle whose close could publish it
            self._catalog.require_writable()
            database.truncate(length)
            database.close_handle(context_pid())
        finally:
            self._release(database)

    def fsync(self, path: str | None, datasync: int, info: FileInfo) -> None:
        handle = self._handles[info.fh]
        if isinstance(database := handle.file, Database):
            self._kernel.inode_of(database)
            self._durably(handle, database, lambda: database.sync(context_pid(), self._commits))
        elif (logged := self._log_of(database)) is not None:
            logged.log_sync(context_pid(), context_thread())

    def fsyncdir(self, path: str | None, datasync: int, handle: int) -> None:
        """Unlinking and creating are durable when they return."""

    def flush(self, path: str | None, info: FileInfo) -> None:
        handle = self._handles[info.fh]
        if isinstance(database := handle.file, SideFile):
            if database.linked and (indexed := self._in_wal_mode(database.path, INDEX_SUFFIX)):
                indexed.index_closes(info.lock_owner)
            return
        self._kernel.inode_of(database)
        owner = context_pid() if isinstance(database, ExclusiveDatabase) else info.lock_owner
        if database.owner_closes(owner):
            with self._lock:
                for other in self._handles.values():
                    if other.file is database and owner in other.owners:
                        other.failed = True
            if handle.wrote:  # not SQLite, which unlocks before it closes: do not let it think that it was written
                raise OSError(errno.EIO, f"{database.path}: closed in the middle of a transaction, which is lost")
        elif handle.wrote:
            self._durably(handle, database, lambda: database.close_handle(context_pid()))
        else:
            handle.require_sound()

    def release(self, path: str | None, info: FileInfo) -> None:
        with self._lock:
            handle = self._handles.pop(info.fh)
            if isinstance(database := handle.file, SideFile):
                return
            if isinstance(database, MountedDatabase):
                database.closed(handle.pid, handle.only_reads)
        self._kernel.closed(database)
        self._release(database)

    # --- locks -----------------------------------------------------------------------------------------

    def lock(self, path: str | None, info: FileInfo, command: int, lock: Flock) -> None:
        handle, owner = self._handles[info.fh], info.lock_owner
        start, end = lock.l_start, lock.l_start + lock.l_len - 1 if lock.l_len else TO_END
        indexed = None
        if isinstance(database := handle.file, SideFile):
            indexed = self._in_wal_mode(database.path, INDEX_SUFFIX) if database.linked else None
            if indexed is None and lock.l_type == F_UNLCK:
                return None
            if indexed is None:  # SQLite never locks a journal
                raise OSError(errno.ENOLCK, f"{database.path}: cannot be locked")
            database = indexed
        shown = self._kernel.inode_of(database)
        if lock.l_type == F_UNLCK and command != F_GETLK:
            try:
                return (indexed.unlock_index if indexed else database.unlock)(owner, start, end)
            except BaseException:
                handle.failed |= indexed is None  # its pages are not what was published, and it does not know
                raise
        handle.require_sound()
        self._require_not_moved(database, shown)
        kind = Kind.WRITE if lock.l_type == F_WRLCK else Kind.READ
        if command == F_GETLK:
            conflict = (indexed.index_locks if indexed else database.locks).test(owner, kind, start, end)
            lock.l_type = F_UNLCK
            if conflict is not None:
                lock.l_type, lock.l_start, lock.l_pid = conflict.kind.value, conflict.start, conflict.pid
                lock.l_len = 0 if conflict.end == TO_END else conflict.end - conflict.start + 1
            return None
        if self._ending and kind is Kind.WRITE and database.locks.level(owner) < Level.RESERVED:
            raise OSError(errno.EAGAIN, "the mount is ending")
        handle.owners.add(owner)
        try:
            if indexed is not None:
                indexed.lock_index(owner, kind, start, end, lock.l_pid, context_thread())
            elif command == F_SETLKW:
                database.wait_lock(owner, kind, start, end, lock.l_pid, self.mounted.interrupted)
            else:
                database.lock(owner, kind, start, end, lock.l_pid)
        except AccessDenied as error:  # EACCES from a lock is SQLITE_BUSY for SQLite, which would try for ever
            raise OSError(errno.EIO if kind is Kind.READ else errno.EROFS, str(error)) from error

    # --- helpers ---------------------------------------------------------------------------------------

    def _truncate(self, handle: Handle, length: int) -> None:
        if isinstance(handle.file, SideFile):
            self._truncate_side(handle.file, length)
        else:
            handle.require_sound()
            handle.wrote = True
            handle.file.truncate(length, handle.owners)

    def _truncate_side(self, side: SideFile, length: int) -> None:
        if length == 0:
            self._before_finalising(side)
        if (logged := self._log_of(side)) is not None:
            logged.log_truncate(length)
        side.truncate(length)

    def _durably(self, handle: Handle, database: Database, publish: Callable[[], None]) -> None:
        """Run a commit point that no lock protects: if it fails, everything written through the handle is lost."""
        handle.require_sound()
        try:
            publish()
        except BaseException:
            if isinstance(database, ExclusiveDatabase):
                handle.failed |= not database.may_roll_back
            else:
                handle.failed |= not database.locks.writers()
            raise

    @staticmethod
    def _require_not_moved(database: Database, shown: Shown | None) -> None:
        if shown is not None and shown.moved:
            raise OSError(errno.ESTALE, f"{database.path}: was renamed or deleted; open it again")

    def _before_finalising(self, side: SideFile) -> None:
        """A journal or super-journal is about to vanish: commit first. Raises if that fails; then it must stay."""
        if not side.linked:
            raise OSError(errno.EIO, f"{side.path}: was removed; its transaction is lost")
        if (database := self._database_of(side)) is not None:
            database.finalise_journal(context_pid())
        elif not side.path.endswith(SUFFIXES):
            for database in sorted(self._catalog.opened(), key=lambda each: each.prefix):
                database.finalise_super_journal(f"{self._mountpoint}/{side.path}", context_pid())

    def _database_of(self, side: SideFile) -> Database | None:
        stem = side.path.removesuffix(JOURNAL_SUFFIX)
        return self._catalog.opened_at(stem) if stem != side.path else None

    def _in_wal_mode(self, path: str, *suffixes: str) -> WalDatabase | None:
        """The database of a `-wal` or `-shm` of this path."""
        stem = next((path.removesuffix(suffix) for suffix in suffixes if path.endswith(suffix)), None)
        database = None if stem is None else self._catalog.opened_at(stem)
        return database if isinstance(database, WalDatabase) else None

    def _log_of(self, side: SideFile) -> WalDatabase | None:
        """The database whose log this is. Raises when it was removed, perhaps for another database of that name."""
        if side.path.endswith(LOG_SUFFIX) and not side.linked:
            raise OSError(errno.EIO, f"{side.path}: was removed; what was not in S3 is lost")
        return self._in_wal_mode(side.path, LOG_SUFFIX)

    def _side(self, path: str, changes: bool = False) -> SideFile:
        """Raises FileNotFoundError; OSError (EBUSY) if it is not to be changed because it is only pretended."""
        database = self._catalog.opened_at((name := self._side_path(path)).removesuffix(JOURNAL_SUFFIX))
        if isinstance(database, MountedDatabase) and (side := database.pretended_journal) is not None:
            if changes:
                raise OSError(errno.EBUSY, f"{path}: a newer state waits for readers to finish")
            if not (database.only_read and database.only_read[context_pid()]):
                return side
        if (found := self._catalog.side_files.get(name)) is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return found

    def _commits(self, super_journal: str | None) -> bool:
        """Whether fsync does, not the journal's unlink: during that the kernel holds the directory locked, against all
        other databases in it. A super-journal's unlink comes only if it is on this mount."""
        return super_journal is None or not super_journal.startswith(self._mountpoint + "/")

    def _side_path(self, path: str) -> str:
        """Where the side file of a database lies, whichever of its names was used."""
        stem, dash, kind = path[1:].rpartition("-")
        database = self._catalog.opened_at(stem) if dash + kind in SUFFIXES else None
        return path[1:] if database is None else f"{database.path}-{kind}"

    def _add_database(self, info: FileInfo, database: Database, looked_up: str | None = None) -> Handle:
        """`looked_up`: the kernel knows its attributes by that path."""
        self._hold(database)
        try:
            if looked_up is not None:
                self._kernel.require_current(looked_up, database)
        except BaseException:
            self._release(database)
            raise
        shown = self._kernel.opened(database, info)
        handle = self._add_handle(info, database)
        handle.shown = shown
        if self._config.direct_io and not isinstance(database, Past):
            handle.own = OwnState(database, self._config.refresh_s)
        if isinstance(database, MountedDatabase):
            handle.pid, handle.only_reads = context_pid(), info.flags & os.O_ACCMODE == os.O_RDONLY
            with self._lock:
                database.opened(handle.pid, handle.only_reads)
        if isinstance(database, ExclusiveDatabase):
            handle.owners.add(context_pid())
        return handle

    def _hold(self, database: Database) -> None:
        """With `--exclusive` take the lease for it; if that fails, let it go."""
        try:
            if isinstance(database, ExclusiveDatabase):
                if context_pid() == 0:  # its locks could not be seen, nor its death
                    raise OSError(errno.EPERM, "with --exclusive processes of other PID namespaces are not served")
                database.hold(self.mounted.interrupted)
        except BaseException:
            self._catalog.release(database)
            raise

    def _release(self, database: Database) -> None:
        if isinstance(database, ExclusiveDatabase):
            database.let_go()
        self._catalog.release(database)

    def _add_handle(self, info: FileInfo, file: Database | SideFile) -> Handle:
        handle = Handle(file, Readahead(self._config.readahead_size))
        with self._lock:
            info.fh = next(self._numbers)
            self._handles[info.fh] = handle
        return handle

    def _told(self, database: Database) -> int:
        """The size for all that have it open, each of which may show another state: one inode has one size."""
        with self._lock:
            owns = [handle.own for handle in self._handles.values() if handle.file is database and handle.own]
        if not all(own.begun for own in owns):
            database.refresh(self._config.refresh_s)
        state, thread = database.shown, context_thread()
        for own in owns:
            own.told(thread, state)
        return max([state.head.size, *(own.size for own in owns)])

    def _attributes(self, file: Database | SideFile | Entry) -> Attributes:
        past = isinstance(file, Past) or (isinstance(file, Entry) and file.is_fixed)
        umask = self._umask | 0o222 * past
        mode, size = stat.S_IFREG | 0o666 & ~umask, file.size
        if self._config.direct_io and isinstance(file, Database):
            size = self._told(file)
        if isinstance(file, Entry) and file.is_folder:
            mode = stat.S_IFDIR | 0o777 & ~umask
        elif isinstance(file, Entry) and file.shown_as is not None:
            mode, size = stat.S_IFLNK | 0o777, len(os.fsencode(file.shown_as))
        times = dict.fromkeys(("st_mtime", "st_ctime", "st_atime"), int(file.modified_s * 1e9))
        return {"st_mode": mode, "st_nlink": 1, "st_size": size, "st_blocks": -(-size // 512), **times, **self._owner}
