"""What the engine knows of SQLite's database header, against headers that SQLite itself wrote."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3blockfs import header

PAGE_SIZES = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]


def database(path: Path, *statements: str) -> bytes:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return path.read_bytes()


def with_number(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + value.to_bytes(4, "big") + data[at + 4 :]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_size_and_counter_of_real_databases(page_size: int, tmp_path: Path) -> None:
    """For every page size, 65,536 (stored as 1) among them, and however many commits were made."""
    path = tmp_path / "a.db"
    data = database(path, f"PRAGMA page_size={page_size}", "CREATE TABLE t (x)", "INSERT INTO t VALUES (1)")
    assert header.is_database(data)
    assert header.counter(data[:100]) == 2
    assert header.file_size(data[:100]) == len(data) == path.stat().st_size
    more = database(path, "INSERT INTO t VALUES (zeroblob(200000))")
    assert header.counter(more) == 3
    assert header.file_size(more) == len(more) > len(data)


def test_a_page_count_that_is_not_valid_is_no_size(tmp_path: Path) -> None:
    """SQLite before 3.7.0 changes the counter and leaves page count and valid-for number alone."""
    data = database(tmp_path / "a.db", "CREATE TABLE t (x)")
    assert header.file_size(with_number(data, header.COUNTER_AT, 77)) is None
    assert header.file_size(with_number(data, 28, 0)) is None
    assert header.file_size(data[:99]) is None
    assert header.file_size(b"x" * 100) is None
    assert header.file_size(b"") is None


def test_a_new_counter_keeps_a_valid_page_count_valid(tmp_path: Path) -> None:
    """SQLite accepts the patched file and takes it for changed."""
    path = tmp_path / "a.db"
    data = database(path, "CREATE TABLE t (x)")
    for counter in (0, 500, 0xFFFFFFFF):
        patched = bytearray(data)
        for offset, field in header.counter_patches(data, counter):
            patched[offset : offset + len(field)] = field
        assert header.counter(bytes(patched)) == counter
        assert header.file_size(bytes(patched)) == len(data)
        assert header.without_counter(0, bytes(patched)) == header.without_counter(0, data)
        path.write_bytes(patched)
        database(path)


def test_a_new_counter_does_not_make_a_stale_page_count_valid(tmp_path: Path) -> None:
    """The valid-for number follows only if it equalled the counter, or the file would be cut at an old size."""
    data = with_number(database(tmp_path / "a.db", "CREATE TABLE t (x)"), header.COUNTER_AT, 40)
    assert header.counter_patches(data, 41) == [(header.COUNTER_AT, (41).to_bytes(4, "big"))]
    stale = with_number(data, header.COUNTER_AT, 41)
    assert header.file_size(stale) is None


@given(st.integers(0, 120), st.binary(max_size=130))
@settings(deadline=None)
def test_without_counter_hides_these_eight_bytes_only(offset: int, data: bytes) -> None:
    """Wherever a range starts and ends."""
    hidden = {*range(24, 28), *range(92, 96)}
    expected = bytes(0 if offset + i in hidden else byte for i, byte in enumerate(data))
    assert header.without_counter(offset, data) == expected


@given(st.integers(0, 40), st.binary(max_size=40))
@settings(deadline=None)
def test_sets_wal_looks_at_both_version_bytes_only(offset: int, data: bytes) -> None:
    """A 2 anywhere else is content."""
    assert header.sets_wal(offset, data) == any(b == 2 and offset + i in (18, 19) for i, b in enumerate(data))


def test_wal_databases_are_recognised_and_shown_in_rollback_mode(tmp_path: Path) -> None:
    """What SQLite writes for journal_mode=WAL; what is shown opens without `-wal` and `-shm`, read-only too."""
    plain = database(tmp_path / "plain.db", "CREATE TABLE t (x)")
    wal = database(tmp_path / "wal.db", "PRAGMA journal_mode=WAL", "CREATE TABLE t (x)")
    assert header.sets_wal(0, wal) and header.sets_wal(18, wal[18:20]) and header.sets_wal(19, wal[19:20])
    assert not header.sets_wal(0, plain) and not header.sets_wal(0, wal[:18])
    assert header.switches_to_wal(0, wal, wal) and header.switches_to_wal(18, wal[18:20], wal)
    assert not header.switches_to_wal(0, wal, b"") and not header.switches_to_wal(0, plain, plain)
    shown = header.in_rollback_mode(0, wal)
    assert shown == wal[:18] + b"\1\1" + wal[20:]
    path = tmp_path / "shown.db"
    path.write_bytes(shown)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain.db", "shown.db", "wal.db"]


@given(st.integers(0, 100))
@settings(deadline=None)
def test_what_is_shown_has_the_length_that_was_read(length: int) -> None:
    """A short read of the header too: a longer answer than asked for is an I/O error of the mount."""
    data = (header.MAGIC + b"\x10\0\2\2" + bytes(range(100, 180)))[:length]
    shown = header.in_rollback_mode(0, data)
    assert len(shown) == length
    assert shown == bytes(1 if i in (18, 19) else byte for i, byte in enumerate(data))


def test_other_files_are_shown_as_they_are() -> None:
    """No magic, or not from the start: bytes that look like a WAL version are content."""
    assert header.in_rollback_mode(0, b"x" * 18 + b"\2\2") == b"x" * 18 + b"\2\2"
    assert header.in_rollback_mode(4096, header.MAGIC + b"\x10\0\2\2") == header.MAGIC + b"\x10\0\2\2"
