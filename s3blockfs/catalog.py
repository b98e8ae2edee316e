"""The databases under a bucket's prefix: open ones, creation, renaming, deletion. Names are the matter of `names.py`.

Thread rule: any thread; `_lock` is never held during a request to the store."""

import errno
import os
import platform
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from weakref import WeakSet, WeakValueDictionary

from cachetools import LRUCache

from s3blockfs.config import Config
from s3blockfs.database import Database, Past, Plain
from s3blockfs.errors import Busy, DatabaseExists, DatabaseNotFound, ReadOnly, StoreError, TooOld
from s3blockfs.format.data import COMMIT_ID_BYTES, Commit
from s3blockfs.format.head import Head
from s3blockfs.format.keys import NONCE_BYTES, check_prefix, join
from s3blockfs.format.tail import LogCommit, Tail
from s3blockfs.history import open_at
from s3blockfs.lease import Lease
from s3blockfs.legacy import report_stale
from s3blockfs.names import DATABASE_SUFFIXES, Names, undotted
from s3blockfs.objectfile import as_database
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import Runtime
from s3blockfs.snapshot import Snapshot, Source, Version
from s3blockfs.transfer import Place, bury, put_state, rename

TICK_S = 0.25  # how often leases and the like are looked after; without requests unless something is due
IDLE_KEPT = 64  # closed databases, with their decoded heads


class Catalog(Names):
    """The databases under `root`, a key prefix without slashes at its ends ("" is the whole bucket)."""

    def __init__(self, store: ObjectStore, runtime: Runtime, config: Config, root: str) -> None:
        super().__init__(store, runtime, config, root)
        self._open: dict[str, Database] = {}
        self._users: dict[Database, int] = {}
        self._plain: LRUCache[str, Database] = LRUCache(IDLE_KEPT)
        self._idle: OrderedDict[str, Database] = OrderedDict()
        self._leases: WeakValueDictionary[str, Lease] = WeakValueDictionary()  # shared by connections to one database
        self._writer = f"{platform.node()}:{os.getpid()}"
        self.kind: type[Database] = Database  # what `open` and `create` make; a mount's know WAL mode
        self.files: WeakSet[object] = WeakSet()  # open ones that read or write by it (files.py)
        self.refused: set[str] = set()  # prefixes under which the last PUT of a connection was refused
        self._stop_ticking: Callable[[], None] | None = None

    def open(self, path: str) -> Database:
        """The database, with one more user. Raises DatabaseNotFound, DamagedObject, StoreError."""
        if (entry := self.lookup(path)) is None or entry.is_folder:
            raise DatabaseNotFound(f"{self._label(path)}: no such database")
        if entry.is_fixed:
            return self._shared(entry.prefix, path)
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
        check_prefix(prefix := join(self._root, path))
        self.require_writable()
        version = self._head_file(prefix).read()
        is_new = version is None or version.head.deleted
        if version is None or version.head.deleted:
            version = self._create(prefix, version, path.rpartition("/")[2], exclusive)
        elif exclusive:
            raise DatabaseExists(f"{self._label(path)}: exists")
        self._remember(prefix, version, self._runtime.monotonic())
        with self._lock:
            old = self._open.get(prefix) or self._idle.get(prefix)
        # What was read may be older than what `old` shows, and of sqlite-s3vfs each state has an id of its own.
        is_newer = is_new or (old is not None and 0 < old.version.head.rev < version.head.rev)
        if old is not None and is_newer and old.version.head.id != version.head.id:
            old.delete(here=False)  # and made anew
        return self._take(prefix) or self._add(prefix, version)

    def connection(
        self, path: str, side_path: str, create: bool, at: int | str | None = None, is_object: bool = False
    ) -> Database:
        """A Database for one connection alone: its own snapshot, its own transaction, its side files at `side_path`.
        `path` is a key prefix below the root, or the key of a plain object. Raises DatabaseNotFound unless `create`,
        with `at` what `past` raises, and NotSupported."""
        check_prefix(prefix := join(self._root, path))
        if is_object:
            database = self.plain(prefix, side_path)
        else:
            database = self._newest(prefix, path, side_path, create) if at is None else self.past(prefix, side_path, at)
        with self._lock:
            self._users[database] = 1
        return database

    def past(self, prefix: str, side_path: str, at: int | str) -> Database:
        """What this key prefix held once, to be read only; nobody counts its users. Raises what `open_at` raises."""
        source, heads = self.at(prefix)
        state = open_at(source, heads, at)
        return self._made(prefix, state.version._replace(snapshot=state), side_path, Past)

    def plain(self, prefix: str, side_path: str) -> Database:
        """The object with this key, to be read only; nobody counts its users. Raises DatabaseNotFound, NotSupported."""
        if (found := self._object(prefix)) is None:
            raise DatabaseNotFound(f"{self._store.name}/{prefix}: no such object")
        return self._made(prefix, as_database(self._source(prefix), found), side_path, Plain)

    def _shared(self, prefix: str, path: str) -> Database:
        """The same for all handles of a mount that opened one version: SQLite opens a file more than once."""
        found = self._object(prefix)
        with self._lock:
            held = self._plain.get(prefix)
        if held is None or found is None or held.version.etag != found.etag:
            held = self.plain(prefix, path)
            with self._lock:
                self._plain[prefix] = held
        return held

    def _newest(self, prefix: str, path: str, side_path: str, create: bool) -> Database:
        version = self._head(prefix)
        if version is None or version.head.deleted:  # a moment ago, perhaps: look again
            version = self._head_file(prefix).read()
            if version is None or version.head.deleted:
                if not create:
                    raise DatabaseNotFound(f"{self._label(path)}: no such database")
                self.require_writable(prefix)
                if prefix.endswith(DATABASE_SUFFIXES) and self._object(prefix) is not None:
                    text = "a plain object, read-only; open it with connect(object=...), or `s3blockfs import` it"
                    raise ReadOnly(f"{self._label(path)}: {text}")
                version = self._create(prefix, version, None, exclusive=False)
            self._remember(prefix, version, self._runtime.monotonic())
        return self._made(prefix, version, side_path)

    def release(self, database: Database) -> None:
        """One user less. Nothing is published here: the face did that when the handle was flushed."""
        dropped: list[Database] = []
        if not database.is_gone and not isinstance(database, Past):
            self._remember(database.prefix, database.version, database.checked_s)
        with self._lock:
            if isinstance(database, Past) and database not in self._users:
                return  # a mount does not count those
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
                dropped += self._surplus()
        for idle in dropped:
            idle.close()

    def _surplus(self) -> list[Database]:
        """With `_lock` held: take out those that were closed first, but for what is in doubt, or has a log."""
        settled = [idle for idle in self._idle.values() if not (idle.in_doubt or idle.is_logged)]
        return [self._idle.pop(idle.prefix) for idle in settled[: max(0, len(self._idle) - IDLE_KEPT)]]

    def _shown(self, prefix: str) -> Version | None:
        with self._lock:
            held = self._open.get(prefix)
        return None if held is None or held.is_gone else held.version

    def _is_used_below(self, prefix: str) -> bool:
        with self._lock:
            held = [*self._users, *(idle for idle in self._idle.values() if idle.is_cut_off)]
        return any(database.prefix.startswith(f"{prefix}/") for database in held if not database.is_gone)

    def opened_at(self, path: str) -> Database | None:
        """The database known here under this name or its alias, open or lately closed; never asks the store."""
        with self._lock:
            for name in (path, undotted(path)):
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
        self.require_writable(source.prefix)
        self._replaced(source.prefix, bury(source, heads, version, self._writer))

    def rename(self, old: str, new: str, overwrite: bool = True) -> None:
        """Give a database another name, over an existing one, too; or a folder, one database after the other. Raises
        DatabaseNotFound, DatabaseExists unless `overwrite`, Busy in a transaction on either, OSError."""
        if (entry := self.lookup(old)) is not None and entry.is_folder:
            if f"{new}/".startswith(f"{old}/"):
                raise OSError(errno.EINVAL, f"{self._label(old)}: cannot be moved into itself; choose another name")
            for _, inside in self.listing(old):
                self._require_database(inside)
            if self.lookup(new) is not None:
                self.remove_folder(new)
            self.make_folder(new)
            for inner, _ in self.listing(old):
                self.rename(f"{old}/{inner}", f"{new}/{inner}")
            return self.remove_folder(old)
        for held in filter(None, map(self.opened_at, (old, new))):
            held.tidy()
        source, heads, version = self.find(old)
        place = self._place(new, overwrite)
        self._require_idle(source, place.source)
        if source.prefix != place.source.prefix:
            state = Snapshot.load(source, heads.convert(version))
            buried, moved = rename(source, heads, state, place, self._writer)
            self._replaced(source.prefix, buried)
            self._replaced(place.source.prefix, moved)
        return None

    def copy(self, old: str, new: str, overwrite: bool = False, at: int | str | None = None) -> None:
        """The newest state of a database, or an earlier one (see `open_at`), becomes the next one under the name `new`.
        Raises DatabaseNotFound, DatabaseExists, TooOld, Busy, UsageError."""
        source, heads, version = self.find(old)
        place = self._place(new, overwrite)
        self._require_idle(place.source)
        version = heads.convert(version)
        state = Snapshot.load(source, version) if at is None else open_at(source, heads, at)
        self._replaced(place.source.prefix, put_state(state, source, place, self._writer))

    def _place(self, path: str, overwrite: bool) -> Place:
        """For a database that is going to be under this name."""
        self.require_writable()
        if (entry := self.lookup(path)) is not None and entry.is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if entry is not None:
            self._require_database(entry)
        check_prefix(prefix := join(self._root, path) if entry is None else entry.prefix)
        heads = self._head_file(prefix)
        base = heads.read()
        base = base and heads.convert(base)
        live = base is not None and not base.head.deleted
        if live and not overwrite:
            raise DatabaseExists(f"{self._label(path)}: exists")
        name = base.head.name if base and live else path.rpartition("/")[2]
        return Place(self._source(prefix), heads, base, name)

    def _require_idle(self, *places: Source) -> None:
        with self._lock:
            known = [held for at in places if (held := self._open.get(at.prefix) or self._idle.get(at.prefix))]
        if any(held.is_dirty or held.is_logged or held.in_doubt or list(held.locks) for held in known):
            raise Busy(f"{self._label('')}: the database is in use; try again")

    def _replaced(self, prefix: str, version: Version) -> None:
        """The database that is open under this prefix is another one now, or none."""
        self._remember(prefix, version, self._runtime.monotonic())
        with self._lock:
            held, idle = self._open.get(prefix), self._idle.pop(prefix, None)
        if held is not None:
            held.delete()
        if idle is not None:
            idle.close()

    def tick(self) -> None:
        """Give leases back, and the like; called every now and then."""
        with self._lock:
            dropped = self._surplus()
            databases = [*self._users, *self._idle.values()]
        for idle in dropped:  # their logs were left by programs that died
            with suppress(RuntimeError):  # no more threads: then others have to wait for the end of its lease
                self._runtime.submit(idle.close)
        for database in databases:
            database.tick()

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

    def _made(self, prefix: str, version: Version, side_path: str, kind: type[Database] = Database) -> Database:
        source, made = self._source(prefix), Lease(self._head_file(prefix), self._runtime, self._config, self._writer)
        with self._lock:
            lease = self._leases.setdefault(prefix, made)
            if self._stop_ticking is None:
                self._stop_ticking = self._runtime.every(TICK_S, self.tick)
            looked_s = self._heads.get(prefix, (None, float("-inf")))[1]
        try:
            database = kind(source, lease, self._config, version, self.side_files, side_path)
        except TooOld:  # remembered since before S3 was away for long, and collected meanwhile
            newest = lease.heads.read()
            if issubclass(kind, Past) or newest is None or newest.head.deleted:
                raise
            database = kind(source, lease, self._config, newest, self.side_files, side_path)
        database.checked_s = min(database.checked_s, looked_s)  # `version` was perhaps read for somebody else
        return database

    def _add(self, prefix: str, version: Version) -> Database:
        database = self._made(prefix, version, prefix[len(self._root) :].lstrip("/"), self.kind)
        with self._lock:
            if (held := self._open.get(prefix)) is None or held.is_gone:
                return self._use(database)
            self._use(held)  # another thread was faster: there is only one per prefix
        Database.close(database)  # not with its `-wal` and `-shm`, which are those of the other
        return held

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
            created = heads.swap(tombstone, make)
            if created.head.deleted:  # the answer was lost, and somebody was quick
                raise DatabaseNotFound(f"{heads.prefix}: was deleted right after its creation")
            return created
        except DatabaseExists:
            version = heads.read()
            if exclusive or version is None or version.head.deleted:
                raise
            return version
