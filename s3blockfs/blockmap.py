"""The block map of one head: which block object holds each block. Immutable; leaves are fetched when first needed.

A block that no extent covers is a hole. A map that has outgrown the head is cut into leaves, of which a commit uploads
only those it changed."""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from s3blockfs.format import extents as codec
from s3blockfs.format.extents import INLINE_MAP_BYTES, LEAF_EXTENTS, Extent, LeafRef

NO_END = 1 << 62  # beyond every block
Load = Callable[[LeafRef], tuple[Extent, ...]]  # fetches and decodes one leaf; raises whatever a GET raises


class _Leaf:
    """Extents from block `first` up to the next leaf's; `ref` is where they are stored, None if new."""

    __slots__ = ("_extents", "_lock", "first", "ref")

    def __init__(self, first: int, ref: LeafRef | None, extents: tuple[Extent, ...] | None) -> None:
        self.first, self.ref, self._extents = first, ref, extents
        self._lock = threading.Lock()

    def extents(self, load: Load) -> tuple[Extent, ...]:
        with self._lock:
            if self._extents is None:
                assert self.ref is not None
                self._extents = load(self.ref)
            return self._extents


class EncodedMap(NamedTuple):
    """How a map goes into a head: either inline extents, or leaves, of which `uploads` must be stored first. `map` is
    the one to go on with: it knows its leaves as stored, so that later commits do not upload them again."""

    extents: tuple[Extent, ...]
    leaves: tuple[LeafRef, ...]
    uploads: tuple[tuple[LeafRef, bytes], ...]
    map: BlockMap


class BlockMap:
    """Sorted, disjoint extents."""

    def __init__(self, leaves: Sequence[_Leaf], load: Load) -> None:
        self._leaves, self._load = leaves, load
        self._firsts = [leaf.first for leaf in leaves]

    @classmethod
    def of(cls, extents: tuple[Extent, ...], leaves: tuple[LeafRef, ...], load: Load) -> BlockMap:
        return cls([_Leaf(leaf.first, leaf, None) for leaf in leaves] or _split(0, extents), load)

    def find(self, first: int, end: int) -> Iterator[Extent]:
        """The extents that overlap blocks first..end, clipped to them, in order."""
        index = max(0, bisect_right(self._firsts, first) - 1)
        while index < len(self._leaves) and (index == 0 or self._firsts[index] < end):
            rows = self._leaves[index].extents(self._load)
            row = max(0, bisect_right(rows, first, key=lambda extent: extent.first) - 1)
            while row < len(rows) and rows[row].first < end:
                yield from clipped(rows[row], first, end)
                row += 1
            index += 1

    def replace(self, new: Sequence[Extent]) -> BlockMap:
        """With `new` (disjoint) laid over it. Per block the extent with the higher seq stays (merging a fold or a bulk
        commit into a newer head), of equal ones the new: a compaction moves blocks and keeps their seq."""
        if not new:
            return self
        todo = sorted(new)
        leaves: list[_Leaf] = []
        for leaf, end in zip(self._leaves, [*self._firsts[1:], NO_END], strict=True):
            mine = [part for extent in todo for part in clipped(extent, leaf.first, end)]
            leaves += _split(leaf.first, _merge(leaf.extents(self._load), mine)) if mine else [leaf]
        return BlockMap(leaves, self._load)

    def clip(self, first: int, limit: Callable[[int], int]) -> BlockMap:
        """Without the blocks from `limit(seq)` on of extents that are complete to seq; no limit is below `first`."""
        leaves: list[_Leaf] = []
        for leaf, end in zip(self._leaves, [*self._firsts[1:], NO_END], strict=True):
            rows = leaf.extents(self._load) if first < end else ()
            kept = tuple(part for extent in rows for part in clipped(extent, extent.first, limit(extent.seq)))
            if kept == rows:
                leaves.append(leaf)
            elif kept or leaf.first == 0:
                leaves += _split(leaf.first, kept)
        return BlockMap(leaves, self._load)

    def encode(self, rev: int, nonce: Callable[[], bytes]) -> EncodedMap:
        """Inline if it fits and no leaf was ever stored, else leaves; `rev` names those that are uploaded."""
        if all(leaf.ref is None for leaf in self._leaves):
            extents = tuple(e for leaf in self._leaves for e in leaf.extents(self._load))
            if len(extents) <= LEAF_EXTENTS and len(codec.encode(extents)) <= INLINE_MAP_BYTES:
                return EncodedMap(extents, (), (), self)
        refs: list[LeafRef] = []
        uploads: list[tuple[LeafRef, bytes]] = []
        leaves: list[_Leaf] = []
        for number, leaf in enumerate(self._leaves):
            ref = leaf.ref
            if ref is None:
                rows = leaf.extents(self._load)
                body = codec.encode(rows)
                ref = LeafRef(leaf.first, number, rev, nonce(), zlib.crc32(body))
                uploads.append((ref, body))
                leaf = _Leaf(leaf.first, ref, rows)
            refs.append(ref)
            leaves.append(leaf)
        return EncodedMap((), tuple(refs), tuple(uploads), BlockMap(leaves, self._load))


def _split(first: int, rows: Sequence[Extent]) -> list[_Leaf]:
    """New leaves, the first of which covers the blocks from `first` on."""
    parts = max(1, -(-len(rows) // LEAF_EXTENTS))
    step = max(1, -(-len(rows) // parts))  # even parts: a full leaf and a crumb would breed crumbs
    starts = range(0, max(1, len(rows)), step)
    return [_Leaf(rows[start].first if start else first, None, tuple(rows[start : start + step])) for start in starts]


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """Neighbours that lie next to each other in one object become one extent."""
    result: list[Extent] = []
    for new in extents:
        last = result[-1] if result else None
        if last and (last.end, last.ref, last.slot + last.blocks, last.seq) == (new.first, new.ref, new.slot, new.seq):
            result[-1] = last._replace(blocks=last.blocks + new.blocks)
        else:
            result.append(new)
    return result


def clipped(extent: Extent, first: int, end: int) -> Iterator[Extent]:
    """The part of it inside first..end, if there is one."""
    low, high = max(extent.first, first), min(extent.end, end)
    if low < high:
        yield extent._replace(first=low, blocks=high - low, slot=extent.slot + low - extent.first)


def _merge(old: Sequence[Extent], new: Sequence[Extent]) -> list[Extent]:
    """Both sorted and disjoint. The higher seq wins, of equal ones the new; neighbours in one object are joined."""
    edges = sorted({edge for e in (*old, *new) for edge in (e.first, e.end)})
    best: list[Extent] = []
    i = j = 0
    for low, high in pairwise(edges):
        while i < len(old) and old[i].end <= low:
            i += 1
        while j < len(new) and new[j].end <= low:
            j += 1
        here = [part for extent in (*new[j : j + 1], *old[i : i + 1]) for part in clipped(extent, low, high)]
        if here:
            best.append(max(here, key=lambda extent: extent.seq))  # the first of equal ones
    return joined(best)
