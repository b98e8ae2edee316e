"""The one immutable object format, `P/data/...`, in its two roles.

Header, frames, index, footer. A frame is one extent of the database file and verifies itself when only its own bytes
were fetched. Log role ("segment"): extents of one or more commits, none crossing a block boundary, compressed when that
helps. Base role ("block object"): whole blocks, uncompressed, so that slot i starts at a computable byte."""

import struct
import zlib
from collections.abc import Sequence
from struct import Struct
from typing import Any, NamedTuple

from s3blockfs.errors import DamagedObject, NewerFormat
from s3blockfs.format.keys import ObjectRef

Row = tuple[Any, ...]

VERSION = 1
LOG, BASE = 0, 1

_HEADER = Struct(">4sBBH8s")  # magic, version, role, reserved, uid
_FRAME = Struct(">QQIIB3xI")  # offset, seq, raw length, stored length, codec, CRC-32
_FOOTER = Struct(">8sQIIIIQ4sI")  # uid, index pos, index length, index CRC, frames, commits, length, magic, CRC
_COMMIT = Struct(">Q16sQQQ")  # seq, commit id, time in ms, size in bytes, cut in bytes
_EXTENT = Struct(">QQQII")  # pos, offset, seq, raw length, stored length
_MAGIC, _END_MAGIC = b"S3BD", b"DB3S"
_RAW, _ZLIB = 0, 1

HEADER_BYTES, FRAME_BYTES, FOOTER_BYTES = _HEADER.size, _FRAME.size, _FOOTER.size
COMMIT_ID_BYTES = 16

#: Payload of a block object, and the size at which segments are split: requests cost little, several fit in memory.
OBJECT_BYTES = 4 * 1024 * 1024
MAX_FRAME_BYTES = 16 * 1024 * 1024  # no legal frame or index is longer; a decoder allocates no more for one


class Commit(NamedTuple):
    """`cut` is the smallest size the file had between the state before and this one: older bytes at or beyond it are
    gone, also when the file grew again, so they read as zeros unless this or a later commit wrote them."""

    seq: int
    id: bytes
    time_ms: int
    size: int
    cut: int


class FrameAddress(NamedTuple):
    """Where one frame lies (`pos`, `stored`: in the object) and what it must hold (`offset`, `raw`: in the file)."""

    ref: ObjectRef
    pos: int
    stored: int
    offset: int
    raw: int

    @property
    def end(self) -> int:
        return self.pos + FRAME_BYTES + self.stored

    def decode(self, buffer: bytes | memoryview | None, name: str) -> bytes:
        return decode_frame(buffer, self, name)


class IndexEntry(NamedTuple):
    pos: int
    offset: int
    seq: int
    raw: int
    stored: int

    def address(self, ref: ObjectRef) -> FrameAddress:
        return FrameAddress(ref, self.pos, self.stored, self.offset, self.raw)


class Index(NamedTuple):
    commits: tuple[Commit, ...]
    extents: tuple[IndexEntry, ...]


class BuiltObject(NamedTuple):
    """An encoded object, and where its index lies: the head repeats it so that opening needs one ranged GET."""

    body: bytes
    index_pos: int
    index_length: int
    index_crc: int
    entries: tuple[IndexEntry, ...]


def slots_per_object(block_size: int) -> int:
    return max(1, OBJECT_BYTES // block_size)


def slot_address(ref: ObjectRef, slot: int, block: int, block_size: int) -> FrameAddress:
    """The frame of one block in the base role."""
    pos = HEADER_BYTES + slot * (FRAME_BYTES + block_size)
    return FrameAddress(ref, pos, block_size, block * block_size, block_size)


def build(
    uid: bytes, role: int, frames: Sequence[tuple[int, int, bytes]], commits: Sequence[Commit] = ()
) -> BuiltObject:
    """Encode (offset, seq, bytes) frames. In the base role all must have one length, that of a block."""
    header = _HEADER.pack(_MAGIC, VERSION, role, 0, uid)
    parts, entries, pos = [header], [], HEADER_BYTES
    for offset, seq, raw in frames:
        codec, stored = _RAW, raw
        if role == LOG:
            packed = zlib.compress(raw, 1)
            if len(packed) < len(raw) * 9 // 10:
                codec, stored = _ZLIB, packed
        head = _FRAME.pack(offset, seq, len(raw), len(stored), codec, 0)[:-4]
        parts += (head, _frame_crc(uid, head, stored).to_bytes(4, "big"), stored)
        entries.append(IndexEntry(pos, offset, seq, len(raw), len(stored)))
        pos += FRAME_BYTES + len(stored)
    index = pack_tables(_COMMIT, commits, _EXTENT, entries)
    index_crc = zlib.crc32(index, zlib.crc32(uid))
    length = pos + len(index) + FOOTER_BYTES
    footer = _FOOTER.pack(uid, pos, len(index), index_crc, len(entries), len(commits), length, _END_MAGIC, 0)[:-4]
    parts += (index, footer, zlib.crc32(header + footer).to_bytes(4, "big"))
    return BuiltObject(b"".join(parts), pos, len(index), index_crc, tuple(entries))


def decode_frame(buffer: bytes | memoryview | None, address: FrameAddress, name: str) -> bytes:
    """The extent's bytes. `buffer` is exactly the frame, None when the object is missing. Raises DamagedObject naming
    the object and the bytes of the database."""
    if buffer is None:
        raise DamagedObject(f"{name}: missing {_held(address)}")
    if len(buffer) != FRAME_BYTES + address.stored:
        whole = FRAME_BYTES + address.stored
        raise _damaged(address, name, f"{len(buffer)} bytes instead of {whole}; object truncated")
    offset, _seq, raw, stored, codec, crc = _FRAME.unpack_from(buffer)
    data = bytes(buffer[FRAME_BYTES:])
    if crc != _frame_crc(address.ref.uid, buffer[: FRAME_BYTES - 4], data):
        raise _damaged(address, name, "checksum mismatch")
    if (offset, raw, stored) != (address.offset, address.raw, address.stored):
        raise _damaged(address, name, "holds other bytes than its place says")
    if codec == _ZLIB:
        data = inflate(data, raw, f"{name}: damaged at byte {address.pos} {_held(address)}")
    elif codec != _RAW:
        raise NewerFormat(f"{name}: unknown compression {codec}; upgrade s3blockfs")
    if len(data) != raw:
        raise _damaged(address, name, f"{len(data)} bytes unpacked instead of {raw}")
    return data


def _held(address: FrameAddress) -> str:
    return f"(database bytes {address.offset}..{address.offset + address.raw})"


def _damaged(address: FrameAddress, name: str, what: str) -> DamagedObject:
    return DamagedObject(f"{name}: damaged at byte {address.pos} {_held(address)}: {what}")


def decode_index(buffer: bytes, uid: bytes, crc: int, name: str) -> Index:
    """The index of a data object. Raises DamagedObject."""
    if zlib.crc32(buffer, zlib.crc32(uid)) != crc:
        raise DamagedObject(f"{name}: checksum mismatch in the index")
    commits, extents = unpack_tables(buffer, MAX_FRAME_BYTES, _COMMIT, _EXTENT, name)
    index = Index(tuple(Commit(*row) for row in commits), tuple(IndexEntry(*row) for row in extents))
    if any(entry.raw > MAX_FRAME_BYTES or entry.stored > MAX_FRAME_BYTES for entry in index.extents):
        raise DamagedObject(f"{name}: an extent of more than {MAX_FRAME_BYTES} bytes")
    return index


def decode_object(body: bytes, ref: ObjectRef, name: str) -> tuple[int, Index]:
    """(role, index) of a whole object, which needs no head to be verified. Raises DamagedObject, NewerFormat."""
    if len(body) < HEADER_BYTES + FOOTER_BYTES:
        raise DamagedObject(f"{name}: {len(body)} bytes are too short for a data object")
    magic, version, role, _, uid = _HEADER.unpack_from(body)
    if magic != _MAGIC or uid != ref.uid:
        raise DamagedObject(f"{name}: not the data object its name says")
    if version != VERSION:
        raise NewerFormat(f"{name}: data object version {version}; upgrade s3blockfs")
    footer = body[-FOOTER_BYTES:]
    uid, index_pos, index_length, index_crc, frames, commits, length, magic, crc = _FOOTER.unpack(footer)
    expected = zlib.crc32(body[:HEADER_BYTES] + footer[:-4])
    if magic != _END_MAGIC or crc != expected or uid != ref.uid or length != len(body):
        raise DamagedObject(f"{name}: damaged footer")
    index = decode_index(body[index_pos : index_pos + index_length], ref.uid, index_crc, name)
    if (len(index.extents), len(index.commits)) != (frames, commits):
        raise DamagedObject(f"{name}: footer and index disagree")
    for entry in index.extents:
        address = entry.address(ref)
        decode_frame(body[entry.pos : address.end], address, name)
    return role, index


def pack_tables(first: Struct, rows: Sequence[Row], second: Struct, more: Sequence[Row]) -> bytes:
    """Compressed: how many rows each table has (4 bytes each), then the tables."""
    tables = [first.pack(*row) for row in rows] + [second.pack(*row) for row in more]
    return zlib.compress(struct.pack(">II", len(rows), len(more)) + b"".join(tables), 6)


def unpack_tables(packed: bytes, limit: int, first: Struct, second: Struct, name: str) -> tuple[list[Row], list[Row]]:
    """Raises DamagedObject."""
    body = inflate(packed, limit, name)
    n_rows, n_more = struct.unpack_from(">II", body) if len(body) >= 8 else (0, 0)
    middle = 8 + n_rows * first.size
    if len(body) != middle + n_more * second.size:
        raise DamagedObject(f"{name}: its length does not fit its counts")
    return list(first.iter_unpack(body[8:middle])), list(second.iter_unpack(body[middle:]))


def inflate(packed: bytes, limit: int, where: str, zdict: bytes = b"") -> bytes:
    """zlib-decompress at most `limit` bytes: a few hostile bytes must not become gigabytes."""
    unpacker = zlib.decompressobj(zdict=zdict) if zdict else zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, limit + 1)
    except zlib.error as error:
        raise DamagedObject(f"{where}: {error}") from error
    if len(data) > limit or not unpacker.eof or unpacker.unused_data:
        raise DamagedObject(f"{where}: compressed data of another length than declared")
    return data


def _frame_crc(uid: bytes, head: bytes | memoryview, stored: bytes) -> int:
    return zlib.crc32(stored, zlib.crc32(head, zlib.crc32(uid)))
