"""The map's codec: which block object holds each block. A map is a sorted, disjoint list of extents.
Inline in the head while it is small, otherwise in leaves of at most LEAF_EXTENTS extents (<= 64 KiB)."""

from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

from s3blockfs.errors import DamagedObject, NewerFormat
from s3blockfs.format.data import pack_tables, unpack_tables
from s3blockfs.format.keys import ObjectRef, map_key

LEAF_EXTENTS = 1024
INLINE_MAP_BYTES = 16 * 1024

_MAGIC = b"S3BM\x01"
_OBJECT = Struct(">Q8s8s")
_EXTENT = Struct(">QIIIQ")  # first block, blocks, object number, first slot, complete to seq
_MAX_LEAF_BYTES = 4 * 1024 * 1024


class Extent(NamedTuple):
    """Blocks `first .. first+blocks` are the slots `slot .. slot+blocks` of one block object, and hold everything
    committed up to `seq` ("complete to"): log entries with a seq <= it are ignored for these blocks."""

    first: int
    blocks: int
    ref: ObjectRef
    slot: int
    seq: int

    @property
    def end(self) -> int:
        return self.first + self.blocks


class LeafRef(NamedTuple):
    """The blocks from `first` up to the next leaf's. The CRC ties the content to the head that refers to it."""

    first: int
    number: int
    rev: int
    nonce: bytes
    crc: int

    def key(self, prefix: str) -> str:
        return map_key(prefix, self.number, self.rev, self.nonce)


def encode(extents: Iterable[Extent]) -> bytes:
    rows = list(extents)
    numbers = {ref: number for number, ref in enumerate(dict.fromkeys(extent.ref for extent in rows))}
    numbered = [(e.first, e.blocks, numbers[e.ref], e.slot, e.seq) for e in rows]
    return _MAGIC + pack_tables(_OBJECT, list(numbers), _EXTENT, numbered)


def decode(encoded: bytes, name: str) -> tuple[Extent, ...]:
    """Raises DamagedObject unless the extents are sorted, disjoint and non-empty."""
    if not encoded.startswith(_MAGIC[:4]):
        raise DamagedObject(f"{name}: not a block map")
    if encoded[:5] != _MAGIC:
        raise NewerFormat(f"{name}: block map version {encoded[4:5].hex()}; upgrade s3blockfs")
    objects, extents = unpack_tables(encoded[5:], _MAX_LEAF_BYTES, _OBJECT, _EXTENT, name)
    refs = [ObjectRef(*row) for row in objects]
    rows: list[Extent] = []
    for first, blocks, number, slot, seq in extents:
        if number >= len(refs) or blocks == 0 or (rows and first < rows[-1].end):
            raise DamagedObject(f"{name}: block map out of order")
        rows.append(Extent(first, blocks, refs[number], slot, seq))
    return tuple(rows)
