"""Databases of sqlite-s3vfs: `P/0000000000`, `P/0000000001`, ... are the file cut into blocks of one size. A leftover
`P-journal/` in the same layout means that it died in mid-transaction. Read in place, converted, written again.

That library overwrites in place and knows no locks. So the ETags of one LIST define the state that is read, and every
GET asks for its own: what was overwritten since is an error, never a mix. A LIST of many pages is no instant; a second
one that equals it proves that everything was as listed when the journal was looked at between the two.

Its file size is the sum of all blocks, and so it is here. Where one is missing or short (SQLite skips the page at 2^30,
and that library pads; a cut that died half-way leaves a hole) the file ends if its header says so, else it is damaged.
Journals do have short blocks, since SQLite leaves gaps before their headers. (By its sum of sizes that library then
misses the rest of a journal, and rolls back in part: measured. Here it is rolled back as SQLite does on a disk.)

Threads: any. A `Version` with a made-up head (rev 0) and its snapshot stands for such a database everywhere."""

import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from s3blockfs import errors, header, journal
from s3blockfs.blockmap import BlockMap
from s3blockfs.config import MIB, Config
from s3blockfs.dirty import Dirty, spill_folder
from s3blockfs.format.data import COMMIT_ID_BYTES, OBJECT_BYTES, Commit, FrameAddress, slots_per_object
from s3blockfs.format.head import MAX_BLOCK_BYTES, MIN_BLOCK_BYTES, Head
from s3blockfs.format.keys import NONCE_BYTES, ObjectRef, is_prefix
from s3blockfs.format.tail import LogCommit, Tail
from s3blockfs.head import HeadFile
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import IO_THREADS, Progress, all_of, in_flight
from s3blockfs.snapshot import Snapshot, Source, Version
from s3blockfs.uploads import Uploads, upload_map

log = logging.getLogger(__name__)

CONVERT_BYTES = 256 * MIB  # a larger one is not converted by its first write, which would wait for minutes
CELL_BYTES = MIB  # the most that one GET asks for: blocks may have any size
ATTEMPTS = 3  # to find a state that nobody changes meanwhile

_BLOCK = re.compile(r"/([0-9]{10})")


class _Blocks:
    """One file in that layout, as it was listed. Each byte has its place; what no block holds reads as zeros."""

    def __init__(self, source: Source, name: str, block_size: int = 0) -> None:
        """`block_size`: at least; blocks may be short, but hardly all of them."""
        self._source = source
        self.name = name
        listed = [(_BLOCK.fullmatch(e.key, len(name)), e) for e in source.store.list(f"{name}/", site="legacy")]
        #: number -> (bytes, ETag) of that library's keys; others are uploads of a conversion that died.
        self.rows = {int(match[1]): (e.size_bytes, e.etag) for match, e in listed if match}
        self.modified_s = max((e.modified_s for match, e in listed if match), default=0.0)
        self.block_size = max([block_size, *(size for size, _ in self.rows.values())])
        self.size = max((number * self.block_size + size for number, (size, _) in self.rows.items()), default=0)
        self.total = sum(size for size, _ in self.rows.values())
        full = next(n for n in itertools.count() if self.rows.get(n, (0,))[0] < max(self.block_size, 1))
        self.solid = full * self.block_size + self.rows.get(full, (0,))[0]  # up to here nothing is missing

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes at the end. Raises DatabaseGone when a block is not the one listed any more."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        size, start = self.block_size, offset - offset % self.block_size % CELL_BYTES
        first, last = start // size, (end - 1) // size
        # By what there is, not by how many there would be: a listed key of ten digits makes a file of any size.
        numbers = range(first, last + 1) if last - first < len(self.rows) else sorted(self.rows)
        held = [number for number in numbers if first <= number <= last and number in self.rows]
        cells = [
            (number, low)
            for number in held
            for low in range(max(start - number * size, 0), min(size, end - number * size), CELL_BYTES)
        ]
        parts = all_of(self._source.runtime, [partial(self._cell, *cell) for cell in cells])
        data = bytearray(end - start)
        for (number, low), part in zip(cells, parts, strict=True):
            at = number * size + low - start
            data[at : at + len(part)] = part
        return bytes(data[offset - start : end - start])

    def _cell(self, block: int, start: int) -> bytes:
        """A block, or CELL_BYTES of it. An ETag stands for one content of a key, so the cache may know it by that."""
        size, etag = self.rows.get(block, (0, ""))
        length = min(CELL_BYTES, self.block_size - start)
        here, uid = max(0, min(length, size - start)), etag.encode()
        address = FrameAddress(ObjectRef(block, uid, uid), start, here, block * self.block_size + start, here)
        data = self._source.cache.get(self.name, address) if here else b""
        if data is None:
            key = f"{self.name}/{block:010d}"
            try:
                found = self._source.store.get(key, site="legacy", start=start, length=here, if_match=etag)
            except (errors.ObjectNotFound, errors.PreconditionFailed):
                found = None
            if found is None or found.etag != etag or len(found.body) != here:  # not every store knows If-Match on GET
                raise errors.DatabaseGone(f"{self._source.name_of(key)}: changed by another program; read again")
            data = found.body
            self._source.cache.put(self.name, address, data)
        return data.ljust(length, b"\0")


class LegacySnapshot(Snapshot):
    """The last committed state of such a database: the images of a leftover journal lie over the blocks. No map."""

    def __init__(self, source: Source, config: Config, blocks: _Blocks, leftover: _Blocks, shown: int | None) -> None:
        """`shown`: the change counter of what was shown until now. Raises DamagedObject, NotSupported, DatabaseGone."""
        self._source, self._blocks, self._end = source, blocks, blocks.solid
        self._places, self._top = {}, b""
        self.listed = blocks.rows, leftover.rows
        self._over = Dirty(spill_folder(config.spill_dir), config.block_size, 0)
        size = _roll_back(source.store, leftover, self._over)
        size = blocks.total if size is None else size
        claimed = header.file_size(self.read(0, header.HEADER_BYTES)) or size
        if max(size, claimed) > blocks.solid:
            size = claimed
        if size > blocks.solid:
            hole = source.name_of(f"{blocks.name}/{blocks.solid // (blocks.block_size or 1):010d}")
            raise errors.DamagedObject(f"{hole}: missing, or shorter than others")
        self._end = size
        first = self.read(0, header.HEADER_BYTES)
        if header.sets_wal(0, first) and any(source.store.list(f"{blocks.name}-wal/", site="legacy", max_keys=1)):
            advice = "open it once with sqlite-s3vfs and locking_mode=EXCLUSIVE, and close it"
            raise errors.NotSupported(f"{source.name_of(blocks.name)}: has a write-ahead log; {advice}")
        counter = header.counter(first) if header.is_database(first) else None
        if counter is not None and shown is not None and counter <= shown:
            # That library's EXCLUSIVE mode changes pages but not the counter, and SQLite would keep its old pages.
            counter = (shown + 1) & 0xFFFFFFFF
            for offset, data in header.counter_patches(first, counter):
                self._over.write(offset, data)
        # Two machines that see the same bytes give them the same identity, so that either may convert them.
        state = repr((blocks.name, *(sorted(rows.items()) for rows in self.listed), counter)).encode()
        name, time_ms = hashlib.blake2b(state, digest_size=COMMIT_ID_BYTES).digest(), int(blocks.modified_s * 1000)
        record = Commit(1, name, time_ms, size, 0)
        head = Head(name, 0, 1, name, size, config.block_size, bytes(NONCE_BYTES), "sqlite-s3vfs", time_ms)
        self.head = replace(head, counter=counter, tail=Tail.of([LogCommit(record, ())]))
        self.version = Version(self.head, "", self)

    def read(self, offset: int, length: int) -> bytes:
        end = max(offset, min(offset + length, self._end))
        data = bytearray(self._blocks.read(offset, end - offset))
        for low, high in self._over.ranges(offset, end):
            data[low - offset : high - offset] = self._over.read(low, high)
        return bytes(data)

    def _frames(self, first: int, end: int) -> None:
        """There are none."""

    def prefetch(self, offset: int, end: int) -> None:
        """Nothing: with small blocks the number of requests is the limit, and more of them do not help."""


def _roll_back(store: ObjectStore, leftover: _Blocks, over: Dirty) -> int | None:
    """Put the images of a hot journal into `over`; the size before its transaction, None when it is not hot. SQLite's
    rules (pager.c: hasHotJournal, pager_playback): one that names a super-journal which is gone is committed."""
    window = (0, b"")

    def read(offset: int, length: int) -> bytes:
        """In large pieces: records are small, and each GET takes a round trip."""
        nonlocal window
        if not window[0] <= offset <= offset + length <= window[0] + len(window[1]):
            window = offset, leftover.read(offset, max(length, OBJECT_BYTES))
        return window[1][offset - window[0] : offset - window[0] + length]

    if not journal.is_hot(read(0, 1)):
        return None
    name = journal.super_journal(read, leftover.size)
    size = journal.size_before(read, leftover.size)
    is_there = name is None or (is_prefix(name) and any(store.list(f"{name}/", site="legacy", max_keys=1)))
    if size is None or not is_there:  # committed; a name that no key can have is that of nothing
        return None
    for offset, image in journal.page_images(read, leftover.size, hot=True):
        if offset < size:
            over.write(offset, image)
    return size


def find(source: Source, config: Config, before: Version | None = None) -> Version | None:
    """What that library stored under the prefix: `before` itself when nothing changed, None when there is nothing.
    Raises DatabaseGone while it is being written, and what `LegacySnapshot` raises."""
    shown = None if before is None else before.snapshot
    for _ in range(ATTEMPTS):
        if not exists(source.store, source.prefix):
            return None
        blocks = _Blocks(source, source.prefix)
        leftover = _Blocks(source, source.prefix + "-journal", blocks.block_size)
        if isinstance(shown, LegacySnapshot) and shown.listed == (blocks.rows, leftover.rows):
            return before
        if blocks.rows and blocks.rows == _Blocks(source, source.prefix).rows:
            return LegacySnapshot(source, config, blocks, leftover, shown.head.counter if shown else None).version
    raise errors.DatabaseGone(f"{source.name_of(source.prefix)}: sqlite-s3vfs is writing to it; try again")


def exists(store: ObjectStore, prefix: str) -> bool:
    """Whether block 0 is there; beside a head it is stale."""
    try:
        store.get(f"{prefix}/{0:010d}", site="legacy", length=1)
    except errors.ObjectNotFound:
        return False
    return True


def stale_keys(store: ObjectStore, prefix: str) -> list[str]:
    """Blocks and journals of that library. Beside a head they count for nothing: a conversion kept them or was
    interrupted before it deleted them all, or that library went on writing."""
    starts = (f"{prefix}/0", f"{prefix}-journal/0")
    keys = [(entry.key, len(start) - 2) for start in starts for entry in store.list(start, site="legacy")]
    return [key for key, slash in keys if _BLOCK.fullmatch(key, slash)]


def report_stale(source: Source, head: Head) -> None:
    """To the log. Asks the store only for one that was converted, as the first commit in its tail still shows."""
    converted = head.rev and [record.id for record in head.tail.records[:1]] == [head.id]
    if converted and exists(source.store, source.prefix):
        key = source.name_of(f"{source.prefix}/{0:010d}")
        log.warning("%s: left or written by sqlite-s3vfs beside the converted database; it counts for nothing", key)


class AnyHead(HeadFile):
    """A head, or where there is none what sqlite-s3vfs stored; a swap based on that converts it first."""

    def __init__(self, source: Source, config: Config) -> None:
        super().__init__(source.store, source.runtime, config, source.prefix)
        self._source = source

    def read(self, before: Version | None = None) -> Version | None:
        return self.stored() or find(self._source, self._config, before)

    def read_if_changed(self, known: Version) -> Version:
        if known.snapshot is None:
            return super().read_if_changed(known)
        if (found := self.read(known)) is None:
            raise errors.DatabaseGone(f"{self._name}: the database was deleted by another program")
        return found

    def swap(self, base: Version | None, make: Callable[[Any], Head], **options: Any) -> Version:
        if base is None or not isinstance(base.snapshot, LegacySnapshot):
            return super().swap(base, make, **options)
        if not make(base.head).deleted:
            return super().swap(self.convert(base), make, **options)
        gone = super().swap(None, lambda _: make(base.head))  # the tombstone is its first head
        if not gone.head.deleted:  # who converts it draws the same id, so this looked like our own head
            raise errors.Busy(f"{self._name}: changed elsewhere, and was not deleted; try again")
        self._clear(base.snapshot)
        return gone

    def convert(
        self, version: Version, limit: int = CONVERT_BYTES, keep: bool = False, progress: Progress = lambda *_: None
    ) -> Version:
        """Copy the bytes into block objects, create the head, delete the old keys unless `keep`. No commit: the bytes
        stay as they are. Until there is a head the old store is as it was, and from then on it counts for nothing; so
        this may die anywhere. Raises ReadOnly when it is larger, Busy when it changed meanwhile, StoreError."""
        snapshot, head = version.snapshot, version.head
        if not isinstance(snapshot, LegacySnapshot):
            return version
        name = self._source.name_of(self.prefix)
        if head.size > limit:
            raise errors.ReadOnly(f"{name}: large and in sqlite-s3vfs's layout; convert it with s3blockfs adopt {name}")
        uploads = Uploads(self._source, self._config, head, head.seq)
        step = slots_per_object(head.block_size)
        try:
            for first in range(0, -(-head.size // head.block_size), step):
                data = snapshot.read(first * head.block_size, step * head.block_size)
                pieces = range(0, len(data), head.block_size)
                uploads.put_blocks([(first + n, data[at : at + head.block_size]) for n, at in enumerate(pieces)])
                progress(first * head.block_size + len(data), head.size)
            uploads.wait()
            block_map = BlockMap.of((), (), self._source.load_leaf).replace(uploads.extents())
            encoded = upload_map(self._source, block_map, head.rev)
            if self.read_if_changed(version) is not version:
                raise errors.DatabaseGone(f"{name}: written by sqlite-s3vfs")
            made = replace(head, extents=encoded.extents, leaves=encoded.leaves)
            converted = self.swap(None, lambda _: made)
            if converted.head.deleted or converted.head.commit != head.commit:  # the id is the same for everybody
                raise errors.DatabaseGone(f"{name}: converted by somebody else, who went on")
        except (errors.DatabaseExists, errors.DatabaseGone) as error:
            raise errors.Busy(f"{name}: changed elsewhere, and was not converted; read again") from error
        if not keep:
            self._clear(snapshot)
        return converted

    def _clear(self, snapshot: LegacySnapshot) -> None:
        """Delete the old keys, now that there is a head. What is left when that fails is only stale. Block 0 first:
        without it that library fails loudly. The journal last: without it torn blocks would look sound."""
        names = zip((self.prefix, f"{self.prefix}-journal"), snapshot.listed, strict=True)
        try:
            self._store.delete([f"{name}/{n:010d}" for name, rows in names for n in sorted(rows)], site="legacy")
        except errors.StoreError as error:
            log.warning("keys of sqlite-s3vfs are left: %s", error)


def export_layout(snapshot: Snapshot, source: Source, block_size: int, progress: Progress) -> None:
    """Write a state as that library stores it, under the prefix of `source`, where nothing may be. Block 0 comes last:
    without it nobody takes an interrupted export for a database. Raises UsageError, DatabaseExists, StoreError."""
    if not MIN_BLOCK_BYTES <= block_size <= MAX_BLOCK_BYTES:
        raise errors.UsageError(f"block size {block_size}: from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES} bytes")
    for name in (source.prefix, f"{source.prefix}-journal"):
        if any(source.store.list(f"{name}/", site="export", max_keys=1)):
            raise errors.DatabaseExists(f"{source.name_of(name)}/: not empty; export to another name, or delete it")

    size, step = snapshot.head.size, max(1, OBJECT_BYTES // block_size) * block_size

    def put(start: int, block: bytes) -> Callable[[], str]:
        return partial(source.store.put, f"{source.prefix}/{start // block_size:010d}", block, site="export")

    def puts() -> Iterator[Callable[[], str]]:
        for piece in range(0, size, step):
            data = snapshot.read(piece, step)
            for start in range(0 if piece else block_size, len(data), block_size):
                yield put(piece + start, data[start : start + block_size])
            progress(piece + len(data), size)

    list(in_flight(source.runtime, IO_THREADS, puts()))
    if size:
        put(0, header.in_rollback_mode(0, snapshot.read(0, block_size)))()
