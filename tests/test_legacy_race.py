"""A conversion, or a removal, of a sqlite-s3vfs store that stalls right before its head is created."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine import Call, InlineRuntime, World
from s3vfs import CREATE, MemoryBucket, P, fill, run

from s3blockfs.errors import Busy, DatabaseNotFound
from s3blockfs.format.head import Head


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        run(MemoryBucket(made.store.inner), P, CREATE, fill(60))
        yield made


def others_come_first(world: World, *, write: bool, remove: bool) -> None:
    """Right before the next swap arrives."""

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            world.store.rule = None
            other = world.machine(faulty=False)
            if write:
                database = other.open(P)
                database.write(0, database.read(0, 10))
                database.close_handle(0)
                other.release(database)
            if remove:
                other.remove(P)

    world.store.rule = rule


def head(world: World) -> Head:
    version = world.heads(P, faulty=False).read()
    assert version is not None
    return version.head


@pytest.mark.parametrize("write", [True, False])
def test_a_conversion_does_not_go_on_with_what_was_deleted_meanwhile(world: World, write: bool) -> None:
    """What is written then must not be acknowledged: the machines agree on the id, so it looks like our own head."""
    database = world.machine().open(P)
    others_come_first(world, write=write, remove=True)
    with pytest.raises(Busy):
        database.write(0, b"x")
    assert not database.is_dirty and head(world).deleted
    with pytest.raises(DatabaseNotFound):
        world.content(P)


@pytest.mark.parametrize("write", [True, False])
def test_what_others_removed_first_is_removed(world: World, write: bool) -> None:
    """Their tombstone stays: no floor falls (invariant I1)."""
    machine = world.machine()
    others_come_first(world, write=write, remove=True)
    machine.remove(P)
    assert head(world).deleted and head(world).floor == head(world).rev - 1


def test_a_removal_that_somebodys_commit_forestalled_is_no_success(world: World) -> None:
    machine = world.machine()
    others_come_first(world, write=True, remove=False)
    with pytest.raises(Busy):
        machine.remove(P)
    assert not head(world).deleted and world.content(P)


def test_opening_for_writing_with_what_was_read_a_while_ago(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program wrote in between, and whoever has it open here has seen that already: it was not made anew."""
    machine = world.machine()
    database = machine.open(P)
    old = database.version
    run(MemoryBucket(world.store.inner), P, "UPDATE t SET data = 0")
    world.runtime.sleep(60)
    database.refresh(0)
    assert database.version.head.id != old.head.id
    monkeypatch.setattr(machine._head_file(P), "read", lambda *_: old)
    assert machine.create(P, exclusive=False) is database
    assert not database.is_gone
