"""Garbage: raising the floor, and deleting what lies at or below it and is unreachable.

Why nothing that somebody needs is deleted, without a lock: a new head refers only to what the replaced head or one of
its roots reaches, or to uploads with a rev above the replaced head's floor (commit.py, fold.py check that). So what is
unreachable from one head and its roots, and not above *its* floor, is unreachable for ever. That head must have been
read, or swapped in, before its roots are listed: then every archive that counts is there already. A reader of a state
below the floor may meet a 404, which is TooOld.

Thread rule: any thread; several collectors at once are safe."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple

from s3blockfs.blockmap import NO_END, BlockMap
from s3blockfs.errors import DamagedObject
from s3blockfs.format.data import FOOTER_BYTES, FRAME_BYTES, HEADER_BYTES
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.head import Head
from s3blockfs.format.keys import head_key
from s3blockfs.head import HeadFile
from s3blockfs.history import dated, require_newest, roots
from s3blockfs.objectstore import Listed
from s3blockfs.snapshot import Source, Version

SPARSE_BLOCKS = 4096  # named for one compaction, at most


class Report(NamedTuple):
    """What a collection did, in objects and bytes."""

    deleted: int = 0
    deleted_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    sparse: tuple[int, ...] = ()  # live blocks in objects of which less than half is live: `extra_blocks` of a fold


def collect(source: Source, heads: HeadFile, retain_s: float) -> Report:
    """Let what was replaced more than `retain_s` ago go. Raises DamagedObject, DatabaseGone, StoreError, Unsettled."""
    listed = dated(source, "collect")
    if (version := heads.stored()) is None:
        return Report()
    try:
        require_newest(source, version.head, listed)
        reachable, extents = _reachable(source, version)  # of a damaged database nothing is let go
        raised = _raise_floor(source, heads, version, listed, retain_s)
        if raised is not version:
            version = raised
            reachable, extents = _reachable(source, version)
    except DamagedObject:
        if (now := heads.stored()) is None or now.head.floor > version.head.floor:
            return Report()  # another collector was faster, and did what was to be done
        raise
    head = version.head
    dead = [entry for rev, entry in listed if rev <= head.floor and entry.key not in reachable]
    if dead:
        source.store.delete([entry.key for entry in dead], site="collect")
    gone = {entry.key for entry in dead}
    kept = [entry for _, entry in listed if entry.key not in gone]
    sizes = [sum(entry.size_bytes for entry in entries) for entries in (dead, kept)]
    return Report(len(dead), sizes[0], len(kept), sizes[1], _sparse(source, head, extents, kept))


def _raise_floor(
    source: Source, heads: HeadFile, version: Version, listed: Sequence[tuple[int, Listed]], retain_s: float
) -> Version:
    """With the highest floor that the retention allows, if there is anything between the two.

    An archive was written while its head was the current one, so all before that head had been replaced by then; not
    that head itself, because the swap that wrote the archive may have failed."""
    old, key = source.store.server_time_s() - retain_s, head_key(source.prefix)
    revs = [rev for rev, entry in listed if entry.modified_s < old and "/archive/" in entry.key]
    for entry in source.store.list(key, site="collect"):
        if (entry.key, entry.etag) == (key, version.etag) and entry.modified_s < old:
            revs.append(version.head.rev)
    floor = max(revs, default=0) - 1
    if version.head.deleted or not any(version.head.floor < rev <= floor for rev, _ in listed):
        return version
    return heads.swap(version, lambda replaced: replace(replaced, floor=max(replaced.floor, floor)))


def _reachable(source: Source, version: Version) -> tuple[set[str], list[Extent]]:
    """The keys that a head and its roots need, and the head's own extents. DamagedObject also when one is lost."""
    prefix, head = source.prefix, version.head
    keys = {snapshot.archive for snapshot in head.snapshots}
    leaves: set[LeafRef] = set()
    for root in chain(roots(source, head), [version]):
        new = set(root.head.leaves) - leaves
        leaves |= new
        extents = chain(root.head.extents, *map(source.load_leaf, new))
        keys.update(ref.key(prefix) for ref in {extent.ref for extent in extents})
        keys.update(segment.ref.key(prefix) for segment in root.head.segments)
    keys.update(leaf.key(prefix) for leaf in leaves)
    lost = keys.difference(entry.key for _, entry in dated(source, "collect"))
    if lost:
        raise DamagedObject(f"{source.name_of(min(lost))}: missing; nothing was deleted")
    return keys, list(BlockMap.of(head.extents, head.leaves, source.load_leaf).find(0, NO_END))


def _sparse(source: Source, head: Head, extents: Sequence[Extent], kept: Sequence[Listed]) -> tuple[int, ...]:
    live: Counter[str] = Counter()
    for extent in extents:
        live[extent.ref.key(source.prefix)] += extent.blocks
    around, slot = HEADER_BYTES + FOOTER_BYTES, FRAME_BYTES + head.block_size
    sparse = {entry.key for entry in kept if 0 < 2 * live[entry.key] < (entry.size_bytes - around) // slot}
    homes = (extent for extent in extents if extent.ref.key(source.prefix) in sparse)
    return tuple(islice(chain.from_iterable(range(home.first, home.end) for home in homes), SPARSE_BLOCKS))
