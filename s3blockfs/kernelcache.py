"""What the kernel remembers of a mount's databases, and when it has to forget.

Handles keep the kernel's pages (`keep_cache`) when those are known to be of the state the database shows. Whenever that
state changes by anything but this mount's own writes, `invalidate` drops pages and attributes.

Attributes are remembered for the refresh interval. That serves handles; a path is looked up at each step, with them.
Between the look-up and `open` a database may move. The kernel would cut its reads at the old size, so it is sent back.
That a name is not there is remembered for half the interval, because the catalog does so for the other half. Side files
come to be through the kernel alone, which replaces such an entry then.

Thread rule: any thread; `_lock` protects moments. `inode_of` and `invalidate` wait for requests: see
`fuse_binding.Mounted`."""

import errno
import threading
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary, ref

from cachetools import LRUCache

from s3blockfs.config import Config
from s3blockfs.database import Database, Plain
from s3blockfs.exclusive import ExclusiveDatabase
from s3blockfs.fuse_binding import FileInfo, LookAgain, Operations
from s3blockfs.locks import Kind, Lock
from s3blockfs.sidefiles import SideFile
from s3blockfs.walmode import WalDatabase

SIZES_KEPT = 1024  # between look-ups and opens; one that was forgotten is looked up once more
SHORT_S = 0.5  # with such an interval `open` could find another size time and again: the kernel looks again only once


@dataclass(slots=True)
class Shown:
    """What the kernel knows of a database: handles, inode number once looked up, and of which commit its pages are.
    `stale`: they have to go and could not be dropped, because the inode number was not known. `moved`: it was renamed,
    or deleted elsewhere, and the kernel gave its inode and pages to another database, so what has this one open must
    not fill them. `direct`: it must not fill the pages of its inode, through which others still read that lost it."""

    handles: int = 0
    inode: int | None = None
    pages_of: bytes | None = None
    stale: bool = False
    moved: bool = False
    direct: bool = False


class KernelCache:
    """That of one mount."""

    def __init__(self, face: Operations, config: Config) -> None:
        self._face, self._config = face, config
        self._attributes_s = config.refresh_s if config.refresh_s >= SHORT_S and not config.direct_io else 0
        self.timeouts = {"negative_timeout": str(config.refresh_s / 2), "attr_timeout": str(self._attributes_s)}
        if config.exclusive:  # the engine removes journals of the dead only, and `open` finds out about the rest
            self.timeouts["entry_timeout"] = str(self._attributes_s)
        self._sizes: LRUCache[str, int] = LRUCache(SIZES_KEPT)
        self._lock = threading.Lock()
        self._shown: WeakKeyDictionary[Database, Shown] = WeakKeyDictionary()

    def is_open(self, database: Database) -> bool:
        shown = self._shown.get(database)
        return shown is not None and shown.handles > 0

    def looked_up(self, path: str, size: int) -> None:
        """The kernel is told this size, uncommitted bytes apart."""
        with self._lock:
            self._sizes[path] = size

    def require_current(self, path: str, database: Database) -> None:
        """Before a handle is made. Raises LookAgain if the kernel was told another size, and not yet to forget it."""
        with self._lock:
            shown, told = self._shown.get(database), self._sizes.get(path)
        if self._attributes_s and (shown is None or shown.inode is None) and told != database.version.head.size:
            raise LookAgain(path)

    def opened(self, database: Database, info: FileInfo) -> Shown:
        """One more handle: fills in what the kernel may keep."""
        with self._lock:
            shown = self._shown.setdefault(database, Shown())
            if shown.handles == 0 and self._config.exclusive:
                shown.direct = any(_is_lost(other) for other, at in self._shown.items() if at.handles)
            for other, at in self._shown.items() if shown.handles == 0 else ():
                at.moved |= other.is_replaced and other.path == database.path
            shown.handles += 1
            # An inode that is known belongs to a handle whose open the kernel has seen: its pages are current.
            current = shown.inode is not None or shown.pages_of == database.version.head.commit
            info.keep_cache = int(current and not shown.stale)
            # An inode has one page cache, for whichever versions of an object were opened under its name.
            info.direct_io = int(isinstance(database, Plain) or shown.direct or self._config.direct_io)
            database.on_moved = partial(self._moved, ref(database))
            if isinstance(database, WalDatabase):
                database.forget_pages = self.forget_pages
            if isinstance(database, ExclusiveDatabase):
                database.kernel_locks.look = partial(self._locks_of, shown)
            return shown

    def _locks_of(self, shown: Shown) -> list[Lock]:
        found = set() if shown.inode is None else self._face.mounted.locks(shown.inode)
        return [Lock(pid, Kind.WRITE if writes else Kind.READ, start, end, pid) for writes, pid, start, end in found]

    def closed(self, database: Database) -> None:
        with self._lock:
            shown = self._shown[database]
            shown.handles -= 1
            if shown.handles == 0:
                known = shown.inode is not None and not (shown.stale or database.is_dirty or database.is_logged)
                shown.pages_of = database.version.head.commit if known else None
                shown.inode = None  # the kernel may forget it now, and give the number away
                shown.stale = False

    def before_rename(self, replaced: Database | None) -> list[tuple[Database, Shown]]:
        """Those of which the rename may move the inode: their `moved` is to be set if they are gone then."""
        with self._lock:
            return [pair for pair in self._shown.items() if not pair[0].is_gone and pair[0] is not replaced]

    def inode_of(self, database: Database) -> Shown:
        """Learn the inode number while a handle keeps it alive: the kernel's own number is what stat shows."""
        shown = self._shown[database]
        if shown.inode is not None or (database.is_gone and not _is_lost(database)):
            return shown
        try:
            inode = self._face.mounted.inode(f"/{database.path}")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTCONN):  # unlinked, or the mount is ending: nothing to invalidate
                return shown
            raise
        with self._lock:
            shown.inode = inode
            stale, shown.stale = shown.stale, False
        if stale:  # also when the last open dropped the pages: its answer may still be on its way
            self.invalidate(database)
        return shown

    def _moved(self, reference: ref[Database]) -> None:
        """What a database calls must not refer to it, or only a search for cycles would free it, with its megabytes."""
        if (database := reference()) is not None:
            self.invalidate(database)

    def invalidate(self, database: Database) -> None:
        """Drop the kernel's pages and attributes of a database."""
        shown = self._shown[database]
        with self._lock:
            inode = shown.inode
            shown.stale = inode is None
            if inode is None:
                self._sizes.clear()  # the kernel's attributes may be old, too: the next `open` sends it back
        if inode is None and _is_lost(database):  # it was only read; the inode is still that of its path
            self.inode_of(database)
        if inode is not None:
            try:
                self._face.mounted.invalidate_inode(inode)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise

    def forget_pages(self, side: SideFile) -> None:
        """The kernel writes back what it has of a `-wal` or `-shm`, and forgets it."""
        try:
            self._face.mounted.invalidate_inode(self._face.mounted.inode(side.shown_as))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTCONN):
                raise


def _is_lost(database: Database) -> bool:
    return isinstance(database, ExclusiveDatabase) and database.is_lost
