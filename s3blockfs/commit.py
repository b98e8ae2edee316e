"""Publishing a transaction: collect what is dirty, upload what is large, swap the head. One PUT if it is small.

Where the bytes go: everything up to SMALL_COMMIT_BYTES into the tail; else runs of whole blocks of at least
SMALL_COMMIT_BYTES into block objects, what is left into the tail, or into segments when it is large itself. Within one
commit a block is either in a block object or in the log, never in both, because both carry the commit's seq.
One `publish` at a time per database (database.py serialises)."""

from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice

from s3blockfs import header, metrics
from s3blockfs.blockmap import NO_END, BlockMap, EncodedMap
from s3blockfs.config import KIB, MIB
from s3blockfs.dirty import Dirty, Range
from s3blockfs.errors import StoreUnavailable
from s3blockfs.format.data import COMMIT_ID_BYTES, OBJECT_BYTES, Commit, slots_per_object
from s3blockfs.format.head import Head, Segment
from s3blockfs.format.tail import LogCommit, Tail, split_chunks
from s3blockfs.lease import Lease
from s3blockfs.snapshot import Snapshot, Source, Version, segment_pieces, tail_pieces
from s3blockfs.uploads import Uploads, build_segment, upload_map
from s3blockfs.view import View

SMALL_COMMIT_BYTES = 256 * KIB  # more do not go into the tail: they would be uploaded again with every later commit

#: The tail is rolled into a segment in the background beyond the first size, twice that while it holds few commits (a
#: roll costs a PUT), and a commit waits beyond the second one. Every commit uploads the tail, so its size is time.
ROLL_BYTES = 128 * KIB
FEW_COMMITS = 32
FULL_TAIL_BYTES = MIB
ROLL_RAW_BYTES = 16 * MIB
ROLL_COMMITS = 1024
ROLL_SEGMENTS = 8  # of large commits whose records are still in the tail, which holds up their fold

SUPERSEDED = '"superseded"'  # the ETag of a head that is not the newest any more: it never matches


class Publisher:
    """Publishes the transactions of one database."""

    def __init__(self, source: Source, lease: Lease) -> None:
        self._source, self._lease = source, lease
        self._rolling: Future[tuple[Segment, tuple[Commit, ...]]] | None = None
        """A segment that holds the commits of these records, waiting to ride on the next head."""

    @metrics.FAILED_COMMITS.count_exceptions()
    def publish(self, view: View) -> tuple[Version, Snapshot | None, bool]:
        """Make what is dirty the next state; the caller moves the view. Returns the head that holds it; the state after
        it, None when that has to be loaded; whether readers are shown another header than the application wrote
        (counter, or WAL as rollback mode). Raises CommitLost, DatabaseGone, StoreError (not published), Unsettled."""
        source = self._source
        counter, counter_set = _next_counter(view)
        base, dirty, uploads = view.snapshot, view.dirty, view.uploads
        assert uploads is not None
        uploads.deadline = deadline = source.runtime.monotonic() + uploads.patience_s
        chunks, segments = _upload(base, dirty, uploads)
        pieces = [p for s in segments for p in segment_pieces(s.ref, source.load_index(s).extents)]
        extents = uploads.extents()
        refs = [extent.ref for extent in extents] + [segment.ref for segment in segments]
        seq, commit_id = base.head.seq + 1, source.runtime.token(COMMIT_ID_BYTES)
        time_ms = int(source.store.server_time_s() * 1000)
        logged = LogCommit(Commit(seq, commit_id, time_ms, dirty.size, min(dirty.cut, dirty.size)), chunks)
        made: Head
        encoded: EncodedMap
        uploads.wait()

        def make(replaced: Head) -> Head:
            nonlocal encoded, made
            if any(ref.rev <= replaced.floor for ref in refs):
                # A collector may take them for garbage by now, and no head may refer to that (invariant I5).
                label = source.name_of(source.prefix)
                raise StoreUnavailable(f"{label}: took longer than the retention; nothing was committed, run it again")
            tail, held = self._rolled(replaced)
            block_map = base.map
            if (replaced.extents, replaced.leaves) != (base.head.extents, base.head.leaves):
                block_map = BlockMap.of(replaced.extents, replaced.leaves, source.load_leaf)
            encoded = upload_map(source, block_map.replace(extents), replaced.rev)
            made = replace(replaced, seq=seq, commit=commit_id, size=dirty.size, time_ms=time_ms, counter=counter)
            made = replace(made, writer=self._lease.writer, lease=self._lease.kept(replaced.lease))
            made = replace(made, segments=(*held, *segments), extents=encoded.extents, leaves=encoded.leaves)
            made = replace(made, tail=tail.append(logged))
            return made

        left_s = max(deadline - source.runtime.monotonic(), 0.01)
        version = self._lease.heads.swap(base.version, make, commit=True, deadline_s=left_s)
        self._lease.committed(version.head)
        metrics.COMMITS.inc()
        head, expected = version.head, (made.extents, made.leaves, (*base.head.segments, *segments))
        roll_bytes = ROLL_BYTES if len(head.tail.records) > FEW_COMMITS else 2 * ROLL_BYTES
        if self._rolling is None and (_is_beyond(head.tail, roll_bytes, 1) or _holds_up_a_fold(head)):
            with suppress(RuntimeError):  # no more threads: a later commit tries again, this one is durable already
                self._rolling = source.runtime.submit(partial(self._roll, head))
        if head.seq > seq or head.deleted:
            # Others went on already, and our readers may be in mid-transaction: show our own commit until a refresh.
            version = Version(made, SUPERSEDED)
        elif (head.extents, head.leaves, head.segments) != expected:
            return version, None, counter_set
        return version, base.advance(version, logged.record, [*pieces, *tail_pieces(logged)], encoded.map), counter_set

    def _rolled(self, replaced: Head) -> tuple[Tail, tuple[Segment, ...]]:
        """The tail and segments of a head in place of this one. Takes in a finished roll; a full tail waits for one."""
        must = _is_beyond(replaced.tail, FULL_TAIL_BYTES, 2)
        rolling, rolled = self._rolling, None
        if rolling is not None and (must or rolling.done()):
            self._rolling = None
            rolled = None if rolling.cancel() or rolling.exception() else rolling.result()
        if rolled is None and must:
            rolled = self._roll(replaced)
        if rolled is not None and rolled[0].ref.rev > replaced.floor:
            segment, records = rolled
            if replaced.tail.records[: len(records)] == records:
                return replaced.tail.after(records[-1].seq), (*replaced.segments, segment)
        return replaced.tail, replaced.segments

    def _roll(self, head: Head) -> tuple[Segment, tuple[Commit, ...]]:
        """Upload the commits of the tail as one segment: each stays separate, so every one can still be opened."""
        records, size = head.tail.records, head.block_size
        frames = [(at, commit.seq, data) for commit, rows in head.tail.commits for at, data in _joined(rows, size)]
        segment, built = build_segment(self._source, head.rev, frames, records)
        self._source.store.put(segment.ref.key(self._source.prefix), built.body, site="roll")
        content = {(at, seq): data for at, seq, data in frames}
        for entry in built.entries:
            self._source.cache.put(self._source.prefix, entry.address(segment.ref), content[entry.offset, entry.seq])
        return segment, records


def _is_beyond(tail: Tail, encoded_bytes: int, times: int) -> bool:
    is_large = tail.encoded_bytes >= encoded_bytes or tail.raw_bytes >= times * ROLL_RAW_BYTES
    return is_large or len(tail.records) >= times * ROLL_COMMITS


def _holds_up_a_fold(head: Head) -> bool:
    first = [record.seq for record in head.tail.records[:1]]
    return bool(first) and sum(segment.first_seq >= first[0] for segment in head.segments) >= ROLL_SEGMENTS


def _joined(chunks: Iterable[tuple[int, bytes]], block_size: int) -> list[tuple[int, bytes]]:
    """Adjacent chunks of one block joined: fewer, larger extents."""
    rows: list[tuple[int, bytearray]] = []
    for offset, data in sorted(chunks):
        if rows and offset == rows[-1][0] + len(rows[-1][1]) and offset % block_size:
            rows[-1][1].extend(data)
        else:
            rows.append((offset, bytearray(data)))
    return [(offset, bytes(data)) for offset, data in rows]


def _upload(base: Snapshot, dirty: Dirty, uploads: Uploads) -> tuple[tuple[tuple[int, bytes], ...], list[Segment]]:
    """Start the uploads of a large commit. Returns (chunks for the tail, segments)."""
    block_size = base.head.block_size
    whole = _whole_runs(dirty, block_size) if dirty.held_bytes > SMALL_COMMIT_BYTES else []
    rest, at = list[Range](), 0
    for run in (*whole, range(NO_END, NO_END)):
        uploads.forget(at, run.start)
        rest += _in_blocks(dirty.ranges(at * block_size, run.start * block_size), block_size)
        at = run.stop
    for _ in range(2):  # the second time for what was streamed ahead and failed
        todo = chain.from_iterable([gap for run in whole for gap in uploads.gaps(run.start, run.stop)])
        while group := list(islice(todo, slots_per_object(block_size))):
            uploads.put_blocks([(number, dirty.block(number)) for number in group])
        uploads.wait()
    if sum(high - low for low, high in rest) <= SMALL_COMMIT_BYTES:
        return tuple(c for low, high in rest for c in split_chunks(low, dirty.read(low, high), block_size)), []
    segments = []
    frames: list[tuple[int, bytes]] = []
    size = 0
    for low, high in rest:
        frames.append((low, dirty.read(low, high)))
        size += high - low
        if size >= OBJECT_BYTES or (low, high) == rest[-1]:
            segments.append(uploads.put_segment(frames))
            frames, size = [], 0
    return (), segments


def _in_blocks(ranges: Iterable[Range], size: int) -> list[Range]:
    return [(max(low, at), min(high, at + size)) for low, high in ranges for at in range(low - low % size, high, size)]


def _whole_runs(dirty: Dirty, block_size: int) -> list[range]:
    """Blocks that go into block objects: whole ones (the last may be short) in runs that are worth it."""
    past = -dirty.size % block_size  # of the last block
    rows = [(low, high + past if high == dirty.size else high) for low, high in dirty.ranges(0, dirty.size)]
    runs = [range(-(-low // block_size), high // block_size) for low, high in rows]
    return [run for run in runs if len(run) * block_size >= SMALL_COMMIT_BYTES]


def _next_counter(view: View) -> tuple[int | None, bool]:
    """Set the change counter to the base's plus one: (the counter, whether the header shown is not the one written).
    Not every commit changes it by itself (WAL, EXCLUSIVE). A file that is no database keeps it for one to come."""
    base = view.snapshot
    local = view.read(0, header.HEADER_BYTES)
    if not header.is_database(local):
        return base.head.counter, False
    own = header.counter(local)
    counter = own if base.head.counter is None else (base.head.counter + 1) & 0xFFFFFFFF
    if counter == own:
        return counter, header.sets_wal(0, local)
    for offset, data in header.counter_patches(local, counter):
        view.write(offset, data)
    return counter, True
