"""Observer of SQLite's rollback journal: is it hot, and do the dirty bytes equal the images it holds? Pure; no I/O.

Format: https://sqlite.org/fileformat2.html#the_rollback_journal. A journal is a sequence of segments, each a header
(28 bytes, padded to the sector size) followed by records: page number, page image, checksum."""

import struct
from collections.abc import Callable, Iterator

from s3blockfs.dirty import Range, union
from s3blockfs.header import without_counter

MAGIC = bytes.fromhex("d9d505f920a163d7")
HEADER_BYTES = 28
FIRST_SECTOR_BYTES = 512  # SQLite reads a hot journal's first header by this size, before it knows what is in it

_HEADER = struct.Struct(">8sIIIII")  # magic, records, nonce, pages before, sector size, page size
_ALL_RECORDS = 0xFFFFFFFF
_SECTOR_SIZES = {1 << n for n in range(5, 17)}
_PAGE_SIZES = {1 << n for n in range(9, 17)}

Reader = Callable[[int, int], bytes]  # (offset, length) -> bytes, fewer at the end


def is_hot(first_byte: bytes) -> bool:
    """Whether SQLite may play this journal back; like SQLite, by its first byte (an empty or zeroed one is not)."""
    return first_byte not in (b"", b"\0")


def size_before(read: Reader, size: int) -> int | None:
    """Bytes that the database had before a hot journal's transaction; None if SQLite would not play it back."""
    if size < FIRST_SECTOR_BYTES:
        return None
    magic, _, _, pages, sector, page = _HEADER.unpack(read(0, HEADER_BYTES))
    return pages * page if magic == MAGIC and sector in _SECTOR_SIZES and page in _PAGE_SIZES else None


def page_images(read: Reader, size: int, hot: bool = False) -> Iterator[tuple[int, bytes]]:
    """(offset, what the database held there before the transaction) of the images with a valid checksum, in order.
    Stops at the first that is not valid, as SQLite's play-back does. A stale record of an earlier transaction (PERSIST)
    fails its checksum, because every header draws a new nonce. `hot`: its writer died, so what it had not synced never
    reached the database; the journal of a living one is complete all the same."""
    start = 0
    while start + HEADER_BYTES <= size:
        magic, records, nonce, _, sector, page = _HEADER.unpack(read(start, HEADER_BYTES))
        if magic != MAGIC or sector not in _SECTOR_SIZES or page not in _PAGE_SIZES:
            return
        pos, record_bytes = start + sector, page + 8
        if records == _ALL_RECORDS or (records == 0 and not hot):  # never synced: SQLite goes by the size of the file
            records = max(0, size - pos) // record_bytes
        for _ in range(records):
            record = read(pos, record_bytes)
            if len(record) < record_bytes:
                return
            number, image = int.from_bytes(record[:4], "big"), record[4 : 4 + page]
            if number == 0 or checksum(nonce, image) != int.from_bytes(record[-4:], "big"):
                return
            yield (number - 1) * page, image
            pos += record_bytes
        start = -(-pos // sector) * sector


def super_journal(read: Reader, size: int) -> str | None:
    """The super-journal that this journal names at its end (a commit over several attached databases), or None.
    Layout, from the end: magic (8), checksum of the name (4), its length (4), the name; pager.c, readSuperJournal."""
    if size < 16 + len(MAGIC):
        return None
    length, total, magic = struct.unpack(">II8s", read(size - 16, 16))
    if magic != MAGIC or not 0 < length <= min(4096, size - 16):
        return None
    name = read(size - 16 - length, length)
    signed = sum(byte - 256 if byte > 127 else byte for byte in name)
    if (sum(name) & 0xFFFFFFFF) != total and (signed & 0xFFFFFFFF) != total:  # C's char is signed or not
        return None
    return name.decode("utf-8", "surrogateescape")


def checksum(nonce: int, image: bytes) -> int:
    """nonce + every 200th byte, counted down from 200 before the end of the page (same source, section 3)."""
    return (nonce + sum(image[len(image) - 200 : 0 : -200])) & 0xFFFFFFFF


def restores_committed(
    read: Reader, size: int, dirty: Callable[[int, int], list[Range]], read_dirty: Callable[[int, int], bytes]
) -> bool:
    """Whether every dirty range lies inside page images of this journal and equals them: a play-back just put back what
    is committed. The change counter and its twin (bytes 24..27 and 92..95) do not count: the engine sets them anew.
    `dirty` gives the ranges between two offsets, joined; `read_dirty` the bytes of one."""
    covered: list[Range] = []
    for low, image in page_images(read, size):
        for start, end in dirty(low, low + len(image)):
            was, now = image[start - low : end - low], read_dirty(start, end)
            if without_counter(start, was) != without_counter(start, now):
                return False
            covered.append((start, end))
    return union(covered) == dirty(0, 1 << 63)
