"""The head: the one mutable object of a database, changed only by compare-and-swap.

One line of JSON (readable with `head -1`), the inline map, the tail, then `S3BH` and a CRC-32 of everything before it.
The nonce is new in every head, because S3's ETag is a content hash and must never repeat."""

import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, NamedTuple, get_type_hints

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
LABEL = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")  # of a named snapshot: neither a number nor a time

_TRAILER = struct.Struct(">4sI")
_MAGIC = b"S3BH"


class Segment(NamedTuple):
    """A data object in the log role, of which the commits first_seq..last_seq count."""

    ref: ObjectRef
    first_seq: int
    last_seq: int
    length: int
    index_pos: int
    index_length: int
    index_crc: int


class Lease(NamedTuple):
    """Politeness between writers, never safety."""

    owner: str
    nonce: str
    seconds: int
    waiting: tuple[str, ...] = ()  # who is to have it next, in this order


class NamedSnapshot(NamedTuple):
    label: str
    archive: str


class Archived(NamedTuple):
    """Which former head was archived: its key has both, so that its content proves to belong there."""

    rev: int
    nonce: bytes


_Decode = Callable[[Any], Any]  # of a JSON value; raises ValueError or TypeError for what it cannot take


def _exact(kind: type, value: Any) -> Any:
    if type(value) is not kind:  # true is no number
        raise TypeError(f"not a {kind.__name__}")
    return value


def _number(limit: int, value: Any) -> int:
    if not 0 <= _exact(int, value) <= limit:
        raise ValueError("out of range")
    return int(value)


def _text(value: Any) -> str:
    if len(_exact(str, value)) > 4096:
        raise ValueError("too long")
    return str(value)


def _hex(size: int, value: Any) -> bytes:
    if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", value):
        raise ValueError("not hex digits")
    return bytes.fromhex(value)


def _optional(decode: _Decode, value: Any) -> Any:
    return None if value is None else decode(value)


def _row(make: Callable[..., Any], columns: Sequence[_Decode], value: Any) -> Any:
    return make(*(decode(cell) for decode, cell in zip(columns, _exact(list, value), strict=True)))


def _rows(make: Callable[..., Any], columns: Sequence[_Decode], value: Any) -> tuple[Any, ...]:
    return tuple(_row(make, columns, row) for row in _exact(list, value))


def _lease(value: Any) -> Lease:
    owner, nonce, seconds, *waiting = _exact(list, value)
    return Lease(_text(owner), _text(nonce), _count(seconds), tuple(map(_text, waiting)))


_ref = partial(ObjectRef.decode, name="a segment")
_count = partial(_number, (1 << 63) - 1)
_Count = Annotated[int, _count]
_Text = Annotated[str, _text]
_Id = Annotated[bytes, partial(_hex, 16)]


@dataclass(frozen=True, slots=True)
class Head:
    """One committed state. `commit` is the id of the commit that made it; `id` that of the database.
    What is annotated with a decoder makes the JSON line, in this order."""

    id: _Id
    rev: _Count
    seq: _Count
    commit: _Id
    size: Annotated[int, partial(_number, MAX_DATABASE_BYTES)]
    block_size: Annotated[int, partial(_number, MAX_BLOCK_BYTES)]
    nonce: Annotated[bytes, partial(_hex, 8)]
    writer: _Text = ""
    time_ms: _Count = 0
    floor: _Count = 0
    archived: Annotated[Archived | None, partial(_optional, partial(_row, Archived, (_count, partial(_hex, 8))))] = None
    """The last head before this one that was archived: what came after it was only added to. None: there is none."""
    deleted: Annotated[bool, partial(_exact, bool)] = False
    name: Annotated[str | None, partial(_optional, _text)] = None
    """The exact file name, when it was created through a mount; None lets `acme` be shown as `acme.sqlite`."""
    counter: Annotated[int | None, partial(_optional, partial(_number, 0xFFFFFFFF))] = None
    """SQLite's change counter (bytes 24..27) in this state; None when the file is not a SQLite database."""
    lease: Annotated[Lease | None, partial(_optional, _lease)] = None
    segments: Annotated[tuple[Segment, ...], partial(_rows, Segment, (_ref, *[_count] * 6))] = ()
    snapshots: Annotated[tuple[NamedSnapshot, ...], partial(_rows, NamedSnapshot, (_text, _text))] = ()
    leaves: Annotated[tuple[LeafRef, ...], partial(_rows, LeafRef, (*[_count] * 3, partial(_hex, 8), _count))] = ()
    extents: tuple[Extent, ...] = ()  # the inline map; empty when there are leaves
    tail: Tail = field(default_factory=Tail)


_KINDS = get_type_hints(Head, include_extras=True)
_FIELDS: dict[str, _Decode] = {n: kind.__metadata__[0] for n, kind in _KINDS.items() if hasattr(kind, "__metadata__")}
_IN_JSON = {"size": "size_bytes"}


def encode(head: Head) -> bytes:
    """Raises NotSupported when it would be too large to be read again."""
    inline = extents.encode(head.extents)
    fields = {_IN_JSON.get(name, name): getattr(head, name) for name in _FIELDS}
    fields["lease"] = head.lease and (*head.lease[:3], *head.lease.waiting)
    fields["segments"] = [(segment.ref.encode(), *segment[1:]) for segment in head.segments]
    fields = {"format": FORMAT, **fields, "map_bytes": len(inline), "tail_bytes": head.tail.encoded_bytes}
    line = json.dumps(fields, ensure_ascii=True, separators=(",", ":"), default=bytes.hex).encode("ascii") + b"\n"
    body = b"".join((line, inline, *head.tail.parts))
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
    values: dict[str, Any] = {}
    sections: dict[str, _Decode] = {"map_bytes": _count, "tail_bytes": _count}
    for key, convert in {**_FIELDS, **sections}.items():
        try:
            values[key] = convert(fields.get(_IN_JSON.get(key, key)))
        except (ValueError, TypeError, DamagedObject) as error:
            raise DamagedObject(f"{name}: bad field {key!r} in the head") from error
    map_bytes, tail_bytes = values.pop("map_bytes"), values.pop("tail_bytes")
    if map_bytes + tail_bytes + _TRAILER.size != len(rest):
        raise DamagedObject(f"{name}: sections do not fill the head")
    inline, tail = rest[:map_bytes], rest[map_bytes : -_TRAILER.size]
    head = Head(**values, extents=extents.decode(inline, name), tail=Tail.decode(tail, name))
    if head.block_size < MIN_BLOCK_BYTES:
        raise DamagedObject(f"{name}: block size {head.block_size}")
    if head.leaves and (head.leaves[0].first != 0 or any(a.first >= b.first for a, b in pairwise(head.leaves))):
        raise DamagedObject(f"{name}: leaves of the block map out of order")
    return head


def glance(start: bytes) -> tuple[int, int] | None:
    """(size, time in ms) from the first bytes of a head; None when they do not tell, and for a tombstone. Not verified
    by its checksum: enough to be shown in a listing, not to be read by."""
    line, newline, _ = start.partition(b"\n")
    try:
        fields = json.loads(line) if newline else {}
        if fields["format"] > FORMAT or fields["deleted"]:
            return None
        return _FIELDS["size"](fields["size_bytes"]), _count(fields["time_ms"])
    except (ValueError, TypeError, KeyError, RecursionError, DamagedObject):
        return None
