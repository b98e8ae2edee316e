"""What the engine must know of SQLite's 100-byte database header. Pure. https://sqlite.org/fileformat2.html#database_header"""

MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100

#: File format write and read version: 1 for rollback journals, 2 for WAL.
VERSIONS_AT, WAL_VERSION = 18, 2

#: The change counter (SQLite drops its page cache only when bytes 24..39 change), and the counter for which the page
#: count (bytes 28..31) is valid.
COUNTER_AT, VALID_FOR_AT = 24, 92


def is_database(header: bytes) -> bool:
    """Anything else is a plain byte file: no counter, no page count."""
    return len(header) >= HEADER_BYTES and header.startswith(MAGIC)


def counter(header: bytes) -> int:
    return int.from_bytes(header[COUNTER_AT : COUNTER_AT + 4], "big")


def counter_patches(header: bytes, new: int) -> list[tuple[int, bytes]]:
    """(offset, bytes) that set the change counter. The valid-for number follows only if it equalled the counter before,
    or a stale page count would become valid."""
    field = new.to_bytes(4, "big")
    followed = header[VALID_FOR_AT : VALID_FOR_AT + 4] == header[COUNTER_AT : COUNTER_AT + 4]
    return [(COUNTER_AT, field), (VALID_FOR_AT, field)] if followed else [(COUNTER_AT, field)]


def file_size(header: bytes) -> int | None:
    """Page count times page size in bytes, if the page count is valid."""
    if not is_database(header) or header[COUNTER_AT : COUNTER_AT + 4] != header[VALID_FOR_AT : VALID_FOR_AT + 4]:
        return None
    return int.from_bytes(header[28:32], "big") * page_size(header) or None


def page_size(header: bytes) -> int:
    size = int.from_bytes(header[16:18], "big")
    return 65536 if size == 1 else size


def without_counter(offset: int, data: bytes) -> bytes:
    """`data` from file offset `offset` with both counters zeroed, for comparing."""
    for field in (COUNTER_AT, VALID_FOR_AT):
        low, high = max(field - offset, 0), min(field + 4 - offset, len(data))
        if low < high:
            data = data[:low] + bytes(high - low) + data[high:]
    return data


def sets_wal(offset: int, data: bytes) -> bool:
    """Whether `data` at `offset` says that the file is in WAL mode."""
    return WAL_VERSION in data[max(0, VERSIONS_AT - offset) : max(0, VERSIONS_AT + 2 - offset)]


def switches_to_wal(offset: int, data: bytes, before: bytes) -> bool:
    """Whether a write over a committed header is `PRAGMA journal_mode=WAL`. The backup API (also `.restore`) of a
    database in WAL mode changes the schema cookie (bytes 40..43), too."""
    return sets_wal(offset, data) and (offset > 0 or data[40:44] == before[40:44].ljust(4, b"\0"))


def in_rollback_mode(offset: int, data: bytes) -> bytes:
    """How bytes are shown where there can be no log: a database in WAL mode needs no `-wal` and `-shm` if it says 1."""
    return with_versions(1, data) if offset == 0 and sets_wal(0, data) else data


def with_versions(version: int, data: bytes) -> bytes:
    """The beginning of a file, with other file format versions if it is a database."""
    if not data.startswith(MAGIC):
        return data
    return data[:VERSIONS_AT] + bytes([version] * 2)[: len(data) - VERSIONS_AT] + data[VERSIONS_AT + 2 :]
