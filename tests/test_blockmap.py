"""The block map against a dict, with small leaves, so that splitting, sharing and lazy loading happen all the time."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
from engine import catalog, new_store
from hypothesis import given, settings
from hypothesis import strategies as st

from s3blockfs import blockmap, commit
from s3blockfs.blockmap import BlockMap, EncodedMap
from s3blockfs.errors import StoreUnavailable
from s3blockfs.format import extents as codec
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.keys import ObjectRef

BLOCKS = 60
LEAF = 4

#: Which slot of which object holds each block, and what it is complete to.
Model = dict[int, tuple[ObjectRef, int, int]]


def object_ref(number: int) -> ObjectRef:
    nonce = number.to_bytes(8, "big")
    return ObjectRef(number, nonce, nonce)


@contextmanager
def small_leaves(inline_bytes: int = 0, leaf: int = LEAF) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockmap, "LEAF_EXTENTS", leaf)
        patch.setattr(blockmap, "INLINE_MAP_BYTES", inline_bytes)
        yield


class Leaves:
    """Stored leaves: what a bucket would hold, and every load counted."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.loaded: list[str] = []
        self._nonces = 0

    def nonce(self) -> bytes:
        self._nonces += 1
        return self._nonces.to_bytes(8, "big")

    def load(self, ref: LeafRef) -> tuple[Extent, ...]:
        self.loaded.append(ref.key("P"))
        return codec.decode(self.bodies[ref.key("P")], "leaf")

    def encode(self, block_map: BlockMap, rev: int) -> EncodedMap:
        encoded = block_map.encode(rev, self.nonce)
        for ref, body in encoded.uploads:
            assert ref.key("P") not in self.bodies, "a leaf's name was used twice"
            self.bodies[ref.key("P")] = body
        return encoded

    def reload(self, encoded: EncodedMap) -> BlockMap:
        """What another machine sees."""
        return BlockMap.of(encoded.extents, encoded.leaves, self.load)


def as_dict(found: Sequence[Extent]) -> Model:
    rows: Model = {}
    end = 0
    for extent in found:
        assert extent.blocks > 0 and extent.first >= end, "extents overlap or are out of order"
        end = extent.end
        rows.update((extent.first + i, (extent.ref, extent.slot + i, extent.seq)) for i in range(extent.blocks))
    return rows


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[list[Extent], bool]]:
    """Per batch: disjoint extents of one seq (as those of a commit or fold are), and whether to store and reload then.

    The seqs come in any order: a fold of old commits may meet a head with newer ones.
    """
    seqs = draw(st.permutations(range(1, draw(st.integers(1, 14)) + 1)))
    result = []
    for seq in seqs:
        edges = sorted(draw(st.sets(st.integers(0, BLOCKS), min_size=2, max_size=14)))
        pairs = [p for p in pairwise(edges) if draw(st.booleans())]
        rows = [Extent(a, b - a, object_ref(seq), draw(st.integers(0, 3)) * 64 + a, seq) for a, b in pairs]
        result.append((draw(st.permutations(rows)), draw(st.booleans())))
    return result


@given(batches(), st.sampled_from([0, 150, 16384]))
@settings(deadline=None, max_examples=200)
def test_a_map_is_a_dict(todo: list[tuple[list[Extent], bool]], inline_bytes: int) -> None:
    """Per block the extent with the highest seq counts, however maps are merged, split, stored and reloaded."""
    with small_leaves(inline_bytes):
        store = Leaves()
        block_map = BlockMap.of((), (), store.load)
        model: Model = {}
        for rev, (rows, stores) in enumerate(todo):
            before = block_map
            block_map = before.replace(rows)
            assert as_dict(list(before.find(0, BLOCKS))) == model, "the map that was replaced changed"
            for block, row in as_dict(sorted(rows)).items():
                if block not in model or row[2] > model[block][2]:
                    model[block] = row
            if stores:
                encoded = store.encode(block_map, rev)
                assert not (encoded.extents and encoded.leaves)
                assert [ref.first for ref in encoded.leaves[:1]] in ([], [0])
                for ref in encoded.leaves:
                    assert len(codec.decode(store.bodies[ref.key("P")], "leaf")) <= LEAF
                block_map = store.reload(encoded)
            for first in range(0, BLOCKS, 7):
                for end in (first, first + 1, first + 13, BLOCKS):
                    found = as_dict(list(block_map.find(first, end)))
                    assert found == {b: row for b, row in model.items() if first <= b < end}


@given(batches(), st.lists(st.tuples(st.integers(0, 15), st.integers(0, BLOCKS)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=200)
def test_clipping_a_map(todo: list[tuple[list[Extent], bool]], drawn: list[tuple[int, int]]) -> None:
    """What was written before a cut is gone from there on; leaves before all cuts are not even loaded."""

    def limit(seq: int) -> int:
        return min((at for cut_seq, at in drawn if cut_seq > seq), default=blockmap.NO_END)

    with small_leaves():
        store = Leaves()
        block_map = BlockMap.of((), (), store.load)
        for rows, _ in todo:
            block_map = block_map.replace(rows)
        model = as_dict(list(block_map.find(0, BLOCKS)))
        first = min(at for _, at in drawn)
        before = store.encode(block_map, 1)
        clipped = store.reload(before).clip(first, limit)
        unloaded = [leaf for leaf, after in pairwise(before.leaves) if after.first <= first]
        assert not {leaf.key("P") for leaf in unloaded} & set(store.loaded)
        after = store.encode(clipped, 2)
        assert after.leaves[: len(unloaded)] == tuple(unloaded)
        expected = {block: row for block, row in model.items() if block < limit(row[2])}
        assert as_dict(list(store.reload(after).find(0, BLOCKS))) == expected
        if expected == model:
            assert after.leaves == before.leaves


def test_of_equal_seqs_the_new_extent_counts() -> None:
    """A compaction moves blocks to another object and keeps what they are complete to."""
    store = Leaves()
    old, moved = Extent(0, 10, object_ref(1), 0, 5), Extent(3, 4, object_ref(2), 0, 5)
    block_map = BlockMap.of((), (), store.load).replace([old]).replace([moved])
    assert as_dict(list(block_map.find(0, 10))) == {**as_dict([old]), **as_dict([moved])}


def scattered(count: int) -> list[Extent]:
    """Extents that cannot be joined."""
    return [Extent(2 * i, 1, object_ref(i), 0, 1) for i in range(count)]


def test_a_small_map_stays_in_the_head() -> None:
    """No upload and no GET for a map that fits inline."""
    store = Leaves()
    encoded = store.encode(BlockMap.of((), (), store.load).replace(scattered(100)), 1)
    assert encoded.extents == tuple(scattered(100)) and not encoded.leaves and not encoded.uploads
    assert not store.loaded


def test_a_map_beyond_its_space_in_the_head_goes_into_leaves() -> None:
    """Both limits hold: 16 KiB in the head, 1,024 extents and 64 KiB a leaf."""
    rng = random.Random(1)
    rows = [
        Extent(2 * i, 1, ObjectRef(i, rng.randbytes(8), rng.randbytes(8)), 0, rng.getrandbits(60)) for i in range(3000)
    ]
    store = Leaves()
    encoded = store.encode(BlockMap.of((), (), store.load).replace(rows), 1)
    assert not encoded.extents and len(encoded.leaves) >= 3
    assert all(len(body) <= 65536 for body in store.bodies.values())
    assert as_dict(list(store.reload(encoded).find(0, 6000))) == as_dict(rows)
    few = store.encode(BlockMap.of((), (), store.load).replace(rows[:600]), 2)
    assert not few.extents and len(codec.encode(rows[:600])) > codec.INLINE_MAP_BYTES


def test_a_look_up_loads_only_the_leaves_it_needs_and_each_once() -> None:
    """A point read in a large database costs one leaf; a map that was replaced goes on using what was loaded."""
    with small_leaves():
        store = Leaves()
        block_map = store.reload(store.encode(BlockMap.of((), (), store.load).replace(scattered(40)), 1))
        assert not store.loaded
        assert [e.first for e in block_map.find(50, 51)] == [50]
        assert len(store.loaded) == 1
        changed = block_map.replace([Extent(51, 1, object_ref(99), 0, 2)])
        assert [e.first for e in changed.find(50, 52)] == [50, 51]
        assert len(store.loaded) == 1
        assert len(list(block_map.find(0, 80))) == 40
        assert len(store.loaded) == len(set(store.loaded)) == len(store.bodies)


def test_a_leaf_that_cannot_be_loaded_is_asked_for_again() -> None:
    """An outage during a look-up is an error there and nowhere later."""
    with small_leaves():
        store = Leaves()
        encoded = store.encode(BlockMap.of((), (), store.load).replace(scattered(40)), 1)
        failures = [StoreUnavailable("down")]

        def load(ref: LeafRef) -> tuple[Extent, ...]:
            if failures:
                raise failures.pop()
            return store.load(ref)

        block_map = BlockMap.of(encoded.extents, encoded.leaves, load)
        with pytest.raises(StoreUnavailable):
            list(block_map.find(0, 80))
        assert as_dict(list(block_map.find(0, 80))) == as_dict(scattered(40))


def test_a_commit_uploads_only_the_leaves_it_changed() -> None:
    """The others keep their names, in the map that was reloaded and in the one that this process goes on with."""
    with small_leaves():
        store = Leaves()
        first = store.encode(BlockMap.of((), (), store.load).replace(scattered(40)), 1)
        for block_map in (store.reload(first), first.map):
            second = store.encode(block_map.replace([Extent(50, 1, object_ref(99), 0, 2)]), 2)
            assert len(second.uploads) == 1 and len(set(second.leaves) - set(first.leaves)) == 1
            third = store.encode(second.map.replace([]), 3)
            assert not third.uploads and third.leaves == second.leaves


def test_leaves_stay_filled() -> None:
    """Random updates split leaves in halves, not into a full one and a crumb, or the head would list one per extent."""
    rng = random.Random(1)
    leaf = 32
    with small_leaves(leaf=leaf):
        block_map = BlockMap.of((), (), Leaves().load)
        for seq in range(1, 1500):
            block_map = block_map.replace([Extent(2 * rng.randrange(1000), 1, object_ref(seq), 0, seq)])
        count = len(list(block_map.find(0, 2000)))
        leaves = block_map.encode(1, lambda: bytes(8)).leaves
    assert count > 700
    assert len(leaves) <= count / (leaf / 2)


def test_a_small_commit_is_one_put_also_with_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the map got its leaves, a commit that changes no extent uploads none of them."""
    monkeypatch.setattr(blockmap, "LEAF_EXTENTS", LEAF)
    monkeypatch.setattr(blockmap, "INLINE_MAP_BYTES", 0)
    monkeypatch.setattr(commit, "SMALL_COMMIT_BYTES", 8192)
    store, runtime = new_store()
    machine = catalog(store, runtime, block_size=512)
    try:
        database = machine.create("a.bin", exclusive=True)
        for part in range(6):  # the last leaves were written by commits, not read from a head
            database.write(part * 100_000, os.urandom(20_000))
            database.close_handle(0)
        assert len(database.version.head.leaves) > 1
        uploaded = store.count("PUT")
        for text in (b"one", b"two"):
            database.write(5, text)
            database.close_handle(0)
        assert store.count("PUT") == uploaded + 2
    finally:
        machine.close()
        runtime.close()
