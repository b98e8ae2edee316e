"""Is everything there that a database and its past need, whole, and can every byte of it be read? Changes nothing."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain

from s3blockfs import header
from s3blockfs.errors import DamagedObject, NewerFormat, ObjectNotFound, S3BlockFSError
from s3blockfs.format.data import OBJECT_BYTES, decode_object
from s3blockfs.format.extents import LeafRef
from s3blockfs.format.keys import ObjectRef
from s3blockfs.head import HeadFile
from s3blockfs.history import dated, require_newest, roots
from s3blockfs.runtime import Progress, in_flight
from s3blockfs.snapshot import Snapshot, Source, Version

AT_A_TIME = 8  # whole objects in memory


def findings(source: Source, heads: HeadFile, version: Version, report: Progress) -> list[str]:
    """What is wrong, one line each. Raises TooOld (it was replaced, and collected meanwhile), StoreError."""
    while True:
        found = [*_of_objects(source, version, report), *_of_pages(source, version, report)]
        listed = dated(source, "check")
        now = heads.read()
        try:
            require_newest(source, version.head if now is None else now.head, listed)
        except DamagedObject as error:
            found.append(str(error))
        if not found or now is None or now.head.floor == version.head.floor or now.head.deleted:
            return found
        version = now  # a collector was at work: look again


def _of_objects(source: Source, version: Version, report: Progress) -> Iterator[str]:
    """Every data object that the head or one of its roots refers to is fetched whole, every leaf and archive, too."""
    refs: dict[ObjectRef, None] = {}
    leaves: dict[LeafRef, None] = {}
    wrong: list[S3BlockFSError] = []
    for root in chain(roots(source, version.head, wrong.append), [version]):
        leaves |= dict.fromkeys(root.head.leaves)
        refs |= dict.fromkeys(extent.ref for extent in root.head.extents)
        refs |= dict.fromkeys(segment.ref for segment in root.head.segments)
    yield from dict.fromkeys(map(str, wrong))
    for leaf in leaves:
        try:
            refs |= dict.fromkeys(extent.ref for extent in source.load_leaf(leaf))
        except (DamagedObject, NewerFormat) as error:
            yield str(error)
    looks = in_flight(source.runtime, AT_A_TIME, (partial(_of_object, source, ref) for ref in refs))
    for done, finding in enumerate(looks):
        report(done, len(refs))
        if finding:
            yield finding


def _of_object(source: Source, ref: ObjectRef) -> str | None:
    key = ref.key(source.prefix)
    try:
        decode_object(source.store.get(key, site="check").body, ref, source.name_of(key))
    except ObjectNotFound:
        return f"{source.name_of(key)}: missing"
    except (DamagedObject, NewerFormat) as error:
        return str(error)
    return None


def _of_pages(source: Source, version: Version, report: Progress) -> Iterator[str]:
    """Every byte of the state is read; what cannot be is narrowed down to blocks."""
    damaged: list[tuple[int, int, str]] = []
    try:
        state = Snapshot.load(source, version)
    except (DamagedObject, NewerFormat) as error:
        yield f"nothing can be read: {error}"
        return
    size, block, unit, name = state.head.size, state.head.block_size, 1, "bytes"
    with suppress(DamagedObject, NewerFormat):
        if header.is_database(first := state.read(0, header.HEADER_BYTES)):
            unit, name = header.page_size(first), "pages"
    for start in range(0, size, OBJECT_BYTES):
        report(start, size)
        try:
            state.prefetch(start, start + AT_A_TIME * OBJECT_BYTES)
            state.read(start, OBJECT_BYTES)
        except (DamagedObject, NewerFormat):
            for at in range(start, min(start + OBJECT_BYTES, size), block):
                try:
                    state.read(at, block)
                except (DamagedObject, NewerFormat) as error:
                    why, low = str(error), at
                    if damaged and damaged[-1][1:] == (at, why):
                        low = damaged.pop()[0]
                    damaged.append((low, min(at + block, size), why))
    yield from (f"{name} {low // unit + 1} to {-(-high // unit)}: {why}" for low, high, why in damaged)
