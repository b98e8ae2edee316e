"""The FUSE face: translates file-system calls into calls of catalog.py, database.py and sidefiles.py. Decides nothing.

Threads: libfuse calls from many at once; `_lock` protects the table of handles for moments. The kernel holds the
directory locked during create and unlink, so those never look at the mounted path; `_inode_of` is called where a handle
is at hand and no directory is locked.

Kernel cache: handles keep the kernel's pages (`keep_cache`) when those are known to be of the state the database shows.
Whenever that state changes by anything but this mount's own writes, `_invalidate` drops them.
"""

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from s3blockfs.catalog import Catalog, Entry
from s3blockfs.config import Config
from s3blockfs.database import Database
from s3blockfs.errors import S3BlockFSError
from s3blockfs.fuse_binding import (
    F_GETLK,
    F_RDLCK,
    F_SETLKW,
    F_UNLCK,
    F_WRLCK,
    Attributes,
    FileInfo,
    Flock,
    Operations,
    context_pid,
)
from s3blockfs.journal import HEADER_BYTES, is_hot
from s3blockfs.locks import TO_END, Kind, Level
from s3blockfs.prefetch import Readahead
from s3blockfs.runtime import Runtime
from s3blockfs.sidefiles import JOURNAL_SUFFIX, SUFFIXES, SideFile, is_side_file

log = logging.getLogger(__name__)

#: statfs: S3 has no end, so say 1 PiB, in blocks of this size.
STATFS_BLOCK_BYTES = 4096
STATFS_BLOCKS = 2**50 // STATFS_BLOCK_BYTES

#: How long a daemon that was asked to end waits for applications to end their write transactions.
QUIESCE_S = 5.0


@dataclass(slots=True)
class _Shown:
    """What the kernel knows of a database: handles, inode number once looked up, and of which commit its pages are."""

    handles: int = 0
    inode: int | None = None
    pages_of: bytes | None = None
    stale: bool = False
    """The pages have to go and could not be dropped: its inode number was not known."""


@dataclass(slots=True, eq=False)
class _Handle:
    path: str
    database: Database | None
    side: SideFile | None
    readahead: Readahead
    wrote: bool = False
    failed: bool = False
    """What was written through this handle is lost, so no later call on it may succeed."""
    owners: set[Hashable] = field(default_factory=set)


class FileSystem(Operations):
    """One mount."""

    def __init__(
        self, catalog: Catalog, config: Config, runtime: Runtime, mountpoint: str, on_ready: Callable[[], None]
    ) -> None:
        """`on_ready` is called once, on a thread of its own, when the mount answers."""
        self._catalog = catalog
        self._config = config
        self._runtime = runtime
        self._ending = False
        self._mountpoint = os.path.realpath(mountpoint)
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._handles: dict[int, _Handle] = {}
        self._numbers = count(1)
        self._shown: dict[Database, _Shown] = {}
        self._owner = {"st_uid": os.getuid(), "st_gid": os.getgid()}

    def quiesce(self) -> None:
        """Let transactions that are open end, for a while, and commits that are under way in any case: SQLite takes the
        failure of the unlock that follows a commit for a failure of the commit."""
        self._ending = True
        left_s = QUIESCE_S
        while left_s > 0:
            databases = self._catalog.opened()
            if any(database.publishing for database in databases):
                left_s = QUIESCE_S
            elif not any(database.locks.writers() for database in databases):
                return
            self._runtime.sleep(0.05)
            left_s -= 0.05

    def init(self) -> None:
        threading.Thread(target=self._announce, name="s3blockfs-ready", daemon=True).start()

    def destroy(self) -> None:
        """Publish what only a close would have published (journal_mode=OFF), then forget everything."""
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
            handle = self._handles[info.fh]
            if handle.side is not None:
                return self._side_attributes(handle.side)
            assert handle.database is not None
            return self._file_attributes(handle.database.size, handle.database.modified_s)
        if path is None:
            raise OSError(errno.ESTALE, "fstat of a file that was unlinked here: the kernel does not say which")
        if is_side_file(path):
            return self._side_attributes(self._side(path))
        database = self._catalog.opened_at(path[1:])
        by_shown_name = "." in path.rpartition("/")[2] or (database and database.version.head.name is not None)
        shown = None if database is None else self._shown.get(database)
        if database is not None and by_shown_name and shown and shown.handles and not database.is_gone:
            return self._file_attributes(database.size, database.modified_s)
        entry = self._catalog.lookup(path[1:])
        if entry is None:
            raise _no_entry(path)
        return self._attributes(entry)

    def readlink(self, path: str) -> str:
        """`acme` is a link to `acme.sqlite`: two names of one inode, so that SQLite and the kernel see one file."""
        entry = self._catalog.lookup(path[1:])
        if entry is None or entry.shown_as is None:
            raise OSError(errno.EINVAL, f"{path}: not a link")
        return entry.shown_as

    def readdir(self, path: str) -> Iterable[tuple[str, Attributes | None]]:
        folder = path.strip("/")
        for name, entry in self._catalog.listing(folder):
            yield name, self._attributes(entry)
        for name in self._catalog.side_files.names_under(folder):
            yield name, {"st_mode": stat.S_IFREG | 0o600}

    def unlink(self, path: str) -> None:
        if not is_side_file(path):
            return self._catalog.remove(path[1:])
        self._side(path)
        self._before_finalising(path)
        self._catalog.side_files.remove(self._side_path(path))
        return None

    def rename(self, old: str, new: str) -> None:
        raise OSError(errno.EXDEV, "renaming is not supported yet; mv copies instead")

    def _accept(self, path: str, *_: object) -> None:
        """Modes belong to the mount, and mtime is the time of the last commit: `cp -p` and `touch` work, no more."""

    chmod = utimens = _accept

    def chown(self, path: str, uid: int, gid: int) -> None:
        if uid not in (-1, self._owner["st_uid"]) or gid not in (-1, self._owner["st_gid"]):
            raise OSError(errno.EPERM, "everything belongs to the user who mounted it")

    def statfs(self, path: str) -> Attributes:
        free = dict.fromkeys(("f_blocks", "f_bfree", "f_bavail"), STATFS_BLOCKS)
        return {"f_bsize": STATFS_BLOCK_BYTES, "f_frsize": STATFS_BLOCK_BYTES, "f_namemax": 255, **free}

    # --- handles ---------------------------------------------------------------------------------------

    def create(self, path: str, mode: int, info: FileInfo) -> None:
        exclusive = bool(info.flags & os.O_EXCL)
        if is_side_file(path):
            if path.endswith(SUFFIXES) and not path.endswith(JOURNAL_SUFFIX):
                raise OSError(errno.EPERM, f"{path}: journal_mode=WAL is not supported yet")
            self._catalog.require_writable()
            side = self._catalog.side_files.create(self._side_path(path), mode & 0o777, exclusive)
            self._add_handle(info, _Handle(path, None, side, Readahead(self._config.readahead_size)))
        else:
            self._add_database(path, info, self._catalog.create(path[1:], exclusive))

    def open(self, path: str, info: FileInfo) -> None:
        if is_side_file(path):
            side = self._catalog.side_files.open(self._side_path(path))
            self._add_handle(info, _Handle(path, None, side, Readahead(self._config.readahead_size)))
            if info.flags & os.O_TRUNC:
                self._truncate_side(path, side, 0)
            return
        if info.flags & os.O_ACCMODE != os.O_RDONLY:
            self._catalog.require_writable()
        handle = self._add_database(path, info, self._catalog.open(path[1:]))
        if info.flags & os.O_TRUNC:
            try:
                self._change(handle, lambda database: database.truncate(0, handle.owners))
            except BaseException:
                self.release(None, info)
                raise

    def read(self, path: str | None, size: int, offset: int, info: FileInfo) -> bytes:
        handle = self._handles[info.fh]
        if handle.side is not None:
            return handle.side.read(offset, size)
        assert handle.database is not None
        return handle.database.read(offset, size, handle.readahead)

    def write(self, path: str | None, data: bytes, offset: int, info: FileInfo) -> int:
        handle = self._handles[info.fh]
        if handle.side is not None:
            if offset == 0 and not is_hot(data[:1]) and len(data) >= HEADER_BYTES:
                self._before_finalising(handle.path, handle.side)  # journal_mode=PERSIST zeroes the header
            elif offset == 0 and is_hot(data[:1]) and (database := self._database_of_journal(handle.path)):
                database.journal_begins()
            handle.side.write(offset, data)
        else:
            self._change(handle, lambda database: database.write(offset, data, handle.owners))
        return len(data)

    def truncate(self, path: str | None, length: int, info: FileInfo | None) -> None:
        if info is not None:
            handle = self._handles[info.fh]
            if handle.side is not None:
                self._truncate_side(handle.path, handle.side, length)
            else:
                self._change(handle, lambda database: database.truncate(length, handle.owners))
            return None
        assert path is not None
        if is_side_file(path):
            return self._truncate_side(path, self._side(path), length)
        database = self._catalog.open(path[1:])  # truncate(2): there is no handle whose close could publish it
        try:
            self._catalog.require_writable()
            database.truncate(length)
            database.close_handle(context_pid())
        finally:
            self._catalog.release(database)
        return None

    def fsync(self, path: str | None, datasync: int, info: FileInfo) -> None:
        handle = self._handles[info.fh]
        if handle.database is not None:
            self._inode_of(handle)
            self._require_sound(handle)
            self._durably(handle, lambda database: database.sync(context_pid(), self._is_foreign))

    def fsyncdir(self, path: str | None, datasync: int, handle: int) -> None:
        """Unlinking and creating are durable when they return."""

    def flush(self, path: str | None, info: FileInfo) -> None:
        handle = self._handles[info.fh]
        database = handle.database
        if database is None:
            return
        self._inode_of(handle)
        if database.owner_closes(info.lock_owner):
            with self._lock:
                for other in self._handles.values():
                    if other.database is database and info.lock_owner in other.owners:
                        other.failed = True
            if handle.wrote:  # not SQLite, which unlocks before it closes: do not let it think that it was written
                raise OSError(errno.EIO, f"{handle.path}: closed in the middle of a transaction, which is lost")
            return
        self._require_sound(handle)
        if handle.wrote:
            self._durably(handle, lambda database: database.close_handle(context_pid()))

    def release(self, path: str | None, info: FileInfo) -> None:
        with self._lock:
            handle = self._handles.pop(info.fh)
            database = handle.database
            if database is not None:
                shown = self._shown[database]
                shown.handles -= 1
                if shown.handles == 0:
                    known = shown.inode is not None and not shown.stale and not database.is_dirty
                    shown.pages_of = database.version.head.commit if known else None
                    shown.inode = None  # the kernel may forget it now, and give the number away
                    shown.stale = False
                    if database.is_gone:
                        del self._shown[database]
        if database is not None:
            self._catalog.release(database)
        else:
            assert handle.side is not None
            self._catalog.side_files.release(handle.side)

    # --- locks -----------------------------------------------------------------------------------------

    def lock(self, path: str | None, info: FileInfo, command: int, lock: Flock) -> None:
        handle = self._handles[info.fh]
        database, owner = handle.database, info.lock_owner
        start, end = lock.l_start, lock.l_start + lock.l_len - 1 if lock.l_len else TO_END
        if database is None:
            if lock.l_type != F_UNLCK:  # SQLite never locks a journal
                raise OSError(errno.ENOLCK, f"{handle.path}: side files cannot be locked")
            return
        self._inode_of(handle)
        if lock.l_type == F_UNLCK and command != F_GETLK:
            database.unlock(owner, start, end)
            return
        kind = Kind.WRITE if lock.l_type == F_WRLCK else Kind.READ
        if command == F_GETLK:
            conflict = database.locks.test(owner, kind, start, end)
            lock.l_type = F_UNLCK
            if conflict is not None:
                lock.l_type = F_WRLCK if conflict.kind is Kind.WRITE else F_RDLCK
                lock.l_start, lock.l_pid = conflict.start, conflict.pid
                lock.l_len = 0 if conflict.end == TO_END else conflict.end - conflict.start + 1
            return
        if self._ending and kind is Kind.WRITE and database.locks.level(owner) < Level.RESERVED:
            raise OSError(errno.EAGAIN, "the mount is ending")
        handle.owners.add(owner)
        if command == F_SETLKW:
            database.wait_lock(owner, kind, start, end, lock.l_pid, self.mounted.interrupted)
        else:
            database.lock(owner, kind, start, end, lock.l_pid)

    # --- helpers ---------------------------------------------------------------------------------------

    def _change(self, handle: _Handle, change: Callable[[Database], None]) -> None:
        self._require_sound(handle)
        assert handle.database is not None
        handle.wrote = True
        change(handle.database)

    def _durably(self, handle: _Handle, publish: Callable[[Database], None]) -> None:
        """Run a commit point that no lock protects: if it fails, everything written through the handle is lost."""
        assert handle.database is not None
        try:
            publish(handle.database)
        except BaseException:
            if not handle.database.locks.writers():
                handle.failed = True
            raise

    @staticmethod
    def _require_sound(handle: _Handle) -> None:
        if handle.failed:
            raise OSError(errno.EIO, f"{handle.path}: what was written through this descriptor is lost; open it again")

    def _truncate_side(self, path: str, side: SideFile, length: int) -> None:
        if length == 0:
            self._before_finalising(path, side)
        side.truncate(length)

    def _before_finalising(self, path: str, side: SideFile | None = None) -> None:
        """A journal or super-journal is about to vanish: commit first. Raises if that fails; then it must stay."""
        if side is not None and not side.linked:
            raise OSError(errno.EIO, f"{path}: was removed; its transaction is lost")
        database = self._database_of_journal(path)
        if database is not None:
            database.finalise_journal(context_pid())
        elif not path.endswith(SUFFIXES):
            for database in sorted(self._catalog.opened(), key=lambda each: each.prefix):
                database.finalise_super_journal(self._mountpoint + path, context_pid())

    def _database_of_journal(self, path: str) -> Database | None:
        name = path[1:].removesuffix(JOURNAL_SUFFIX)
        return self._catalog.opened_at(name) if path.endswith(JOURNAL_SUFFIX) else None

    def _side(self, path: str) -> SideFile:
        side = self._catalog.side_files.get(self._side_path(path))
        if side is None:
            raise _no_entry(path)
        return side

    def _is_foreign(self, super_journal: str) -> bool:
        return not super_journal.startswith(self._mountpoint + "/")

    def _side_path(self, path: str) -> str:
        """Where the side file of a database lies, whichever of its names was used."""
        for suffix in SUFFIXES:
            if path.endswith(suffix):
                database = self._catalog.opened_at(path[1 : -len(suffix)])
                if database is not None:
                    return database.path + suffix
        return path[1:]

    def _add_database(self, path: str, info: FileInfo, database: Database) -> _Handle:
        with self._lock:
            shown = self._shown.setdefault(database, _Shown())
            shown.handles += 1
            # An inode that is known belongs to a handle whose open the kernel has seen: its pages are current.
            current = shown.inode is not None or shown.pages_of == database.version.head.commit
            info.keep_cache = int(current and not shown.stale)
            database.on_moved = partial(self._invalidate, database)
            self._shown = {d: s for d, s in self._shown.items() if s.handles or d is self._catalog.opened_at(d.path)}
        return self._add_handle(info, _Handle(path, database, None, Readahead(self._config.readahead_size)))

    def _add_handle(self, info: FileInfo, handle: _Handle) -> _Handle:
        with self._lock:
            info.fh = next(self._numbers)
            self._handles[info.fh] = handle
        return handle

    def _inode_of(self, handle: _Handle) -> None:
        """Learn the inode number while the handle keeps it alive: the kernel's own number is what stat shows."""
        assert handle.database is not None
        shown = self._shown[handle.database]
        if shown.inode is None and not handle.database.is_gone:
            try:
                inode = self.mounted.inode(handle.path)
            except FileNotFoundError:
                log.debug("%s: unlinked while open", handle.path)
                return
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # the mount is ending: there is nothing to invalidate any more
                    raise
                return
            with self._lock:
                shown.inode = inode
                stale, shown.stale = shown.stale, False
            if stale:  # also when the last open dropped the pages: its answer may still be on its way
                self._invalidate(handle.database)

    def _invalidate(self, database: Database) -> None:
        """Drop the kernel's pages and attributes of a database."""
        shown = self._shown.get(database)
        if shown is None:
            return
        with self._lock:
            inode = shown.inode
            shown.stale = inode is None
        if inode is not None:
            try:
                self.mounted.invalidate_inode(inode)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise

    def _attributes(self, entry: Entry) -> Attributes:
        if entry.is_folder:
            mode = stat.S_IFDIR | (0o500 if self._config.read_only else 0o700)
            return {"st_mode": mode, "st_nlink": 1, "st_size": 0, **self._owner}
        if entry.shown_as is not None:
            return {"st_mode": stat.S_IFLNK | 0o777, "st_nlink": 1, "st_size": len(entry.shown_as), **self._owner}
        return self._file_attributes(entry.size, entry.modified_s)

    def _file_attributes(self, size: int, modified_s: float) -> Attributes:
        mode = stat.S_IFREG | (0o400 if self._config.read_only else 0o600)
        times = dict.fromkeys(("st_mtime", "st_ctime", "st_atime"), int(modified_s * 1e9))
        return {"st_mode": mode, "st_nlink": 1, "st_size": size, "st_blocks": -(-size // 512), **times, **self._owner}

    def _side_attributes(self, side: SideFile) -> Attributes:
        size = side.size
        mode = stat.S_IFREG | side.mode
        return {"st_mode": mode, "st_nlink": 1, "st_size": size, "st_blocks": -(-size // 512), **self._owner}


def _no_entry(path: str) -> OSError:
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
