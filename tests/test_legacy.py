"""Databases written by the real sqlite-s3vfs, read in place: layouts, leftover journals, writers meanwhile, names."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
import s3vfs
import sqlite_s3vfs
from engine import Call, FaultyStore, InlineRuntime, Process, World, catalog
from memorystore import MemoryStore
from s3vfs import CREATE, Died, MemoryBucket, dump, fill, run
from scenes import without_counters

from s3blockfs import legacy
from s3blockfs.catalog import Catalog
from s3blockfs.database import Database
from s3blockfs.errors import DamagedObject, DatabaseGone, NotSupported, S3BlockFSError
from s3blockfs.objectstore import Listed

P = "old/app.db"


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


def whole(database: Database) -> bytes:
    return database.read(0, database.size)


def puts(world: World) -> list[Call]:
    return [call for call in world.store.calls if call.operation in ("PUT", "DELETE")]


# --- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [512, 1000, 4095, 4096, 4097, 65536, 3 << 20])
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_any_block_size_is_read_in_place(world: World, block_size: int, page_size: int) -> None:
    bucket = MemoryBucket(world.store.inner)
    run(
        bucket,
        P,
        f"PRAGMA page_size={page_size}",
        CREATE,
        fill(700),
        "DELETE FROM t WHERE id%3=0",
        block_size=block_size,
    )
    expected = s3vfs.content(bucket, P)
    entry = world.machine().lookup(P)
    assert entry is not None and (entry.size, entry.is_folder) == (len(expected), False)
    database = world.machine().open(P)
    assert whole(database) == expected
    draw = random.Random(block_size)
    for _ in range(200):
        start, length = draw.randrange(len(expected) + 5000), draw.choice((0, 1, 100, 4096, 70000))
        assert database.read(start, length) == expected[start : start + length]
    assert puts(world) == []


def test_large_blocks_are_read_in_parts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "CELL_BYTES", 5000)
    test_any_block_size_is_read_in_place(world, 3 << 20, 4096)
    world.store.calls.clear()
    assert len(world.machine(refresh_s=1).open(P).read(100_000, 10)) == 10
    assert world.store.count("GET", "legacy") == 3  # is there a block 0, its header, the bytes


@pytest.mark.parametrize("block_size", [64 << 20, (64 << 20) - 1])
def test_the_page_that_sqlite_never_writes(world: World, block_size: int) -> None:
    """At 2^30 SQLite keeps its locks. That library pads when the page behind it is written."""
    store, lock_page, page = world.store.inner, 1 << 30, 4096
    zeros, number = bytes(block_size), 0
    for number in range(lock_page // block_size):
        store.put(f"{P}/{number:010d}", zeros)
    if lock_page % block_size:
        store.put(f"{P}/{number + 1:010d}", zeros[: lock_page % block_size])
    file = sqlite_s3vfs.S3VFSFile(P, 0, MemoryBucket(store), block_size)
    file.xWrite(b"x" * page, lock_page + page)
    database = world.machine().open(P)
    assert database.size == file.xFileSize() == lock_page + 2 * page
    assert database.read(lock_page - 10, 2 * page + 20) == bytes(page + 10) + b"x" * page


def test_a_missing_or_short_block_is_damage(world: World) -> None:
    bucket, store = MemoryBucket(world.store.inner), world.store.inner
    run(bucket, P, CREATE, fill(100))
    body = store.get(f"{P}/0000000003").body
    for break_it in (lambda: store.delete([f"{P}/0000000003"]), lambda: store.put(f"{P}/0000000003", body[:-1])):
        break_it()
        with pytest.raises(DamagedObject, match=r"000000000[34]: missing"):
            world.machine().open(P)
        store.put(f"{P}/0000000003", body)
    assert dump(whole(world.machine().open(P)))


def test_a_hole_behind_the_end_that_the_header_tells_is_none(world: World) -> None:
    """That library cuts a file block by block from the lower end, and may die between two."""
    bucket, store = MemoryBucket(world.store.inner), world.store.inner
    run(bucket, P, CREATE, fill(100))
    expected = s3vfs.content(bucket, P)
    for number in (3, 4):
        store.put(f"{P}/{len(expected) // 4096 + number:010d}", b"left over".ljust(4096))
    assert whole(world.machine().open(P)) == expected


def test_other_keys_do_not_belong_to_it(world: World) -> None:
    bucket, store = MemoryBucket(world.store.inner), world.store.inner
    run(bucket, P, CREATE, fill(10))
    expected = s3vfs.content(bucket, P)
    for key in ("data/0000000000000000-00", "00000000001", "x", "0000000000/0000000000"):
        store.put(f"{P}/{key}", b"other")
    assert whole(world.machine().open(P)) == expected


def test_a_write_ahead_log_is_refused(world: World) -> None:
    """Committed rows are in it, and it is nothing that could be read here."""
    bucket = MemoryBucket(world.store.inner)
    with s3vfs.connected(bucket, P) as connection:
        for statement in ("PRAGMA locking_mode=EXCLUSIVE", "PRAGMA journal_mode=WAL", CREATE, fill(10)):
            list(connection.execute(statement))
        with pytest.raises(NotSupported, match="write-ahead log"):
            world.machine().open(P)
    assert len(dump(whole(world.machine().open(P)))) == 10  # closed: it is all in the file


# --- names -------------------------------------------------------------------------------------------------


def test_names(world: World) -> None:
    bucket = MemoryBucket(world.store.inner)
    for prefix in ("a.db", "acme", "folder/b.sqlite"):
        run(bucket, prefix, CREATE)
    world.store.inner.put("acme-journal/0000000000", b"\0" * 512)
    world.store.inner.put("other-journal/x.db/head", b"")
    machine = world.machine()
    listing = [name + "/" * entry.is_folder for name, entry in machine.listing("")]
    assert listing == ["a.db", "acme.sqlite", "folder/", "other-journal/"]
    entry = machine.lookup("acme")
    assert entry is not None and entry.shown_as == "acme.sqlite"
    assert dump(whole(machine.open("acme.sqlite"))) == []
    assert machine.opened_at("acme") is machine.open("acme.sqlite")
    assert machine.lookup("a.db/0000000000") is None


def test_creating_over_one_opens_it(world: World) -> None:
    bucket = MemoryBucket(world.store.inner)
    run(bucket, P, CREATE, fill(10))
    assert len(dump(whole(world.machine().create(P, exclusive=False)))) == 10
    with pytest.raises(S3BlockFSError, match="exists"):
        world.machine().create(P, exclusive=True)


# --- leftover journals -------------------------------------------------------------------------------------

TRANSACTIONS = {
    "update": ["UPDATE t SET data=randomblob(310) WHERE id%7=0"],
    "grow": [fill(300, start=1000)],
    "spill": ["PRAGMA cache_size=5", "BEGIN", fill(200, start=1000), "UPDATE t SET data=randomblob(290)", "COMMIT"],
    "vacuum": ["DELETE FROM t WHERE id%2=0", "VACUUM"],
    "auto_vacuum": ["DELETE FROM t WHERE id>20"],
    "no_sync": ["PRAGMA synchronous=OFF", "PRAGMA cache_size=5", "UPDATE t SET data=randomblob(290)"],
    "persist": ["PRAGMA journal_mode=PERSIST", fill(50, start=1000), "DELETE FROM t WHERE id%3=0"],
    "truncate": ["PRAGMA journal_mode=TRUNCATE", fill(50, start=1000), "DELETE FROM t WHERE id%3=0"],
}


@pytest.mark.parametrize("kind", TRANSACTIONS)
@pytest.mark.parametrize("block_size", [4095, 4096, 65536])
def test_a_writer_that_died_anywhere(world: World, tmp_path: Path, kind: str, block_size: int) -> None:
    """Killed before any of its PUTs and DELETEs: read here is what SQLite makes of the same files on a disk."""
    prepare = ["PRAGMA page_size=1024", f"PRAGMA auto_vacuum={int('auto' in kind)}", CREATE, fill(120, 100)]
    run(MemoryBucket(world.store.inner), "start.db", *prepare, block_size=block_size)
    outcomes = []
    at, died = 0, True
    while died:
        store = MemoryStore(world.runtime)
        store._objects.update(world.store.inner._objects)
        died = kill(MemoryBucket(store), "start.db", at, TRANSACTIONS[kind], block_size)
        machine = catalog(FaultyStore(store), world.runtime)
        shown = whole(machine.open("start.db"))
        machine.close()
        recovered = on_disk(store, "start.db", tmp_path, block_size)
        assert dump(shown) == dump(recovered), at
        assert recovered.startswith(shown), at  # that library may die while it cuts what lies behind the end
        outcomes.append(any("-journal" in key for key in store._objects))
        at += 1 + at // 20
    assert len(outcomes) > 4 and set(outcomes) == {True, False}


def on_disk(store: MemoryStore, prefix: str, folder: Path, block_size: int) -> bytes:
    """The same files, and SQLite's own recovery."""
    for old in folder.iterdir():
        old.unlink()
    for name in (prefix, prefix + "-journal"):
        entries = list(store.list(f"{name}/"))
        if entries:
            with (folder / name).open("wb") as file:
                for entry in entries:
                    file.seek(int(entry.key[-10:]) * block_size)
                    file.write(store.get(entry.key).body)
    connection = apsw.Connection(str(folder / prefix))
    try:
        list(connection.execute("SELECT * FROM t"))
    finally:
        connection.close()
    return (folder / prefix).read_bytes()


def kill(bucket: MemoryBucket, prefix: str, at: int, statements: list[str], block_size: int) -> bool:
    """Run them in a process that dies before its change number `at`; False when it made fewer."""
    left = at

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Died

    bucket.on_change = count
    try:
        run(bucket, prefix, *statements, block_size=block_size)
    except (Died, apsw.Error):
        return True
    finally:
        bucket.on_change = lambda: None
    return False


@pytest.mark.parametrize("super_journal_is_gone", [False, True])
def test_a_transaction_over_two_databases(world: World, super_journal_is_gone: bool) -> None:
    """It is committed when the super-journal goes, although journals are left that name it."""
    bucket, store = MemoryBucket(world.store.inner), world.store.inner
    for prefix in ("a.db", "b.db"):
        run(bucket, prefix, CREATE, fill(10))
    before = {prefix: s3vfs.content(bucket, prefix) for prefix in ("a.db", "b.db")}
    journals: dict[str, bytes] = {}

    def watch() -> None:
        found = {key: stored.body for key, stored in store._objects.items() if "-journal/" in key or "-mj" in key}
        if len(found) >= len(journals):
            journals.update(found)

    bucket.on_change = watch
    with s3vfs.connected(bucket, "a.db") as connection:
        connection.execute("ATTACH 'b.db' AS b")
        connection.execute("BEGIN; UPDATE main.t SET data=1; UPDATE b.t SET data=2; COMMIT")
    assert any("-mj" in key for key in journals)
    for key, body in journals.items():
        if "-mj" not in key or not super_journal_is_gone:
            store.put(key, body)
    shown = {prefix: whole(world.machine().open(prefix)) for prefix in before}
    if super_journal_is_gone:
        assert {row[1] for row in dump(shown["a.db"])} == {1} and {row[1] for row in dump(shown["b.db"])} == {2}
    else:
        assert shown == before


# --- that library writes meanwhile -------------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_write_meanwhile_is_an_error_and_never_a_mix(world: World, exclusive: bool) -> None:
    """At every request of a reader. In EXCLUSIVE mode the change counter stays as it is."""
    seen = set()
    for at in range(10**6):
        world.runtime.sleep(10)
        prefix = f"m{at}.db"
        bucket = MemoryBucket(world.store.inner)
        with s3vfs.connected(bucket, prefix) as writer:
            for statement in (f"PRAGMA locking_mode={'EXCLUSIVE' if exclusive else 'NORMAL'}", CREATE, fill(40)):
                list(writer.execute(statement))
            states = [without_counters(s3vfs.content(bucket, prefix))]

            def write(call: Call, when: str, left: list[int] = [at], writer: object = writer) -> None:  # noqa: B006
                left[0] -= when == "before"
                if left[0] == -1 and when == "before":
                    left[0] -= 1
                    writer.execute("UPDATE t SET data=randomblob(300) WHERE id%9=0")  # type: ignore[attr-defined]

            world.store.rule = write
            machine, shown = world.machine(), None
            try:
                database = machine.open(prefix)
                parts = [database.read(start, 4096) for start in range(0, database.size, 4096)]
                shown = without_counters(b"".join(parts))
            except DatabaseGone:
                shown = None
            calls = len(world.store.calls)
            world.store.calls.clear()
            world.store.rule = None
            states.append(without_counters(s3vfs.content(bucket, prefix)))
            assert shown is None or shown in states, at
            seen.add(shown if shown is None else states.index(shown))
            if calls <= at:
                break
            database = machine.open(prefix)
            database.refresh(0)
            assert without_counters(whole(database)) == states[1], at
    assert seen == {None, 0, 1}


def test_the_next_transaction_sees_what_was_written(world: World) -> None:
    bucket = MemoryBucket(world.store.inner)
    run(bucket, P, CREATE, fill(40))
    machine = world.machine(refresh_s=100)
    database = machine.open(P)
    moves = []
    database.on_moved = lambda: moves.append(1)
    process = Process(machine, database, 1)
    process.shared()
    before = database.read(0, 4096)
    run(bucket, P, "UPDATE t SET data='new'")
    with pytest.raises(DatabaseGone, match="changed by another program"):
        database.read(8192, 4096)
    assert database.read(0, 4096) == before  # known here, and of that state
    process.unlock()
    process.shared()  # long before the refresh interval is over
    assert whole(database) == s3vfs.content(bucket, P)
    assert {row[1] for row in dump(whole(database))} == {"new"} and moves == [1]
    process.unlock()


def test_an_unchanged_one_is_not_read_again(world: World) -> None:
    bucket = MemoryBucket(world.store.inner)
    run(bucket, P, CREATE, fill(40))
    machine = world.machine()
    database = machine.open(P)
    whole(database)
    version = database.version
    world.store.calls.clear()
    database.refresh(0)
    assert database.version is version
    assert [call.operation for call in world.store.calls] == ["GET", "GET", "LIST", "LIST"]
    database.on_moved = lambda: pytest.fail("nothing moved")
    whole(database)
    assert len(world.store.calls) == 4


def test_sqlite_drops_its_pages_though_the_writer_leaves_the_counter_alone(world: World) -> None:
    bucket = MemoryBucket(world.store.inner)
    with s3vfs.connected(bucket, P) as writer:
        for statement in ("PRAGMA locking_mode=EXCLUSIVE", CREATE, fill(40)):
            list(writer.execute(statement))
        database = world.machine().open(P)
        counters = [database.read(24, 16)]
        files = [s3vfs.content(bucket, P)]
        for _ in range(3):
            writer.execute("UPDATE t SET data=randomblob(300) WHERE id=33")
            database.refresh(0)
            counters.append(database.read(24, 16))
            files.append(s3vfs.content(bucket, P))
            assert dump(whole(database)) == dump(files[-1])
    assert len({file[24:40] for file in files}) == 1, "that library wrote the counter: the test is of no use"
    assert len(set(counters)) == 4


def test_deleted_by_that_library(world: World) -> None:
    bucket = MemoryBucket(world.store.inner)
    run(bucket, P, CREATE, fill(40))
    machine: Catalog = world.machine()
    database = machine.open(P)
    sqlite_s3vfs.S3VFS(bucket=bucket).xDelete(P, False)
    with pytest.raises(DatabaseGone):
        database.refresh(0)
    assert world.machine().lookup(P) is None


def test_one_that_is_always_being_written(world: World) -> None:
    """A LIST that never comes out the same twice is no state."""
    bucket, count = MemoryBucket(world.store.inner), 0
    run(bucket, P, CREATE, fill(40))

    def write(call: Call, when: str) -> None:
        nonlocal count
        if call.operation == "LIST" and when == "before":
            count += 1
            run(bucket, P, f"UPDATE t SET data={count}")

    world.store.rule = write
    with pytest.raises(DatabaseGone, match="is writing"):
        world.machine().open(P)


def test_stores_that_ignore_if_match_on_get(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = MemoryBucket(world.store.inner)
    run(bucket, P, CREATE, fill(40))
    original = MemoryStore.get
    monkeypatch.setattr(MemoryStore, "get", lambda self, key, if_match=None, **rest: original(self, key, **rest))
    database = world.machine().open(P)
    run(bucket, P, "UPDATE t SET data='new'")
    with pytest.raises(DatabaseGone):
        whole(database)


def test_a_listing_in_any_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = MemoryBucket(world.store.inner)
    run(bucket, P, CREATE, fill(400))
    expected = s3vfs.content(bucket, P)
    original = MemoryStore.list

    def shuffled(self: MemoryStore, prefix: str, **rest: object) -> Iterator[Listed]:
        entries = list(original(self, prefix, **rest))  # type: ignore[arg-type]
        random.shuffle(entries)
        return iter(entries)

    monkeypatch.setattr(MemoryStore, "list", shuffled)
    assert whole(world.machine().open(P)) == expected
