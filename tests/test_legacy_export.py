"""The way back: a database of this package is written in the layout of sqlite-s3vfs, and read by that library."""

from __future__ import annotations

from collections.abc import Iterator

import apsw
import pytest
import s3vfs
import sqlite_s3vfs
from engine import CONFIG, Call, InlineRuntime, World
from s3vfs import CREATE, MemoryBucket, P, adopt, dump, fill, keys, run, source_of

from s3blockfs import legacy
from s3blockfs.errors import DatabaseExists, StoreUnavailable, UsageError
from s3blockfs.snapshot import Snapshot


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


@pytest.fixture
def bucket(world: World) -> MemoryBucket:
    """A store with a few rows."""
    made = MemoryBucket(world.store.inner)
    run(made, P, CREATE, fill(60))
    return made


def export(world: World, block_size: int, target: str = "out/x.db") -> bytes:
    """Of the database at P; its bytes."""
    version = world.heads().read() or world.heads(P).read()
    assert version is not None
    snapshot = Snapshot.load(source_of(world), version)
    legacy.export_layout(snapshot, source_of(world, target), block_size, lambda *_: None)
    return snapshot.read(0, version.head.size)


@pytest.mark.parametrize("block_size", [512, 4095, 4096, 65536, 1 << 20])
def test_an_export_is_read_by_that_library(world: World, bucket: MemoryBucket, block_size: int) -> None:
    run(bucket, P, fill(800, start=1000))
    adopt(world)
    expected = export(world, block_size)
    assert s3vfs.content(bucket, "out/x.db") == expected
    assert sqlite_s3vfs.S3VFSFile("out/x.db", 0, bucket, block_size).xFileSize() == len(expected)
    assert run(bucket, "out/x.db", "SELECT * FROM t ORDER BY 1", block_size=block_size) == dump(expected)
    run(bucket, "out/x.db", fill(50, start=9000), block_size=block_size)
    assert len(dump(world.content("out/x.db"))) == 910


def test_a_wal_database_is_exported_in_rollback_mode(world: World, bucket: MemoryBucket) -> None:
    adopt(world)
    database = world.machine().open(P)
    database.write(18, b"\2\2")
    database.close_handle(0)
    export(world, 4096)
    assert len(run(bucket, "out/x.db", "SELECT * FROM t")) == 60


@pytest.mark.parametrize("there", ["out/x.db/head", "out/x.db/0000000009", "out/x.db-journal/0000000000"])
def test_an_export_never_goes_where_something_is(world: World, bucket: MemoryBucket, there: str) -> None:
    adopt(world)
    world.store.inner.put(there, b"")
    with pytest.raises(DatabaseExists, match="not empty"):
        export(world, 4096)
    assert keys(world, "out/") == [there]


@pytest.mark.parametrize("block_size", [0, 511, (4 << 20) + 1])
def test_block_sizes_that_make_no_sense(world: World, bucket: MemoryBucket, block_size: int) -> None:
    adopt(world)
    with pytest.raises(UsageError):
        export(world, block_size)


def test_an_interrupted_export_is_no_database(world: World, bucket: MemoryBucket) -> None:
    adopt(world)
    for at in range(10**6):
        count = 0

        def die(call: Call, now: str, at: int = at) -> None:
            nonlocal count
            count += call.site == "export" and call.operation == "PUT" and now == "before"
            if count > at:
                raise StoreUnavailable("no")

        world.store.rule = die
        try:
            export(world, 4096, f"out{at}.db")
        except StoreUnavailable:
            world.store.rule = None
            assert legacy.find(source_of(world, f"out{at}.db"), CONFIG) is None
            if at:
                with pytest.raises(apsw.Error):
                    run(bucket, f"out{at}.db", "SELECT * FROM t")
            continue
        break
    assert at > 4
