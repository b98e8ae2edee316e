"""The observer of SQLite's write-ahead log, against logs that the real SQLite wrote."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from engine import World
from hypothesis import given, settings
from hypothesis import strategies as st

from s3blockfs import wal
from s3blockfs.walmode import WalDatabase


class Log:
    """A log in memory that counts what is read of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.was_read = content, 0

    def read(self, offset: int, length: int) -> bytes:
        data = self.content[offset : offset + length]
        self.was_read += len(data)
        return data


def applied(base: bytes, log: bytes, found: wal.Committed) -> bytes:
    """What the database holds after these transactions."""
    content = bytearray(base[: found.cut].ljust(found.size, b"\0")[: found.size])
    for offset, place in found.pages.items():
        content[offset : offset + found.end.page_size] = log[place : place + found.end.page_size]
    return bytes(content)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size=10")  # large transactions spill, and rewrite their frames
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA wal_autocheckpoint=0")
        yield connection


def files(tmp_path: Path) -> tuple[bytes, bytes]:
    return (tmp_path / "a.db").read_bytes(), (tmp_path / "a.db-wal").read_bytes()


STEPS = [
    "CREATE TABLE t(a, b)",
    "INSERT INTO t VALUES (1, 'one')",
    "WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<400) INSERT INTO t SELECT i, randomblob(500) FROM n",
    "UPDATE t SET b = randomblob(300)",
    "DELETE FROM t WHERE a > 20",
    "VACUUM",
    "CREATE INDEX i ON t(b)",
]


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_every_commit_is_found_where_it_ends(database: sqlite3.Connection, tmp_path: Path, page_size: int) -> None:
    """Commit by commit, reading only what is new; the result is what a checkpoint makes of it."""
    database.execute("PRAGMA journal_mode=DELETE")
    database.execute(f"PRAGMA page_size={page_size}")
    database.execute("VACUUM")
    database.execute("PRAGMA journal_mode=WAL")
    base = (tmp_path / "a.db").read_bytes()
    shown, at = base, None
    for step in STEPS:
        database.execute(step)
        log = Log(files(tmp_path)[1])
        at = at or wal.start(log.content)
        assert at is not None
        found = wal.committed(log.read, at)
        assert found is not None and found.end.end <= len(log.content)
        assert log.was_read <= found.end.end - at.end + 24 + page_size  # one frame more at most
        assert found.end.frames > at.frames and wal.committed(log.read, found.end) is None
        shown, at = applied(shown, log.content, found), found.end
    _, content = files(tmp_path)
    whole = wal.committed(Log(content).read, wal.start(content))  # type: ignore[arg-type]
    assert whole is not None and whole.end == at
    database.execute("PRAGMA wal_checkpoint(PASSIVE)")
    assert files(tmp_path)[0] == shown == applied(base, content, whole)


def test_what_is_not_committed_does_not_count(database: sqlite3.Connection, tmp_path: Path) -> None:
    database.execute(STEPS[0])
    _, before = files(tmp_path)
    first = wal.committed(Log(before).read, wal.start(before))  # type: ignore[arg-type]
    assert first is not None
    database.execute("BEGIN")
    database.execute(STEPS[2])
    _, content = files(tmp_path)
    assert len(content) > len(before) + 100_000  # spilled
    assert wal.committed(Log(content).read, first.end) is None
    database.execute("UPDATE t SET b = randomblob(500)")  # frames of this transaction are written again, in place
    database.execute("ROLLBACK")
    assert wal.committed(Log(files(tmp_path)[1]).read, first.end) is None
    database.execute(STEPS[1])
    found = wal.committed(Log(files(tmp_path)[1]).read, first.end)
    assert found is not None and found.end.frames == first.end.frames + 1


def test_a_restarted_log_is_another_one(database: sqlite3.Connection, tmp_path: Path) -> None:
    """What lies behind it from before counts no more."""
    for step in STEPS[:4]:
        database.execute(step)
    _, old = files(tmp_path)
    database.execute("PRAGMA wal_checkpoint(RESTART)")
    database.execute(STEPS[1])
    _, content = files(tmp_path)
    assert len(content) == len(old)
    at = wal.start(content)
    assert at is not None and at.salts != old[16:24]
    found = wal.committed(Log(content).read, at)
    assert found is not None and found.end.frames < 4


def test_both_byte_orders_are_what_sqlite_reads(database: sqlite3.Connection, tmp_path: Path) -> None:
    """The log of this machine, and the same one with checksums of the other byte order, which SQLite recovers, too."""
    for step in STEPS[:3]:
        database.execute(step)
    base, content = files(tmp_path)
    magic, _, page_size = struct.unpack(">III", content[:12])
    order = ">" if magic & 1 else "<"
    other = "<" if magic & 1 else ">"
    head = struct.pack(">I", magic ^ 1) + content[4:24]
    sums = reference(other, head)
    swapped = head + struct.pack(">II", *sums)
    for low in range(32, len(content), 24 + page_size):
        frame = content[low : low + 24 + page_size]
        sums = wal.checksum(other, frame[:8] + frame[24:], sums)
        swapped += frame[:16] + struct.pack(">II", *sums) + frame[24:]
    found = {}
    for words, log in ((order, content), (other, swapped)):
        at = wal.start(log)
        assert at is not None and at.words == words
        found[words] = wal.committed(Log(log).read, at)
        assert found[words] is not None
        (tmp_path / "copy.db").write_bytes(base)
        (tmp_path / "copy.db-wal").write_bytes(log)
        with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
            assert copy.execute("SELECT count(*) FROM t").fetchone() == (401,)
    assert found["<"].pages == found[">"].pages  # type: ignore[union-attr]


def reference(words: str, data: bytes) -> tuple[int, int]:
    one = two = 0
    for at in range(0, len(data), 8):
        one += struct.unpack(words + "I", data[at : at + 4])[0] + two
        two += struct.unpack(words + "I", data[at + 4 : at + 8])[0] + one
    return one % 2**32, two % 2**32


@given(st.sampled_from("<>"), st.lists(st.binary(min_size=8, max_size=8), max_size=40), st.integers(0, 40))
def test_checksums_continue(words: str, parts: list[bytes], cut: int) -> None:
    whole, first = b"".join(parts), b"".join(parts[:cut])
    assert wal.checksum(words, whole) == reference(words, whole)
    assert wal.checksum(words, whole[len(first) :], wal.checksum(words, first)) == wal.checksum(words, whole)


Frames = list[tuple[int, int, bool]]


def built(frames: Frames, words: str = "<", page_size: int = 512) -> bytes:
    """A log of (page number, database pages or 0, is sound) frames."""
    head = struct.pack(">IIII8s", 0x377F0682 + (words == ">"), 3007000, page_size, 0, b"12345678")
    sums = wal.checksum(words, head)
    parts = [head + struct.pack(">II", *sums)]
    for index, (number, size, sound) in enumerate(frames):
        page = bytes([index % 251]) * page_size
        sums = wal.checksum(words, page, wal.checksum(words, struct.pack(">II", number, size), sums))
        stored = sums if sound else (sums[0] ^ 1, sums[1])
        parts.append(struct.pack(">II8sII", number, size, b"12345678", *stored) + page)
    return b"".join(parts)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 0, 1, 4, 9]), st.integers(0, 15).map(bool))),
    st.sampled_from("<>"),
)
def test_against_a_simple_reference(frames: Frames, words: str) -> None:
    content, expected, waiting = built(frames, words), b"\xff" * 2048, []
    complete = 0
    for index, (number, size, sound) in enumerate(frames):
        if not sound or number == 0:
            break
        waiting.append((number - 1, bytes([index % 251]) * 512))
        if size:
            after = bytearray(expected[: size * 512].ljust(size * 512, b"\0"))
            for at, page in waiting:
                if at < size:
                    after[at * 512 : at * 512 + 512] = page
            expected, waiting, complete = bytes(after), [], index + 1
    at = wal.start(content)
    assert at is not None
    found = wal.committed(Log(content).read, at)
    if found is None:
        assert complete == 0
    else:
        assert found.end.frames == complete
        assert applied(b"\xff" * 2048, content, found) == expected


@settings(max_examples=300)
@given(st.data())
def test_hostile_bytes(data: st.DataObject) -> None:
    """Anything is read without an exception, and a changed byte ends the chain before it."""
    noise = data.draw(st.binary(max_size=700))
    if (at := wal.start(noise)) is not None:
        wal.committed(Log(noise).read, at)
    frames = [(n + 1, n + 1, True) for n in range(4)]
    content = bytearray(built(frames))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(content)))
    at = wal.start(bytes(content[:cut]))
    found = at and wal.committed(Log(bytes(content[:cut])).read, at)
    intact = 0 if place < 32 else (min(place, cut) - 32) // 536
    assert (found.end.frames if found else 0) == max(0, intact)


def test_who_opens_a_database_at_the_same_time_takes_no_side_files_along() -> None:
    """Two processes right after a mount came up: the log of the faster one stayed open, and was another file for all
    others, and its index was cut off under the processes that had mapped it (found by the soak: SIGBUS)."""
    with World() as world:
        machine = world.machine()
        machine.kind = WalDatabase
        database = machine.create("a.db", exclusive=True)
        made = [machine.side_files.create(f"a.db{suffix}") for suffix in ("-wal", "-shm")]
        assert machine._add("a.db", database.version) is database
        assert all(file.linked for file in made)
