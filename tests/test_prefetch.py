"""Read-ahead: what it asks for, given what was read."""

from __future__ import annotations

import random
import threading
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from engine import ManualRuntime
from hypothesis import given, settings
from hypothesis import strategies as st
from memorystore import MemoryStore

from s3blockfs.cache import BlockCache
from s3blockfs.config import Config
from s3blockfs.format.data import OBJECT_BYTES
from s3blockfs.objectfile import ObjectSnapshot
from s3blockfs.objectstore import Listed, StoredObject
from s3blockfs.prefetch import (
    BYTES_A_MISS,
    FIRST_WINDOW_BYTES,
    GROWTH,
    LATELY_S,
    MISSES,
    REFILL_BYTES,
    SLACK_BYTES,
    Density,
    Readahead,
)
from s3blockfs.snapshot import Source
from s3blockfs.view import View

KIB = 1024
MIB = 1024 * KIB
LIMIT = 16 * MIB


@given(st.integers(1, 60 * MIB), st.integers(4 * KIB, 256 * KIB), st.integers(0, 64 * MIB), st.integers(1, LIMIT))
@settings(deadline=None, max_examples=60)
def test_a_scan_is_covered_once_within_the_window(length: int, step: int, start: int, limit: int) -> None:
    """Nothing is asked for twice, nothing that was read already, nothing skipped or beyond window and end."""
    ahead = Readahead(limit)
    size = start + length
    known = start  # everything from the start to here was read or asked for
    for offset in range(start, size, step):
        end = min(offset + step, size)
        asked = ahead.next_range(offset, step, size)
        known = max(known, end)
        if asked is not None:
            assert asked[0] == known < asked[1] <= min(size, offset + step + limit)
            known = asked[1]
    assert known == size


def test_a_scan_soon_reads_whole_objects_and_stays_ahead() -> None:
    """After the start nearly every byte was asked for before it was read, in few, large ranges."""
    ahead = Readahead(LIMIT)
    size, step = 200 * MIB, 128 * KIB
    late, ranges, known = 0, [], 0
    for offset in range(0, size, step):
        late += offset + step > known
        asked = ahead.next_range(offset, step, size)
        if asked is not None:
            ranges.append(asked)
            known = asked[1]
    assert late <= 3
    assert ranges[0][1] - ranges[0][0] <= FIRST_WINDOW_BYTES
    assert len(ranges) <= 2 * size / OBJECT_BYTES
    assert sum((high - low) % OBJECT_BYTES != 0 for low, high in ranges) <= 8


@pytest.mark.parametrize("seed", range(5))
def test_no_prefetch_on_random_access(seed: int) -> None:
    """Point reads in a large file, each following its own chain of pages, cost what they read."""
    rng = random.Random(seed)
    ahead = Readahead(LIMIT)
    size = 10 << 30
    for _ in range(2000):
        assert ahead.next_range(rng.randrange(size // 4096) * 4096, 4096, size) is None


def test_two_neighbouring_reads_are_no_scan() -> None:
    """They happen by chance in any B-tree."""
    ahead = Readahead(LIMIT)
    rng = random.Random(1)
    size = 10 << 30
    for _ in range(500):
        offset = rng.randrange(size // 4096 - 2) * 4096
        assert ahead.next_range(offset, 4096, size) is None
        assert ahead.next_range(offset + 4096, 4096, size) is None


@pytest.mark.parametrize("offset", [0, 5 * MIB])
def test_reading_one_page_again_and_again_is_no_scan(offset: int) -> None:
    """Page 1 is read at every transaction; nothing behind it is fetched for that."""
    ahead = Readahead(LIMIT)
    assert [ahead.next_range(offset, 4096, 1 << 30) for _ in range(50)] == [None] * 50


def test_reading_backwards_is_no_scan() -> None:
    """What lies ahead of it was read already."""
    ahead = Readahead(LIMIT)
    assert [ahead.next_range(at, 4096, 1 << 30) for at in range(40 * MIB, 39 * MIB, -4096)] == [None] * 256


@pytest.mark.parametrize("seed", range(5))
def test_reads_out_of_order_are_a_scan(seed: int) -> None:
    """Kernel threads deliver the reads of one scan a little shuffled."""
    rng = random.Random(seed)
    ahead = Readahead(LIMIT)
    step, size = 128 * KIB, 100 * MIB
    offsets = sorted(range(0, size, step), key=lambda at: at + rng.randrange(SLACK_BYTES))
    asked = [found for at in offsets if (found := ahead.next_range(at, step, size)) is not None]
    assert sum(high - low for low, high in asked) > 0.9 * size
    assert all(a[1] <= b[0] for a, b in pairwise(asked)), "something was asked for twice"


@pytest.mark.parametrize("step", [4096, 65536, 128 * KIB])
def test_a_short_scan_asks_for_little(step: int) -> None:
    """At any moment no more than the first window or a few times what was read so far, whatever the size of a read."""
    ahead = Readahead(LIMIT)
    asked = 0
    for offset in range(0, 40 * MIB, step):
        found = ahead.next_range(offset, step, 1 << 30)
        asked += found[1] - found[0] if found else 0
        read = offset + step
        assert asked <= max(FIRST_WINDOW_BYTES, min((GROWTH + 1) * read, read + LIMIT))


@pytest.mark.parametrize("step", [4096, 65536, 128 * KIB])
def test_a_scan_is_at_full_speed_after_three_steps(step: int) -> None:
    """A little, some, all that the limit allows: each step is a wait of 15 ms."""
    ahead = Readahead(LIMIT)
    asked = [(at, found[1]) for at in range(0, 8 * MIB, step) if (found := ahead.next_range(at, step, 1 << 30))]
    ahead_bytes = [to - at for at, to in asked]
    assert ahead_bytes[0] <= FIRST_WINDOW_BYTES + step
    assert ahead_bytes[2] > LIMIT - OBJECT_BYTES
    assert asked[2][0] <= 4 * MIB


def test_a_reader_waits_while_what_lies_ahead_is_fetched_already() -> None:
    """Its own GET is answered only when the one for the bytes behind it has been sent."""
    runtime, gets, seen = ManualRuntime(), Counter[str](), threading.Event()

    class Store(MemoryStore):
        def get(self, key: str, *, start: int = 0, **options: Any) -> StoredObject:
            gets["own" if threading.current_thread() is threading.main_thread() else "ahead"] += 1
            if start > 22 * BLOCK:
                seen.set()
            if start == 22 * BLOCK:
                assert seen.wait(60), "nothing is fetched ahead of the third block while it is on its way"
            return super().get(key, start=start, **options)

    store = Store(runtime)
    etag = store.put("a", bytes(range(256)) * (32 * BLOCK // 256), site="t")
    source = Source(store, BlockCache(store, runtime, MIB, 60), runtime, "a")
    view = View(source, Config(), ObjectSnapshot(source, Listed("a", False, 32 * BLOCK, etag, 1.0)))
    ahead = Readahead(LIMIT)
    for block in (20, 21, 22):
        assert view.read(block * BLOCK, BLOCK, ahead) == bytes(range(256)) * (BLOCK // 256)
    runtime.close()
    assert gets == {"own": 3, "ahead": 1}


def test_a_jump_ends_the_scan_and_a_new_one_starts_small() -> None:
    """The window is that of the new place, not that of the old one."""
    ahead = Readahead(LIMIT)
    size = 1 << 30
    for offset in range(0, 50 * MIB, 128 * KIB):
        ahead.next_range(offset, 128 * KIB, size)
    asked = [ahead.next_range(at, 4096, size) for at in range(500 * MIB, 500 * MIB + 12 * 4096, 4096)]
    ranges = [found for found in asked if found is not None]
    assert asked[0] is None and ranges
    assert ranges[0][1] - ranges[0][0] <= FIRST_WINDOW_BYTES
    assert all(500 * MIB < low < high < 501 * MIB for low, high in ranges)


def test_switched_off() -> None:
    """A limit of 0 asks for nothing."""
    ahead = Readahead(0)
    assert all(ahead.next_range(at, 4096, 1 << 30) is None for at in range(0, MIB, 4096))


def test_a_file_that_ends_ends_it() -> None:
    """Nothing at or beyond the end, however often the end is read."""
    ahead = Readahead(LIMIT)
    size = MIB + 100
    asked = [ahead.next_range(at, 4096, size) for at in range(0, 2 * MIB, 4096)]
    assert max(found[1] for found in asked if found is not None) == size
    assert ahead.next_range(size - 100, 4096, size) is None
    assert ahead.next_range(0, 4096, 0) is None


def test_interior_pages_do_not_end_a_scan() -> None:
    """A table's scan reads an interior page every few hundred leaves, anywhere in the file, and goes on as before."""
    rng = random.Random(1)
    ahead = Readahead(LIMIT)
    size, step = 100 * MIB, 64 * KIB
    asked = []
    for offset in range(0, size, step):
        if offset % (2 * MIB) == 0:
            asked.append(ahead.next_range(rng.randrange(size // 4096) * 4096, 4096, size))
        asked.append(ahead.next_range(offset, step, size))
    ranges = [found for found in asked if found is not None]
    assert len(ranges) <= 2 * size / OBJECT_BYTES
    assert sum(high - low for low, high in ranges) > 0.9 * size


# --- dense random reads -----------------------------------------------------------------------------------

BLOCK = 64 * KIB
CACHE = 112 * MIB


def total(asked: list[tuple[int, int] | None]) -> int:
    return sum(high - low for low, high in filter(None, asked))


@pytest.mark.parametrize("seed", range(5))
def test_random_rows_of_a_database_that_fits_into_the_cache_bring_all_of_it(seed: int) -> None:
    """After few of them; nothing is asked for twice before it may have been evicted."""
    rng = random.Random(seed)
    density, size = Density(CACHE), 103 * MIB
    asked = [density.missed(0.0, rng.randrange(size // BLOCK) * BLOCK, size) for _ in range(100)]
    assert asked.index((0, size)) <= 12
    assert asked[:MISSES] == [None] * (MISSES - 1) + asked[MISSES - 1 : MISSES]
    assert total(asked) <= CACHE


@pytest.mark.parametrize("size", [1 << 40, 10 << 30, 1 << 30])
@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_rows_of_a_large_database_bring_nothing_else(seed: int, size: int) -> None:
    rng = random.Random(seed)
    density = Density(CACHE)
    asked = [density.missed(n / 50, rng.randrange(size // BLOCK) * BLOCK, size) for n in range(100)]
    assert total(asked) <= (CACHE if size < 10 << 30 else 0)


@given(st.integers(1, 1 << 34), st.lists(st.integers(0, (1 << 34) - 1), max_size=400), st.integers(0, CACHE))
@settings(deadline=None, max_examples=60)
def test_what_is_asked_for_is_bounded_whatever_is_read(size: int, offsets: list[int], most: int) -> None:
    """By the cache, by a share of the misses in the long run, and by the misses that led to it."""
    density, misses = Density(most), 0
    asked = []
    for misses, offset in enumerate(offsets, 1):
        found = density.missed(0.0, offset % size, size)
        asked.append(found)
        assert total(asked) <= most + misses * REFILL_BYTES
        if found is not None:
            low, high = found
            assert 0 <= low <= offset % size < high <= size
            assert sum(low <= o % size < high for o in offsets[:misses]) >= max(MISSES, (high - low) // BYTES_A_MISS)


def test_reads_now_and_then_are_not_dense() -> None:
    density, size = Density(CACHE), 100 * MIB
    rng = random.Random(1)
    pause_s = LATELY_S / (MISSES - 2)
    assert all(density.missed(n * pause_s, rng.randrange(size), size) is None for n in range(200))


def test_dense_reads_of_a_part_bring_that_part() -> None:
    """Of 10 GB, those 16 MiB that are read."""
    density, size = Density(CACHE), 10 << 30
    rng = random.Random(1)
    asked = [density.missed(0.0, 5 * (1 << 30) + rng.randrange(16 * MIB), size) for _ in range(40)]
    low, high = max(filter(None, asked), key=lambda found: found[1] - found[0])
    assert low <= 5 << 30 and high >= (5 << 30) + 16 * MIB
    assert high - low <= 64 * MIB


def test_density_switched_off() -> None:
    density = Density(0)
    assert all(density.missed(0.0, at * BLOCK, MIB) is None for at in range(16))
