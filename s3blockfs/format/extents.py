"""The map's codec: which block object holds each block. A map is a sorted, disjoint list of extents.

Inline in the head while it is small; otherwise cut into leaves `P/map/<leaf>-<rev>-<nonce>` of at most LEAF_EXTENTS
extents (<= 64 KiB), each covering the blocks from its `first` up to the next leaf's.
"""

import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from s3blockfs.errors import DamagedObject, NewerFormat
from s3blockfs.format.data import inflate
from s3blockfs.format.keys import ObjectRef, map_key

LEAF_EXTENTS = 1024
INLINE_MAP_BYTES = 16 * 1024

_MAGIC = b"S3BM\x01"
_OBJECT = struct.Struct(">Q8s8s")
_EXTENT = struct.Struct(">QIIIQ")  # first block, blocks, object number, first slot, complete to seq
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
    """A leaf of the map: the blocks from `first` on. The CRC ties the content to the head that refers to it."""

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
    body = (
        struct.pack(">II", len(numbers), len(rows))
        + b"".join(_OBJECT.pack(*ref) for ref in numbers)
        + b"".join(_EXTENT.pack(e.first, e.blocks, numbers[e.ref], e.slot, e.seq) for e in rows)
    )
    return _MAGIC + zlib.compress(body, 6)


def decode(encoded: bytes, name: str) -> tuple[Extent, ...]:
    """Raises DamagedObject unless the extents are sorted, disjoint and non-empty."""
    if not encoded.startswith(_MAGIC[:4]):
        raise DamagedObject(f"{name}: not a block map")
    if encoded[:5] != _MAGIC:
        raise NewerFormat(f"{name}: block map version {encoded[4:5].hex()}; upgrade s3blockfs")
    body = inflate(encoded[5:], _MAX_LEAF_BYTES, name)
    n_objects, n_extents = struct.unpack_from(">II", body) if len(body) >= 8 else (0, 0)
    middle = 8 + n_objects * _OBJECT.size
    if len(body) != middle + n_extents * _EXTENT.size:
        raise DamagedObject(f"{name}: block map length does not fit its counts")
    refs = [ObjectRef(*row) for row in _OBJECT.iter_unpack(body[8:middle])]
    rows: list[Extent] = []
    for first, blocks, number, slot, seq in _EXTENT.iter_unpack(body[middle:]):
        if number >= n_objects or blocks == 0 or (rows and first < rows[-1].end):
            raise DamagedObject(f"{name}: block map out of order")
        rows.append(Extent(first, blocks, refs[number], slot, seq))
    return tuple(rows)
