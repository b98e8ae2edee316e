"""Plain objects, read where they lie: one version of an object, by ranged GETs through the cache of the databases.

Every GET asks for the ETag with which the object was found, so one that was replaced or deleted meanwhile is an error,
never a mixture of two. There are no checksums of ours in it: what S3 and TLS deliver is what it holds.

A `Version` with a made-up head (rev 0) and its snapshot stands for it, as for a database of sqlite-s3vfs, so everything
above reads it like any other committed state. Threads: any."""

import hashlib
from collections.abc import Iterator

from s3blockfs import errors, header
from s3blockfs.config import KIB
from s3blockfs.format.data import COMMIT_ID_BYTES, FrameAddress
from s3blockfs.format.head import Head
from s3blockfs.format.keys import NONCE_BYTES, ObjectRef
from s3blockfs.objectstore import Listed
from s3blockfs.snapshot import Snapshot, Source, Version

BLOCK_BYTES = 64 * KIB  # what a point read fetches


class _Ref(ObjectRef):
    """An object with this ETag, under its own key."""

    __slots__ = ()

    @property
    def etag(self) -> str:
        return self.uid.decode()

    def key(self, prefix: str) -> str:
        return prefix


class _Block(FrameAddress):
    """Bytes of such an object, with no frame around them."""

    __slots__ = ()

    @property
    def end(self) -> int:
        return self.pos + self.stored

    def decode(self, buffer: bytes | memoryview | None, name: str) -> bytes:
        if buffer is None or len(buffer) != self.stored:
            raise errors.ObjectReplaced(f"{name}: replaced or deleted since it was opened; open it again")
        return bytes(buffer)


class ObjectSnapshot(Snapshot):
    """The object whose key is the prefix of `source`, as it was found. No map."""

    def __init__(self, source: Source, found: Listed) -> None:
        self._source, self._ref = source, _Ref(0, b"", found.etag.encode())
        self._places, self._top = {}, b""
        name = hashlib.blake2b(f"{source.prefix}\0{found.etag}".encode(), digest_size=COMMIT_ID_BYTES).digest()
        time_ms = int(found.modified_s * 1000)
        self.head = Head(name, 0, 1, name, found.size_bytes, BLOCK_BYTES, bytes(NONCE_BYTES), "", time_ms)
        self.version = Version(self.head, found.etag, self)

    def read(self, offset: int, length: int) -> bytes:
        """Raises ObjectReplaced, StoreError."""
        end = min(offset + length, self.head.size)
        if offset >= end:
            return b""
        blocks = self._source.cache.fetch(self._source.prefix, list(self._blocks(offset, end)), self._missed)
        skip = offset % BLOCK_BYTES
        return b"".join(blocks)[skip : skip + end - offset]

    def prefetch(self, offset: int, end: int) -> None:
        self._source.cache.prefetch(self._source.prefix, self._blocks(offset, min(end, self.head.size)))

    def _frames(self, first: int, end: int) -> None:
        """There are none."""

    def _blocks(self, offset: int, end: int) -> Iterator[FrameAddress]:
        for start in range(offset - offset % BLOCK_BYTES, end, BLOCK_BYTES):
            size = min(BLOCK_BYTES, self.head.size - start)
            yield _Block(self._ref, start, size, start, size)


def find(source: Source, before: Listed | None = None) -> Listed | None:
    """The object with that key, `before` itself if it is unchanged, None if there is none. One GET, which brings the
    first block along unless there was one before."""
    length = BLOCK_BYTES if before is None else 1
    try:
        answer = source.store.get(source.prefix, site="object", length=length)
    except errors.ObjectNotFound:
        return None
    if before is not None and before.etag == answer.etag:
        return before
    found = Listed(source.prefix, False, answer.size_bytes, answer.etag, answer.modified_s)
    if before is None and answer.body:
        size = len(answer.body)
        source.cache.put(source.prefix, _Block(_Ref(0, b"", found.etag.encode()), 0, size, 0, size), answer.body)
    return found


def as_database(source: Source, found: Listed) -> Version:
    """To be read by SQLite. Raises NotSupported when rows of it are elsewhere."""
    snapshot = ObjectSnapshot(source, found)
    if header.sets_wal(0, snapshot.read(0, header.HEADER_BYTES)):
        log = next(source.store.list(f"{source.prefix}-wal", site="object", max_keys=1), None)
        if log is not None and log.key == f"{source.prefix}-wal" and log.size_bytes:
            text = "rows are in its write-ahead log; upload it after a checkpoint"
            raise errors.NotSupported(f"{source.name_of(source.prefix)}: {text}")
    return snapshot.version
