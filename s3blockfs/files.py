"""`s3blockfs.open`: objects, and databases as the SQLite files that they are, as Python file objects.

Reading goes through the cache that this process has for the bucket. Writing uploads parts while more is written; the
object appears when the file is closed, or not at all. Threads: as for other Python files, one at a time. Forks: a file
belongs to the process that opened it."""

import atexit
import codecs
import errno
import io
import logging
import os
import re
from collections import deque
from concurrent.futures import Future, wait
from functools import partial
from typing import IO, Any, cast
from weakref import WeakSet

from s3blockfs import errors, header
from s3blockfs.catalog import Catalog
from s3blockfs.config import MIB, Config
from s3blockfs.format.keys import is_prefix
from s3blockfs.names import DATABASE_SUFFIXES
from s3blockfs.objectfile import BLOCK_BYTES, ObjectSnapshot, find
from s3blockfs.prefetch import Readahead
from s3blockfs.runtime import uninterrupted
from s3blockfs.snapshot import Snapshot
from s3blockfs.vfs import engine

log = logging.getLogger(__name__)

MOST_READ_BYTES = 8 * MIB  # by one call of `readinto`; larger reads are made of several
#: S3 takes 10,000 parts of at least 5 MiB. The first thousand have this size, the next twice that, and so on: 440 GB.
PART_BYTES, PARTS_OF_ONE_SIZE = 8 * MIB, 1000
PARTS_IN_FLIGHT = 4

#: Keys that would belong to a database with the prefix that is the group.
_INSIDE = re.compile(r"(.+)/(?:head|(?:data|map|archive)/[^/]+|\d{10})", re.DOTALL)

_writers: "WeakSet[Writer]" = WeakSet()


def open(
    url: str, mode: str = "rb", buffering: int = -1, encoding: str | None = None, *, bucket: Any = None, **options: Any
) -> IO[Any]:
    """Open `s3://BUCKET/KEY` like a local file: `rb` and `r` read and seek, `wb` and `w` write a new object from start
    to end. Text is UTF-8 unless `encoding` says otherwise. Where KEY is a database, its newest committed state is read.

    What was opened is what is read: an object that is replaced meanwhile raises ObjectReplaced. What is written appears
    when the file is closed; after an exception in its `with` block, or if it is never closed, nothing does. `bucket`, a
    boto3 Bucket, may bring credentials and endpoint; `options` are the fields of `config.Config`. Raises UsageError,
    ObjectNotFound, StoreError; closing what was written, OutcomeUnknown if nobody can tell whether it was stored."""
    match = re.fullmatch(r"s3://([^/]+)/(.+)", url, re.DOTALL)
    if match is None or mode not in ("r", "rt", "rb", "w", "wt", "wb") or (buffering == 0 and "b" not in mode):
        raise errors.UsageError(f"open({url!r}, {mode!r}): write s3://BUCKET/KEY, and rb, r, wb or w")
    if bucket is not None and bucket.name != match[1]:
        raise errors.UsageError(f"{url}: is not in the bucket {bucket.name}")
    codecs.lookup(encoding := encoding or "utf-8")
    config = Config(**options)
    catalog = engine(bucket or match[1], config)
    if "w" in mode:
        writer = Writer(catalog, config, match[2], url)
        return cast(IO[Any], writer) if "b" in mode else _Text(cast(Any, writer), encoding)
    reader = Reader(catalog, config, *_newest(catalog, match[2]), url)
    if buffering == 0:
        return cast(IO[Any], reader)
    binary = io.BufferedReader(reader, max(buffering, BLOCK_BYTES))
    return binary if "b" in mode else io.TextIOWrapper(binary, encoding)


class _File(io.RawIOBase):
    def __init__(self, catalog: Catalog, url: str, mode: str) -> None:
        super().__init__()
        self.name, self.mode, self._pid, self._at = url, mode, os.getpid(), 0
        catalog.files.add(self)

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.name}: I/O operation on closed file")
        if self._pid != os.getpid():
            raise errors.NotSupported(f"{self.name}: cannot be used in a forked child; open it anew there")

    def tell(self) -> int:
        return self._at


class Reader(_File):
    """One state of a database, or one version of an object."""

    def __init__(self, catalog: Catalog, config: Config, state: Snapshot, is_database: bool, url: str) -> None:
        super().__init__(catalog, url, "rb")
        self._readahead = Readahead(config.readahead_size)
        self._state, self._is_database = state, is_database

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._require_open()
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._state.head.size}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        self._at = at
        return at

    def readinto(self, buffer: Any, /) -> int:
        self._require_open()
        view = memoryview(buffer).cast("B")
        start, length = self._at, min(len(view), MOST_READ_BYTES)
        if length <= BLOCK_BYTES:  # not the next block on account of a few bytes
            length = min(length, BLOCK_BYTES - start % BLOCK_BYTES)
        low = 0 if self._is_database and start < header.HEADER_BYTES else start
        data = self._state.read(low, start + length - low)
        data = (header.in_rollback_mode(low, data) if self._is_database else data)[start - low :]
        if ahead := self._readahead.next_range(start, length, self._state.head.size):
            self._state.prefetch(*ahead)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(partial(self.read, MOST_READ_BYTES), b""))


class Writer(_File):
    """A new object; whatever is written is taken, so nothing has to buffer above it. `flush` promises nothing."""

    def __init__(self, catalog: Catalog, config: Config, key: str, url: str) -> None:
        super().__init__(catalog, url, "wb")
        self._source, self._key = catalog.at(key)[0], key
        self._timeout_s = config.transaction_deadline_s
        self._buffer, self._upload = bytearray(), ""
        self._etags: list[str] = []
        self._pending: deque[Future[str]] = deque()
        if config.read_only:
            raise errors.ReadOnly(f"{url}: opened with read_only")
        inside = _INSIDE.fullmatch(key)
        for prefix in (key, inside[1]) if inside else (key,):
            version = catalog.at(prefix)[1].read() if is_prefix(prefix) else None
            if version is not None and not version.head.deleted:
                text = f"belongs to the database {prefix}; write to that by SQL, or replace it by `s3blockfs import`"
                raise errors.UsageError(f"{url}: {text}")
        _writers.add(self)

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        raise io.UnsupportedOperation("not readable")

    def write(self, data: Any, /) -> int:
        self._require_open()
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), PART_BYTES):
                self._buffer += view[start : start + PART_BYTES]
                sent = len(self._etags) + len(self._pending)
                if len(self._buffer) > (size := PART_BYTES * (1 + sent // PARTS_OF_ONE_SIZE)):
                    self._send(size)
        except BaseException:
            self.abandon()
            raise
        self._at += len(view)
        return len(view)

    def close(self) -> None:
        if self.closed:
            return
        interrupts: list[BaseException] = []
        try:
            self._require_open()
            uninterrupted(self._publish, interrupts)
        finally:
            self.abandon()
        if interrupts:
            raise interrupts.pop()

    def abandon(self) -> None:
        """Leave nothing behind, and close."""
        if self.closed:
            return
        super().close()
        if self._pid == os.getpid():
            for future in self._pending:
                future.cancel()
            wait(self._pending)
            try:
                if self._upload:
                    self._source.store.abort_upload(self._key, self._upload, site="file")
            except errors.StoreError as error:
                log.warning("parts of an unfinished upload are left; a lifecycle rule can delete such: %s", error)

    def __exit__(self, kind: object, *_: object) -> None:
        self.close() if kind is None else self.abandon()

    def __del__(self) -> None:
        if not self.closed and self in _writers:
            log.warning("%s: was never closed, so nothing was stored", self.name)
            self.abandon()

    def _send(self, size: int) -> None:
        """The first bytes are a part: in the background, while more is written."""
        store, runtime = self._source.store, self._source.runtime
        self._upload = self._upload or store.begin_upload(self._key, site="file")
        while len(self._pending) >= PARTS_IN_FLIGHT:
            self._etags.append(self._pending.popleft().result())
        part, number = bytes(self._buffer[:size]), len(self._etags) + len(self._pending) + 1
        del self._buffer[:size]
        put = partial(store.put_part, self._key, self._upload, number, part, site="file", timeout_s=self._timeout_s)
        self._pending.append(runtime.submit(put))

    def _publish(self) -> None:
        store = self._source.store
        if self._upload:
            self._send(len(self._buffer))
            self._etags += [future.result() for future in self._pending]
        try:
            if self._upload:
                upload, self._upload = self._upload, ""
                try:
                    store.complete_upload(self._key, upload, self._etags, site="file", timeout_s=self._timeout_s)
                except errors.RequestInDoubt:
                    raise  # it is perhaps being completed, and must not be aborted
                except BaseException:
                    self._upload = upload
                    raise
            else:
                store.put(self._key, bytes(self._buffer), site="file", timeout_s=self._timeout_s)
        except (errors.RequestInDoubt, errors.StoreUnavailable) as error:
            text = f"{self.name}: the store does not say whether it was stored; look, or write it again"
            raise errors.OutcomeUnknown(text) from error


class _Text(io.TextIOWrapper):
    def __exit__(self, kind: object, *_: object) -> None:
        self.close() if kind is None else cast(Writer, self.buffer).abandon()

    def __del__(self) -> None:
        cast(Writer, self.buffer).__del__()


@atexit.register
def _abandon_all() -> None:
    for writer in list(_writers):
        writer.__del__()


def _newest(catalog: Catalog, key: str) -> tuple[Snapshot, bool]:
    """What a key stands for, and whether that is a database: only names that look like one are asked for that first."""
    source, heads = catalog.at(key)
    may_be = is_prefix(key)
    found = None if may_be and key.endswith(DATABASE_SUFFIXES) else find(source)
    if found is None and may_be and (version := heads.read()) is not None and not version.head.deleted:
        return Snapshot.load(source, version), True
    if (found := found or find(source)) is None:
        raise errors.ObjectNotFound(f"{source.name_of(key)}: no such object, and no such database")
    return ObjectSnapshot(source, found), False
