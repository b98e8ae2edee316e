"""The data objects of one transaction or fold on their way to S3: in parallel, within a memory bound, before the swap.

Thread rule: the calls of one `Uploads` are serialised by the caller; the PUTs run on I/O threads."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial

from s3blockfs.blockmap import BlockMap, EncodedMap, joined
from s3blockfs.config import Config
from s3blockfs.dirty import Dirty
from s3blockfs.errors import StoreError, StoreUnavailable
from s3blockfs.format.data import BASE, LOG, OBJECT_BYTES, BuiltObject, Commit, Index, build, slots_per_object
from s3blockfs.format.extents import Extent
from s3blockfs.format.head import Head, Segment
from s3blockfs.format.keys import NONCE_BYTES, ObjectRef
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
        self.blocks: dict[int, tuple[ObjectRef, int]] = {}  # which slot holds each block that is still as uploaded

    def stream(self, dirty: Dirty, first: int, end: int) -> None:
        """Blocks first..end were written: upload a block object's worth, ahead of the commit, as soon as all of it is
        there. One that fails is forgotten, so that the commit uploads it."""
        per_object = slots_per_object(self._block_size)
        for start in range(first - first % per_object, end, per_object):
            group = range(start, start + per_object)
            # The last block first: most writers come to it last, so that one look tells.
            is_there = dirty.size >= group.stop * self._block_size and dirty.is_full(group[-1])
            if is_there and self.blocks.keys().isdisjoint(group) and all(map(dirty.is_full, group)):
                self.put_blocks([(number, dirty.block(number)) for number in group], ahead=True)

    def put_blocks(self, blocks: Sequence[tuple[int, bytes]], ahead: bool = False) -> None:
        """One block object of (number, bytes); a short one (the last of the file) is padded with zeros."""
        size = self._block_size
        ref = self._source.new_ref(self._rev)
        frames = [(number * size, self._seq, data.ljust(size, b"\0")) for number, data in blocks]
        self._upload(ref, build(ref.uid, BASE, frames).body, ahead)
        self.blocks.update((number, (ref, slot)) for slot, (number, _) in enumerate(blocks))

    def put_segment(self, frames: Sequence[tuple[int, bytes]]) -> Segment:
        """One segment of (offset, bytes), none crossing a block boundary; the commit's record goes into the tail."""
        segment, built = build_segment(self._source, self._rev, [(at, self._seq, data) for at, data in frames], ())
        self._upload(segment.ref, built.body, False)
        return segment

    def forget(self, first: int, end: int) -> None:
        """These blocks changed after they were uploaded, or are gone."""
        few = end - first <= len(self.blocks)
        for number in range(first, end) if few else [n for n in self.blocks if first <= n < end]:
            self.blocks.pop(number, None)

    def wait(self) -> None:
        """Until everything is stored. Raises what an upload raised; then nothing of it may be referred to."""
        while self._pending:
            self._reap()

    def extents(self) -> list[Extent]:
        """What the map says of the uploaded blocks."""
        return joined(Extent(number, 1, *place, self._seq) for number, place in sorted(self.blocks.items()))

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
        except (StoreError, FutureTimeout) as error:
            future.cancel()
            if not ahead:
                if isinstance(error, StoreError):
                    raise
                raise StoreUnavailable(f"{self._source.prefix}: not uploaded in time; nothing was committed") from error
            self.blocks = {number: place for number, place in self.blocks.items() if place[0] != ref}

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
    """A data object in the log role from (offset, seq, bytes) frames, and what the head says of it."""
    ref = source.new_ref(rev)
    built = build(ref.uid, LOG, frames, commits)
    source.remember_index(ref, Index(tuple(commits), built.entries))
    seqs = [seq for _, seq, _ in frames] + [record.seq for record in commits]
    index = (built.index_pos, built.index_length, built.index_crc)
    return Segment(ref, min(seqs), max(seqs), len(built.body), *index), built
