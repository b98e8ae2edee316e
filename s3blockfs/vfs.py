"""The in-process face: an APSW VFS, which turns SQLite's calls into the engine's. Decides nothing, needs no libfuse.

Every connection has a Database of its own, with its own snapshot and transaction. SQLite opens a journal by its name
and does not say for which connection, so `xFullPathname` gives every open its own name, `acme.sqlite#1f`.

Errors: at a commit point SQLite must get SQLITE_IOERR or SQLITE_FULL. After anything else it goes on with a page cache
full of what was never committed (pager.c, pager_error), and after SQLITE_BUSY a second COMMIT reports success. The text
and the `__cause__` of what the application gets say what really happened.

Threads: any. Forks: a connection belongs to the process that opened it."""

import atexit
import errno
import io
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial, wraps
from itertools import count
from typing import Any, TypeVar
from urllib.parse import quote

import apsw

from s3blockfs import errors
from s3blockfs.catalog import Catalog
from s3blockfs.config import KIB, MIB, Config
from s3blockfs.database import Database
from s3blockfs.format.head import MAX_BLOCK_BYTES, MIN_BLOCK_BYTES
from s3blockfs.journal import HEADER_BYTES, is_hot
from s3blockfs.locks import PENDING_BYTE, RESERVED_BYTE, SHARED_FIRST, SHARED_LAST, TO_END, Kind
from s3blockfs.prefetch import Readahead
from s3blockfs.runtime import Runtime, uninterrupted
from s3blockfs.s3store import S3Store
from s3blockfs.sidefiles import JOURNAL_SUFFIX, LOG_SUFFIX, SideFile, is_side_file

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Files that the default VFS keeps.
_TEMPORARY = apsw.SQLITE_OPEN_TEMP_DB | apsw.SQLITE_OPEN_TEMP_JOURNAL
_TEMPORARY |= apsw.SQLITE_OPEN_TRANSIENT_DB | apsw.SQLITE_OPEN_SUBJOURNAL

#: What each level locks. PENDING would hold back other owners, and a connection's Database has but one.
_SHARED, _RESERVED = apsw.SQLITE_LOCK_SHARED, apsw.SQLITE_LOCK_RESERVED
_LOCKS = {
    _SHARED: (Kind.READ, SHARED_FIRST, SHARED_LAST),
    _RESERVED: (Kind.WRITE, RESERVED_BYTE, RESERVED_BYTE),
    apsw.SQLITE_LOCK_EXCLUSIVE: (Kind.WRITE, SHARED_FIRST, SHARED_LAST),
}

_CANNOT_OPEN = (errors.AccessDenied, errors.DatabaseNotFound, errors.NewerFormat, errors.NotSupported)
#: Result codes other than SQLITE_IOERR and SQLITE_FULL.
_CODES: dict[str, dict[Any, type[apsw.Error]]] = {
    "xOpen": {(*_CANNOT_OPEN, errors.ReadOnly, errors.TooOld, errors.UsageError): apsw.CantOpenError},
    "xLock": {errors.Busy: apsw.BusyError, errors.ReadOnly: apsw.ReadOnlyError},
}

ENGINES_KEPT = 16  # buckets (with their options) that keep client and cache when no connection uses them
#: By process, bucket and options; the one used last is at the end.
_engines: dict[tuple[object, ...], tuple[Catalog, Runtime]] = {}
_lock = threading.Lock()
_pid = os.getpid()


def _in_child() -> None:
    global _pid
    _pid = os.getpid()
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child)

#: The databases that are open in this process, by the names that `xFullPathname` gave them.
_files: dict[str, "_DatabaseFile"] = {}
_serials = count(1)


def connect(
    *,
    bucket: Any,
    name: str | None = None,
    object: str | None = None,
    block_size: int = 64 * KIB,
    at: int | str | None = None,
    **options: Any,
) -> apsw.Connection:
    """Open the database with key prefix `name`, created if missing. `bucket` is a name or a boto3 Bucket; `options` are
    the fields of `config.Config`. Connections with the same bucket and options share one cache. The busy timeout is
    5 s, as in Python's sqlite3. With `at`, a commit's number, a snapshot's label or a time as for `restore --to`, it
    shows that state, read-only, as `file:NAME?at=...` does. With `object` instead of `name` it reads the SQLite file
    that is stored under that key, as `file:KEY?object=1` does. Raises apsw.CantOpenError, apsw.IOError, UsageError."""
    if (name is None) is (object is None) or (object is not None and at is not None):
        raise errors.UsageError("connect: name a database (name=..., at=...) or a plain object (object=...)")
    vfs = S3VFS(bucket, block_size, **options)  # which lives as long as its connections
    if name is not None and at is None:
        connection = apsw.Connection(name, vfs=vfs.name)
    else:
        which = "object=1" if name is None else f"at={quote(str(at))}"
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        connection = apsw.Connection(f"file:{quote(name or object or '')}?{which}", flags, vfs.name)
    connection.set_busy_timeout(5000)
    return connection


def integrity(catalog: Catalog, path: str) -> list[str]:
    """What `PRAGMA integrity_check` finds. Raises what reading raises."""
    vfs = S3VFS.over(catalog)
    with closing(apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY, vfs=vfs.name)) as connection:
        try:
            rows = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
        except apsw.Error as error:
            if isinstance(error.__cause__, errors.S3BlockFSError):
                raise error.__cause__ from error
            rows = [str(error)]
    return [] if rows == ["ok"] else rows


@atexit.register
def _close_all() -> None:
    """A connection that ends with the interpreter calls Python objects that are no more, and crashes (measured)."""
    for connection in apsw.connections():
        try:
            if any(connection.db_filename(name) in _files for name in connection.db_names()):
                connection.close()
        except apsw.Error as error:
            log.error("closing at exit: %s", error)


def engine(bucket: Any, config: Config, identity: object = None) -> Catalog:
    """The databases of a bucket as this process knows them."""
    key = (os.getpid(), identity or _identity(bucket), config)
    with _lock:
        if key not in _engines:
            mine = [(other, catalog) for other, (catalog, _) in _engines.items() if other[0] == key[0]]
            unused = [other for other, catalog in mine if not catalog.opened() and not catalog.files]
            for other in unused[:-ENGINES_KEPT]:
                for part in _engines.pop(other):
                    part.close()
            runtime = Runtime()
            store = S3Store(bucket, runtime=runtime, request_deadline_s=config.request_deadline_s, **config.access)
            _engines[key] = Catalog(store, runtime, config, ""), runtime
        _engines[key] = _engines.pop(key)
        return _engines[key][0]


def _identity(bucket: Any) -> object:
    return bucket if isinstance(bucket, str) else S3Store.identity(bucket)


def _translated(cls: type[T]) -> type[T]:
    """What a method that SQLite calls raises becomes a result code; nothing unforeseen may end as SQLITE_ERROR."""

    def translate(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        unlocks = name == "xUnlock"

        @wraps(method)
        def call(*arguments: Any) -> Any:  # no parameter of its own: Python would copy the others
            self = arguments[0]
            try:
                if self.pid != _pid and self.pid is not None:
                    if unlocks or name == "xClose":
                        return None  # what a forked child inherited is not the child's to close
                    raise errors.NotSupported("a connection cannot be used in a forked child: open a new one there")
                result = method(*arguments)
            except apsw.Error:
                raise
            except Exception as error:
                full = isinstance(error, OSError) and error.errno == errno.ENOSPC
                default = apsw.FullError if full else apsw.IOError
                code = next((c for kind, c in _CODES.get(name, {}).items() if isinstance(error, kind)), default)
                raise code(str(error) or type(error).__name__) from error
            if unlocks:
                self.raise_interrupt()
            return result

        return call

    for name in [name for name in vars(cls) if name.startswith("x")]:
        setattr(cls, name, translate(name, getattr(cls, name)))
    return cls


@_translated
class S3VFS(apsw.VFS):
    """A drop-in for `sqlite_s3vfs.S3VFS`: `apsw.Connection(key_prefix, vfs=S3VFS(bucket=bucket).name)`."""

    pid = None  # it belongs to whoever uses it

    def __init__(self, bucket: Any, block_size: int = 4 * KIB, **options: Any) -> None:
        """`bucket` and `options` as for `connect`. `block_size`, in bytes, is that of databases made here: a power of
        two from 512 to 4 MiB. Others are accepted, as by the original library, and stand for 4096."""
        usable = MIN_BLOCK_BYTES <= block_size <= MAX_BLOCK_BYTES and not block_size & (block_size - 1)
        self._config = Config(block_size=block_size if usable else 4 * KIB, **options)
        self._bucket = bucket
        self._over: Catalog | None = None
        self._identity = _identity(bucket)
        self.name = f"s3vfs-{uuid.uuid4()}"
        super().__init__(name=self.name, base="", maxpathname=1200)

    @classmethod
    def over(cls, catalog: Catalog) -> "S3VFS":
        """A VFS for databases that a catalog leads to; their names are keys below its root."""
        vfs = cls("")
        vfs._over = catalog
        return vfs

    @property
    def catalog(self) -> Catalog:
        """The engine of this process: in a forked child another one than in its parent."""
        return self._over or engine(self._bucket, self._config, self._identity)

    # --- what SQLite calls -----------------------------------------------------------------------------

    def xFullPathname(self, name: str) -> str:
        return f"{_prefix(name)}#{next(_serials):x}"

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> Any:
        path, wanted = name.filename() if isinstance(name, apsw.URIFilename) else name, flags[0]
        if path is None or wanted & _TEMPORARY:
            return apsw.VFSFile("", name, flags)
        if wanted & apsw.SQLITE_OPEN_WAL:
            raise errors.NotSupported(f"{path}: journal_mode=WAL works on a mount only; stay with DELETE")
        if wanted & apsw.SQLITE_OPEN_MAIN_DB:
            if isinstance(name, apsw.URIFilename) and name.uri_boolean("nolock", False):
                raise errors.NotSupported(f"{path}: needs its locks; leave out nolock=1")
            at = name.uri_parameter("at") if isinstance(name, apsw.URIFilename) else None
            is_object = isinstance(name, apsw.URIFilename) and name.uri_boolean("object", False)
            if self._config.read_only or at is not None or is_object:
                flags[1] = apsw.SQLITE_OPEN_READONLY
            return self._open(path.rpartition("#")[0], bool(wanted & apsw.SQLITE_OPEN_CREATE), path, at, is_object)
        if (side := self.catalog.side_files.get(path)) is None and not wanted & apsw.SQLITE_OPEN_CREATE:
            raise apsw.CantOpenError(f"{path}: no such journal")
        return _SideFile(side or self.catalog.side_files.create(path), _owner(path))

    def xAccess(self, pathname: str, flags: int) -> bool:
        owner = _files.get(pathname.removesuffix(JOURNAL_SUFFIX).removesuffix(LOG_SUFFIX))
        if owner is not None and owner.database.path != pathname:  # twice in each transaction
            return owner.catalog.side_files.get(pathname) is not None
        if is_side_file(pathname):
            return self.catalog.side_files.get(pathname) is not None
        found = self.catalog.lookup(prefix := _prefix(pathname))
        if found is None or found.is_folder or found.prefix != prefix:
            return False
        writable = not self._config.read_only and prefix not in self.catalog.refused
        return writable or flags != apsw.SQLITE_ACCESS_READWRITE

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """Of a journal or super-journal: SQLite's commit point. Of a database: its end."""
        if not is_side_file(filename):
            if not self.xAccess(filename, apsw.SQLITE_ACCESS_EXISTS):  # `remove` knows `acme` as `acme.sqlite`, too
                raise errors.DatabaseNotFound(f"{filename}: no such database")
            return self.catalog.remove(_prefix(filename))
        side, owner = self.catalog.side_files.get(filename), _owner(filename)
        if owner is not None:  # also without a journal, when PRAGMA journal_mode clears up: then nothing is dirty
            owner.commit_point(owner.database.finalise_journal)
        elif side is not None:  # a super-journal holds the names of the journals that it binds together
            owners = map(_owner, side.read(0, side.size).decode().split("\0"))
            for owner in sorted(filter(None, owners), key=lambda each: each.database.prefix):
                owner.commit_point(partial(owner.database.finalise_super_journal, filename))
        return self.catalog.side_files.remove(filename)

    def xSleep(self, microseconds: int) -> int:
        # The default VFS would keep the GIL, also from the thread that is waited for.
        time.sleep(microseconds / 1_000_000)  # noqa: TID251  SQLite's waiting, not the engine's
        return microseconds

    # --- what applications call ------------------------------------------------------------------------

    def serialize_iter(self, key_prefix: str) -> Iterator[bytes]:
        """The bytes of a regular SQLite file: of one committed state, whoever writes meanwhile."""
        with self.serialize_fileobj(key_prefix) as file:
            yield from iter(partial(file.read, MIB), b"")

    def serialize_fileobj(self, key_prefix: str) -> io.BufferedReader:
        """The same as a file that can be read once. Raises DatabaseNotFound; a read, what reading a database raises."""
        return io.BufferedReader(_Serialized(self._open(key_prefix, False)), MIB)

    def deserialize_iter(self, key_prefix: str, bytes_iter: Iterable[bytes]) -> None:
        """Make these bytes the database, by one commit at the end; what fails before leaves the old one, or an empty
        one where there was none. Raises CommitLost if others commit meanwhile, StoreError, OSError (no space)."""
        file = self._open(key_prefix, True)
        try:
            file.database.refresh(0)
            file.database.truncate(0)
            for chunk in bytes_iter:
                file.database.write(file.database.size, bytes(chunk))
            file.commit_point(file.database.close_handle)
        finally:
            file.release()
        file.raise_interrupt()

    def _open(
        self, prefix: str, create: bool, path: str | None = None, at: str | None = None, is_object: bool = False
    ) -> "_DatabaseFile":
        path = path or self.xFullPathname(prefix)
        database = self.catalog.connection(prefix, path, create, at, is_object)
        _files[path] = file = _DatabaseFile(self.catalog, database, Readahead(self._config.readahead_size))
        return file


def _prefix(name: str) -> str:
    """The key prefix that a name stands for, which may be that of an open file."""
    return _files[name].database.prefix if name in _files else name


def _owner(journal: str) -> "_DatabaseFile | None":
    return _files.get(journal.removesuffix(JOURNAL_SUFFIX))


class _File:
    """What is the same for all of ours."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def _nothing(self, *_: Any, **__: Any) -> Any:
        """SQLite's defaults. Side files live and die with this process, and the last reference closes them."""
        return False

    xClose = xFileControl = xSectorSize = xSync = _nothing


@_translated
class _DatabaseFile(_File):
    """A connection's database."""

    def __init__(self, catalog: Catalog, database: Database, readahead: Readahead) -> None:
        super().__init__()
        self.catalog, self.database, self.readahead = catalog, database, readahead
        self._interrupts: list[BaseException] = []

    def xRead(self, amount: int, offset: int) -> bytes:
        return self.database.read(offset, amount, self.readahead)

    def xWrite(self, data: bytes, offset: int) -> None:
        self.database.write(offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        self.database.truncate(size)

    def xFileSize(self) -> int:
        return self.database.size

    def xSync(self, flags: int) -> None:
        files = self.catalog.side_files
        self.commit_point(partial(self.database.sync, commits=lambda name: name is not None and not files.get(name)))

    def xLock(self, level: int) -> None:
        try:
            if level == _RESERVED:
                self.catalog.require_writable(self.database.prefix)
            kind, first, last = _LOCKS[level]
            self.database.lock(self, kind, first, last, self.pid)
        except (errors.AccessDenied, errors.ReadOnly) as error:
            if level != _RESERVED:
                raise
            self.catalog.refused.add(self.database.prefix)
            raise errors.ReadOnly(str(error)) from error

    def xUnlock(self, level: int) -> None:
        if level == _SHARED:
            self.database.lock(self, *_LOCKS[level], self.pid)
            self.commit_point(lambda pid: self.database.unlock(self, PENDING_BYTE, RESERVED_BYTE))
        else:
            self.database.unlock(self, 0, TO_END)

    def xCheckReservedLock(self) -> bool:
        return bool(self.database.locks.writers())

    def xClose(self) -> None:
        try:
            # Dirty without a transaction: journal_mode=OFF, synchronous=OFF. In doubt: COMMIT said so already.
            if not self.database.owner_closes(self) and self.database.is_dirty and not self.database.in_doubt:
                self.commit_point(self.database.close_handle)
        finally:
            self.release()

    def commit_point(self, publish: Callable[[int], object]) -> None:
        """Call `publish` with the process id. Ctrl-C in the middle of a PUT would leave SQLite with one opinion of the
        transaction and S3 with another, so it has to wait for `raise_interrupt`."""
        before, refused = self.database.version, self.catalog.refused
        try:
            uninterrupted(lambda: publish(self.pid), self._interrupts)
        except errors.AccessDenied:
            refused.add(self.database.prefix)
            raise
        if self.database.version is not before:
            refused.discard(self.database.prefix)

    def raise_interrupt(self) -> None:
        """Raise what a signal handler raised during a commit point: its fate is known now, and SQLite can bear it."""
        if self._interrupts:
            raise self._interrupts.pop()

    def release(self) -> None:
        self.database.unlock(self, 0, TO_END)
        self.catalog.release(self.database)
        self.catalog.side_files.remove(self.database.path + JOURNAL_SUFFIX)
        del _files[self.database.path]


@_translated
class _SideFile(_File):
    """A journal or super-journal. Zeroing a journal's header or cutting it to nothing is a commit point."""

    def __init__(self, side: SideFile, owner: _DatabaseFile | None) -> None:
        super().__init__()
        self._side, self._owner = side, owner

    def xRead(self, amount: int, offset: int) -> bytes:
        return self._side.read(offset, amount)

    def xWrite(self, data: bytes, offset: int) -> None:
        if offset == 0 and self._owner is not None:
            if is_hot(bytes(data[:1])):
                self._owner.database.journal_begins()
            elif len(data) >= HEADER_BYTES:
                self._finalise()
        self._side.write(offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        if size == 0:
            self._finalise()
        self._side.truncate(size)

    def _finalise(self) -> None:
        if not self._side.linked:
            raise errors.StoreUnavailable(f"{self._side.path}: was removed; its transaction is lost")
        if self._owner is not None:
            self._owner.commit_point(self._owner.database.finalise_journal)

    def xFileSize(self) -> int:
        return self._side.size


class _Serialized(io.RawIOBase):
    """The bytes of a database, from start to end."""

    def __init__(self, file: _DatabaseFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.database.read(self._position, len(buffer), self._file.readahead)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.release()
        super().close()
