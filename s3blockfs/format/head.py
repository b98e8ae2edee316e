"""The head: the one mutable object of a database, changed only by compare-and-swap.

Layout: one line of JSON (readable with `head -1`), the inline map, the tail, then `S3BH` and a CRC-32 of everything
before it. The nonce is new in every head, because S3's ETag is a content hash and must never repeat.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from s3blockfs.errors import DamagedObject, NewerFormat, NotSupported
from s3blockfs.format import extents
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.keys import ObjectRef
from s3blockfs.format.tail import Tail

#: Version of everything under a prefix. A reader refuses a higher one; a change that old readers misread raises it.
FORMAT = 1

MAX_HEAD_BYTES = 64 * 1024 * 1024
MAX_LINE_BYTES = 4 * 1024 * 1024  # of JSON, which takes many times as much when parsed
MAX_DATABASE_BYTES = 1 << 48
MIN_BLOCK_BYTES = 512
MAX_BLOCK_BYTES = 4 * 1024 * 1024

_TRAILER = struct.Struct(">4sI")
_MAGIC = b"S3BH"


@dataclass(frozen=True, slots=True)
class Segment:
    """A data object in the log role that the head still needs."""

    ref: ObjectRef
    first_seq: int
    last_seq: int
    length: int
    index_pos: int
    index_length: int
    index_crc: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Politeness between writers, never safety."""

    owner: str
    nonce: str
    seconds: int


@dataclass(frozen=True, slots=True)
class NamedSnapshot:
    label: str
    archive: str


@dataclass(frozen=True, slots=True)
class Head:
    """One committed state. `commit` is the id of the commit that made it; `id` that of the database."""

    id: bytes
    rev: int
    seq: int
    commit: bytes
    size: int
    block_size: int
    nonce: bytes
    writer: str = ""
    time_ms: int = 0
    floor: int = 0
    deleted: bool = False
    name: str | None = None
    """The exact file name, when it was created through a mount; None lets `acme` be shown as `acme.sqlite`."""
    counter: int | None = None
    """SQLite's change counter (bytes 24..27) in this state; None when the file is not a SQLite database."""
    lease: Lease | None = None
    segments: tuple[Segment, ...] = ()
    snapshots: tuple[NamedSnapshot, ...] = ()
    leaves: tuple[LeafRef, ...] = ()
    extents: tuple[Extent, ...] = ()
    """The inline map; empty when there are leaves."""
    tail: Tail = field(default_factory=Tail)


def encode(head: Head) -> bytes:
    inline = extents.encode(head.extents)
    fields = {
        "format": FORMAT,
        "id": head.id.hex(),
        "rev": head.rev,
        "seq": head.seq,
        "commit": head.commit.hex(),
        "size_bytes": head.size,
        "block_size": head.block_size,
        "nonce": head.nonce.hex(),
        "writer": head.writer,
        "time_ms": head.time_ms,
        "floor": head.floor,
        "deleted": head.deleted,
        "name": head.name,
        "counter": head.counter,
        "lease": head.lease and [head.lease.owner, head.lease.nonce, head.lease.seconds],
        "segments": [
            [s.ref.encode(), s.first_seq, s.last_seq, s.length, s.index_pos, s.index_length, s.index_crc]
            for s in head.segments
        ],
        "snapshots": [[s.label, s.archive] for s in head.snapshots],
        "leaves": [[leaf.first, leaf.number, leaf.rev, leaf.nonce.hex(), leaf.crc] for leaf in head.leaves],
        "map_bytes": len(inline),
        "tail_bytes": len(head.tail.encoded),
    }
    line = json.dumps(fields, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"
    body = b"".join((line, inline, head.tail.encoded))
    if len(line) > MAX_LINE_BYTES or len(body) + _TRAILER.size > MAX_HEAD_BYTES:
        raise NotSupported("this database has outgrown its head; nothing was changed, copy it under another name")
    return body + _TRAILER.pack(_MAGIC, zlib.crc32(body, zlib.crc32(_MAGIC)))


def decode(body: bytes, name: str) -> Head:
    """Raises DamagedObject, or NewerFormat (looked at before anything else can be misread)."""
    if len(body) > MAX_HEAD_BYTES:
        raise DamagedObject(f"{name}: {len(body)} bytes are too many for a head")
    line, newline, rest = body.partition(b"\n")
    try:
        fields = json.loads(line) if len(line) <= MAX_LINE_BYTES else None
    except (ValueError, RecursionError) as error:
        raise DamagedObject(f"{name}: not the head of a database (its first line is no JSON)") from error
    if not isinstance(fields, dict) or type(version := fields.get("format")) is not int or version < 1:
        raise DamagedObject(f"{name}: not the head of a database")
    if version > FORMAT:
        raise NewerFormat(f"{name}: format {version}, this s3blockfs reads up to {FORMAT}; upgrade s3blockfs")
    if not newline or len(rest) < _TRAILER.size:
        raise DamagedObject(f"{name}: truncated head")
    magic, crc = _TRAILER.unpack(rest[-_TRAILER.size :])
    if magic != _MAGIC or crc != zlib.crc32(body[: -_TRAILER.size], zlib.crc32(_MAGIC)):
        raise DamagedObject(f"{name}: checksum mismatch in the head")

    def get(field: str, convert: Callable[..., Any], *options: Any) -> Any:
        try:
            return convert(fields.get(field), *options)
        except (ValueError, TypeError) as error:
            raise DamagedObject(f"{name}: bad field {field!r} in the head") from error

    map_bytes, tail_bytes = get("map_bytes", _number), get("tail_bytes", _number)
    if map_bytes + tail_bytes + _TRAILER.size != len(rest):
        raise DamagedObject(f"{name}: sections do not fill the head")
    head = Head(
        id=get("id", _hex, 16),
        rev=get("rev", _number),
        seq=get("seq", _number),
        commit=get("commit", _hex, 16),
        size=get("size_bytes", _number, MAX_DATABASE_BYTES),
        block_size=get("block_size", _number, MAX_BLOCK_BYTES),
        nonce=get("nonce", _hex, 8),
        writer=get("writer", _text),
        time_ms=get("time_ms", _number),
        floor=get("floor", _number),
        deleted=get("deleted", _flag),
        name=get("name", _optional, _text),
        counter=get("counter", _optional, _number, 0xFFFFFFFF),
        lease=get("lease", _optional, _row, lambda o, n, seconds: Lease(_text(o), _text(n), _number(seconds))),
        segments=get("segments", _rows, lambda ref, *n: Segment(ObjectRef.decode(ref, name), *map(_number, n))),
        snapshots=get("snapshots", _rows, lambda label, key: NamedSnapshot(_text(label), _text(key))),
        leaves=get("leaves", _rows, _leaf),
        extents=extents.decode(rest[:map_bytes], name),
        tail=Tail.decode(rest[map_bytes : map_bytes + tail_bytes], name),
    )
    if head.block_size < MIN_BLOCK_BYTES:
        raise DamagedObject(f"{name}: block size {head.block_size}")
    if head.leaves and (head.leaves[0].first != 0 or any(a.first >= b.first for a, b in pairwise(head.leaves))):
        raise DamagedObject(f"{name}: leaves of the block map out of order")
    return head


# Converters of JSON values: each raises ValueError or TypeError for what it cannot take.


def _number(value: Any, limit: int = (1 << 63) - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise ValueError("not a number in range")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError("not a text")
    return value


def _hex(value: Any, size: int) -> bytes:
    if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", value):
        raise ValueError("not hex digits")
    return bytes.fromhex(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("not true or false")
    return value


def _optional(value: Any, convert: Callable[..., Any], *options: Any) -> Any:
    return None if value is None else convert(value, *options)


def _row(value: Any, make: Callable[..., Any]) -> Any:
    if not isinstance(value, list):
        raise ValueError("not a row")
    return make(*value)


def _rows(value: Any, make: Callable[..., Any]) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError("not a list of rows")
    return tuple(_row(row, make) for row in value)


def _leaf(first: Any, number: Any, rev: Any, nonce: Any, crc: Any) -> LeafRef:
    return LeafRef(_number(first), _number(number), _number(rev), _hex(nonce, 8), _number(crc))
