"""Publishing a transaction: collect what is dirty, upload what is large, swap the head. One PUT if it is small.

Where the bytes go: everything up to SMALL_COMMIT_BYTES into the tail; else runs of whole blocks of at least
SMALL_COMMIT_BYTES into block objects, what is left into the tail, or into segments when it is large itself. Within one
commit a block is either in a block object or in the log, never in both, because both carry the commit's seq.

Thread rule: one `publish` at a time per database (database.py serialises); uploads run on I/O threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from s3blockfs import header
from s3blockfs.config import KIB, MIB, Config
from s3blockfs.dirty import Dirty
from s3blockfs.errors import StoreUnavailable
from s3blockfs.format import data as codec
from s3blockfs.format.data import COMMIT_ID_BYTES, OBJECT_BYTES, Commit, FrameAddress, slots_per_object
from s3blockfs.format.head import Head, Segment
from s3blockfs.format.keys import ObjectRef
from s3blockfs.format.tail import LogCommit, Tail, split_chunks
from s3blockfs.head import HeadFile
from s3blockfs.snapshot import Piece, Snapshot, Source, Version, tail_pieces
from s3blockfs.uploads import Uploads, build_segment

#: A commit with more bytes than this does not go into the tail: it would be uploaded again with every later commit.
SMALL_COMMIT_BYTES = 256 * KIB

#: The tail is rolled into a segment in the background beyond the first size, and a commit waits beyond the second.
ROLL_BYTES = 256 * KIB
FULL_TAIL_BYTES = MIB
ROLL_RAW_BYTES = 16 * MIB
ROLL_COMMITS = 1024


@dataclass(frozen=True, slots=True)
class Published:
    """A commit that is durable."""

    version: Version
    snapshot: Snapshot | None
    """The state after it; None when others committed meanwhile and `version` has to be loaded."""
    counter_set: bool
    """Whether readers are shown another header than the application wrote (counter, or WAL as rollback mode)."""


@dataclass(frozen=True, slots=True)
class _Rolled:
    """A segment that holds the commits up to `last`, waiting to ride on the next head."""

    segment: Segment
    first: Commit
    last: Commit


class Publisher:
    """Publishes the transactions of one database."""

    def __init__(self, source: Source, heads: HeadFile, config: Config, writer: str) -> None:
        self._source = source
        self._heads = heads
        self._config = config
        self._writer = writer
        self._rolling: Future[_Rolled] | None = None

    def uploads(self, base: Snapshot) -> Uploads:
        """For a transaction that starts on `base`."""
        return Uploads(self._source, self._config, base.head)

    def publish(self, base: Snapshot, dirty: Dirty, uploads: Uploads) -> Published:
        """Make `dirty` the next state. On success the caller clears it.

        Raises CommitLost, DatabaseGone, StoreError (nothing was published) or Unsettled (not known).
        """
        counter, counter_set = _next_counter(base, dirty, uploads)
        chunks, segments, pieces = self._upload(base, dirty, uploads)
        new_extents = uploads.extents()
        seq = base.head.seq + 1
        time_ms = int(self._source.store.server_time_s() * 1000)
        commit_id = self._source.runtime.token(COMMIT_ID_BYTES)
        record = Commit(seq, commit_id, time_ms, dirty.size, min(dirty.cut, dirty.size))
        logged = LogCommit(record, chunks)
        maps = {}
        uploads.wait()

        def make(replaced: Head) -> Head:
            self._require_live(replaced, [e.ref for e in new_extents] + [s.ref for s in segments])
            tail, rolled = self._rolled_tail(replaced)
            block_map = base.map
            if (replaced.extents, replaced.leaves) != (base.head.extents, base.head.leaves):
                block_map = base.map.of(replaced.extents, replaced.leaves, self._source.load_leaf)
            block_map = block_map.replace(new_extents)
            encoded = block_map.encode(replaced.rev, self._heads.nonce)
            for leaf, body in encoded.uploads:
                self._source.store.put(leaf.key(self._source.prefix), body, site="map")
            maps[encoded.extents, encoded.leaves] = encoded.map
            return replace(
                replaced,
                seq=seq,
                commit=commit_id,
                size=dirty.size,
                writer=self._writer,
                time_ms=time_ms,
                counter=counter,
                segments=(*rolled, *segments),
                extents=encoded.extents,
                leaves=encoded.leaves,
                tail=tail.append(logged),
            )

        version = self._heads.swap(base.version, make, commit=commit_id)
        self._start_roll(version.head)
        snapshot = None
        block_map = maps.get((version.head.extents, version.head.leaves))
        same_log = version.head.segments == base.head.segments + tuple(segments)
        if version.head.commit == commit_id and same_log and block_map is not None:
            snapshot = base.advance(version, record, [*pieces, *tail_pieces(logged)], block_map)
        return Published(version, snapshot, counter_set)

    def _upload(
        self, base: Snapshot, dirty: Dirty, uploads: Uploads
    ) -> tuple[tuple[tuple[int, bytes], ...], list[Segment], list[Piece]]:
        """Start the uploads of a large commit. Returns (chunks for the tail, segments, their pieces)."""
        uploads.settle()
        block_size = base.head.block_size
        uploads.forget(-(-dirty.size // block_size), 1 << 62)
        whole = _whole_runs(dirty, block_size) if dirty.bytes > SMALL_COMMIT_BYTES else set()
        for number in [n for n in uploads.blocks if n not in whole]:
            uploads.forget(number, number + 1)
        todo = sorted(whole - uploads.blocks.keys())
        per_object = slots_per_object(block_size)
        for start in range(0, len(todo), per_object):
            uploads.put_blocks(dirty, todo[start : start + per_object])
        rest = [(low, high) for low, high in _ranges_outside(dirty, whole, block_size)]
        total = sum(high - low for low, high in rest)
        if total <= SMALL_COMMIT_BYTES:
            chunks = [chunk for low, high in rest for chunk in split_chunks(low, dirty.read(low, high), block_size)]
            return tuple(chunks), [], []
        segments, pieces = [], []
        frames: list[tuple[int, bytes]] = []
        size = 0
        for low, high in rest:
            frames.append((low, dirty.read(low, high)))
            size += high - low
            if size >= OBJECT_BYTES or (low, high) == rest[-1]:
                segment, of_segment = uploads.put_segment(frames)
                segments.append(segment)
                pieces += of_segment
                frames, size = [], 0
        return (), segments, pieces

    def _require_live(self, replaced: Head, refs: Iterable[ObjectRef]) -> None:
        """A head may refer to a new upload only while no collector can take it for garbage (invariant I5)."""
        if any(ref.rev <= replaced.floor for ref in refs):
            raise StoreUnavailable(
                f"{self._source.name_of(self._source.prefix)}: this transaction took longer than the retention; "
                "nothing was committed, run it again"
            )

    # --- rolling the tail ------------------------------------------------------------------------------

    def _rolled_tail(self, replaced: Head) -> tuple[Tail, tuple[Segment, ...]]:
        """The tail and segments for a head that replaces this one, with a finished roll taken in."""
        rolled = self._finished_roll(must=_is_full(replaced.tail), replaced=replaced)
        if rolled is not None:
            ids = {commit.record.seq: commit.record.id for commit in replaced.tail.commits}
            held = all(ids.get(record.seq) == record.id for record in (rolled.first, rolled.last))
            starts = bool(replaced.tail.commits) and replaced.tail.commits[0].record == rolled.first
            if held and starts and rolled.segment.ref.rev > replaced.floor:
                return replaced.tail.after(rolled.last.seq), (*replaced.segments, rolled.segment)
        return replaced.tail, replaced.segments

    def _finished_roll(self, must: bool, replaced: Head) -> _Rolled | None:
        rolling = self._rolling
        if rolling is None:
            if not must:
                return None
            return self._roll(replaced)
        if not must and not rolling.done():
            return None
        self._rolling = None
        error = rolling.exception()
        if error is not None:
            return self._roll(replaced) if must else None
        return rolling.result()

    def _start_roll(self, head: Head) -> None:
        if self._rolling is None and _is_long(head.tail):
            with suppress(RuntimeError):  # no more threads: a later commit tries again, this one is durable already
                self._rolling = self._source.runtime.submit(partial(self._roll, head))

    def _roll(self, head: Head) -> _Rolled:
        """Upload the commits of the tail as one segment: each stays separate, so every one can still be opened."""
        records = [commit.record for commit in head.tail.commits]
        frames = [
            (offset, commit.record.seq, data)
            for commit in head.tail.commits
            for offset, data in _joined(commit.chunks, head.block_size)
        ]
        ref = self._source.new_ref(head.rev)
        built, segment = build_segment(ref, frames, records)
        self._source.store.put(ref.key(self._source.prefix), built.body, site="roll")
        self._source.remember_index(ref, codec.Index(tuple(records), built.entries))
        for entry, (_, _, data) in zip(built.entries, frames, strict=True):
            address = FrameAddress(ref, entry.pos, entry.stored, entry.offset, entry.raw)
            self._source.cache.put(self._source.prefix, address, data)
        return _Rolled(segment, records[0], records[-1])


def _is_long(tail: Tail) -> bool:
    return len(tail.encoded) >= ROLL_BYTES or tail.raw_bytes >= ROLL_RAW_BYTES or len(tail.commits) >= ROLL_COMMITS


def _is_full(tail: Tail) -> bool:
    return (
        len(tail.encoded) >= FULL_TAIL_BYTES
        or tail.raw_bytes >= 2 * ROLL_RAW_BYTES
        or len(tail.commits) >= 2 * ROLL_COMMITS
    )


def _joined(chunks: Iterable[tuple[int, bytes]], block_size: int) -> Iterator[tuple[int, bytes]]:
    """Adjacent chunks of one block joined: fewer, larger extents."""
    start, end = 0, -1
    parts: list[bytes] = []
    for offset, data in sorted(chunks):
        if parts and (offset != end or offset % block_size == 0):
            yield start, b"".join(parts)
            parts = []
        if not parts:
            start = offset
        parts.append(data)
        end = offset + len(data)
    if parts:
        yield start, b"".join(parts)


def _whole_runs(dirty: Dirty, block_size: int) -> set[int]:
    """Blocks that go into block objects: whole ones in runs that are worth it."""
    result: set[int] = set()
    run: list[int] = []
    for number in [n for n in dirty.blocks() if dirty.is_full(n)] + [-1]:
        if run and number != run[-1] + 1:
            if len(run) * block_size >= SMALL_COMMIT_BYTES:
                result.update(run)
            run = []
        run.append(number)
    return result


def _ranges_outside(dirty: Dirty, whole: set[int], block_size: int) -> Iterator[tuple[int, int]]:
    """The dirty ranges of the other blocks, none crossing a block boundary."""
    for number in dirty.blocks():
        if number not in whole:
            yield from dirty.ranges(number * block_size, (number + 1) * block_size)


def _next_counter(base: Snapshot, dirty: Dirty, uploads: Uploads) -> tuple[int | None, bool]:
    """Set the change counter to the base's plus one: (the counter, whether the header shown is not the one written).

    Not every commit changes it by itself (WAL, EXCLUSIVE). A file that is no database keeps the base's, so that it goes
    on when one is written over it.
    """
    local = _local_header(base, dirty)
    if not header.is_database(local):
        return base.head.counter, False
    own = header.counter(local)
    counter = own if base.head.counter is None else (base.head.counter + 1) & 0xFFFFFFFF
    if counter == own:
        return counter, header.sets_wal(0, local)
    for offset, data in header.counter_patches(local, counter):
        dirty.write(offset, data)
    uploads.forget(0, 1)
    return counter, True


def _local_header(base: Snapshot, dirty: Dirty) -> bytes:
    """The first 100 bytes as the transaction left them; fewer when the file is shorter."""
    end = min(header.HEADER_BYTES, dirty.size)
    ranges = list(dirty.ranges(0, end))
    covered = ranges == [(0, end)]  # usual: no need to fetch the base
    result = bytearray(b"" if covered else base.read(0, min(end, dirty.cut))).ljust(end, b"\0")
    for low, high in ranges:
        result[low:high] = dirty.read(low, high)
    return bytes(result)
