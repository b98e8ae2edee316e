"""S3VFS in the place of sqlite-s3vfs: what that package's users and its own tests do."""

from __future__ import annotations

import hashlib
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest
import sqlite_s3vfs
from inprocess import PATIENCE_MS, bucket_of, connect, elsewhere, key, rows
from mounting import Place, numbers, sqlite
from proxy import FaultProxy

from s3blockfs import errors
from s3blockfs.vfs import S3VFS

pytestmark = pytest.mark.s3


def local_database(rows_of_1k: int = 100) -> bytes:
    """A database file as the `sqlite3` program writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.db"
        statement = f"INSERT INTO t SELECT randomblob(1000) FROM ({numbers(rows_of_1k)})"
        sqlite(path, "CREATE TABLE t(x)", statement)
        return path.read_bytes()


def opened(vfs: S3VFS, name: str) -> apsw.Connection:
    connection = apsw.Connection(name, vfs=vfs.name)
    connection.set_busy_timeout(PATIENCE_MS)
    return connection


@pytest.mark.parametrize("block_size", [4095, 4096, 4097, 65536, 1, 512])
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_every_block_size_that_the_original_takes(place: Place, block_size: int, page_size: int) -> None:
    vfs = S3VFS(bucket=bucket_of(place), block_size=block_size)
    with closing(opened(vfs, key(place))) as db:
        cursor = db.cursor()
        cursor.execute(f"PRAGMA page_size = {page_size}; PRAGMA journal_mode = DELETE; CREATE TABLE t(x, y)").fetchall()
        cursor.execute("BEGIN; INSERT INTO t VALUES (1, 2); COMMIT")
        with db:
            cursor.executemany("INSERT INTO t VALUES (?, ?)", [(n, "x" * 1000) for n in range(100)])
        assert cursor.execute("SELECT count(*) FROM t").fetchall() == [(101,)]
    assert elsewhere(place, "SELECT count(*), sum(length(y)) FROM t") == [(101, 100_001)]
    db.close()


def test_several_connections_of_one_vfs(place: Place) -> None:
    vfs = S3VFS(bucket_of(place))
    one, two = opened(vfs, key(place)), opened(S3VFS(bucket_of(place)), key(place))
    one.execute("CREATE TABLE t(x)")
    for number in range(5):
        one.execute("INSERT INTO t VALUES (?)", (number,))
        assert rows(two)[-1] == (number,)
    assert one.filename.partition("#")[0] == key(place)
    one.close()
    two.close()


def test_a_name_without_a_dot_and_one_with_a_sign(place: Place) -> None:
    vfs = S3VFS(bucket_of(place))
    for name in ("acme", "a#1", "ümlaut mit raum", "x" * 255):
        with closing(opened(vfs, key(place, name))) as db:
            db.execute("CREATE TABLE t(x); INSERT INTO t VALUES (?)", (name,))
        assert elsewhere(place, name=name) == [(name,)]
        assert vfs.xAccess(key(place, name), apsw.SQLITE_ACCESS_EXISTS)
        db.close()


def test_serialized_it_is_an_ordinary_file(place: Place, tmp_path: Path) -> None:
    vfs = S3VFS(bucket_of(place))
    with closing(opened(vfs, key(place))) as db:
        db.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    (tmp_path / "iter.db").write_bytes(b"".join(vfs.serialize_iter(key_prefix=key(place))))
    assert sqlite(tmp_path / "iter.db", "PRAGMA integrity_check", "SELECT * FROM t") == "ok\n1"
    with vfs.serialize_fileobj(key_prefix=key(place)) as file:
        assert file.read(16) == b"SQLite format 3\0"
        rest = file.read()
        assert (b"SQLite format 3\0" + rest, file.read()) == ((tmp_path / "iter.db").read_bytes(), b"")
    bucket_of(place).Object(key(place, "copy")).upload_fileobj(vfs.serialize_fileobj(key_prefix=key(place)))
    assert place.get("copy") == (tmp_path / "iter.db").read_bytes()
    with pytest.raises(errors.DatabaseNotFound):
        list(vfs.serialize_iter(key_prefix=key(place, "none")))
    db.close()


def test_serializing_shows_one_state_whoever_writes(place: Place) -> None:
    vfs = S3VFS(bucket_of(place))
    content = local_database(3000)
    vfs.deserialize_iter(key_prefix=key(place), bytes_iter=[content])
    chunks = vfs.serialize_iter(key_prefix=key(place))
    seen = next(chunks)
    with closing(opened(vfs, key(place))) as db:
        db.execute("UPDATE t SET x = randomblob(1000); VACUUM")
    assert seen + b"".join(chunks) == content


@pytest.mark.parametrize("chunk", [1, 1000, 4096, 1 << 20])
def test_deserialized_it_is_the_same(place: Place, chunk: int) -> None:
    vfs = S3VFS(bucket_of(place))
    content = local_database(20 if chunk == 1 else 100)
    pieces = (content[at : at + chunk] for at in range(0, len(content), chunk))
    vfs.deserialize_iter(key_prefix=key(place), bytes_iter=pieces)
    assert b"".join(vfs.serialize_iter(key_prefix=key(place))) == content
    assert elsewhere(place, "SELECT count(*) FROM t")[0][0] in (20, 100)


def test_deserializing_a_database_in_wal_mode(place: Place, tmp_path: Path) -> None:
    sqlite(tmp_path / "wal.db", "PRAGMA journal_mode=WAL", "CREATE TABLE t(x)", "INSERT INTO t VALUES (1)")
    content = (tmp_path / "wal.db").read_bytes()
    assert content[18:20] == b"\2\2"
    vfs = S3VFS(bucket_of(place))
    vfs.deserialize_iter(key_prefix=key(place), bytes_iter=[content[:19], content[19:]])
    with closing(opened(vfs, key(place))) as db:
        db.execute("INSERT INTO t VALUES (2)")
    assert elsewhere(place) == [(1,), (2,)]
    db.close()


def test_deserializing_is_one_commit_and_failing_leaves_the_old_database(place: Place, proxy: FaultProxy) -> None:
    vfs = S3VFS(bucket_of(place.via(proxy.url)), 65536)
    db = opened(vfs, key(place))
    db.execute("CREATE TABLE t(x); INSERT INTO t VALUES ('old')")
    content = local_database(9000)
    states = []

    def interrupted() -> Iterator[bytes]:
        for at in range(0, len(content), 1_000_000):
            yield content[at : at + 1_000_000]
            states.append(elsewhere(place) == rows(db) == [("old",)])
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        vfs.deserialize_iter(key_prefix=key(place), bytes_iter=interrupted())
    assert len(states) > 9 and all(states)
    assert rows(db) == elsewhere(place) == [("old",)]
    proxy.reset()
    vfs.deserialize_iter(key_prefix=key(place), bytes_iter=[content])
    assert proxy.counts()["PUT", "head"] == 1
    assert rows(db, "SELECT count(*) FROM t") == elsewhere(place, "SELECT count(*) FROM t") == [(9000,)]
    assert len(b"".join(vfs.serialize_iter(key(place)))) == len(content)
    db.close()


def test_deserializing_loses_against_a_commit_in_between(place: Place) -> None:
    vfs = S3VFS(bucket_of(place))
    with connect(place) as db:
        db.execute("CREATE TABLE t(x)")

    def source() -> Iterator[bytes]:
        yield b"SQLite format 3\0"
        db.execute("INSERT INTO t VALUES (1)")

    with pytest.raises(errors.CommitLost):
        vfs.deserialize_iter(key_prefix=key(place), bytes_iter=source())
    assert elsewhere(place) == [(1,)]
    db.close()


def test_large_databases_pass_through_in_constant_memory(place: Place) -> None:
    """96 MB in and out, in no more memory than caches and uploads may take."""
    vfs = S3VFS(bucket_of(place), 1 << 20, cache_size=1 << 22, memory=1 << 23, readahead_size=1 << 21)
    piece = os.urandom(1 << 18)
    count = 96 * 4
    digest = hashlib.md5(piece * 4).hexdigest()
    tracemalloc.start()
    try:
        vfs.deserialize_iter(key_prefix=key(place), bytes_iter=(piece for _ in range(count)))
        chunks: Any = vfs.serialize_iter(key_prefix=key(place))
        assert sum(hashlib.md5(chunk).hexdigest() == digest for chunk in chunks) == 96
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("block_size", [4095, 4096, 65536])
def test_a_store_of_the_original_is_read_and_then_converted(place: Place, block_size: int) -> None:
    original = sqlite_s3vfs.S3VFS(bucket=bucket_of(place), block_size=block_size)
    with closing(apsw.Connection(key(place), vfs=original.name)) as db:
        db.execute(f"CREATE TABLE t(x); INSERT INTO t SELECT i FROM ({numbers(5000)})")
    before = place.listing()
    vfs = S3VFS(bucket=bucket_of(place), block_size=block_size)
    assert vfs.xAccess(key(place), apsw.SQLITE_ACCESS_EXISTS)
    with closing(opened(vfs, key(place))) as db:
        assert rows(db, "SELECT count(*) FROM t") == [(5000,)]
        assert b"".join(vfs.serialize_iter(key(place))) == b"".join(original.serialize_iter(key(place)))
        assert place.listing() == before
        db.execute("DELETE FROM t WHERE x > 10")
        assert rows(db, "SELECT count(*) FROM t") == elsewhere(place, "SELECT count(*) FROM t") == [(10,)]
    assert not set(before) & set(place.listing())
