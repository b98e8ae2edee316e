"""Past commits: which can still be opened, and from which head.

A swap that drops a reference archives the head it replaces, and every commit stays separate in the log until a fold. So
the first kept head with a seq of at least s only ever *added* to the state right after commit s, and shows it when
everything newer is ignored. Kept are the *roots*: archives with a rev above the floor, those that a named snapshot
pins, and the head itself. What was displaced before the first root of this database above the floor, or under another
name before a copy, cannot be seen here. An extent uploaded here above the floor was swapped in above it, too; any other
one may have displaced something unseen, so that root shows no commit older than such an extent. Threads: any."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from itertools import chain
from typing import TypeVar

from s3blockfs import errors
from s3blockfs.blockmap import NO_END, BlockMap
from s3blockfs.config import duration_s
from s3blockfs.format.data import Commit
from s3blockfs.format.head import LABEL, Archived, Head, NamedSnapshot, decode
from s3blockfs.format.keys import archive_key, head_key, rev_of
from s3blockfs.head import HeadFile
from s3blockfs.objectstore import Listed
from s3blockfs.snapshot import Snapshot, Source, Version, read_log

T = TypeVar("T")


def _refuse(error: errors.S3BlockFSError) -> None:
    raise error


def roots(source: Source, head: Head, wrong: Callable[[errors.S3BlockFSError], object] = _refuse) -> Iterator[Version]:
    """The archived heads that `head` keeps, oldest first, one at a time. `wrong` gets a DamagedObject or NewerFormat
    for each that cannot be had, also when it was collected since `head` was read. Raises StoreError."""
    pinned = {snapshot.archive for snapshot in head.snapshots}
    listed = {entry.key for entry in source.store.list(f"{source.prefix}/archive/", site="roots")}
    found = [(rev_of(source.prefix, key), key) for key in listed | pinned]

    def require(last: Archived | None) -> None:
        if last is not None and last.rev > head.floor and (key := archive_key(source.prefix, *last)) not in listed:
            wrong(errors.DamagedObject(f"{source.name_of(key)}: missing"))

    for rev, key in sorted((rev, key) for rev, key in found if rev is not None):
        if key in pinned or head.floor < rev < head.rev:
            try:
                root = archived(source, key)
            except errors.ObjectNotFound:  # also if a collector with a higher floor was here, after a restore from it
                wrong(errors.DamagedObject(f"{source.name_of(key)}: missing"))
                continue
            except (errors.DamagedObject, errors.NewerFormat) as error:
                wrong(error)
                continue
            require(root.head.archived)
            yield root
    require(head.archived)


def dated(source: Source, site: str) -> list[tuple[int, Listed]]:
    """Every object of ours with the rev in its name; what is not ours is left out."""
    folders = (source.store.list(f"{source.prefix}/{folder}/", site=site) for folder in ("data", "map", "archive"))
    return [(rev, e) for e in chain.from_iterable(folders) if (rev := rev_of(source.prefix, e.key)) is not None]


def require_newest(source: Source, head: Head, listed: Iterable[tuple[int, Listed]]) -> None:
    """Raise DamagedObject when objects listed before `head` was read were made by later heads: it was put back, or is
    that of another database, and does not know what they are needed for."""
    newer = sorted(entry.key for rev, entry in listed if rev > head.rev)
    if newer:
        text = f"older (rev {head.rev}) than the head by which {newer[0]} was made"
        raise errors.DamagedObject(f"{source.name_of(head_key(source.prefix))}: {text}")


def archived(source: Source, key: str) -> Version:
    """A former head. Raises DamagedObject (for a key of another database, too), NewerFormat, StoreError."""
    if rev_of(source.prefix, key) is None:
        raise errors.DamagedObject(f"{source.name_of(source.prefix)}: refers to {key[:99]!r}, which is none of its own")
    found = source.store.get(key, site="roots")
    head = decode(found.body, source.name_of(key))
    if key != archive_key(source.prefix, head.rev, head.nonce):
        raise errors.DamagedObject(f"{source.name_of(key)}: not the head that its name says")
    return Version(head, found.etag)


def keep(source: Source, heads: HeadFile, version: Version, label: str) -> None:
    """Keep the state of `version`, a head that is stored, under a new label for as long as `forget` is not called.
    Raises DatabaseExists (the label is in use), Busy, and what a swap raises."""
    key = archive_key(source.prefix, version.head.rev, version.head.nonce)
    source.store.put(key, version.body, site="archive")

    def make(head: Head) -> Head:
        others = tuple(named for named in head.snapshots if named != NamedSnapshot(label, key))
        if label in [named.label for named in others]:
            raise errors.DatabaseExists(f"{source.name_of(source.prefix)}: has a snapshot {label!r}; choose another")
        if version.head.rev <= head.floor:
            raise errors.Busy(f"{source.name_of(source.prefix)}: took longer than the retention; try again")
        return replace(head, snapshots=(*others, NamedSnapshot(label, key)))

    heads.swap(version, make)


def forget(source: Source, heads: HeadFile, version: Version, label: str) -> None:
    """Let a named snapshot go, after the retention. Raises DatabaseNotFound, and what a swap raises."""
    if label not in [named.label for named in version.head.snapshots]:
        raise errors.DatabaseNotFound(f"{source.name_of(source.prefix)}: no snapshot {label!r}")
    heads.swap(version, lambda head: replace(head, snapshots=tuple(n for n in head.snapshots if n.label != label)))


def commits(source: Source, heads: HeadFile) -> list[Commit]:
    """Every commit that can be opened, newest first. Raises DatabaseNotFound, DamagedObject, StoreError."""

    def collected(version: Version) -> list[Commit]:
        return [commit for _, found in _timeline(source, version, 0) for commit in found][::-1]

    return _under_one_floor(source, heads, collected)


def open_at(source: Source, heads: HeadFile, which: int | str) -> Snapshot:
    """The state right after the commit with this seq, that of the named snapshot with this label, or the newest one at
    a time: `2026-01-31T23:59:59`, UTC unless it says otherwise, or how long ago, like `90m`. A seq may be text as well.
    Raises UsageError, DatabaseNotFound, TooOld, DamagedObject, StoreError."""
    if isinstance(which, str) and not LABEL.fullmatch(which):
        which = int(which) if re.fullmatch(r"\d{1,18}", which) else _newest_at(source, heads, which)

    def opened(version: Version) -> Snapshot:
        label = source.name_of(source.prefix)
        if isinstance(which, str):
            keys = {snapshot.label: snapshot.archive for snapshot in version.head.snapshots}
            if rev_of(source.prefix, keys.get(which, "")) is None:
                raise errors.DatabaseNotFound(f"{label}: no snapshot {which!r}")
            return Snapshot.load(source, archived(source, keys[which]))
        for root, found_there in _timeline(source, version, which):
            if any(commit.seq == which for commit in found_there):
                return Snapshot.load(source, root, at=which)
            raise errors.TooOld(f"{label}: commit {which} is not kept any more; `s3blockfs history` lists what is")
        raise errors.DatabaseNotFound(f"{label}: no commit {which} yet, the last one is {version.head.seq}")

    return _under_one_floor(source, heads, opened)


def _newest_at(source: Source, heads: HeadFile, time: str) -> int:
    """The seq of the newest commit then."""
    if (ago_s := duration_s(time)) is not None:
        moment_s = source.store.server_time_s() - ago_s
    else:
        try:
            moment = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", time))
        except ValueError:
            text = f"{time!r} is no label and no time; write a commit's number, a label, 90m, or 2026-01-31T23:59:59"
            raise errors.UsageError(text) from None
        moment_s = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    for commit in commits(source, heads):
        if commit.time_ms <= moment_s * 1000:
            return commit.seq
    raise errors.TooOld(f"{source.name_of(source.prefix)}: no commit of {time} or before is kept")


def _under_one_floor(source: Source, heads: HeadFile, look: Callable[[Version], T]) -> T:
    """Look again if the floor rose meanwhile: roots that were collected must not be taken for never having been."""
    while True:
        if (version := heads.read()) is None or version.head.deleted:
            raise errors.DatabaseNotFound(f"{source.name_of(source.prefix)}: no such database")
        result: T | errors.S3BlockFSError
        try:
            result = look(version)
        except errors.S3BlockFSError as error:
            result = error
        if (now := heads.read()) is None or now.head.floor == version.head.floor:
            if isinstance(result, errors.S3BlockFSError):
                raise result
            return result


def _timeline(source: Source, version: Version, first: int) -> Iterator[tuple[Version, list[Commit]]]:
    """Each root that shows commit `first` or later ones, oldest first, with the commits after the root before it."""
    shown, vouching = 0, None
    for root in chain(roots(source, version.head), [version]):
        head = root.head
        if head.seq >= first and not head.deleted:
            records, _ = read_log(source, head)
            records.setdefault(head.seq, Commit(head.seq, head.commit, head.time_ms, head.size, head.size))
            oldest = 0
            if head.id != vouching:
                found = BlockMap.of(head.extents, head.leaves, source.load_leaf).find(0, NO_END)
                unclear = (e.seq for e in found if e.ref.rev <= version.head.floor or e.ref.uid != e.ref.nonce)
                oldest = min(head.seq, max(unclear, default=0))
            yield root, [records[seq] for seq in sorted(records) if seq > shown and oldest <= seq <= head.seq]
        shown, vouching = max(shown, head.seq), head.id if head.rev > version.head.floor else None
