"""The databases under a bucket's prefix: names <-> key prefixes, listings, open databases, creation and deletion.

A database with prefix `a/b.sqlite` is the file `a/b.sqlite`; one whose last part has no dot (`tenants/acme`) is shown
as `tenants/acme.sqlite` and found under both names, unless its head records that it was created under its exact name.
Exact names win. Prefixes above databases are folders.

Thread rule: any thread; `_lock` is never held during a request to the store.
"""

import errno
import os
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakValueDictionary

from cachetools import LRUCache

from s3blockfs.cache import BlockCache
from s3blockfs.capabilities import ensure_safe
from s3blockfs.commit import Publisher
from s3blockfs.config import Config
from s3blockfs.database import Database
from s3blockfs.dirty import spill_folder
from s3blockfs.errors import (
    Busy,
    DamagedObject,
    DatabaseExists,
    DatabaseGone,
    DatabaseNotFound,
    NewerFormat,
    NotSupported,
    ObjectNotFound,
    ReadOnly,
    StoreError,
    UsageError,
)
from s3blockfs.format import keys
from s3blockfs.format.data import COMMIT_ID_BYTES, Commit
from s3blockfs.format.head import Head
from s3blockfs.format.keys import HIDDEN_FOLDER, NONCE_BYTES, check_prefix, deleted_mark_key, is_file_name, join
from s3blockfs.format.tail import LogCommit, Tail
from s3blockfs.head import HeadFile
from s3blockfs.lease import Lease
from s3blockfs.legacy import AnyHead, report_stale
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import Runtime
from s3blockfs.sidefiles import JOURNAL_SUFFIX, SideFiles, is_side_file
from s3blockfs.snapshot import Snapshot, Source, Version
from s3blockfs.transfer import bury, put_state, rename

#: Names with these endings are taken for databases in listings without looking.
DATABASE_SUFFIXES = (".sqlite", ".sqlite3", ".db", ".db3", ".s3db", ".sl3")
SHOWN_SUFFIX = ".sqlite"

#: How often leases and the like are looked after; without requests unless something is due.
TICK_S = 0.25

#: Closed databases kept with their decoded heads, and heads kept for the time between a look and an open.
IDLE_KEPT = 64
HEADS_KEPT = 64
PROBES_KEPT = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name stands for. Size in bytes, time in seconds by the store's clock; both 0 where not looked up."""

    prefix: str
    is_folder: bool
    size: int = 0
    modified_s: float = 0.0
    shown_as: str | None = None
    """The name in a listing, where it is another one than was asked for."""


class Catalog:
    """The databases under `root`, a key prefix without slashes at its ends ("" is the whole bucket)."""

    def __init__(self, store: ObjectStore, runtime: Runtime, config: Config, root: str) -> None:
        self._store = store
        self._runtime = runtime
        self._config = config
        self._root = root
        self._cache = BlockCache(store, runtime, config.cache_size, 2 * config.request_deadline_s)
        self._lock = threading.Lock()
        self._open: dict[str, Database] = {}
        self._users: dict[Database, int] = {}
        self._idle: OrderedDict[str, Database] = OrderedDict()
        self._leases: WeakValueDictionary[str, Lease] = WeakValueDictionary()  # shared by connections to one database
        self._heads: LRUCache[str, tuple[Version | None, float]] = LRUCache(HEADS_KEPT)
        self._head_files: WeakValueDictionary[str, AnyHead] = WeakValueDictionary()
        self._probed: LRUCache[str, bool] = LRUCache(PROBES_KEPT)
        self._safe = config.only_writer
        self._writer = f"{platform.node()}:{os.getpid()}"
        self.refused: set[str] = set()
        """Prefixes under which the last PUT of a connection was refused."""
        self.side_files = SideFiles(spill_folder(config.spill_dir))
        self._stop_ticking: Callable[[], None] | None = None

    # --- looking ---------------------------------------------------------------------------------------

    def lookup(self, path: str) -> Entry | None:
        """What `path` (relative to the root, no slash at its start) is, or None."""
        if path == "":
            return Entry(self._root, is_folder=True)
        if not all(is_file_name(part) and part != HIDDEN_FOLDER for part in path.split("/")):
            return None
        version = self._head(prefix := join(self._root, path))
        if version is not None:
            if version.head.deleted:
                return None
            entry, name = _entry(prefix, version), path.rpartition("/")[2]
            if "." in name or version.head.name is not None:
                return entry
            hidden = self._head(prefix + SHOWN_SUFFIX) is not None
            return entry if hidden else replace(entry, shown_as=name + SHOWN_SUFFIX)
        alias = _undotted(path)
        if alias is not None:
            version = self._head(prefix := join(self._root, alias))
            if version is not None and not version.head.deleted and version.head.name is None:
                return _entry(prefix, version)
        if path.endswith(DATABASE_SUFFIXES):
            return None
        return Entry(join(self._root, path), is_folder=True) if self._is_folder(path) else None

    def listing(self, folder: str) -> list[tuple[str, Entry]]:
        """(name, entry) of everything in a folder, sorted. Two LISTs, and a look at each name that needs one."""
        base = join(self._root, folder)
        start = f"{base}/" if base else ""
        marks_start = f"{deleted_mark_key(base, '')}/"
        marks = self._runtime.submit(lambda: list(self._store.list(marks_start, site="list-deleted")))
        names = [
            name
            for listed in self._store.list(start, site="list", delimiter="/")
            if listed.is_prefix and is_file_name(name := listed.key[len(start) : -1]) and name != HIDDEN_FOLDER
        ]
        marked = {listed.key[len(marks_start) :] for listed in marks.result()}
        found: dict[str, Entry] = {}
        unclear: dict[str, Future[Version | None]] = {}
        journals = {name + JOURNAL_SUFFIX for name in names}  # left by sqlite-s3vfs
        for name in set(names) - journals:
            prefix = start + name
            if name.endswith(DATABASE_SUFFIXES) and name not in marked:
                found[name] = Entry(prefix, is_folder=False)
            elif self._probed.get(prefix) is False and name not in marked:
                found[name] = Entry(prefix, is_folder=True)
            else:
                unclear[name] = self._runtime.submit(partial(self._head, prefix))
        for name, future in unclear.items():
            try:
                version = future.result()
            except (DamagedObject, NewerFormat, NotSupported, DatabaseGone):  # using it says what is wrong
                found[name] = Entry(start + name, is_folder=False)
                continue
            self._probed[start + name] = version is not None
            if version is None:
                if name not in marked or self._is_folder(join(folder, name)):
                    found[name] = Entry(start + name, is_folder=True)
            elif not version.head.deleted:
                exact = "." in name or version.head.name is not None or name + SHOWN_SUFFIX in names
                found[name if exact else name + SHOWN_SUFFIX] = _entry(start + name, version)
        return sorted(found.items())

    def _is_folder(self, path: str) -> bool:
        """Whether keys below `path`, which has no head, make it a folder. A removed one may still hold tombstones: it
        is none unless it was made again or has something to show."""
        prefix = join(self._root, path)
        mark = keys.folder_mark_key(prefix)
        first = next(iter(self._store.list(f"{prefix}/", site="folder", max_keys=1)), None)
        if first is None or first.key == mark:
            return first is not None
        parent, _, name = prefix.rpartition("/")
        return not self._exists(deleted_mark_key(parent, name)) or self._exists(mark) or bool(self.listing(path))

    def _exists(self, key: str) -> bool:
        try:
            self._store.get(key, site="folder-mark")
        except ObjectNotFound:
            return False
        return True

    def _head(self, prefix: str) -> Version | None:
        """The head, at most as old as the refresh interval; None when there is none."""
        now = self._runtime.monotonic()
        with self._lock:
            held = self._open.get(prefix)
            known = self._heads.get(prefix)
        if held is not None and not held.is_gone:
            return held.version
        heads, before = self._head_file(prefix), known[0] if known else None
        if known is not None and now - known[1] < self._config.refresh_s:
            seen = [version for version in (before, heads.latest) if version is not None]
            return max(seen, key=lambda version: version.head.rev, default=None)
        version = heads.read(before) if before is None or before.snapshot else heads.read_if_changed(before)
        self._remember(prefix, version, now)
        return version

    def _source(self, prefix: str) -> Source:
        return Source(self._store, self._cache, self._runtime, prefix)

    def _head_file(self, prefix: str) -> AnyHead:
        """One per prefix, so that what one connection sees or writes is known to the others at once."""
        made = AnyHead(self._source(prefix), self._config)
        with self._lock:
            return self._head_files.setdefault(prefix, made)

    def _remember(self, prefix: str, version: Version | None, now: float) -> None:
        with self._lock:
            known = self._heads.get(prefix, (None,))[0]
            if version is None or known is None or version.head.rev >= known.head.rev:
                self._heads[prefix] = (version, now)

    # --- opening ---------------------------------------------------------------------------------------

    def open(self, path: str) -> Database:
        """The database, with one more user. Raises DatabaseNotFound, DamagedObject, StoreError."""
        entry = self.lookup(path)
        if entry is None or entry.is_folder:
            raise DatabaseNotFound(f"{self._label(path)}: no such database")
        database = self._take(entry.prefix)
        if database is None:
            version = self._head(entry.prefix)
            if version is None or version.head.deleted:
                raise DatabaseNotFound(f"{self._label(path)}: no such database")
            database = self._add(entry.prefix, version)
            with suppress(StoreError):
                report_stale(self._source(entry.prefix), version.head)
        try:
            if not database.is_dirty:
                database.refresh(self._config.refresh_s)
        except BaseException:
            self.release(database)
            raise
        return database

    def create(self, path: str, exclusive: bool) -> Database:
        """Make an empty database, or open the one that is there. Raises DatabaseExists if `exclusive`."""
        prefix = join(self._root, path)
        check_prefix(prefix)
        self.require_writable()
        version = self._head_file(prefix).read()
        if version is None or version.head.deleted:
            version = self._create(prefix, version, path.rpartition("/")[2], exclusive)
        elif exclusive:
            raise DatabaseExists(f"{self._label(path)}: exists")
        self._remember(prefix, version, self._runtime.monotonic())
        with self._lock:
            old = self._open.get(prefix) or self._idle.get(prefix)
        if old is not None and old.version.head.id != version.head.id:
            old.delete()  # elsewhere, and made anew
        return self._take(prefix) or self._add(prefix, version)

    def connection(self, path: str, side_path: str, create: bool) -> Database:
        """A Database for one connection alone: its own snapshot, its own transaction, its side files at `side_path`.
        `path` is taken for a key prefix below the root as it is. Raises DatabaseNotFound unless `create`."""
        check_prefix(prefix := join(self._root, path))
        version = self._head(prefix)
        if version is None or version.head.deleted:  # a moment ago, perhaps: look again
            version = self._head_file(prefix).read()
            if version is None or version.head.deleted:
                if not create:
                    raise DatabaseNotFound(f"{self._label(path)}: no such database")
                self.require_writable()
                version = self._create(prefix, version, None, exclusive=False)
            self._remember(prefix, version, self._runtime.monotonic())
        database = self._made(prefix, version, side_path)
        with self._lock:
            self._users[database] = 1
        return database

    def release(self, database: Database) -> None:
        """One user less. Nothing is published here: the face did that when the handle was flushed."""
        dropped: list[Database] = []
        if not database.is_gone:
            self._remember(database.prefix, database.version, database.checked_s)
        with self._lock:
            self._users[database] -= 1
            if self._users[database]:
                return
            del self._users[database]
            current = self._open.get(database.prefix) is database  # not if it was deleted and made anew meanwhile
            if current:
                del self._open[database.prefix]
            if not current or database.is_gone or (database.is_dirty and not database.in_doubt):
                dropped.append(database)
            else:  # one in doubt stays closed to everybody until it is settled
                self._idle[database.prefix] = database
                settled = [idle for idle in self._idle.values() if not idle.in_doubt]
                for idle in settled[: max(0, len(self._idle) - IDLE_KEPT)]:
                    dropped.append(self._idle.pop(idle.prefix))
        for idle in dropped:
            idle.close()

    def opened_at(self, path: str) -> Database | None:
        """The database known here under this name or its alias, open or lately closed; never asks the store."""
        with self._lock:
            for name in (path, _undotted(path)):
                prefix = join(self._root, name or "")
                found = None if name is None else self._open.get(prefix) or self._idle.get(prefix)
                if found is not None and (name == path or found.version.head.name is None):
                    return found
        return None

    def opened(self) -> list[Database]:
        with self._lock:
            return list(self._users)

    def remove(self, path: str) -> None:
        """Replace the head by a tombstone. Raises DatabaseNotFound."""
        source, heads, version = self.find(path)
        self.require_writable()
        self._replaced(source.prefix, bury(source, heads, version, self._writer))

    def rename(self, old: str, new: str) -> None:
        """Give a database another name, over an existing one, too; or a folder, one database after the other. Raises
        DatabaseNotFound, Busy when it or the one it replaces is being written, OSError (EISDIR, ENOTDIR, ENOTEMPTY)."""
        entry = self.lookup(old)
        if entry is not None and entry.is_folder:
            if self.lookup(new) is not None:
                self.remove_folder(new)
            self.make_folder(new)
            for inner, _ in self.listing(old):
                self.rename(f"{old}/{inner}", f"{new}/{inner}")
            return self.remove_folder(old)
        source, heads, version = self.find(old)
        target, over, base, name = self._target(new)
        self._require_idle(source, target)
        if source.prefix != target.prefix:
            state = Snapshot.load(source, heads.convert(version))
            buried, moved = rename(source, heads, state, target, over, base, name, self._writer)
            self._replaced(source.prefix, buried)
            self._replaced(target.prefix, moved)
        return None

    def copy(self, old: str, new: str, overwrite: bool = False) -> None:
        """The newest state of a database becomes the next one under the name `new`. Raises DatabaseNotFound,
        DatabaseExists, Busy."""
        source, from_heads, version = self.find(old)
        target, heads, base, name = self._target(new)
        if base is not None and not base.head.deleted and not overwrite:
            raise DatabaseExists(f"{self._label(new)}: exists")
        self._require_idle(target)
        state = Snapshot.load(source, from_heads.convert(version))
        made = put_state(state, source, target, heads, base, name, self._writer)
        self._replaced(target.prefix, made)

    def find(self, path: str) -> tuple[Source, HeadFile, Version]:
        """The newest state of a database, for commands. Raises DatabaseNotFound."""
        entry = self.lookup(path)
        if entry is not None and not entry.is_folder:
            heads = self._head_file(entry.prefix)
            version = heads.read()
            if version is not None and not version.head.deleted:
                return self._source(entry.prefix), heads, version
        raise DatabaseNotFound(f"{self._label(path)}: no such database")

    def _target(self, path: str) -> tuple[Source, HeadFile, Version | None, str | None]:
        """(place, head, what it holds, name to record) for a database that is going to be under this name."""
        self.require_writable()
        entry = self.lookup(path)
        if entry is not None and entry.is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        prefix = join(self._root, path) if entry is None else entry.prefix
        check_prefix(prefix)
        heads = self._head_file(prefix)
        base = heads.read()
        base = base and heads.convert(base)
        live = base is not None and not base.head.deleted
        return self._source(prefix), heads, base, base.head.name if base and live else path.rpartition("/")[2]

    def _require_idle(self, *places: Source) -> None:
        with self._lock:
            known = [held for at in places if (held := self._open.get(at.prefix) or self._idle.get(at.prefix))]
        if any(held.is_dirty or held.in_doubt or held.locks.writers() for held in known):
            raise Busy(f"{self._label('')}: the database is being written; try again")

    def _replaced(self, prefix: str, version: Version) -> None:
        """The database that is open under this prefix is another one now, or none."""
        self._remember(prefix, version, self._runtime.monotonic())
        with self._lock:
            held, idle = self._open.get(prefix), self._idle.pop(prefix, None)
        if held is not None:
            held.delete()
        if idle is not None:
            idle.close()

    def make_folder(self, path: str) -> None:
        """Remembered by a mark in it. Raises DatabaseExists for any name in use, UsageError for one that cannot be."""
        if self.lookup(path) is not None:
            raise DatabaseExists(f"{self._label(path)}: exists")
        check_prefix(prefix := join(self._root, path))
        if path.endswith(DATABASE_SUFFIXES) or is_side_file(path) or self._head(prefix) is not None:
            raise UsageError(f"{self._label(path)}: a name of databases or one that was deleted; choose another")
        self.require_writable()
        self._store.put(keys.folder_mark_key(prefix), b"", site="mark-folder")

    def remove_folder(self, path: str) -> None:
        """Raises DatabaseNotFound when there is no such folder, OSError (ENOTEMPTY; EBUSY for the root)."""
        entry = self.lookup(path)
        if entry is None:
            raise DatabaseNotFound(f"{self._label(path)}: no such folder")
        if not entry.is_folder:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if not path:
            raise OSError(errno.EBUSY, "the root is not removed: unmount it")
        self.require_writable()
        if self.listing(path) or self.side_files.names_under(path):
            raise OSError(errno.ENOTEMPTY, f"{self._label(path)}: not empty")
        parent, _, name = entry.prefix.rpartition("/")
        # What was deleted in it leaves tombstones, and some stores list empty prefixes for a while.
        self._store.put(deleted_mark_key(parent, name), b"", site="mark-deleted")
        self._store.delete([keys.folder_mark_key(entry.prefix)], site="unmark-folder")

    def tick(self) -> None:
        """Give leases back, and the like; called every now and then."""
        with self._lock:
            databases = [*self._users, *self._idle.values()]
        for database in databases:
            database.tick()

    def require_writable(self) -> None:
        """Raises ReadOnly, or what the probe of the store raises; asks the store once in a process's life."""
        if self._config.read_only:
            raise ReadOnly(f"{self._label('')}: mounted read-only")
        if not self._safe:
            ensure_safe(self._store, self._root, self._runtime)
            self._safe = True

    def close(self) -> None:
        """Forget everything; nobody uses the catalog any more."""
        with self._lock:
            databases = [*self._idle.values(), *self._users]
            self._idle.clear()
            self._open.clear()
            self._users.clear()
        if self._stop_ticking is not None:
            self._stop_ticking()
        for database in databases:
            database.close()
        self.side_files.close()

    def _take(self, prefix: str) -> Database | None:
        """One more user of a database that is known here already."""
        with self._lock:
            database = self._open.get(prefix) or self._idle.pop(prefix, None)
            return None if database is None or database.is_gone else self._use(database)

    def _made(self, prefix: str, version: Version, side_path: str) -> Database:
        source, made = self._source(prefix), Lease(self._head_file(prefix), self._runtime, self._config, self._writer)
        with self._lock:
            lease = self._leases.setdefault(prefix, made)
            if self._stop_ticking is None:
                self._stop_ticking = self._runtime.every(TICK_S, self.tick)
        publisher = Publisher(source, lease, self._config, self._writer)
        return Database(source, lease, publisher, self._config, version, self.side_files, side_path)

    def _add(self, prefix: str, version: Version) -> Database:
        database = self._made(prefix, version, prefix[len(self._root) :].lstrip("/"))
        with self._lock:
            held = self._open.get(prefix)
            if held is not None and not held.is_gone:  # another thread was faster: there is only one per prefix
                database.close()
                return self._use(held)
            return self._use(database)

    def _use(self, database: Database) -> Database:
        """With `_lock` held: count one more user."""
        self._open[database.prefix] = database
        self._users[database] = self._users.get(database, 0) + 1
        return database

    def _create(self, prefix: str, tombstone: Version | None, name: str | None, exclusive: bool) -> Version:
        heads = self._head_file(prefix)
        database_id, commit_id = self._runtime.token(16), self._runtime.token(COMMIT_ID_BYTES)

        def make(replaced: Head | None) -> Head:
            time_ms = int(self._store.server_time_s() * 1000)
            seq = 1 if replaced is None else replaced.seq + 1
            record = LogCommit(Commit(seq, commit_id, time_ms, 0, 0), ())
            block_size, nonce = self._config.block_size, bytes(NONCE_BYTES)
            head = Head(database_id, 0, seq, commit_id, 0, block_size, nonce, self._writer, time_ms, name=name)
            head = replace(head, tail=Tail().append(record))
            return head if replaced is None else replace(head, floor=replaced.floor, counter=replaced.counter)

        try:
            created = heads.create(tombstone, make)
            if created.head.deleted:  # the answer was lost, and somebody was quick
                raise DatabaseNotFound(f"{heads.prefix}: was deleted right after its creation")
            return created
        except DatabaseExists:
            version = heads.read()
            if exclusive or version is None or version.head.deleted:
                raise
            return version

    def _label(self, path: str) -> str:
        return f"{self._store.name}/{join(self._root, path)}"


def _entry(prefix: str, version: Version) -> Entry:
    return Entry(prefix, False, version.head.size, version.head.time_ms / 1000)


def _undotted(path: str) -> str | None:
    """The other name under which `x.sqlite` may be stored: `x`, if that has no dot."""
    stem = path.removesuffix(SHOWN_SUFFIX)
    return stem if stem != path and "." not in stem.rpartition("/")[2] and stem.rpartition("/")[2] else None
