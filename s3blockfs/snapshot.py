"""Reading one committed state: a decoded head plus an index of its log. Immutable.

Look-up is by seq: a log entry counts for a block only if its seq is higher than what the block's extent in the map is
complete to; older entries are covered by newer ones when the index is built. A commit that cut the file masks older
bytes beyond its `cut`, in the log (removed when the index is built) and in the base (`Cut`).

Thread rule: any thread. Does not belong here: uncommitted bytes (dirty.py), finding a newer head (head.py)."""

from __future__ import annotations

import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import NamedTuple, cast

from cachetools import LRUCache

from s3blockfs import header
from s3blockfs.blockmap import NO_END, BlockMap
from s3blockfs.cache import BlockCache
from s3blockfs.errors import DamagedObject, NewerFormat, ObjectNotFound, S3BlockFSError, TooOld
from s3blockfs.format import data as codec
from s3blockfs.format import extents as map_codec
from s3blockfs.format import head as head_codec
from s3blockfs.format.data import Commit, FrameAddress, Index, IndexEntry, slot_address
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.head import Head, Segment
from s3blockfs.format.keys import NONCE_BYTES, ObjectRef, head_key, rev_of
from s3blockfs.format.tail import LogCommit, Tail
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import Runtime, all_of

_BESIDE_INDEX_BYTES = 8192  # that are fetched with an index: a page of 4 KiB fits in
_INDEXES_KEPT = 256  # decoded, of segments; a head names about 16 before a fold, an index takes some 20 KiB
_PLACES_KEPT = 16384  # of blocks, by each snapshot: 3 MB


class Version(NamedTuple):
    """A head as it was read or written: `etag` is what the next swap must match."""

    head: Head
    etag: str
    snapshot: Snapshot | None = None  # what reads it, where no head is stored: a database of sqlite-s3vfs

    @property
    def body(self) -> bytes:
        """Made anew: only archives need it, and of each open database there are several versions."""
        return head_codec.encode(self.head)


class Piece(NamedTuple):
    """Bytes start..end of the file: where `source` holds the bytes from file offset `origin` on."""

    start: int
    end: int
    seq: int
    source: bytes | FrameAddress
    origin: int


class Cut(NamedTuple):
    """Base bytes at or beyond `at` that are older than commit `seq` are gone."""

    seq: int
    at: int


_Pieces = Mapping[int, Sequence[Piece]]


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
        body = _get(self.store, key, "map")
        if zlib.crc32(body) != leaf.crc:
            raise DamagedObject(f"{self.name_of(key)}: checksum mismatch in a leaf of the block map")
        return map_codec.decode(body, self.name_of(key))

    def load_index(self, segment: Segment) -> Index:
        with self._indexes_lock:
            known = self._indexes.get(segment.ref)
        if known is None:
            known = fetch_index(self.store, self.prefix, segment, "index", self.cache)
            self.remember_index(segment.ref, known)
        return known

    def remember_index(self, ref: ObjectRef, index: Index) -> None:
        with self._indexes_lock:
            self._indexes[ref] = index

    def forget_indexes(self, segments: Iterable[Segment]) -> None:
        """Of segments that the head names no more."""
        with self._indexes_lock:
            for segment in segments:
                self._indexes.pop(segment.ref, None)

    @contextmanager
    def reading(self, head: Head) -> Iterator[None]:
        """An object that `head` needs is missing: TooOld if a collector may have deleted it by now."""
        try:
            yield
        except DamagedObject as error:
            key = head_key(self.prefix)
            now = head_codec.decode(_get(self.store, key, "head"), self.name_of(key))
            pinned = any(rev_of(self.prefix, snapshot.archive) == head.rev for snapshot in now.snapshots)
            if head.rev > now.floor or pinned:
                raise
            text = f"{self.name_of(self.prefix)}: this state is older than the retention; open a newer one"
            raise TooOld(text) from error


class Snapshot:
    """One committed state of one database."""

    __slots__ = ("_known", "_log", "_places", "_source", "_top", "head", "map", "version")

    def __init__(self, source: Source, version: Version, block_map: BlockMap, log: Log) -> None:
        self._source, self._log = source, log
        # Of blocks that are one frame, with no log over it: those that were read; these, and what was fetched ahead.
        self._places: dict[int, FrameAddress] = {}
        self._known: dict[int, FrameAddress] = {}
        self._top = b""  # SQLite's header: each transaction begins with a look at its change counter
        self.version, self.head, self.map = version, version.head, block_map

    @classmethod
    def load(cls, source: Source, version: Version, at: int | None = None) -> Snapshot:
        """The state of a head, or the one right after commit `at` by what that head still knows; the caller vouches
        that nothing that `at` needs was dropped before this head (history.py). Indexes the whole log: one ranged GET
        for each segment not seen before, in parallel. Raises TooOld."""
        if version.snapshot is not None:
            return version.snapshot
        head = version.head
        with source.reading(head):
            records, pieces = read_log(source, head, whole=at is not None and at != head.seq)
            block_map = BlockMap.of(head.extents, head.leaves, source.load_leaf)
            if at is not None and at != head.seq:
                if at not in records:
                    raise TooOld(f"{source.name_of(source.prefix)}: commit {at} is not kept; open a newer one")
                head = _head_at(head, records[at], block_map)
                block_map = BlockMap.of(head.extents, (), source.load_leaf)
        log = Log.of(head.block_size, records, pieces, head.seq)
        return cls(source, version._replace(head=head), block_map, log)

    def advance(self, version: Version, record: Commit, pieces: Iterable[Piece], block_map: BlockMap) -> Snapshot:
        """The state after one more commit, made here: only what it touched is indexed anew."""
        log = replace(self._log, overlay=dict(self._log.overlay))
        log.apply(record, pieces)
        return Snapshot(self._source, version, block_map, log)

    def with_version(self, version: Version) -> Snapshot:
        """The same commit by another head (lease, floor, fold): nothing is indexed anew where nothing was moved."""
        layout = attrgetter("extents", "leaves", "segments", "tail")
        if layout(version.head) != layout(self.head):
            return Snapshot.load(self._source, version)
        return Snapshot(self._source, version, self.map, self._log)

    def read(self, offset: int, length: int) -> bytes:
        """Committed bytes; fewer at the end of the file, none past it, zeros in holes."""
        end = min(offset + length, self.head.size)
        if offset >= end:
            return b""
        if end <= header.HEADER_BYTES:
            self._top = self._read([(0, min(header.HEADER_BYTES, self.head.size))], self._missed)[0]
            return self._top[offset:end]
        size, first, last = self.head.block_size, offset // self.head.block_size, -(-end // self.head.block_size)
        if (frames := self._frames(first, last)) is None:
            return self._read([(offset, end)], self._missed)[0]
        blocks = self._content(frames)
        if last - first > 1:
            views = [memoryview(block) for block in blocks]
            views[0], views[-1] = views[0][offset - first * size :], views[-1][: end - (last - 1) * size]
            return b"".join(views)
        if len(self._places) == _PLACES_KEPT:
            self._places.clear()
        self._places[first] = frames[0]
        return blocks[0][offset - first * size : end - first * size]

    def _content(self, frames: list[FrameAddress]) -> list[bytes]:
        prefix, cache = self._source.prefix, self._source.cache
        blocks = [block for frame in frames if (block := cache.get(prefix, frame)) is not None]
        if len(blocks) < len(frames):
            with self._source.reading(self.head):
                blocks = cache.fetch(prefix, frames, self._missed)
        return blocks

    def near(self, offset: int, length: int) -> bytes | None:
        """The same if these bytes are of one block that was read before and is in memory; else None."""
        if offset + length <= len(self._top):
            return self._top[offset : offset + length]
        size = self.head.block_size
        block, low = divmod(offset, size)
        high = low + length
        if (place := self._places.get(block)) is None or high > size or offset + length > self.head.size:
            return None
        frame = self._source.cache.get(self._source.prefix, place)
        return None if frame is None else frame[low:high]

    def read_blocks(self, blocks: Iterable[int]) -> list[bytes]:
        """Whole blocks by their numbers, by few requests also if they are scattered; zeros behind the file's end."""
        size = self.head.block_size
        return self._read([(block * size, (block + 1) * size) for block in blocks])

    def _read(
        self, ranges: Sequence[tuple[int, int]], on_miss: Callable[[int], None] = lambda offset: None
    ) -> list[bytes]:
        with self._source.reading(self.head):
            plans = [self._plan(low, high) for low, high in ranges]
            addresses = [address for plan in plans for address in _addresses(plan)]
            frames = iter(self._source.cache.fetch(self._source.prefix, addresses, on_miss))
        return [_assembled(low, high, plan, frames) for (low, high), plan in zip(ranges, plans, strict=True)]

    def _missed(self, offset: int) -> None:
        """A reader waits for these bytes: fetch what lies around them as well where that is worth it."""
        if ahead := self._source.cache.missed(self._source.prefix, offset, self.head.size):
            with suppress(RuntimeError):  # no more threads
                self._source.runtime.submit(partial(self.prefetch, *ahead))

    def prefetch(self, offset: int, end: int) -> None:
        """Start fetching what a read of these bytes would need. What is wrong with a leaf of the map it will meet."""
        size, end = self.head.block_size, min(end, self.head.size)
        with suppress(S3BlockFSError):
            frames = self._frames(offset // size, -(-end // size)) or _addresses(self._plan(offset, end))
            self._source.cache.prefetch(self._source.prefix, frames)

    def pieces(self, ahead: int) -> Iterator[bytes]:
        """The whole file as it is shown, from start to end, while the next `ahead` bytes are being fetched."""
        at, size = 0, self.head.block_size
        while at < self.head.size:
            end = min(at + codec.OBJECT_BYTES, self.head.size)
            self.prefetch(at, end + ahead)
            frames = self._frames(at // size, -(-end // size))
            for piece in [self.read(at, end - at)] if frames is None else self._content(frames):
                yield header.in_rollback_mode(at, piece[: end - at])
                at += len(piece)

    def _frames(self, first: int, end: int) -> list[FrameAddress] | None:
        """Where these blocks are, if each is one frame with no log over it: a plan of them costs ten times as much."""
        if None not in (known := [self._known.get(block) for block in range(first, end)]):
            return cast("list[FrameAddress]", known)
        if (overlay := self._log.overlay) and not overlay.keys().isdisjoint(range(first, end)):
            return None
        size, frames = self.head.block_size, list[FrameAddress]()
        newest = self._log.cuts[-1].seq if self._log.cuts else 0
        with self._source.reading(self.head):
            homes = list(self.map.find(first, end))
        for home in homes:
            if home.first != first + len(frames) or home.seq < newest:
                return None
            slots = range(home.slot, home.slot + home.blocks)
            frames += [slot_address(home.ref, slot, block, size) for block, slot in enumerate(slots, home.first)]
        if len(frames) < end - first:
            return None
        if len(self._known) + len(frames) > _PLACES_KEPT:
            self._known.clear()
        self._known.update(enumerate(frames, first))
        return frames

    def _plan(self, offset: int, end: int) -> list[Piece]:
        """What to put into offset..end, in this order: the base of each block where it shows, then its log pieces."""
        size, overlay, cuts = self.head.block_size, self._log.overlay, self._log.cuts
        first, last = offset // size, -(-end // size)
        homes = {block: extent for extent in self.map.find(first, last) for block in range(extent.first, extent.end)}
        plan: list[Piece] = []
        for block in range(first, last):
            home = homes.get(block)
            complete_to = -1 if home is None else home.seq
            low, high = max(offset, block * size), min(end, (block + 1) * size)
            logged = [
                piece._replace(start=max(piece.start, low), end=min(piece.end, high))
                for piece in overlay.get(block, ())
                if piece.seq > complete_to and piece.end > low and piece.start < high
            ]
            if home is not None:
                # Cuts rise in seq and `at`, so the first one after what the block is complete to is the lowest.
                limit = min(high, next((cut.at for cut in cuts if cut.seq > complete_to), high))
                shows = low < limit
                if logged:
                    covered_to = [low, *(piece.end for piece in logged)]
                    covered_from = [*(min(piece.start, limit) for piece in logged), limit]
                    shows = any(gap < until for gap, until in zip(covered_to, covered_from, strict=True))
                if shows:
                    address = slot_address(home.ref, home.slot + block - home.first, block, size)
                    plan.append(Piece(low, limit, complete_to, address, address.offset))
            plan += logged
        return plan


@dataclass(slots=True)
class Log:
    """The index of a log: commits are applied in the order of their seq, each its cut first, then its bytes."""

    block_size: int
    overlay: dict[int, tuple[Piece, ...]] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()  # seq and `at` both rise
    size: int | None = None  # of the file; not known before the first record

    @classmethod
    def of(cls, block_size: int, records: Mapping[int, Commit], pieces: _Pieces, last: int) -> Log:
        """Of the commits up to `last`."""
        log = cls(block_size)
        for seq in sorted(seq for seq in records.keys() | pieces.keys() if seq <= last):
            log.apply(records.get(seq), pieces.get(seq, ()))
        return log

    def apply(self, record: Commit | None, pieces: Iterable[Piece]) -> None:
        if record is not None:
            # Base bytes beyond the end may be stale, so the first record cuts also a file that it does not shorten.
            if self.size is None or record.cut < self.size:
                self._cut(Cut(record.seq, record.cut))
            self.size = record.size
        for new in pieces:
            block = new.start // self.block_size
            if (new.end - 1) // self.block_size != block:
                raise DamagedObject(f"log bytes {new.start}..{new.end} of commit {new.seq} cross a block boundary")
            kept = [part for old in self.overlay.get(block, ()) for part in _outside(old, new)]
            self.overlay[block] = tuple(sorted((*kept, new), key=lambda piece: piece.start))

    def _cut(self, cut: Cut) -> None:
        """Log bytes beyond the cut vanish; base bytes are masked by `cuts`."""
        for block in [number for number, pieces in self.overlay.items() if pieces[-1].end > cut.at]:
            kept = tuple(p._replace(end=min(p.end, cut.at)) for p in self.overlay.pop(block) if p.start < cut.at)
            if kept:
                self.overlay[block] = kept
        self.cuts = (*(earlier for earlier in self.cuts if earlier.at < cut.at), cut)


def read_log(source: Source, head: Head, whole: bool = False) -> tuple[dict[int, Commit], _Pieces]:
    """The records and the bytes of all commits in the log, by seq; unless `whole` of a chunk of the tail only the last
    version, which covers the others."""
    records: dict[int, Commit] = {}
    pieces: defaultdict[int, list[Piece]] = defaultdict(list)
    indexes = all_of(source.runtime, [partial(source.load_index, segment) for segment in head.segments])
    for segment, index in zip(head.segments, indexes, strict=True):
        seqs = range(segment.first_seq, segment.last_seq + 1)  # a restored head may count only the first ones
        records.update((record.seq, record) for record in index.commits if record.seq in seqs)
        for piece in segment_pieces(segment.ref, index.extents):
            if piece.seq in seqs:
                pieces[piece.seq].append(piece)
    records.update((record.seq, record) for record in head.tail.records)
    if whole:
        for commit in head.tail.commits:
            pieces[commit.record.seq] += tail_pieces(commit)
    else:
        for (offset, length), (seq, data) in head.tail.latest.items():
            pieces[seq].append(Piece(offset, offset + length, seq, data, offset))
    return records, pieces


def tail_pieces(commit: LogCommit) -> list[Piece]:
    return [Piece(offset, offset + len(data), commit.record.seq, data, offset) for offset, data in commit.chunks]


def segment_pieces(ref: ObjectRef, entries: Iterable[IndexEntry]) -> list[Piece]:
    return [Piece(e.offset, e.offset + e.raw, e.seq, e.address(ref), e.offset) for e in entries]


def fetch_index(store: ObjectStore, prefix: str, segment: Segment, site: str, cache: BlockCache | None = None) -> Index:
    """With a `cache` also frames before it, if they are small, each once. Raises DamagedObject, StoreError."""
    key = segment.ref.key(prefix)
    if segment.index_length > codec.MAX_FRAME_BYTES:
        raise DamagedObject(f"{store.name}/{key}: an index of {segment.index_length} bytes")
    skip = 0 if cache is None else min(_BESIDE_INDEX_BYTES, segment.index_pos)
    name, start = f"{store.name}/{key}", segment.index_pos - skip
    body = _get(store, key, site, start, skip + segment.index_length)
    index = codec.decode_index(body[skip:], segment.ref.uid, segment.index_crc, name)
    for address in {e.pos: e.address(segment.ref) for e in index.extents if e.pos >= start and skip}.values():
        with suppress(DamagedObject, NewerFormat):  # whoever needs it will meet that
            data = codec.decode_frame(body[address.pos - start : address.end - start], address, name)
            if cache is not None:
                cache.put(prefix, address, data)
    return index


def _get(store: ObjectStore, key: str, site: str, start: int = 0, length: int | None = None) -> bytes:
    try:
        return store.get(key, site=site, start=start, length=length).body
    except ObjectNotFound:
        raise DamagedObject(f"{store.name}/{key}: missing") from None


def _head_at(head: Head, record: Commit, block_map: BlockMap) -> Head:
    """What this head would have been right after an earlier commit; its counter is not known."""
    at, commit_id, time_ms, size, _ = record
    segments = tuple(s._replace(last_seq=min(s.last_seq, at)) for s in head.segments if s.first_seq <= at)
    extents = tuple(extent for extent in block_map.find(0, NO_END) if extent.seq <= at)
    tail = Tail.of(commit for commit in head.tail.commits if commit.record.seq <= at)
    head = replace(head, seq=at, commit=commit_id, size=size, time_ms=time_ms, counter=None)
    return replace(head, segments=segments, extents=extents, leaves=(), tail=tail)


def _assembled(low: int, high: int, plan: Sequence[Piece], frames: Iterator[bytes]) -> bytes:
    """The bytes low..high from the pieces of a plan, the fetched ones from `frames`; each covers what came before."""
    parts = [(piece, piece.source if isinstance(piece.source, bytes) else next(frames)) for piece in plan]
    if [low, *(piece.end for piece in plan)] == [*(piece.start for piece in plan), high]:  # side by side
        whole = parts if len(parts) == 1 else [(piece, memoryview(data)) for piece, data in parts]
        return b"".join([data[piece.start - piece.origin : piece.end - piece.origin] for piece, data in whole])
    result = bytearray(high - low)
    for piece, data in parts:
        part = memoryview(data)[piece.start - piece.origin : piece.end - piece.origin]
        result[piece.start - low : piece.end - low] = part
    return bytes(result)


def _addresses(plan: Iterable[Piece]) -> list[FrameAddress]:
    return [piece.source for piece in plan if isinstance(piece.source, FrameAddress)]


def _outside(piece: Piece, new: Piece) -> list[Piece]:
    """What of `piece` `new` leaves visible."""
    if piece.end <= new.start or piece.start >= new.end:
        return [piece]
    parts = (piece._replace(end=new.start), piece._replace(start=new.end))
    return [part for part in parts if part.start < part.end]
