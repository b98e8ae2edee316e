"""Databases of sqlite-s3vfs become databases of this package: at the first write, by `adopt`; and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import apsw
import pytest
import s3vfs
from engine import CONFIG, Call, InlineRuntime, Process, World, shrink_limits
from s3vfs import CREATE, MemoryBucket, P, adopt, dump, fill, keys, run, source_of
from scenes import without_counters

from s3blockfs import legacy
from s3blockfs.database import Database
from s3blockfs.errors import (
    Busy,
    DatabaseGone,
    DatabaseNotFound,
    ReadOnly,
    RequestInDoubt,
    S3BlockFSError,
    StoreUnavailable,
)
from s3blockfs.gc import collect


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


@pytest.fixture
def bucket(world: World) -> MemoryBucket:
    """A store with a few rows."""
    made = MemoryBucket(world.store.inner)
    run(made, P, CREATE, fill(60))
    return made


def whole(database: Database) -> bytes:
    return database.read(0, database.size)


def old_keys(world: World) -> list[str]:
    return [key for key in keys(world) if legacy._BLOCK.fullmatch(key, len(P))]


# --- the first write ---------------------------------------------------------------------------------------


def begin_and_roll_back(world: World, database: Database) -> None:
    process = Process(world.machines[0], database, 1)
    process.shared()
    process.reserved()
    process.unlock()


def write(world: World, database: Database) -> None:
    database.write(0, database.read(0, 10))
    database.close_handle(0)


def truncate(world: World, database: Database) -> None:
    database.truncate(database.size + 1)
    database.truncate(database.size - 1)
    database.close_handle(0)


@pytest.mark.parametrize("change", [begin_and_roll_back, write, truncate])
def test_the_first_change_converts(
    world: World, bucket: MemoryBucket, change: Callable[[World, Database], None]
) -> None:
    before = s3vfs.content(bucket, P)
    database = world.machine().open(P)
    other = world.machine().open(P)
    assert whole(database) == before and old_keys(world)
    if change is begin_and_roll_back:
        database.on_moved = lambda: pytest.fail("the bytes stay as they were")
    change(world, database)
    assert without_counters(whole(database)) == without_counters(before)
    assert (whole(database)[24:28] > before[24:28]) == (change is write)
    assert whole(database) == world.content(P)
    assert old_keys(world) == []
    assert database.version.head.block_size == CONFIG.block_size and database.version.head.name is None
    other.refresh(0)
    assert whole(other) == whole(database)
    with pytest.raises(apsw.Error):  # loudly
        run(bucket, P, "SELECT count(*) FROM t")


def test_a_whole_transaction(world: World, bucket: MemoryBucket) -> None:
    """Its SHARED lock was granted on the old store; what it writes goes into the new one."""
    machine = world.machine()
    process = Process(machine, machine.open(P), 1)
    process.begin()
    page = bytearray(process.database.read(8192, 4096))
    page[100:110] = b"0123456789"
    process.database.write(8192, bytes(page))
    process.commit()
    assert world.content(P)[8192:12288] == bytes(page)
    assert process.database.version.head.seq == 2


def test_a_write_transaction_on_an_old_state_is_refused(world: World, bucket: MemoryBucket) -> None:
    machine = world.machine()
    process = Process(machine, machine.open(P), 1)
    process.shared()
    run(bucket, P, "UPDATE t SET data='new'")
    with pytest.raises(Busy):
        process.reserved()
    process.unlock()
    process.begin()
    process.commit()
    assert {row[1] for row in dump(world.content(P))} == {"new"}


def test_a_large_one_needs_adopt(world: World, bucket: MemoryBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    before = s3vfs.content(bucket, P)
    monkeypatch.setattr(legacy.AnyHead.convert, "__defaults__", (len(before) - 1, False, lambda done, total: None))
    machine = world.machine()
    database = machine.open(P)
    process = Process(machine, database, 1)
    process.shared()
    for refused in (process.reserved, lambda: write(world, database), lambda: truncate(world, database)):
        with pytest.raises(ReadOnly, match=r"s3blockfs adopt memory://store/old/app\.db"):
            refused()
    assert whole(database) == before == s3vfs.content(bucket, P)
    process.unlock()
    steps: list[tuple[int, int]] = []
    adopt(world, limit=1 << 60, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (len(before), len(before))
    process.begin()
    process.commit()


def test_a_read_only_mount_reads_and_converts_nothing(world: World, bucket: MemoryBucket) -> None:
    database = world.machine(read_only=True).open(P)
    with pytest.raises(ReadOnly):
        write(world, database)
    assert whole(database) == s3vfs.content(bucket, P)


def test_a_leftover_journal_is_rolled_back_by_the_conversion(world: World, bucket: MemoryBucket) -> None:
    before = s3vfs.content(bucket, P)
    bucket.on_change = lambda: s3vfs._refuse() if f"{P}-journal/0000000000" in keys(world) and torn(world) else None

    def torn(world: World) -> bool:
        return s3vfs.content(MemoryBucket(world.store.inner), P) != before

    with pytest.raises((s3vfs.Died, apsw.Error)):
        run(bucket, P, "UPDATE t SET data=randomblob(300)")
    assert s3vfs.content(bucket, P) != before
    adopt(world)
    assert without_counters(world.content(P)) == without_counters(before)
    assert keys(world, P + "-journal") == []


def test_a_large_map_and_odd_sizes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many objects, leaves of the map, a last block that is not full, and a file that is no database."""
    shrink_limits(monkeypatch)
    monkeypatch.setattr("s3blockfs.blockmap.INLINE_MAP_BYTES", 100)
    monkeypatch.setattr(legacy, "slots_per_object", lambda block_size: 1)
    body = bytes(range(256)) * 3000 + b"end"
    for number, start in enumerate(range(0, len(body), 1000)):
        world.store.inner.put(f"{P}/{number:010d}", body[start : start + 1000])
    version = adopt(world)
    assert version.head.leaves and version.head.counter is None
    assert world.content(P) == body


# --- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_request_leaves_one_whole_database(world: World, when: str) -> None:
    """The old one until the head is there, the new one from then on; that library can go on in the first case."""
    seen = set()
    for at in range(10**6):
        prefix = f"crash{at}.db"
        bucket = MemoryBucket(world.store.inner)
        run(bucket, prefix, CREATE, fill(60))
        before = s3vfs.content(bucket, prefix)
        count = 0

        def die(call: Call, now: str, at: int = at) -> None:
            nonlocal count
            count += now == when
            if now == when and count > at:
                raise s3vfs.Died

        world.store.rule = die
        with contextlib.suppress(s3vfs.Died):
            adopt(world, prefix)
        world.store.rule = None
        has_head = world.heads(prefix, faulty=False).read() is not None
        seen.add(has_head)
        shown = world.content(prefix)
        assert without_counters(shown) == without_counters(before), at
        if not has_head:
            assert shown == before
            assert len(run(bucket, prefix, "SELECT * FROM t")) == 60  # also with half a conversion beside it
            run(bucket, prefix, "INSERT INTO t VALUES (1000, 'more')")
            adopt(world, prefix)
            assert len(dump(world.content(prefix))) == 61
        if count <= at:
            break
    assert seen == {False, True}


def test_an_error_at_any_request_and_then_the_same_again(world: World) -> None:
    """Through a database that is open: what failed is refused, and works when the store works."""
    for at in range(10**6):
        prefix = f"fault{at}.db"
        bucket = MemoryBucket(world.store.inner)
        run(bucket, prefix, CREATE, fill(60))
        before = without_counters(s3vfs.content(bucket, prefix))
        machine = world.machine()
        process = Process(machine, machine.open(prefix), 1)
        process.shared()
        count = 0

        def fail(call: Call, now: str, at: int = at) -> None:
            nonlocal count
            count += now == "before"
            if now == "before" and count > at:
                raise StoreUnavailable("the store is down")

        world.store.rule = fail
        try:
            process.reserved()
        except S3BlockFSError:
            process.unlock()
            world.store.rule = None
            process.shared()
            assert without_counters(whole(process.database)) == before
            process.reserved()
        world.store.rule = None
        process.unlock()
        assert without_counters(world.content(prefix)) == before
        if count <= at:
            break
    assert at > 10


def test_that_library_writes_during_the_conversion(world: World) -> None:
    """At any request: until the last look the conversion fails. Afterwards the new keys are stale, and reported."""
    results = set()
    for at in range(10**6):
        prefix = f"race{at}.db"
        bucket = MemoryBucket(world.store.inner)
        run(bucket, prefix, CREATE, fill(60))
        before = s3vfs.content(bucket, prefix)
        count = 0

        def interfere(call: Call, now: str, at: int = at, prefix: str = prefix, bucket: MemoryBucket = bucket) -> None:
            nonlocal count
            count += now == "before"
            if now == "before" and count == at + 1:
                try:
                    run(bucket, prefix, "UPDATE t SET data='new'")
                except apsw.Error:
                    assert world.heads(prefix, faulty=False).read() is not None

        world.store.rule = interfere
        try:
            adopt(world, prefix)
            outcome = "converted"
        except (Busy, DatabaseGone):
            outcome = "refused"
        world.store.rule = None
        shown = world.content(prefix)
        if without_counters(shown) == without_counters(before):
            state = "old"
        else:
            assert {row[1] for row in dump(shown)} == {"new"}, at
            state = "new"
        results.add((outcome, state))
        if count <= at:
            break
    assert results == {("converted", "old"), ("converted", "new"), ("refused", "new")}


@pytest.mark.parametrize("goes_on", [True, False])
def test_two_machines_convert_at_once(world: World, bucket: MemoryBucket, goes_on: bool) -> None:
    """They see the same state, so it does not matter whose head is there; but a commit on it is another state."""
    first, second = world.machine(faulty=False), world.machine()
    mine = Process(second, second.open(P), 2)
    mine.shared()

    def race(call: Call, now: str) -> None:
        if call.site == "swap" and now == "before":
            world.store.rule = None
            theirs = Process(first, first.open(P), 1)
            theirs.begin()
            if goes_on:
                theirs.database.write(12288 - 10, b"theirs")
            theirs.commit()

    world.store.rule = race
    with pytest.raises(Busy, match="changed elsewhere") if goes_on else contextlib.nullcontext():
        mine.reserved()
    mine.unlock()
    mine.begin()
    mine.database.write(8192 - 10, b"mine")
    mine.commit()
    content = world.content(P)
    assert content[12288 - 10 : 12288 - 4] == b"theirs" or not goes_on
    assert content[8192 - 10 : 8192 - 6] == b"mine"


@pytest.mark.parametrize("applied", [True, False])
def test_a_head_whose_creation_is_in_doubt(world: World, bucket: MemoryBucket, applied: bool) -> None:
    calls = []

    def doubt(call: Call, now: str) -> None:
        if call.site == "swap" and now == ("after" if applied else "before") and not calls:
            calls.append(call)
            raise RequestInDoubt("cut")

    world.store.rule = doubt
    adopt(world)
    assert calls and old_keys(world) == []
    assert len(dump(world.content(P))) == 60


def test_old_keys_that_cannot_be_deleted(world: World, bucket: MemoryBucket, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(call: Call, now: str) -> None:
        if call.operation == "DELETE":
            raise StoreUnavailable("no")

    world.store.rule = refuse
    adopt(world)
    world.store.rule = None
    assert "keys of sqlite-s3vfs are left" in caplog.text
    assert legacy.stale_keys(world.store, P) == old_keys(world) != []
    assert len(dump(world.content(P))) == 60


def test_keep(world: World, bucket: MemoryBucket) -> None:
    expected = s3vfs.content(bucket, P)
    listed = keys(world)
    adopt(world, keep=True)
    assert legacy.stale_keys(world.store, P) == listed
    assert without_counters(world.content(P)) == without_counters(expected)
    assert [name for name, _ in world.machine().listing("old")] == ["app.db"]


# --- removing ----------------------------------------------------------------------------------------------


def test_removing_one(world: World, bucket: MemoryBucket) -> None:
    world.store.inner.put(f"{P}-journal/0000000000", bytes(512))
    machine = world.machine()
    database = machine.open(P)
    machine.remove(P)
    assert old_keys(world) == [] and keys(world, P + "-journal") == []
    assert machine.lookup(P) is None and machine.listing("old") == []
    with pytest.raises(DatabaseNotFound):
        world.machine().open(P)
    with pytest.raises(DatabaseGone):
        write(world, database)
    created = machine.create(P, exclusive=True)
    assert created.size == 0 and created.version.head.seq == 2


def test_a_crash_while_removing_leaves_all_or_nothing(world: World) -> None:
    for at in range(10**6):
        prefix = f"remove{at}.db"
        bucket = MemoryBucket(world.store.inner)
        run(bucket, prefix, CREATE, fill(60))
        before, count = s3vfs.content(bucket, prefix), 0
        machine = world.machine()

        def die(call: Call, now: str, at: int = at) -> None:
            nonlocal count
            count += now == "before"
            if now == "before" and count > at:
                raise s3vfs.Died

        world.store.rule = die
        with contextlib.suppress(s3vfs.Died):
            machine.remove(prefix)
        world.store.rule = None
        if world.machine(faulty=False).lookup(prefix) is not None:
            assert world.content(prefix) == before == s3vfs.content(bucket, prefix)
        if count <= at:
            break
    assert at > 5


# --- other commands ----------------------------------------------------------------------------------------


def test_rename_and_copy(world: World, bucket: MemoryBucket) -> None:
    """Both copy objects inside the store, so they convert first."""
    before = s3vfs.content(bucket, P)
    machine = world.machine()
    machine.copy(P, "copy.db")
    assert without_counters(world.content("copy.db")) == without_counters(before) == without_counters(world.content(P))
    run(bucket, "second.db", CREATE, fill(5))
    machine.rename("second.db", "renamed.db")
    assert len(dump(world.content("renamed.db"))) == 5 and machine.lookup("second.db") is None
    run(bucket, "third.db", CREATE, fill(7))
    machine.rename("renamed.db", "third.db")  # over one
    assert len(dump(world.content("third.db"))) == 5
    assert [key for key in keys(world, "") if key.endswith("0000000000")] == []


def test_one_that_cannot_be_read_does_not_hide_the_others(world: World, bucket: MemoryBucket) -> None:
    run(bucket, "old/nodot", CREATE, fill(60))
    world.store.inner.delete(["old/nodot/0000000002"])
    assert [name for name, _ in world.machine().listing("old")] == ["app.db", "nodot"]


def test_old_keys_beside_a_head_are_reported_by_open(
    world: World, bucket: MemoryBucket, caplog: pytest.LogCaptureFixture
) -> None:
    adopt(world, keep=True)
    world.machine().open(P)
    assert "old/app.db/0000000000: left or written by sqlite-s3vfs" in caplog.text


def test_a_collector_does_not_touch_a_conversion_that_is_under_way(world: World, bucket: MemoryBucket) -> None:
    """Its uploads are nobody's until the head is there; without a head nothing is garbage."""
    before = s3vfs.content(bucket, P)

    def collect_now(call: Call, now: str) -> None:
        if call.site == "swap" and now == "before":
            world.store.rule = None
            world.runtime.sleep(10**6)
            report = collect(source_of(world), legacy.AnyHead(source_of(world), CONFIG), 0)
            assert report.deleted == 0

    world.store.rule = collect_now
    adopt(world)
    assert world.content(P) == before
