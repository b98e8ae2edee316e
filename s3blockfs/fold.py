"""Merging the log into the blocks: what the segments hold becomes new versions of the blocks that it touches.

Folded is everything up to F, the last commit before the tail. The blocks are read as of F and uploaded, then one swap
puts them into the map ("complete to F") and drops the segments. Other commits and folds may come in between: per block
the higher seq wins, and a fold is given up when a segment that it read is gone, because another fold has then dropped
what masked older bytes. A fold deletes nothing, also when it fails.

Thread rule: any thread; several folds of one database at once are safe and a waste."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

from s3blockfs.blockmap import NO_END, BlockMap
from s3blockfs.config import MIB, Config
from s3blockfs.errors import DatabaseGone, TooOld
from s3blockfs.format.data import slot_address, slots_per_object
from s3blockfs.format.extents import Extent
from s3blockfs.format.head import Head, Segment
from s3blockfs.head import HeadFile
from s3blockfs.snapshot import Log, Snapshot, Source, Version, read_log
from s3blockfs.uploads import Uploads, upload_map

#: A fold is due at one of these: each segment costs a reader a request, each byte of log is written again.
DUE_SEGMENTS = 16
DUE_BYTES = 8 * MIB


class _Overtaken(Exception):
    """Somebody else folded or collected in between."""


def is_due(head: Head) -> bool:
    """Whether enough is waiting."""
    _, segments = _foldable(head)
    return len(segments) >= DUE_SEGMENTS or sum(segment.length for segment in segments) >= DUE_BYTES


def fold(
    source: Source, heads: HeadFile, config: Config, version: Version, extra_blocks: Collection[int] = ()
) -> Version | None:
    """Fold the segments of `version`, and move `extra_blocks` to new objects (compaction). Returns the new head, None
    when there was nothing to do or somebody else was faster. Raises DamagedObject, StoreError, Unsettled."""
    head, size = version.head, version.head.block_size
    last, folded = _foldable(head)
    if head.deleted or not (folded or extra_blocks):
        return None

    def make(replaced: Head) -> Head:
        if not folded.issubset(replaced.segments) or any(extent.ref.rev <= replaced.floor for extent in extents):
            raise _Overtaken
        with source.reading(replaced):
            merged = block_map
            if (replaced.extents, replaced.leaves) != (head.extents, head.leaves):
                merged = BlockMap.of(replaced.extents, replaced.leaves, source.load_leaf)
            # Without segments to tell by, a block that somebody else moved, or cut off, must not come back.
            if not folded and any(_home(merged, block) != home for block, home in moved.items()):
                raise _Overtaken
            merged = merged.replace(extents)
            if log.cuts:
                merged = merged.clip(-(-log.cuts[0].at // size), partial(_limit, log))
        encoded = upload_map(source, merged, replaced.rev)
        kept = tuple(segment for segment in replaced.segments if segment.last_seq > last)
        return replace(replaced, segments=kept, extents=encoded.extents, leaves=encoded.leaves)

    try:
        with source.reading(head):
            log = Log.of(size, *read_log(source, head), last)
            block_map = BlockMap.of(head.extents, head.leaves, source.load_leaf)
            found = {block: _home(block_map, block) for block in extra_blocks}
            moved = {block: home for block, home in found.items() if home is not None and home.seq <= last}
            todo = sorted(_touched(log, block_map) | moved.keys())
        extents = _upload(Snapshot(source, version, block_map, log), source, Uploads(source, config, head, last), todo)
        swapped = heads.swap(version, make)
        source.forget_indexes(folded)
        return swapped
    except (_Overtaken, DatabaseGone, TooOld):
        return None


def _foldable(head: Head) -> tuple[int, set[Segment]]:
    """The last commit before the tail, and the segments that hold nothing newer."""
    last = head.tail.records[0].seq - 1 if head.tail.records else head.seq
    return last, {segment for segment in head.segments if segment.last_seq <= last}


def _upload(view: Snapshot, source: Source, uploads: Uploads, todo: Sequence[int]) -> list[Extent]:
    """The blocks as `view` shows them, one object's worth in memory at a time besides what is on its way."""
    size = view.head.block_size
    step = slots_per_object(size)
    for group in (todo[start : start + step] for start in range(0, len(todo), step)):
        content = list(zip(group, view.read_blocks(group), strict=True))
        ref = uploads.put_blocks(content)
        for slot, (block, data) in enumerate(content):
            source.cache.put(source.prefix, slot_address(ref, slot, block, size), data)
    uploads.wait()
    return uploads.extents()


def _home(block_map: BlockMap, block: int) -> Extent | None:
    return next(block_map.find(block, block + 1), None)


def _touched(log: Log, block_map: BlockMap) -> set[int]:
    """The blocks that show log bytes as of `last`, and those that a cut divides if the file grew again behind it."""
    size = log.block_size
    touched = set()
    for block, pieces in log.overlay.items():
        if (home := _home(block_map, block)) is None or any(piece.seq > home.seq for piece in pieces):
            touched.add(block)
    for cut in log.cuts:
        home = _home(block_map, cut.at // size) if cut.at % size and cut.at < (log.size or 0) else None
        if home is not None and home.seq < cut.seq:
            touched.add(cut.at // size)
    return touched


def _limit(log: Log, seq: int) -> int:
    """The first block that is gone as of the log if it was written at `seq`: cuts rise in seq and `at`."""
    return next((-(-cut.at // log.block_size) for cut in log.cuts if cut.seq > seq), NO_END)
