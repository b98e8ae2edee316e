"""The uncommitted bytes against a byte array and the set of offsets that were written."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from tempfile import gettempdir

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from s3blockfs import dirty as module
from s3blockfs.dirty import Dirty, Range, spill_folder

BLOCK = 16
LIMIT = 6 * BLOCK
HALVES = range(0, LIMIT + 1, BLOCK // 2)
OFFSETS = st.integers(0, LIMIT) | st.sampled_from(HALVES)  # halves of blocks, so that ranges often touch
DATA = st.binary(min_size=1, max_size=3 * BLOCK) | st.sampled_from(HALVES[1:6]).map(lambda n: b"x" * n)


def joined(offsets: set[int]) -> list[Range]:
    """The maximal runs of a set of offsets."""
    rows: list[Range] = []
    for offset in sorted(offsets):
        if rows and rows[-1][1] == offset:
            rows[-1] = (rows[-1][0], offset + 1)
        else:
            rows.append((offset, offset + 1))
    return rows


class Model(RuleBasedStateMachine):
    """`written` maps each dirty offset to what its byte may be: one value, or two after a write that failed there."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, set[int]] = {}

    @initialize(size=OFFSETS)
    def start(self, size: int) -> None:
        self.dirty = Dirty(gettempdir(), BLOCK, size)
        self.committed = self.size = self.cut = size

    @rule(offset=OFFSETS, data=DATA | st.just(b""))
    def write(self, offset: int, data: bytes) -> None:
        self.dirty.write(offset, data)
        self.written.update((offset + i, {byte}) for i, byte in enumerate(data))
        if data:
            self.size = max(self.size, offset + len(data))

    @rule(offset=OFFSETS, data=DATA, done=st.integers(0, 3 * BLOCK))
    def write_without_space(self, offset: int, data: bytes, done: int) -> None:
        """The spill folder fills up in the middle of a write: nothing counts as written that was not before."""
        real = os.pwrite
        left = min(done, len(data) - 1)

        def full(fd: int, part: bytes, at: int) -> int:
            nonlocal left
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = real(fd, part[: min(left, 7)], at)  # a few bytes at a time, as a kernel may
            left -= count
            return count

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.os, "pwrite", full)
            with pytest.raises(OSError, match="No space"):
                self.dirty.write(offset, data)
        for at, byte in enumerate(data, offset):
            if at in self.written:
                self.written[at] = self.written[at] | {byte}

    @rule(size=OFFSETS)
    def truncate(self, size: int) -> None:
        self.dirty.truncate(size)
        self.written = {at: values for at, values in self.written.items() if at < size}
        self.size, self.cut = size, min(self.cut, size)

    @rule(start=OFFSETS, end=OFFSETS)
    def look(self, start: int, end: int) -> None:
        expected = joined({at for at in self.written if start <= at < end})
        assert list(self.dirty.ranges(start, end)) == expected
        if expected:  # several ranges in one read: what lies between is undefined, the length is not
            low, high = expected[0][0], expected[-1][1]
            data = self.dirty.read(low, high)
            assert len(data) == high - low
            assert all(data[at - low] in values for at, values in self.written.items() if low <= at < high)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "dirty"):
            return
        assert (self.dirty.size, self.dirty.cut, self.dirty.held_bytes) == (self.size, self.cut, len(self.written))
        assert self.dirty.is_dirty == (bool(self.written) or self.size != self.committed or self.cut < self.committed)
        ranges = list(self.dirty.ranges(0, 10 * LIMIT))
        assert ranges == joined(set(self.written))
        for low, high in ranges:
            assert all(byte in self.written[at] for at, byte in enumerate(self.dirty.read(low, high), low))
        for block, many in product(range(-(-LIMIT // BLOCK) + 4), (1, 2)):
            offsets = range(block * BLOCK, (block + many) * BLOCK)
            inside = [at for at in offsets if at < self.size]
            assert self.dirty.is_full(block, block + many) == (
                bool(inside) and all(at in self.written for at in inside)
            )

    def teardown(self) -> None:
        if hasattr(self, "dirty"):
            self.dirty.close()


TestModel = Model.TestCase
TestModel.settings = settings(deadline=None, max_examples=150, stateful_step_count=25)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Dirty]]:
    made: list[Dirty] = []

    def new(block_size: int = 4096, size: int = 0) -> Dirty:
        made.append(Dirty(str(tmp_path), block_size, size))
        return made[-1]

    yield new
    for dirty in made:
        dirty.close()


@given(st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 9000)), max_size=30), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_sizes_of_a_database(writes: list[tuple[int, int]], seed: int) -> None:
    """With blocks and writes of real sizes every dirty range reads back, and none crosses what was written."""
    rng = random.Random(seed)
    model = bytearray(300_000)
    dirty = Dirty(gettempdir(), 4096, 0)
    try:
        offsets: set[int] = set()
        for offset, length in writes:
            data = rng.randbytes(length)
            dirty.write(offset, data)
            model[offset : offset + length] = data
            offsets.update(range(offset, offset + length))
        rows = list(dirty.ranges(0, 300_000))
        assert rows == joined(offsets)
        assert all(dirty.read(low, high) == model[low:high] for low, high in rows)
    finally:
        dirty.close()


@pytest.mark.parametrize("parts", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 0, 2)])
def test_parts_that_touch_make_a_whole(parts: tuple[int, ...], make: Callable[..., Dirty]) -> None:
    """A block written page by page, in any order, is whole with the last page: then it can be uploaded as a block."""
    dirty = make(size=4 * 4096)
    for count, part in enumerate(parts):
        assert not dirty.is_full(2, 3), count
        dirty.write(2 * 4096 + part * 1024, b"p" * 1024)
    assert dirty.is_full(2, 3)


def test_nothing_is_left_in_the_spill_folder(make: Callable[..., Dirty], tmp_path: Path) -> None:
    """The spill file has no name, so that a killed process leaves nothing behind."""
    dirty = make()
    dirty.write(10_000_000, b"far away")
    assert list(tmp_path.iterdir()) == []
    assert dirty.read(10_000_000, 10_000_008) == b"far away"


def test_a_missing_spill_folder_is_an_error_of_the_write(tmp_path: Path) -> None:
    """And only of that: nothing is dirty then, and reads go on."""
    dirty = Dirty(str(tmp_path / "none"), 4096, 100)
    with pytest.raises(FileNotFoundError):
        dirty.write(0, b"x")
    assert not dirty.is_dirty and dirty.held_bytes == 0 and dirty.size == 100 and not list(dirty.ranges(0, 100))
    dirty.truncate(10)
    assert dirty.is_dirty
    dirty.close()


def test_a_cut_that_fails_changes_nothing(make: Callable[..., Dirty], monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the bytes behind the cut would be forgotten, and committed ones would show in their place."""
    dirty = make(size=20_000)
    dirty.write(0, b"a" * 10_000)

    def fail(fd: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.os, "ftruncate", fail)
    with pytest.raises(OSError, match="Input/output"):
        dirty.truncate(5000)
    assert list(dirty.ranges(0, 20_000)) == [(0, 10_000)]
    assert (dirty.size, dirty.cut, dirty.held_bytes) == (20_000, 20_000, 10_000)
    monkeypatch.undo()
    dirty.truncate(5000)
    assert list(dirty.ranges(0, 20_000)) == [(0, 5000)] and dirty.read(0, 5000) == b"a" * 5000


def test_bytes_cut_off_do_not_come_back(make: Callable[..., Dirty]) -> None:
    """A file cut and grown again has a hole where the old bytes were, in the ranges and in the spill file."""
    dirty = make()
    dirty.write(0, b"a" * 10_000)
    dirty.truncate(100)
    dirty.truncate(10_000)
    assert list(dirty.ranges(0, 10_000)) == [(0, 100)]
    assert dirty.cut == 0 and dirty.size == 10_000
    dirty.write(9_999, b"z")
    assert dirty.read(100, 10_000) == bytes(9_899) + b"z"


def test_a_sparse_giant_costs_its_ranges_only(make: Callable[..., Dirty]) -> None:
    """A cut, a look or a range over a terabyte goes through the dirty blocks, not through all blocks of the file."""
    dirty = make(block_size=512, size=1 << 40)
    dirty.write(1 << 39, b"x" * 1000)
    dirty.write(0, b"y")
    assert list(dirty.ranges(0, 1 << 40)) == [(0, 1), (1 << 39, (1 << 39) + 1000)]
    dirty.truncate((1 << 39) + 10)
    assert list(dirty.ranges(0, 1 << 40)) == [(0, 1), (1 << 39, (1 << 39) + 10)]
    assert dirty.held_bytes == 11


def test_the_spill_folder_is_not_tmp_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp is often memory. What is configured counts first, then $TMPDIR."""
    monkeypatch.delenv("TMPDIR", raising=False)
    assert spill_folder(None) == "/var/tmp"
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert spill_folder(None) == "/elsewhere"
    assert spill_folder("/here") == "/here"


def test_no_bytes_have_no_ranges(make: Callable[..., Dirty]) -> None:
    """Nor has a stretch that begins behind its end, in the middle of a dirty range."""
    dirty = make()
    dirty.write(0, b"a" * 100)
    assert dirty.ranges(50, 50) == dirty.ranges(60, 50) == []
