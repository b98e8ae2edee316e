"""Reading a whole data object without a head: every byte of it says what it is (docs/FORMAT.md)."""

from __future__ import annotations

import zlib

from s3blockfs.errors import DamagedObject, NewerFormat
from s3blockfs.format import data
from s3blockfs.format.keys import ObjectRef


def decode_object(body: bytes, ref: ObjectRef, name: str) -> tuple[int, data.Index]:
    """(role, index), every frame verified."""
    if len(body) < data.HEADER_BYTES + data.FOOTER_BYTES:
        raise DamagedObject(f"{name}: {len(body)} bytes are too short for a data object")
    magic, version, role, _, uid = data._HEADER.unpack_from(body)
    if magic != data._MAGIC or uid != ref.uid:
        raise DamagedObject(f"{name}: not the data object its name says")
    if version != data.VERSION:
        raise NewerFormat(f"{name}: data object version {version}; upgrade s3blockfs")
    footer = body[-data.FOOTER_BYTES :]
    uid, index_pos, index_length, index_crc, frames, commits, length, magic, crc = data._FOOTER.unpack(footer)
    expected = zlib.crc32(body[: data.HEADER_BYTES] + footer[:-4])
    if magic != data._END_MAGIC or crc != expected or uid != ref.uid or length != len(body):
        raise DamagedObject(f"{name}: damaged footer")
    index = data.decode_index(body[index_pos : index_pos + index_length], ref.uid, index_crc, name)
    if len(index.extents) != frames or len(index.commits) != commits:
        raise DamagedObject(f"{name}: footer and index disagree")
    for entry in index.extents:
        address = entry.address(ref)
        data.decode_frame(body[entry.pos : address.end], address, name)
    return role, index
