"""Observer of SQLite's write-ahead log: which transactions in it are committed. Pure; no I/O.

Format: https://sqlite.org/fileformat2.html#the_write_ahead_log. A log is a header (32 bytes) and frames: page number,
size of the database in pages if this frame ends a transaction, salts, checksum (24 bytes), and the page. A frame counts
only in a chain: the header's salts, and a checksum that continues that of the frame before. SQLite rewrites frames of
the transaction it is in, so only what stands when that transaction ends says anything."""

import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24

INDEX_HEADERS_BYTES = 96  # two copies, by which SQLite judges an index; how far checkpoint and readers are comes next

_MAGIC, _VERSION = 0x377F0682, 3007000  # the lowest bit of the magic: checksums take words as big-endian
_HEADER, _FRAME = struct.Struct(">IIIIIIII"), struct.Struct(">II8sII")
_PAGE_SIZES = {1 << n for n in range(9, 17)}

Reader = Callable[[int, int], bytes]  # (offset, length) -> bytes, fewer at the end
Sums = tuple[int, int]


class Position(NamedTuple):
    """A place behind the header or a valid frame, and what the next frame has to continue."""

    frames: int
    sums: Sums
    salts: bytes
    page_size: int
    words: str  # of checksums: ">" or "<"

    @property
    def end(self) -> int:
        """The offset of the next frame."""
        return HEADER_BYTES + self.frames * (FRAME_HEADER_BYTES + self.page_size)


class Committed(NamedTuple):
    """One or more transactions in a row, as one."""

    pages: dict[int, int]  # offset in the database -> offset in the log of the newest image
    cut: int  # bytes of the database beyond this offset are not those from before
    size: int  # of the database, in bytes
    end: Position
    transactions: int


def has_index(headers: bytes) -> bool:
    """Whether these are two good headers of an index, by all that a writer that died in between may have left."""
    half = INDEX_HEADERS_BYTES // 2
    return any(headers) and headers[:half] == headers[half:]


def indexed(headers: bytes) -> int:
    """How many frames SQLite reads by these: what it has committed, or may be about to say so."""
    return int.from_bytes(headers[16:20], sys.byteorder) if has_index(headers) else 0


def checksum(words: str, data: bytes, sums: Sums = (0, 0)) -> Sums:
    """Continue `sums` over `data`, whose length is a multiple of 8."""
    first, second = sums
    each = iter(struct.unpack(f"{words}{len(data) // 4}I", data))
    for one, two in zip(each, each, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second


def start(header: bytes) -> Position | None:
    """The beginning of a log, or None if SQLite would take it for empty."""
    if len(header) < HEADER_BYTES:
        return None
    magic, version, page_size, _, _, _, *sums = _HEADER.unpack(header[:HEADER_BYTES])
    words = ">" if magic & 1 else "<"
    found = checksum(words, header[:24])
    if magic & ~1 != _MAGIC or version != _VERSION or page_size not in _PAGE_SIZES or found != tuple(sums):
        return None
    return Position(0, found, header[16:24], page_size, words)


def empty(page_size: int, salts: bytes) -> bytes:
    """A log without frames. SQLite copies the salts into its index when it recovers that, so connections notice."""
    head = struct.pack(">IIII8s", _MAGIC, _VERSION, page_size, 0, salts)
    return head + struct.pack(">II", *checksum("<", head)) + b"\0"  # of 32 bytes SQLite would not look at the header


def empty_index(salts: bytes) -> bytes:
    """The beginning of its index, as SQLite makes it."""
    one = struct.pack("=IIIBBHIIQ8s", _VERSION, 0, 0, 1, 0, 0, 0, 0, 0, salts)
    one += struct.pack("=II", *checksum("=", one))
    return one + one + struct.pack("=6I16x", 0, 0, *[0xFFFFFFFF] * 4)


def committed(read: Reader, since: Position) -> Committed | None:
    """All transactions behind `since` that are complete; None if there is none."""
    position, found, transactions = since, None, 0
    pages: dict[int, int] = {}
    cut: int | None = None
    size = since.page_size
    while len(frame := read(position.end, FRAME_HEADER_BYTES + size)) == FRAME_HEADER_BYTES + size:
        number, database_pages, salts, *sums = _FRAME.unpack(frame[:FRAME_HEADER_BYTES])
        if salts != since.salts or number == 0:
            break
        now = checksum(since.words, frame[FRAME_HEADER_BYTES:], checksum(since.words, frame[:8], position.sums))
        if now != tuple(sums):
            break
        pages[(number - 1) * size] = position.end + FRAME_HEADER_BYTES
        position = position._replace(frames=position.frames + 1, sums=now)
        if database_pages:
            end = database_pages * size
            if max(pages) >= end:
                pages = {offset: place for offset, place in pages.items() if offset < end}
            cut = end if cut is None else min(cut, end)
            transactions += 1
            found = Committed(dict(pages), cut, end, position, transactions)
    return found
