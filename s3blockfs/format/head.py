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
_HEX16 = re.compile(r"[0-9a-f]{16}")
_HEX32 = re.compile(r"[0-9a-f]{32}")


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
    fields = _parse_line(line, name)
    version = fields.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DamagedObject(f"{name}: not the head of a database")
    if version > FORMAT:
        raise NewerFormat(f"{name}: format {version}, this s3blockfs reads up to {FORMAT}; upgrade s3blockfs")
    if not newline or len(rest) < _TRAILER.size:
        raise DamagedObject(f"{name}: truncated head")
    magic, crc = _TRAILER.unpack(rest[-_TRAILER.size :])
    if magic != _MAGIC or crc != zlib.crc32(body[: -_TRAILER.size], zlib.crc32(_MAGIC)):
        raise DamagedObject(f"{name}: checksum mismatch in the head")
    get = _Fields(fields, name)
    map_bytes, tail_bytes = get.number("map_bytes"), get.number("tail_bytes")
    if map_bytes + tail_bytes + _TRAILER.size != len(rest):
        raise DamagedObject(f"{name}: sections do not fill the head")
    head = Head(
        id=get.hex("id", _HEX32),
        rev=get.number("rev"),
        seq=get.number("seq"),
        commit=get.hex("commit", _HEX32),
        size=get.number("size_bytes", MAX_DATABASE_BYTES),
        block_size=get.number("block_size", MAX_BLOCK_BYTES),
        nonce=get.hex("nonce", _HEX16),
        writer=get.text("writer"),
        time_ms=get.number("time_ms"),
        floor=get.number("floor"),
        deleted=get.flag("deleted"),
        name=None if fields.get("name") is None else get.text("name"),
        counter=None if fields.get("counter") is None else get.number("counter", 0xFFFFFFFF),
        lease=get.optional("lease", lambda row: Lease(_text(row[0]), _text(row[1]), _number(row[2]))),
        segments=get.rows(
            "segments",
            lambda row: Segment(ObjectRef.decode(row[0], name), *(_number(value) for value in _exactly(row[1:], 6))),
        ),
        snapshots=get.rows("snapshots", lambda row: NamedSnapshot(_text(row[0]), _text(row[1]))),
        leaves=get.rows(
            "leaves",
            lambda row: LeafRef(
                _number(row[0]), _number(row[1]), _number(row[2]), bytes.fromhex(_text(row[3], _HEX16)), _number(row[4])
            ),
        ),
        extents=extents.decode(rest[:map_bytes], name),
        tail=Tail.decode(rest[map_bytes : map_bytes + tail_bytes], name),
    )
    if head.block_size < MIN_BLOCK_BYTES:
        raise DamagedObject(f"{name}: block size {head.block_size}")
    if head.leaves and (head.leaves[0].first != 0 or any(a.first >= b.first for a, b in pairwise(head.leaves))):
        raise DamagedObject(f"{name}: leaves of the block map out of order")
    return head


def _parse_line(line: bytes, name: str) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise DamagedObject(f"{name}: not the head of a database (its first line has {len(line)} bytes)")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DamagedObject(f"{name}: not the head of a database (its first line is no JSON)") from error
    if not isinstance(fields, dict):
        raise DamagedObject(f"{name}: not the head of a database")
    return fields


def _number(value: Any, limit: int = (1 << 64) - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise ValueError("not a number in range")
    return value


def _text(value: Any, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or len(value) > 4096 or (pattern and not pattern.fullmatch(value)):
        raise ValueError("not a text of the right form")
    return value


def _exactly(row: Any, count: int) -> Any:
    if not isinstance(row, list) or len(row) != count:
        raise ValueError("not a row of the right length")
    return row


class _Fields:
    """Typed access to the JSON line; every misfit is a DamagedObject that names the field."""

    def __init__(self, fields: dict[str, Any], name: str) -> None:
        self._fields = fields
        self._name = name

    def _convert(self, field: str, convert: Callable[[Any], Any]) -> Any:
        try:
            return convert(self._fields.get(field))
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise DamagedObject(f"{self._name}: bad field {field!r} in the head") from error

    def number(self, field: str, limit: int = (1 << 63) - 1) -> int:
        result: int = self._convert(field, lambda value: _number(value, limit))
        return result

    def text(self, field: str) -> str:
        result: str = self._convert(field, _text)
        return result

    def flag(self, field: str) -> bool:
        value = self._fields.get(field)
        if not isinstance(value, bool):
            raise DamagedObject(f"{self._name}: bad field {field!r} in the head")
        return value

    def hex(self, field: str, pattern: re.Pattern[str]) -> bytes:
        return bytes.fromhex(self._convert(field, lambda value: _text(value, pattern)))

    def optional(self, field: str, convert: Callable[[Any], Any]) -> Any:
        return None if self._fields.get(field) is None else self._convert(field, convert)

    def rows(self, field: str, convert: Callable[[Any], Any]) -> tuple[Any, ...]:
        def convert_all(value: Any) -> tuple[Any, ...]:
            if not isinstance(value, list):
                raise ValueError("not a list")
            return tuple(convert(row) for row in value)

        result: tuple[Any, ...] = self._convert(field, convert_all)
        return result
