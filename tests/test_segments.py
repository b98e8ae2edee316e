"""Segments: the commits of a log, and what is fetched with their indexes; what is fetched ahead."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from engine import Call, InlineRuntime, World, shrink_limits, small_leaves

from s3blockfs.errors import DamagedObject, StoreUnavailable
from s3blockfs.prefetch import Readahead

PREFIX = "a.db"


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(4096)


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


def test_it_comes_in_pieces_as_well(world: World) -> None:
    """As a commit changes it: here a counter, there a number of pages."""
    database = world.machine().create(PREFIX, exclusive=True)
    for number in range(1, 100):
        database.write(number * 100_000, noise(number))
    for offset in (28, 60, 92):
        database.write(offset, b"1234")
    database.close_handle(0)
    opened = world.machine().open(PREFIX)
    world.store.calls.clear()
    assert opened.read(0, 100) == bytes(28) + (b"1234" + bytes(28)) * 2 + b"1234" + bytes(4)
    assert world.store.calls == []


def test_the_start_of_the_file_comes_with_the_index(world: World) -> None:
    """Whoever opens a database reads that first: also in a segment it takes no request of its own. If it is damaged,
    the database can be opened all the same, and who reads it is told."""
    database = world.machine().create(PREFIX, exclusive=True)
    for number in range(100):
        database.write(number * 100_000, noise(number))
    database.close_handle(0)
    opened = world.machine().open(PREFIX)
    world.store.calls.clear()
    assert opened.read(0, 4096) == noise(0) and world.store.calls == []
    assert opened.read(100_000, 4096) == noise(1) and len(world.store.calls) == 1
    version = world.heads(faulty=False).read()
    assert version is not None
    (segment,) = version.head.segments
    key, at = segment.ref.key(PREFIX), segment.index_pos - 1
    body = world.store.inner.get(key, site="t").body
    world.store.inner.put(key, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :], site="t")
    damaged = world.machine().open(PREFIX)
    assert damaged.read(100_000, 4096) == noise(1)
    with pytest.raises(DamagedObject):
        damaged.read(0, 4096)


def test_read_ahead_that_fails_fails_no_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf of the map, behind what is read, cannot be had; what is read lies in the cache."""
    shrink_limits(monkeypatch)
    small_leaves(monkeypatch)
    writer = world.machine(faulty=False, block_size=4096).create(PREFIX, exclusive=True)
    for at in range(0, 120 * 4096, 3 * 4096):
        writer.write(at, noise(at) * 3)
        writer.close_handle(0)
    reader = world.machine().open(PREFIX)
    before = [reader.read(at, 8192) for at in range(0, 6 * 4096, 8192)]

    def rule(call: Call, when: str) -> None:
        if call.operation == "GET":
            raise StoreUnavailable("away")

    world.store.rule = rule
    ahead = Readahead(1 << 20)
    assert [reader.read(at, 8192, ahead) for at in range(0, 6 * 4096, 8192)] == before
