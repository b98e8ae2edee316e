"""Reading one committed state: a decoded head plus an index of its log. Immutable.

Look-up is by seq: a log entry counts for a block only if its seq is higher than what the block's extent in the map is
complete to; older entries are covered by newer ones when the index is built. A commit that cut the file masks older
bytes beyond its `cut`, in the log (removed when the index is built) and in the base (`_Cut`).

Thread rule: any thread. Does not belong here: uncommitted bytes (dirty.py), finding a newer head (head.py).
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cachetools import LRUCache

from s3blockfs.blockmap import BlockMap
from s3blockfs.cache import BlockCache
from s3blockfs.errors import DamagedObject, ObjectNotFound
from s3blockfs.format import extents as map_codec
from s3blockfs.format.data import MAX_FRAME_BYTES, Commit, FrameAddress, Index, decode_index, slot_address
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.head import Head, Segment
from s3blockfs.format.keys import NONCE_BYTES, ObjectRef
from s3blockfs.format.tail import LogCommit
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import Runtime

#: Indexes of segments kept decoded: an index names a few hundred extents.
_INDEXES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Version:
    """A head as it was read or written: `etag` is what the next swap must match."""

    head: Head
    etag: str
    body: bytes


class Piece(NamedTuple):
    """Bytes start..end of the file, from the log: where `source` holds the bytes from file offset `origin` on."""

    start: int
    end: int
    seq: int
    source: bytes | FrameAddress
    origin: int


class _Cut(NamedTuple):
    """Base bytes at or beyond `at` that are older than commit `seq` are gone."""

    seq: int
    at: int


@dataclass(slots=True)
class Source:
    """Where snapshots of one database read from."""

    store: ObjectStore
    cache: BlockCache
    runtime: Runtime
    prefix: str
    _indexes: LRUCache[ObjectRef, Index] = field(default_factory=lambda: LRUCache(_INDEXES_KEPT))
    _indexes_lock: threading.Lock = field(default_factory=threading.Lock)  # a look-up in an LRU changes it

    def name_of(self, key: str) -> str:
        return f"{self.store.name}/{key}"

    def new_ref(self, rev: int) -> ObjectRef:
        """A name for an upload based on the head with this `rev`."""
        nonce = self.runtime.token(NONCE_BYTES)
        return ObjectRef(rev, nonce, nonce)

    def load_leaf(self, leaf: LeafRef) -> tuple[Extent, ...]:
        key = leaf.key(self.prefix)
        body = self._get(key, "map")
        if zlib.crc32(body) != leaf.crc:
            raise DamagedObject(f"{self.name_of(key)}: checksum mismatch in a leaf of the block map")
        return map_codec.decode(body, self.name_of(key))

    def load_index(self, segment: Segment) -> Index:
        with self._indexes_lock:
            known = self._indexes.get(segment.ref)
        if known is None:
            key = segment.ref.key(self.prefix)
            if segment.index_length > MAX_FRAME_BYTES:
                raise DamagedObject(f"{self.name_of(key)}: an index of {segment.index_length} bytes")
            body = self._get(key, "index", segment.index_pos, segment.index_length)
            known = decode_index(body, segment.ref.uid, segment.index_crc, self.name_of(key))
            self.remember_index(segment.ref, known)
        return known

    def remember_index(self, ref: ObjectRef, index: Index) -> None:
        with self._indexes_lock:
            self._indexes[ref] = index

    def _get(self, key: str, site: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            return self.store.get(key, site=site, start=start, length=length).body
        except ObjectNotFound:
            raise DamagedObject(f"{self.name_of(key)}: missing") from None


class Snapshot:
    """One committed state of one database."""

    __slots__ = ("_cuts", "_overlay", "_source", "head", "map", "version")

    def __init__(
        self,
        source: Source,
        version: Version,
        block_map: BlockMap,
        overlay: dict[int, tuple[Piece, ...]],
        cuts: tuple[_Cut, ...],
    ) -> None:
        self._source = source
        self._overlay = overlay
        self._cuts = cuts
        self.version = version
        self.head = version.head
        self.map = block_map

    @classmethod
    def load(cls, source: Source, version: Version) -> Snapshot:
        """Index the whole log: one ranged GET for each segment not seen before, in parallel."""
        head = version.head
        records: dict[int, Commit] = {}
        pieces: dict[int, list[Piece]] = {}
        for segment, index in zip(head.segments, _load_indexes(source, head.segments), strict=True):
            records.update((record.seq, record) for record in index.commits)
            for entry in index.extents:
                address = FrameAddress(segment.ref, entry.pos, entry.stored, entry.offset, entry.raw)
                piece = Piece(entry.offset, entry.offset + entry.raw, entry.seq, address, entry.offset)
                pieces.setdefault(entry.seq, []).append(piece)
        for commit in head.tail.commits:
            records[commit.record.seq] = commit.record
            pieces.setdefault(commit.record.seq, []).extend(tail_pieces(commit))
        log = _Log({}, (), head.block_size)
        for seq in sorted(records.keys() | pieces.keys()):
            log.apply(records.get(seq), pieces.get(seq, ()))
        block_map = BlockMap.of(head.extents, head.leaves, source.load_leaf)
        return cls(source, version, block_map, log.overlay, log.cuts)

    def advance(self, version: Version, record: Commit, pieces: Iterable[Piece], block_map: BlockMap) -> Snapshot:
        """The state after one more commit, made here: only what it touched is indexed anew."""
        log = _Log(dict(self._overlay), self._cuts, self.head.block_size, self.head.size)
        log.apply(record, pieces)
        return Snapshot(self._source, version, block_map, log.overlay, log.cuts)

    def read(self, offset: int, length: int) -> bytes:
        """Committed bytes; fewer at the end of the file, none past it, zeros in holes."""
        end = min(offset + length, self.head.size)
        if offset >= end:
            return b""
        base, pieces = self._plan(offset, end)
        needed = [address for address, _, _ in base]
        needed += [piece.source for piece in pieces if isinstance(piece.source, FrameAddress)]
        if not needed:
            frames: list[bytes] = []
        else:
            frames = self._source.cache.fetch(self._source.prefix, needed)
        if len(base) == 1 and not pieces:
            address, low, high = base[0]
            if (low, high) == (offset, end):
                return frames[0][low - address.offset : high - address.offset]
        result = bytearray(end - offset)
        frame = iter(frames)
        for address, low, high in base:
            data = next(frame)
            result[low - offset : high - offset] = memoryview(data)[low - address.offset : high - address.offset]
        for piece in pieces:
            data = piece.source if isinstance(piece.source, bytes) else next(frame)
            part = memoryview(data)[piece.start - piece.origin : piece.end - piece.origin]
            result[piece.start - offset : piece.end - offset] = part
        return bytes(result)

    def prefetch(self, offset: int, end: int) -> None:
        """Start fetching what a read of these bytes would need."""
        base, pieces = self._plan(offset, min(end, self.head.size))
        addresses = [address for address, _, _ in base]
        addresses += [piece.source for piece in pieces if isinstance(piece.source, FrameAddress)]
        self._source.cache.prefetch(self._source.prefix, addresses)

    def _plan(self, offset: int, end: int) -> tuple[list[tuple[FrameAddress, int, int]], list[Piece]]:
        """(base frames with the file range each is needed for, log pieces clipped to offset..end)."""
        block_size = self.head.block_size
        first, last = offset // block_size, -(-end // block_size)
        base: list[tuple[FrameAddress, int, int]] = []
        pieces: list[Piece] = []
        extents = iter(self.map.find(first, last))
        extent = next(extents, None)
        for block in range(first, last):
            while extent is not None and extent.end <= block:
                extent = next(extents, None)
            here = extent if extent is not None and extent.first <= block else None
            complete_to = here.seq if here is not None else -1
            low, high = max(offset, block * block_size), min(end, (block + 1) * block_size)
            gaps_from = low
            limit = min(high, self._base_limit(complete_to))
            uncovered = False
            for piece in self._overlay.get(block, ()):
                if piece.seq <= complete_to or piece.end <= low or piece.start >= high:
                    continue
                clipped = piece._replace(start=max(piece.start, low), end=min(piece.end, high))
                pieces.append(clipped)
                uncovered |= gaps_from < min(clipped.start, limit)
                gaps_from = clipped.end
            uncovered |= gaps_from < limit
            if here is not None and uncovered:
                address = slot_address(here.ref, here.slot + block - here.first, block, block_size)
                base.append((address, low, limit))
        return base, pieces

    def _base_limit(self, complete_to: int) -> int:
        """Base bytes of a block complete to this seq count only below the lowest cut made after it."""
        for cut in self._cuts:  # seq and `at` both rise, so the first later one is the lowest
            if cut.seq > complete_to:
                return cut.at
        return self.head.size


class _Log:
    """Builds the index: commits are applied in the order of their seq, each its cut first, then its bytes."""

    def __init__(
        self, overlay: dict[int, tuple[Piece, ...]], cuts: tuple[_Cut, ...], block_size: int, size: int | None = None
    ) -> None:
        self.overlay = overlay
        self.cuts = cuts
        self._block_size = block_size
        self._size = size

    def apply(self, record: Commit | None, pieces: Iterable[Piece]) -> None:
        if record is not None:
            if self._size is None or record.cut < self._size:
                self._cut(_Cut(record.seq, record.cut))
            self._size = record.size
        for new in pieces:
            block = new.start // self._block_size
            if not block * self._block_size <= new.end - 1 < (block + 1) * self._block_size:
                raise DamagedObject(f"log bytes {new.start}..{new.end} of commit {new.seq} cross a block boundary")
            kept = [part for old in self.overlay.get(block, ()) for part in _outside(old, new)]
            self.overlay[block] = tuple(sorted((*kept, new), key=lambda piece: piece.start))

    def _cut(self, cut: _Cut) -> None:
        """Log bytes beyond the cut vanish; base bytes are masked by `cuts`, in which seq and `at` both rise."""
        for block in [number for number, pieces in self.overlay.items() if pieces[-1].end > cut.at]:
            kept = tuple(p._replace(end=min(p.end, cut.at)) for p in self.overlay.pop(block) if p.start < cut.at)
            if kept:
                self.overlay[block] = kept
        self.cuts = (*(earlier for earlier in self.cuts if earlier.at < cut.at), cut)


def _outside(piece: Piece, new: Piece) -> Iterator[Piece]:
    """What of `piece` `new` leaves visible."""
    if piece.end <= new.start or piece.start >= new.end:
        yield piece
        return
    if piece.start < new.start:
        yield piece._replace(end=new.start)
    if piece.end > new.end:
        yield piece._replace(start=new.end)


def tail_pieces(commit: LogCommit) -> Iterator[Piece]:
    for offset, data in commit.chunks:
        yield Piece(offset, offset + len(data), commit.record.seq, data, offset)


def _load_indexes(source: Source, segments: Sequence[Segment]) -> list[Index]:
    futures = []
    for segment in segments[1:]:
        futures.append(source.runtime.submit(lambda segment=segment: source.load_index(segment)))  # type: ignore[misc]
    result = [source.load_index(segment) for segment in segments[:1]]
    for segment, future in zip(segments[1:], futures, strict=True):
        # What no I/O thread has begun is done here: this may be one of them, and all of them may wait like this.
        result.append(source.load_index(segment) if future.cancel() else future.result())
    return result
