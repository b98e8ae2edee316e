"""The change counter (bytes 24..27 of page 1), its twin, and the page count: every sentence of "Commit", point 2."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine import Process, World, sqlite_page

from s3blockfs.catalog import Catalog
from s3blockfs.database import Database
from s3blockfs.format.head import Head, Lease

MIB = 1024 * 1024
PREFIX = "a.db"


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def head_of(world: World) -> Head:
    version = world.heads(faulty=False).read()
    assert version is not None
    return version.head


def new_database(world: World, **changes: object) -> Database:
    database = world.machine(**changes).create(PREFIX, exclusive=True)
    world.store.calls.clear()
    return database


def save(database: Database, *writes: tuple[int, bytes]) -> None:
    for offset, content in writes:
        database.write(offset, content)
    database.close_handle(0)


def counters(world: World) -> tuple[int, int]:
    """Bytes 24..27 and 92..95 as others read them."""
    content = world.content()
    return int.from_bytes(content[24:28], "big"), int.from_bytes(content[92:96], "big")


def test_the_counter_is_the_published_one_plus_one(world: World) -> None:
    """Whatever the application wrote there (WAL and EXCLUSIVE write the same again, `cp` any number)."""
    database = new_database(world)
    save(database, (0, sqlite_page(7, 1)))
    assert counters(world) == (7, 7)  # a new file brings its own
    for written, expected in ((8, 8), (8, 9), (3, 10), (500, 11)):
        save(database, (0, sqlite_page(written, 1)))
        assert counters(world) == (expected, expected)
        assert head_of(world).counter == expected
        assert database.read(24, 4) == expected.to_bytes(4, "big")


def test_the_counter_wraps(world: World) -> None:
    """It has 32 bits."""
    database = new_database(world)
    save(database, (0, sqlite_page(0xFFFFFFFF, 1)))
    save(database, (0, sqlite_page(0xFFFFFFFF, 1, 1)))
    assert counters(world) == (0, 0)


def test_page_one_joins_the_commit(world: World) -> None:
    """A transaction that does not touch page 1 raises the counter all the same; only those bytes are added."""
    database = new_database(world)
    save(database, (0, sqlite_page(1, 2)), (4096, noise(4096)))
    save(database, (4096, noise(4096, 1)))
    assert counters(world) == (2, 2)
    chunks = head_of(world).tail.commits[-1].chunks
    assert [(offset, len(content)) for offset, content in chunks] == [(24, 4), (92, 4), (4096, 4096)]


def test_page_one_joins_from_a_block_object(world: World) -> None:
    """The same when page 1 is not here and has to be fetched: one GET."""
    database = new_database(world)
    save(database, (0, sqlite_page(1, 256)), (4096, noise(MIB - 4096)))
    other = world.machine().open(PREFIX)
    world.store.calls.clear()
    save(other, (500_000, b"change"))
    assert world.store.count("GET") == 1 and counters(world) == (2, 2)


def test_valid_for_follows_only_when_it_was_equal(world: World) -> None:
    """Otherwise a stale page count (bytes 28..31) would become valid."""
    database = new_database(world)
    stale = bytearray(sqlite_page(5, 1))
    stale[92:96] = (4).to_bytes(4, "big")
    save(database, (0, bytes(stale)))
    assert counters(world) == (5, 4)
    save(database, (2000, b"change"))
    assert counters(world) == (6, 4)
    stale[24:28] = (6).to_bytes(4, "big")  # both differ from what is published next
    save(database, (0, bytes(stale)))
    assert counters(world) == (7, 4)


def test_a_plain_file_has_no_counter(world: World) -> None:
    """Without SQLite's magic not a byte is changed; a short file neither."""
    database = new_database(world)
    content = noise(5000)
    for end in (5000, 99, 10, 0):
        database.truncate(0)
        save(database, (0, content[:end]))
        assert world.content() == content[:end] and head_of(world).counter is None
    database.truncate(0)
    save(database, (0, sqlite_page(3, 1)[:99]))
    assert world.content() == sqlite_page(3, 1)[:99] and head_of(world).counter is None


def test_the_counter_survives_what_is_no_database(world: World) -> None:
    """A database copied over a plain file that was copied over a database goes on counting."""
    database = new_database(world)
    save(database, (0, sqlite_page(40, 1)))
    database.truncate(0)
    save(database, (0, noise(5000)))
    assert head_of(world).counter == 40 and world.content() == noise(5000)
    database.truncate(0)
    save(database, (0, sqlite_page(2, 1)))
    assert counters(world) == (41, 41)


def test_the_counter_survives_deletion(world: World) -> None:
    """A reader elsewhere may still hold pages of the deleted database: the new one goes on counting."""
    machine = world.machine()
    save(machine.create(PREFIX, exclusive=True), (0, sqlite_page(40, 1)))
    machine.remove(PREFIX)
    save(machine.create(PREFIX, exclusive=True), (0, sqlite_page(1, 1)))
    assert counters(world) == (41, 41)


def test_the_counter_in_a_bulk_load(world: World) -> None:
    """Page 1 was uploaded with the old counter when the commit begins: its block is uploaded again."""
    database = new_database(world)
    save(database, (0, sqlite_page(9, 1)))
    content = sqlite_page(9, 2048) + noise(8 * MIB - 4096)
    save(database, *[(start, content[start : start + MIB]) for start in range(0, len(content), MIB)])
    assert counters(world) == (10, 10)
    published = world.content()
    assert published[100:] == content[100:] and len(published) == len(content)


def test_a_rebased_commit_keeps_its_counter(world: World) -> None:
    """Swaps that are no commits do not count."""
    database = new_database(world)
    save(database, (0, sqlite_page(1, 1)))
    heads = world.heads(faulty=False)
    version = heads.read()
    assert version is not None
    heads.swap(version, lambda replaced: replace(replaced, lease=Lease("other", "00", 10)))
    save(database, (2000, b"x"))
    assert counters(world) == (2, 2) and head_of(world).lease is not None


def test_the_header_shrinks_the_file_only_under_exclusive(world: World) -> None:
    """Bytes 28..31 may only shrink the file, only when valid, only as the holder of EXCLUSIVE finalises its journal."""
    machine: Catalog = world.machine()
    database = machine.create(PREFIX, exclusive=True)
    pages = noise(3 * 4096)
    save(database, (0, sqlite_page(1, 2)), (4096, pages))  # no lock, no journal: stays
    assert len(world.content()) == 4 * 4096
    writer = Process(machine, database, 1)
    for counter, valid_for, count, expected in ((2, 2, 9, 4), (3, 1, 2, 4), (4, 4, 0, 4), (5, 5, 2, 2)):
        writer.begin()
        page = bytearray(sqlite_page(counter, count))
        page[92:96] = valid_for.to_bytes(4, "big")
        database.write(0, bytes(page))
        writer.commit()
        assert len(world.content()) == database.size == expected * 4096
    assert world.content()[4096:] == pages[:4096]
