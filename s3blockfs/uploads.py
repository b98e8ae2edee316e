"""The data objects of one transaction or fold on their way to S3: in parallel, within a memory bound, before the swap.

Thread rule: the calls of one `Uploads` are serialised by the caller; the PUTs run on I/O threads."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from operator import attrgetter

from s3blockfs.blockmap import NO_END, BlockMap, EncodedMap, clipped, joined
from s3blockfs.config import Config
from s3blockfs.dirty import Dirty
from s3blockfs.errors import StoreError, StoreUnavailable
from s3blockfs.format.data import BASE, LOG, OBJECT_BYTES, BuiltObject, Commit, Index, build, slots_per_object
from s3blockfs.format.extents import Extent
from s3blockfs.format.head import Head, Segment
from s3blockfs.format.keys import NONCE_BYTES, ObjectRef
from s3blockfs.header import HEADER_BYTES
from s3blockfs.runtime import IO_THREADS
from s3blockfs.snapshot import Source


class Uploads:
    """A transaction that writes an uploaded block again calls `forget`; the block is then uploaded anew at the commit.
    Uploads that never become part of a head are garbage for the collector; nobody else deletes them."""

    def __init__(self, source: Source, config: Config, base: Head, seq: int) -> None:
        """They are named after the head `base`; their bytes are complete to `seq`."""
        self._source, self._rev, self._seq, self._block_size = source, base.rev, seq, base.block_size
        self._pending: deque[tuple[Future[str], partial[str], ObjectRef, bool]] = deque()
        self.patience_s = config.transaction_deadline_s  # megabytes need longer than a small request
        self._most = max(1, min(config.memory // OBJECT_BYTES, IO_THREADS // 4))  # the rest is for other databases
        self.deadline: float | None = None  # set by the commit: when everything has to be stored
        self._extents: list[Extent] = []  # of the blocks that are still as uploaded; sorted, disjoint

    def stream(self, dirty: Dirty, first: int, end: int) -> None:
        """Blocks first..end were written: upload a block object's worth, ahead of the commit, as soon as all of it is
        there. One that fails is forgotten, so that the commit uploads it."""
        per_object = slots_per_object(self._block_size)
        for start in range(first - first % per_object, end, per_object):
            stop = start + per_object
            is_there = dirty.size >= stop * self._block_size and dirty.is_full(start, stop)
            if is_there and list(self.gaps(start, stop)) == [range(start, stop)]:
                self.put_blocks([(number, dirty.block(number)) for number in range(start, stop)], ahead=True)

    def put_blocks(self, blocks: Sequence[tuple[int, bytes]], ahead: bool = False) -> ObjectRef:
        """One block object of (number, bytes), in whose slots they are in this order; a short one (the last of the
        file) is padded with zeros. None of them is uploaded already."""
        size = self._block_size
        ref = self._source.new_ref(self._rev)
        frames = [(number * size, self._seq, data.ljust(size, b"\0")) for number, data in blocks]
        self._upload(ref, build(ref.uid, BASE, frames).body, ahead)
        for extent in joined(Extent(number, 1, ref, slot, self._seq) for slot, (number, _) in enumerate(blocks)):
            insort(self._extents, extent)
        return ref

    def put_segment(self, frames: Sequence[tuple[int, bytes]]) -> Segment:
        """One segment of (offset, bytes), none crossing a block boundary; the commit's record goes into the tail."""
        segment, built = build_segment(self._source, self._rev, [(at, self._seq, data) for at, data in frames], ())
        self._upload(segment.ref, built.body, False)
        return segment

    def forget(self, first: int, end: int) -> None:
        """These blocks changed after they were uploaded, or are gone."""
        if (found := self._within(first, end)).start < found.stop:
            old = self._extents[found]
            self._extents[found] = [p for e in old for p in (*clipped(e, 0, first), *clipped(e, end, NO_END))]

    def gaps(self, first: int, end: int) -> Iterator[range]:
        """Which of these blocks are not uploaded."""
        for extent in self._extents[self._within(first, end)]:
            if first < extent.first:
                yield range(first, extent.first)
            first = extent.end
        if first < end:
            yield range(first, end)

    def _within(self, first: int, end: int) -> slice:
        low, high = (bisect_left(self._extents, number, key=attrgetter("first")) for number in (first, end))
        return slice(low - 1 if low and self._extents[low - 1].end > first else low, high)

    def wait(self) -> None:
        """Until everything is stored. Raises what an upload raised; then nothing of it may be referred to."""
        while self._pending:
            self._reap()

    def extents(self) -> list[Extent]:
        """What the map says of the uploaded blocks."""
        return list(self._extents)

    def _upload(self, ref: ObjectRef, body: bytes, ahead: bool) -> None:
        while len(self._pending) >= self._most:
            self._reap()
        key, store = ref.key(self._source.prefix), self._source.store
        put = partial(store.put, key, body, site="data", timeout_s=self._left_s())
        self._pending.append((self._source.runtime.submit(put), put, ref, ahead))

    def _reap(self) -> None:
        future, put, ref, ahead = self._pending.popleft()
        try:
            if future.cancel():  # all I/O threads are taken, perhaps by those who wait for this one
                put(timeout_s=self._left_s())
            else:
                future.result(self._left_s())
        except BaseException as error:  # Ctrl-C, too: it may not be there, so no head may refer to it
            future.cancel()
            self._extents = [extent for extent in self._extents if extent.ref != ref]
            if isinstance(error, FutureTimeout) and not ahead:
                raise StoreUnavailable(f"{self._source.prefix}: not uploaded in time; nothing was committed") from error
            if not ahead or not isinstance(error, StoreError | FutureTimeout):
                raise

    def _left_s(self) -> float:
        left_s = self.patience_s if self.deadline is None else self.deadline - self._source.runtime.monotonic()
        return max(left_s, 0.01)


def upload_map(source: Source, block_map: BlockMap, rev: int) -> EncodedMap:
    """The map for a head that replaces the one with this `rev`; leaves that are new are stored. Raises StoreError."""
    encoded = block_map.encode(rev, partial(source.runtime.token, NONCE_BYTES))
    for leaf, body in encoded.uploads:
        source.store.put(leaf.key(source.prefix), body, site="map")
    return encoded


def build_segment(
    source: Source, rev: int, frames: Sequence[tuple[int, int, bytes]], commits: Sequence[Commit]
) -> tuple[Segment, BuiltObject]:
    """A data object in the log role from (offset, seq, bytes) frames, and what the head says of it. The newest start of
    the file comes last: whoever opens it reads that, and gets it with the index (see `Source.load_index`)."""
    ref = source.new_ref(rev)
    built = build(ref.uid, LOG, sorted(frames, key=lambda frame: frame[0] < HEADER_BYTES), commits)
    source.remember_index(ref, Index(tuple(commits), built.entries))
    seqs = [seq for _, seq, _ in frames] + [record.seq for record in commits]
    index = (built.index_pos, built.index_length, built.index_crc)
    return Segment(ref, min(seqs), max(seqs), len(built.body), *index), built
