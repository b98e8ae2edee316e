"""The real sqlite-s3vfs, on a real bucket or on the in-memory store behind the few calls of boto3 that it makes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import apsw
import sqlite_s3vfs
from engine import CONFIG, World
from memorystore import MemoryStore

from s3blockfs import legacy
from s3blockfs.cache import BlockCache
from s3blockfs.errors import ObjectNotFound
from s3blockfs.snapshot import Source, Version


class Died(BaseException):
    """The process that used that library died here."""


class MemoryBucket:
    """What sqlite-s3vfs uses of a boto3 Bucket. `on_change` is called before every PUT and DELETE and may raise."""

    def __init__(self, store: MemoryStore, on_change: Callable[[], None] = lambda: None) -> None:
        self.store, self.on_change = store, on_change
        self.meta = SimpleNamespace(client=SimpleNamespace(exceptions=SimpleNamespace(NoSuchKey=ObjectNotFound)))
        self.objects = SimpleNamespace(filter=lambda Prefix: _Objects(self, Prefix))

    def Object(self, key: str, size: int = 0) -> Any:
        def get() -> dict[str, Any]:
            body = io.BytesIO(self.store.get(key).body)
            return {"Body": SimpleNamespace(read=body.read, iter_chunks=lambda: iter(lambda: body.read(1024), b""))}

        def put(Body: bytes) -> None:
            self.on_change()
            self.store.put(key, bytes(Body))

        def delete() -> None:
            self.on_change()
            self.store.delete([key])

        return SimpleNamespace(key=key, size=size, get=get, put=put, delete=delete)


class _Objects:
    def __init__(self, bucket: MemoryBucket, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix

    def __iter__(self) -> Iterator[Any]:
        entries = sorted(self._bucket.store.list(self._prefix), key=lambda entry: entry.key)
        return iter([self._bucket.Object(entry.key, entry.size_bytes) for entry in entries])

    def delete(self) -> None:
        for entry in self:
            entry.delete()


@contextlib.contextmanager
def connected(bucket: Any, prefix: str, block_size: int = 4096) -> Iterator[apsw.Connection]:
    """A connection by that library; one whose process `Died` is closed without a trace in the bucket."""
    vfs = sqlite_s3vfs.S3VFS(bucket=bucket, block_size=block_size)
    connection = apsw.Connection(prefix, vfs=vfs.name)
    died = False
    try:
        yield connection
    except Died:
        died = True
        raise
    finally:
        if isinstance(bucket, MemoryBucket) and died:
            bucket.on_change = _refuse
        with contextlib.suppress(apsw.Error, Died):
            connection.close()


def _refuse() -> None:
    raise Died


def run(bucket: Any, prefix: str, *statements: str, block_size: int = 4096) -> list[Any]:
    """The rows of the last statement."""
    rows: list[Any] = []
    with connected(bucket, prefix, block_size) as connection:
        for statement in statements:
            rows = list(connection.execute(statement))
    return rows


def content(bucket: Any, prefix: str) -> bytes:
    """The file, as that library gives it out."""
    return b"".join(sqlite_s3vfs.S3VFS(bucket=bucket).serialize_iter(key_prefix=prefix))


def dump(file: bytes) -> list[Any]:
    """All rows of table t; the file must be a sound database."""
    connection = apsw.Connection(":memory:")
    try:
        connection.deserialize("main", file)
        assert list(connection.execute("PRAGMA integrity_check")) == [("ok",)]
        return list(connection.execute("SELECT * FROM t ORDER BY 1"))
    finally:
        connection.close()


def fill(rows: int, size: int = 300, start: int = 1) -> str:
    return (
        f"WITH n(i) AS (SELECT {start} UNION ALL SELECT i+1 FROM n WHERE i<{start + rows - 1}) "
        f"INSERT INTO t SELECT i, randomblob({size}) FROM n"
    )


CREATE = "CREATE TABLE t(id INTEGER PRIMARY KEY, data)"


#: Where the tests put their database.
P = "old/app.db"


def keys(world: World, prefix: str = P) -> list[str]:
    return [entry.key for entry in world.store.inner.list(prefix)]


def source_of(world: World, prefix: str = P) -> Source:
    return Source(world.store, BlockCache(world.store, world.runtime, 1 << 20, 5), world.runtime, prefix)


def adopt(world: World, prefix: str = P, **options: object) -> Version:
    heads = legacy.AnyHead(source_of(world, prefix), CONFIG)
    version = heads.read()
    assert version is not None and version.snapshot is not None
    return heads.convert(version, **options)  # type: ignore[arg-type]
