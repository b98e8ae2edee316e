"""Rename, copy, and what is left when they are interrupted or raced."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from engine import Call, InlineRuntime, World, shrink_limits, small_leaves, sqlite_page
from scenes import state

from s3blockfs.catalog import Catalog
from s3blockfs.errors import Busy, DatabaseExists, DatabaseNotFound, ObjectNotFound, S3BlockFSError, StoreUnavailable
from s3blockfs.format.head import Head


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    shrink_limits(monkeypatch)
    small_leaves(monkeypatch)
    with World(InlineRuntime()) as made:
        yield made


def fill(machine: Catalog, path: str, data: bytes) -> None:
    database = machine.create(path, exclusive=False)
    database.write(0, data)
    database.truncate(len(data))
    database.close_handle(0)
    machine.release(database)


def patch(machine: Catalog, path: str, offset: int, data: bytes) -> None:
    database = machine.open(path)
    database.write(offset, data)
    database.close_handle(0)
    machine.release(database)


def large(seed: int, pages: int = 200) -> bytes:
    return sqlite_page(seed, pages) + random.Random(seed).randbytes((pages - 1) * 4096)


def without_counter(data: bytes) -> bytes:
    return data[:24] + data[28:92] + data[96:]


def head(world: World, path: str) -> Head:
    version = world.heads(path, faulty=False).read()
    assert version is not None
    return version.head


def test_a_renamed_database_has_its_bytes_a_new_id_and_the_next_counter(world: World) -> None:
    """Whole blocks, scattered pages in segments, and what is in the tail."""
    machine = world.machine()
    data = bytearray(large(1))
    fill(machine, "a.db", bytes(data))
    for number in range(60):
        data[number * 12288 : number * 12288 + 5] = b"patch"
        patch(machine, "a.db", number * 12288, b"patch") if number else None
    data[:5] = large(1)[:5]
    before = head(world, "a.db")
    machine.rename("a.db", "deep/b.db")
    after = head(world, "deep/b.db")
    assert without_counter(world.content("deep/b.db")) == without_counter(bytes(data))
    assert after.id != before.id and after.seq == before.seq + 1 and after.name == "b.db"
    assert after.counter is not None and before.counter is not None and after.counter == before.counter + 1
    assert head(world, "a.db").deleted and head(world, "a.db").floor == before.rev
    with pytest.raises(DatabaseNotFound):
        machine.open("a.db")
    assert [name for name, _ in machine.listing("")] == ["deep"]


def test_rename_over_an_existing_database(world: World) -> None:
    machine = world.machine()
    fill(machine, "a.db", state(1))
    for number in range(5):
        fill(machine, "b.db", state(20 + number))
    old = head(world, "b.db")
    held = machine.open("b.db")
    machine.rename("a.db", "b.db")
    new = head(world, "b.db")
    assert without_counter(world.content("b.db")) == without_counter(state(1))
    assert new.seq > old.seq and new.rev > old.rev and new.counter == old.counter + 1  # type: ignore[operator]
    with pytest.raises(S3BlockFSError):
        held.write(0, b"x")
    patch(machine, "b.db", 5000, b"goes on")
    assert world.content("b.db")[5000:5007] == b"goes on"


def test_a_name_can_be_used_again_after_a_rename(world: World) -> None:
    machine = world.machine()
    for turn in range(4):
        fill(machine, "new.db", large(turn, 50))
        machine.rename("new.db", "live.db")
        assert without_counter(world.content("live.db")) == without_counter(large(turn, 50))
        assert head(world, "live.db").rev > turn


def test_a_copy_is_independent(world: World) -> None:
    machine = world.machine()
    fill(machine, "a.db", large(3))
    machine.copy("a.db", "b.db")
    patch(machine, "a.db", 9000, b"only a")
    patch(machine, "b.db", 9000, b"only b")
    assert world.content("a.db")[9000:9006] == b"only a" and world.content("b.db")[9000:9006] == b"only b"
    with pytest.raises(DatabaseExists):
        machine.copy("a.db", "b.db")
    machine.copy("a.db", "b.db", overwrite=True)
    assert world.content("b.db")[9000:9006] == b"only a"
    machine.remove("a.db")
    for entry in list(world.store.inner.list("a.db/data/", site="t")):
        world.store.inner.delete([entry.key], site="t")
    assert world.content("b.db")[9000:9006] == b"only a"


def test_a_folder_is_renamed_with_all_that_is_in_it(world: World) -> None:
    machine = world.machine()
    for name in ("x/one.db", "x/in/two.db"):
        fill(machine, name, state(3))
    machine.rename("x", "y")
    assert [name for name, _ in machine.listing("")] == ["y"]
    assert without_counter(world.content("y/in/two.db")) == without_counter(state(3))
    assert without_counter(world.content("y/one.db")) == without_counter(state(3))


def test_what_is_being_written_is_not_renamed(world: World) -> None:
    machine = world.machine()
    fill(machine, "a.db", state(1))
    database = machine.open("a.db")
    database.write(0, b"uncommitted")
    with pytest.raises(Busy):
        machine.rename("a.db", "b.db")


def test_a_source_that_moves_on_is_kept_and_the_target_put_back(world: World) -> None:
    machine, other = world.machine(), world.machine(faulty=False)
    fill(machine, "a.db", state(1))
    fill(machine, "b.db", state(5))

    def rule(call: Call, when: str) -> None:
        if call.site == "mark-deleted" and when == "before":
            world.store.rule = None
            patch(other, "a.db", 6000, b"late")

    for existing in (True, False):
        if not existing:
            machine.remove("b.db")
        world.store.rule = rule
        with pytest.raises(Busy):
            machine.rename("a.db", "b.db")
        assert world.content("a.db")[6000:6004] == b"late"
        if existing:
            assert without_counter(world.content("b.db")) == without_counter(state(5))
            patch(machine, "b.db", 7000, b"goes on")
            assert world.content("b.db")[7000:7007] == b"goes on"
            fill(machine, "b.db", state(5))
        else:
            assert head(world, "b.db").deleted


def test_when_both_move_on_both_are_kept(world: World) -> None:
    machine, other = world.machine(), world.machine(faulty=False)
    fill(machine, "a.db", state(1))

    def rule(call: Call, when: str) -> None:
        if call.site == "mark-deleted" and when == "before":
            world.store.rule = None
            patch(other, "a.db", 6000, b"late")
            patch(other, "b.db", 6000, b"too!")

    world.store.rule = rule
    with pytest.raises(Busy):
        machine.rename("a.db", "b.db")
    assert world.content("a.db")[6000:6004] == b"late" and world.content("b.db")[6000:6004] == b"too!"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("over", [True, False])
def test_a_crash_at_any_request_leaves_one_or_both_and_never_a_mix(world: World, when: str, over: bool) -> None:
    for stop in range(200):
        machine = world.machine()
        source, target = f"s{stop}.db", f"t{stop}.db"
        fill(machine, source, large(stop, 40))
        if over:
            fill(machine, target, state(7))
        count = 0

        def rule(call: Call, now: str, stop: int = stop) -> None:
            nonlocal count
            count += now == when
            if count > stop and now == when:
                raise StoreUnavailable("the machine is gone")

        world.store.rule = rule
        done = False
        try:
            machine.rename(source, target)
            done = True
        except (S3BlockFSError, ObjectNotFound):
            pass
        world.store.rule = None
        there = {}
        for path in (source, target):
            try:
                there[path] = without_counter(world.content(path))
            except DatabaseNotFound:
                there[path] = None
        wanted = without_counter(large(stop, 40))
        assert there[source] in (wanted, None)
        assert there[target] in (wanted, without_counter(state(7)) if over else None)
        assert wanted in there.values()
        if done:
            assert there[source] is None and count <= stop
            return
    raise AssertionError("it never ended")
