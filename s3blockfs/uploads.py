"""The data objects of one transaction on their way to S3: in parallel, within a memory bound, before the swap.

Thread rule: one transaction's calls are serialised by the caller; the PUTs run on I/O threads.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from s3blockfs.blockmap import joined
from s3blockfs.config import Config
from s3blockfs.dirty import Dirty
from s3blockfs.errors import StoreError
from s3blockfs.format import data as codec
from s3blockfs.format.data import BASE, LOG, OBJECT_BYTES, Commit, slots_per_object
from s3blockfs.format.extents import Extent
from s3blockfs.format.head import Head, Segment
from s3blockfs.format.keys import ObjectRef
from s3blockfs.snapshot import Piece, Source, segment_pieces


class Uploads:
    """A transaction that writes an uploaded block again calls `forget`; the block is then uploaded anew at the commit.
    Uploads that never become part of a head are garbage for the collector; nobody else deletes them."""

    def __init__(self, source: Source, config: Config, base: Head) -> None:
        self._source = source
        self._rev = base.rev
        self._seq = base.seq + 1
        self._block_size = base.block_size
        self._pending: deque[tuple[Future[str], ObjectRef]] = deque()
        self._committing = False
        self._patience_s = config.transaction_deadline_s
        self._most = max(1, config.memory // OBJECT_BYTES)
        self._whole: dict[int, set[int]] = {}
        self.blocks: dict[int, tuple[ObjectRef, int]] = {}
        """Which slot holds each block that is still as uploaded."""

    def stream(self, dirty: Dirty, first: int, end: int) -> None:
        """Blocks first..end were written: upload a block object's worth as soon as all of it is there."""
        per_object = slots_per_object(self._block_size)
        for block in range(first, end):
            if not dirty.is_whole(block):
                continue
            group = self._whole.setdefault(block // per_object, set())
            group.add(block)
            if len(group) == per_object and group.isdisjoint(self.blocks.keys()):
                self.put_blocks(dirty, sorted(group))

    def put_blocks(self, dirty: Dirty, blocks: Sequence[int]) -> None:
        """One block object of whole blocks; a short one (the last of the file) is padded with zeros."""
        size = self._block_size
        ref = self._source.new_ref(self._rev)
        frames = []
        for number in blocks:
            data = dirty.read(number * size, min((number + 1) * size, dirty.size))
            frames.append((number * size, self._seq, data.ljust(size, b"\0")))
        self._upload(ref, codec.build(ref.uid, BASE, frames).body)
        self.blocks.update((number, (ref, slot)) for slot, number in enumerate(blocks))

    def put_segment(self, frames: Sequence[tuple[int, bytes]]) -> tuple[Segment, list[Piece]]:
        """One segment of this commit's extents, none crossing a block boundary; its record goes into the tail."""
        rows = [(offset, self._seq, data) for offset, data in frames]
        segment, built = build_segment(self._source, self._rev, rows, ())
        self._upload(segment.ref, built.body)
        return segment, segment_pieces(segment.ref, built.entries)

    def forget(self, first: int, end: int) -> None:
        """These blocks changed after they were uploaded, or are gone."""
        few = end - first <= len(self.blocks)
        for number in range(first, end) if few else [n for n in self.blocks if first <= n < end]:
            self.blocks.pop(number, None)

    def settle(self) -> None:
        """Wait for what was streamed ahead of the commit; what failed is forgotten, so that the commit uploads it."""
        while self._pending:
            self._reap()
        self._committing = True

    def wait(self) -> None:
        """Until everything is stored. Raises what an upload raised; then nothing of it may be referred to."""
        while self._pending:
            self._pending.popleft()[0].result()

    def extents(self) -> list[Extent]:
        """What the map says of the uploaded blocks."""
        return joined(Extent(number, 1, *place, self._seq) for number, place in sorted(self.blocks.items()))

    def _upload(self, ref: ObjectRef, body: bytes) -> None:
        while len(self._pending) >= self._most:
            self._reap()
        key, patience_s = ref.key(self._source.prefix), self._patience_s  # megabytes need longer than a small request
        put = partial(self._source.store.put, key, body, site="data", timeout_s=patience_s)
        self._pending.append((self._source.runtime.submit(put), ref))

    def _reap(self) -> None:
        future, ref = self._pending.popleft()
        error = future.exception()
        if error is None:
            return
        if self._committing or not isinstance(error, StoreError):
            raise error
        for number in [n for n, (held_in, _) in self.blocks.items() if held_in == ref]:
            del self.blocks[number]


def build_segment(
    source: Source, rev: int, frames: Sequence[tuple[int, int, bytes]], commits: Sequence[Commit]
) -> tuple[Segment, codec.BuiltObject]:
    """A data object in the log role from (offset, seq, bytes) frames, and what the head says of it."""
    ref = source.new_ref(rev)
    built = codec.build(ref.uid, LOG, frames, commits)
    source.remember_index(ref, codec.Index(tuple(commits), built.entries))
    seqs = [seq for _, seq, _ in frames] + [record.seq for record in commits]
    index = (built.index_pos, built.index_length, built.index_crc)
    return Segment(ref, min(seqs), max(seqs), len(built.body), *index), built
