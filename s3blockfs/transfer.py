"""Rename, copy, restore and delete: a committed state becomes the next state of a database, without passing here.

1. Objects are copied server-side, under new names that carry the target's rev. (A restore in place copies nothing: a
   head may refer to whatever the replaced head or one of its archives reaches.)
2. The target's head is created or swapped: with a new database id, so that transactions open there lose, and a commit
   of its own that sets the next change counter, so that SQLite drops its page cache. seq goes on from the higher one.
3. For a rename the source becomes a tombstone, if its head is still the one copied. Else the target is put back and the
   caller hears Busy; if the target has moved on, too, both are kept. A crash leaves both, never neither; nor does a
   source that others deleted meanwhile.

The source's objects stay for the retention; a copy that takes longer fails on a missing object."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

from s3blockfs import header
from s3blockfs.blockmap import BlockMap
from s3blockfs.errors import Busy, DatabaseGone, DatabaseNotFound
from s3blockfs.format.data import COMMIT_ID_BYTES, Commit
from s3blockfs.format.head import Head
from s3blockfs.format.keys import ObjectRef, deleted_mark_key, rev_of
from s3blockfs.format.tail import LogCommit, Tail
from s3blockfs.head import HeadFile
from s3blockfs.runtime import in_flight
from s3blockfs.snapshot import Snapshot, Source, Version
from s3blockfs.uploads import upload_map

COPIES = 16  # under way at a time


class Place(NamedTuple):
    """Where a state is going to be: what is there now (None: nothing), and the name that the new head records."""

    source: Source
    heads: HeadFile
    base: Version | None
    name: str | None


def put_state(state: Snapshot, origin: Source, place: Place, writer: str, commit_id: bytes | None = None) -> Version:
    """Make `state`, of `origin`, the next state there. Returns the head that holds it, possibly a later one, of others.
    Raises Busy (that has moved on), DatabaseExists, StoreError."""
    target, base = place.source, place.base
    runtime, store = target.runtime, target.store
    old = None if base is None else base.head
    extents, segments = list(state.map.find(0, 1 << 62)), state.head.segments
    copied: dict[ObjectRef, ObjectRef] = {}
    in_place = origin.prefix == target.prefix
    if not in_place:
        rev = 0 if old is None else old.rev
        refs = {extent.ref for extent in extents} | {segment.ref for segment in segments}
        copied = {ref: target.new_ref(rev)._replace(uid=ref.uid) for ref in refs}
        keys = ((ref.key(origin.prefix), new.key(target.prefix)) for ref, new in copied.items())
        list(in_flight(runtime, COPIES, (partial(store.copy, *pair, site="copy") for pair in keys)))
        extents = [extent._replace(ref=copied[extent.ref]) for extent in extents]
        segments = tuple(segment._replace(ref=copied[segment.ref]) for segment in segments)
    block_map = BlockMap.of((), (), target.load_leaf).replace(extents)
    first = state.read(0, header.HEADER_BYTES)
    counter, patches = state.head.counter if old is None else old.counter, []
    if header.is_database(first):
        counter = ((header.counter(first) if counter is None else counter) + 1) & 0xFFFFFFFF
        patches = header.counter_patches(first, counter)
    database_id, commit_id = runtime.token(16), commit_id or runtime.token(COMMIT_ID_BYTES)

    def make(replaced: Head | None) -> Head:
        if replaced is not None:
            if replaced.commit != (old and old.commit):
                raise Busy(f"{store.name}/{target.prefix}: changed meanwhile; try again")
            root = state.version.head.rev  # what is not copied has to be reachable still, by way of this head
            pinned = in_place and root in [rev_of(target.prefix, snapshot.archive) for snapshot in replaced.snapshots]
            used = [root] if in_place else [ref.rev for ref in copied.values()]
            if any(rev <= replaced.floor for rev in used) and not pinned:
                raise Busy(f"{store.name}/{target.prefix}: took longer than the retention; try again")
        encoded = upload_map(target, block_map, 0 if replaced is None else replaced.rev)
        floor, snapshots = (0, ()) if replaced is None else (replaced.floor, replaced.snapshots)
        seq = max(state.head.seq, 0 if replaced is None else replaced.seq) + 1
        time_ms = int(store.server_time_s() * 1000)
        record = Commit(seq, commit_id, time_ms, state.head.size, state.head.size)
        tail = state.head.tail.append(LogCommit(record, tuple(patches)))
        head = replace(state.head, id=database_id, seq=seq, commit=commit_id, writer=writer, time_ms=time_ms)
        head = replace(head, name=place.name, floor=floor, snapshots=snapshots, counter=counter, lease=None)
        return replace(head, segments=segments, extents=encoded.extents, leaves=encoded.leaves, tail=tail)

    return place.heads.swap(base, make, archives=old is not None and not old.deleted)


def bury(target: Source, heads: HeadFile, version: Version, writer: str, same_commit: bool = False) -> Version:
    """Replace the head by a tombstone, after a mark that makes listings look at it. Raises DatabaseNotFound when it is
    none of this database any more, or with `same_commit` Busy when it has moved on."""

    def make(replaced: Head) -> Head:
        if same_commit and replaced.commit != version.head.commit:
            raise Busy(f"{target.prefix}: changed meanwhile; try again")
        empty = replace(replaced, size=0, segments=(), leaves=(), extents=(), tail=Tail(), lease=None, name=None)
        time_ms = int(target.store.server_time_s() * 1000)
        return replace(empty, deleted=True, snapshots=(), floor=replaced.rev, writer=writer, time_ms=time_ms)

    folder, _, name = target.prefix.rpartition("/")
    target.store.put(deleted_mark_key(folder, name), b"", site="mark-deleted")
    try:
        return heads.swap(version, make, archives=True)
    except DatabaseGone as error:
        raise DatabaseNotFound(str(error)) from error


def rename(origin: Source, heads: HeadFile, state: Snapshot, place: Place, writer: str) -> tuple[Version, Version]:
    """Move the newest state of `origin` (its head's state) there: the heads of both afterwards."""
    commit_id = origin.runtime.token(COMMIT_ID_BYTES)
    moved = put_state(state, origin, place, writer, commit_id)
    try:
        return bury(origin, heads, state.version, writer, same_commit=True), moved
    except DatabaseNotFound:  # deleted by others, or by us and the answer was lost: what was copied may be all there is
        return heads.latest or state.version, moved
    except Busy:
        target, over, base, _ = place
        if moved.head.commit == commit_id:  # else others have gone on with it
            # To undo it is a commit of its own, so that seq goes on. Busy when somebody commits on it meanwhile.
            if base is None or base.head.deleted:
                bury(target, over, moved, writer, same_commit=True)
            else:
                put_state(Snapshot.load(target, base), target, Place(target, over, moved, base.head.name), writer)
        raise
