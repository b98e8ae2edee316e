"""Read-ahead: what it asks for, given what was read."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3blockfs.format.data import OBJECT_BYTES
from s3blockfs.prefetch import FIRST_WINDOW_BYTES, SLACK_BYTES, Readahead

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
        assert asked <= max(FIRST_WINDOW_BYTES, 5 * (offset + step))


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
