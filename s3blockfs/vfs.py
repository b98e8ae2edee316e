"""The in-process face: an APSW VFS that translates SQLite's calls into calls of catalog.py, database.py and
sidefiles.py. Decides nothing. Needs no libfuse.

Every connection has a Database of its own, with its own snapshot and transaction. SQLite opens a journal by its name
and does not say for which connection, so `xFullPathname` gives every open its own name, `acme.sqlite#1f`.

Errors: at a commit point SQLite must get SQLITE_IOERR or SQLITE_FULL. After anything else it goes on with a page cache
full of what was never committed (pager.c, pager_error), and after SQLITE_BUSY a second COMMIT reports success. The text
and the `__cause__` of what the application gets say what really happened.

Threads: any. Forks: a connection belongs to the process that opened it.
"""

import atexit
import errno
import io
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from functools import partial, wraps
from itertools import count
from typing import Any, TypeVar

import apsw
from cachetools import LRUCache

from s3blockfs import errors
from s3blockfs.catalog import Catalog
from s3blockfs.config import KIB, MIB, Config
from s3blockfs.database import Database
from s3blockfs.format.head import MAX_BLOCK_BYTES, MIN_BLOCK_BYTES
from s3blockfs.journal import HEADER_BYTES, is_hot
from s3blockfs.locks import PENDING_BYTE, RESERVED_BYTE, SHARED_FIRST, SHARED_SIZE, TO_END, Kind
from s3blockfs.prefetch import Readahead
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store
from s3blockfs.sidefiles import JOURNAL_SUFFIX, SideFile, is_side_file

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Buckets (with their options) whose client and cache are kept when no connection uses them.
ENGINES_KEPT = 16

#: The original library's default, and what stands for a size that only old stores can have.
S3VFS_BLOCK_SIZE = 4 * KIB

#: Files that the default VFS keeps.
_TEMPORARY = apsw.SQLITE_OPEN_TEMP_DB | apsw.SQLITE_OPEN_TEMP_JOURNAL
_TEMPORARY |= apsw.SQLITE_OPEN_TRANSIENT_DB | apsw.SQLITE_OPEN_SUBJOURNAL

_READABLE = SHARED_FIRST, SHARED_FIRST + SHARED_SIZE - 1
#: What each level locks. PENDING would hold back other owners, and a connection's Database has but one.
_LOCKS = {
    apsw.SQLITE_LOCK_SHARED: (Kind.READ, *_READABLE),
    apsw.SQLITE_LOCK_RESERVED: (Kind.WRITE, RESERVED_BYTE, RESERVED_BYTE),
    apsw.SQLITE_LOCK_EXCLUSIVE: (Kind.WRITE, *_READABLE),
}

#: Result codes other than SQLITE_IOERR and SQLITE_FULL, by method.
_CODES: dict[str, dict[type[Exception], type[apsw.Error]]] = {
    "xOpen": dict.fromkeys(
        (errors.AccessDenied, errors.DatabaseNotFound, errors.NewerFormat, errors.NotSupported, errors.ReadOnly)
        + (errors.UsageError,),
        apsw.CantOpenError,
    ),
    "xLock": {errors.Busy: apsw.BusyError, errors.ReadOnly: apsw.ReadOnlyError},
}

_engines: LRUCache[object, Catalog] = LRUCache(ENGINES_KEPT)
_engines_lock = threading.Lock()
os.register_at_fork(
    before=_engines_lock.acquire, after_in_parent=_engines_lock.release, after_in_child=_engines_lock.release
)

#: The databases that are open in this process, by the names that `xFullPathname` gave them.
_files: dict[str, "_DatabaseFile"] = {}
_serials = count(1)


def connect(*, bucket: Any, name: str, block_size: int = 64 * KIB, **options: Any) -> apsw.Connection:
    """Open the database with key prefix `name`, created if missing. `bucket` is a name or a boto3 Bucket; `options` are
    the fields of `config.Config`. Connections with the same bucket and options share one cache.
    Raises apsw.CantOpenError, apsw.IOError, UsageError."""
    vfs = S3VFS(bucket, block_size, **options)  # which lives as long as its connections
    return apsw.Connection(name, vfs=vfs.name)


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


def _engine(bucket: Any, config: Config) -> Catalog:
    """The databases of a bucket as this process knows them."""
    named = isinstance(bucket, str)
    with _engines_lock:
        key = (os.getpid(), config, bucket if named else S3Store.identity(bucket))
        if key not in _engines:
            runtime = Runtime()
            where = {"endpoint_url": config.endpoint_url, "region": config.region, "profile": config.profile}
            make: Any = partial(S3Store, **where) if named else S3Store.from_bucket  # type: ignore[arg-type]
            store = make(bucket, runtime=runtime, request_deadline_s=config.request_deadline_s)
            _engines[key] = Catalog(store, runtime, config, "")
        return _engines[key]


def _translated(cls: type[T]) -> type[T]:
    """What a method that SQLite calls raises becomes a result code; nothing unforeseen may end as SQLITE_ERROR."""

    def translate(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, *arguments: Any) -> Any:
            try:
                if self.pid != os.getpid():
                    if name in ("xUnlock", "xClose"):  # what a forked child inherited is not the child's to close
                        return None
                    raise errors.NotSupported("a connection cannot be used in a forked child: open a new one there")
                result = method(self, *arguments)
            except apsw.Error:
                raise
            except Exception as error:
                full = isinstance(error, OSError) and error.errno == errno.ENOSPC
                code = _CODES.get(name, {}).get(type(error), apsw.FullError if full else apsw.IOError)
                raise code(str(error) or type(error).__name__) from error
            if name == "xUnlock":
                self.raise_interrupt()
            return result

        return call

    for name, method in list(vars(cls).items()):
        if name.startswith("x"):
            setattr(cls, name, translate(name, method))
    return cls


@_translated
class S3VFS(apsw.VFS):
    """A drop-in for `sqlite_s3vfs.S3VFS`: `apsw.Connection(key_prefix, vfs=S3VFS(bucket=bucket).name)`."""

    def __init__(self, bucket: Any, block_size: int = S3VFS_BLOCK_SIZE, **options: Any) -> None:
        """`bucket` and `options` as for `connect`. `block_size`, in bytes, is that of databases made here: a power of
        two from 512 to 4 MiB. Others are accepted, as by the original library, and stand for 4096."""
        usable = MIN_BLOCK_BYTES <= block_size <= MAX_BLOCK_BYTES and not block_size & (block_size - 1)
        self._config = Config(block_size=block_size if usable else S3VFS_BLOCK_SIZE, **options)
        self._bucket = bucket
        self._catalogs: dict[int, Catalog] = {}
        self.name = f"s3vfs-{uuid.uuid4()}"
        super().__init__(name=self.name, base="", maxpathname=1200)

    @classmethod
    def over(cls, catalog: Catalog) -> "S3VFS":
        """A VFS for databases that a catalog leads to; their names are keys below its root."""
        vfs = cls("")
        vfs._catalogs[os.getpid()] = catalog
        return vfs

    @property
    def catalog(self) -> Catalog:
        """The engine of this process: in a forked child another one than in its parent."""
        pid = os.getpid()
        return self._catalogs.get(pid) or self._catalogs.setdefault(pid, _engine(self._bucket, self._config))

    @property
    def pid(self) -> int:
        """A VFS belongs to whoever uses it."""
        return os.getpid()

    # --- what SQLite calls -----------------------------------------------------------------------------

    def xFullPathname(self, name: str) -> str:
        return f"{_prefix(name)}#{next(_serials):x}"

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> Any:
        path, wanted = name.filename() if isinstance(name, apsw.URIFilename) else name, flags[0]
        if path is None or wanted & _TEMPORARY:
            return apsw.VFSFile("", name, flags)
        if wanted & apsw.SQLITE_OPEN_WAL:
            raise errors.NotSupported(f"{path}: journal_mode=WAL is not supported yet; stay with DELETE")
        if wanted & apsw.SQLITE_OPEN_MAIN_DB:
            if self._config.read_only:
                flags[1] = apsw.SQLITE_OPEN_READONLY
            return self._open(path.rpartition("#")[0], path, bool(wanted & apsw.SQLITE_OPEN_CREATE))
        side = self.catalog.side_files.get(path)
        if side is None and not wanted & apsw.SQLITE_OPEN_CREATE:
            raise apsw.CantOpenError(f"{path}: no such journal")
        return _SideFile(side or self.catalog.side_files.create(path), _owner(path))

    def xAccess(self, pathname: str, flags: int) -> bool:
        if is_side_file(pathname):
            return self.catalog.side_files.get(pathname) is not None
        prefix = _prefix(pathname)
        found = self.catalog.lookup(prefix)
        exists = found is not None and not found.is_folder and found.prefix == prefix
        writable = not self._config.read_only and prefix not in self.catalog.refused
        return exists and (writable or flags != apsw.SQLITE_ACCESS_READWRITE)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """Of a journal or super-journal: SQLite's commit point. Of a database: its end."""
        if not is_side_file(filename):
            return self.catalog.remove(_prefix(filename))
        side, owner = self.catalog.side_files.get(filename), _owner(filename)
        if owner is not None:  # also without a journal, when PRAGMA journal_mode clears up: then nothing is dirty
            owner.finalise()
        elif side is not None:  # a super-journal holds the names of the journals that it binds together
            owners = map(_owner, side.read(0, side.size).decode().split("\0"))
            for owner in sorted(filter(None, owners), key=lambda each: each.database.prefix):
                owner.commit_point(partial(owner.database.finalise_super_journal, filename))
        return self.catalog.side_files.remove(filename)

    # --- what applications call ------------------------------------------------------------------------

    def serialize_iter(self, key_prefix: str) -> Iterator[bytes]:
        """The bytes of a regular SQLite file: of one committed state, whoever writes meanwhile."""
        with self.serialize_fileobj(key_prefix) as file:
            yield from iter(partial(file.read, MIB), b"")

    def serialize_fileobj(self, key_prefix: str) -> io.BufferedReader:
        """The same as a file that can be read once. Raises DatabaseNotFound; a read, what reading a database raises."""
        return io.BufferedReader(_Serialized(self._open(key_prefix, self.xFullPathname(key_prefix), False)), MIB)

    def deserialize_iter(self, key_prefix: str, bytes_iter: Iterable[bytes]) -> None:
        """Make these bytes the database, by one commit at the end; what fails before leaves the old one, or an empty
        one where there was none. Raises CommitLost if others commit meanwhile, StoreError, OSError (no space)."""
        file = self._open(key_prefix, self.xFullPathname(key_prefix), True)
        try:
            file.database.refresh(0)
            file.database.truncate(0)
            for chunk in bytes_iter:
                file.database.write(file.database.size, bytes(chunk))
            file.commit_point(file.database.close_handle)
        finally:
            file.release()
        file.raise_interrupt()

    # --- helpers ---------------------------------------------------------------------------------------

    def _open(self, prefix: str, name: str, create: bool) -> "_DatabaseFile":
        catalog = self.catalog
        database = catalog.connection(prefix, name, create)
        _files[name] = _DatabaseFile(catalog, name, database, Readahead(self._config.readahead_size))
        return _files[name]


def _prefix(name: str) -> str:
    """The key prefix that a name stands for, which may be that of an open file."""
    return _files[name].database.prefix if name in _files else name


def _owner(journal: str) -> "_DatabaseFile | None":
    return _files.get(journal.removesuffix(JOURNAL_SUFFIX))


class _File:
    """What SQLite asks of every file and is the same for all of ours."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def xFileControl(self, operation: int, pointer: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return 0  # the default

    def xDeviceCharacteristics(self) -> int:
        return 0


@_translated
class _DatabaseFile(_File):
    """A connection's database."""

    def __init__(self, catalog: Catalog, name: str, database: Database, readahead: Readahead) -> None:
        super().__init__()
        self._catalog = catalog
        self._name = name
        self._readahead = readahead
        self._level = apsw.SQLITE_LOCK_NONE
        self._interrupt: BaseException | None = None
        self.database = database

    def xRead(self, amount: int, offset: int) -> bytes:
        return self.database.read(offset, amount, self._readahead)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._require_lock()
        self.database.write(offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        self._require_lock()
        self.database.truncate(size)

    def xFileSize(self) -> int:
        return self.database.size

    def xSync(self, flags: int) -> None:
        self.commit_point(partial(self.database.sync, foreign=lambda name: self._catalog.side_files.get(name) is None))

    def xLock(self, level: int) -> None:
        if level == apsw.SQLITE_LOCK_RESERVED:
            try:
                self._catalog.require_writable()
            except errors.AccessDenied as error:
                self._catalog.refused.add(self.database.prefix)
                raise errors.ReadOnly(str(error)) from error
        self.database.lock(self, *_LOCKS[level], self.pid)
        self._level = level

    def xUnlock(self, level: int) -> None:
        if level == apsw.SQLITE_LOCK_SHARED:
            self.database.lock(self, *_LOCKS[level], self.pid)
            self.database.unlock(self, PENDING_BYTE, RESERVED_BYTE)
        else:
            self.database.unlock(self, 0, TO_END)
        self._level = level

    def xCheckReservedLock(self) -> bool:
        return bool(self.database.locks.writers())

    def xClose(self) -> None:
        try:
            # Dirty without a transaction: journal_mode=OFF, synchronous=OFF. In doubt: COMMIT said so already.
            if not self.database.owner_closes(self) and self.database.is_dirty and not self.database.in_doubt:
                self.commit_point(self.database.close_handle)
        finally:
            self.release()

    def finalise(self) -> None:
        """The journal is about to be unlinked, cut or zeroed."""
        self.commit_point(self.database.finalise_journal)

    def commit_point(self, publish: Callable[[int], object]) -> None:
        """Call `publish` with the process id, where no signal handler can tear it: Ctrl-C in the middle of a PUT would
        leave SQLite with one opinion of the transaction and S3 with another. See `raise_interrupt`."""
        before, outcome = self.database.version, Future[object]()

        def run() -> None:
            try:
                outcome.set_result(publish(self.pid))
            except BaseException as error:  # noqa: BLE001  raised by `result`
                outcome.set_exception(error)

        if threading.current_thread() is threading.main_thread():  # handlers run nowhere else
            threading.Thread(target=run, name="s3blockfs-commit").start()
        else:
            run()
        while not outcome.done():
            try:
                wait([outcome])
            except BaseException as error:  # noqa: BLE001  raised later
                self._interrupt = error
        try:
            outcome.result()
        except errors.AccessDenied:
            self._catalog.refused.add(self.database.prefix)
            raise
        if self.database.version is not before:
            self._catalog.refused.discard(self.database.prefix)

    def raise_interrupt(self) -> None:
        """Raise what a signal handler raised during a commit point: its fate is known now, and SQLite can bear it."""
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            raise interrupt

    def release(self) -> None:
        del _files[self._name]
        self.database.unlock(self, 0, TO_END)
        self._catalog.release(self.database)
        self._catalog.side_files.remove(self._name + JOURNAL_SUFFIX)

    def _require_lock(self) -> None:
        if self._level < apsw.SQLITE_LOCK_RESERVED:
            raise errors.NotSupported(f"{self._name}: writing without a lock; leave out nolock=1")


@_translated
class _SideFile(_File):
    """A journal or super-journal. Zeroing a journal's header or cutting it to nothing is a commit point."""

    def __init__(self, side: SideFile, owner: _DatabaseFile | None) -> None:
        super().__init__()
        self._side = side
        self._owner = owner

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
            self._owner.finalise()

    def xFileSize(self) -> int:
        return self._side.size

    def xSync(self, flags: int) -> None:
        """It lives and dies with this process."""

    def xClose(self) -> None:
        """The last reference closes it."""


class _Serialized(io.RawIOBase):
    """The bytes of a database, from start to end."""

    def __init__(self, file: _DatabaseFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.xRead(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.release()
        super().close()
