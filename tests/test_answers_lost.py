"""A swap applied, its answer was lost, and others went on before anybody looked. Each was found by tests/simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from engine import Call, InlineRuntime, World
from scenes import PREFIX, Scene, same, state
from test_transfer import fill, head, patch

from s3blockfs.errors import Busy, DatabaseNotFound, RequestInDoubt


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


def answer_lost(world: World, key: str, then: Callable[[], object], nth: int = 1) -> None:
    """The answer to the nth swap of the head `key`; then something happens."""
    swaps = 0

    def rule(call: Call, when: str) -> None:
        nonlocal swaps
        if (call.operation, call.site, call.key, when) == ("PUT", "swap", key, "after"):
            swaps += 1
            if swaps == nth:
                world.store.rule = None
                then()
                raise RequestInDoubt("the answer was lost")

    world.store.rule = rule


def test_a_copy_that_others_replaced_was_made(world: World) -> None:
    machine, others = world.machine(), world.machine(faulty=False)
    for name in ("a.db", "b.db", "c.db"):
        fill(others, name, state(ord(name[0])))
    answer_lost(world, "c.db/head", lambda: others.copy("b.db", "c.db", overwrite=True))
    machine.copy("a.db", "c.db", overwrite=True)  # it was there for a moment: no error may say that nothing was done
    assert same(world.content("c.db"), state(ord("b")))


def test_a_database_that_others_deleted_is_not_made_twice(world: World) -> None:
    machine, others = world.machine(), world.machine(faulty=False)

    def go_on() -> None:
        fill(others, "b.db", state(1))
        others.copy("b.db", "a.db", overwrite=True)
        others.remove("a.db")

    answer_lost(world, "a.db/head", go_on)
    with pytest.raises(DatabaseNotFound, match="right after its creation"):
        machine.create("a.db", exclusive=True)
    assert head(world, "a.db").deleted


def test_a_rename_that_fails_leaves_what_others_committed_at_its_target(world: World) -> None:
    machine, others = world.machine(), world.machine(faulty=False)
    fill(others, "a.db", state(1))

    def go_on() -> None:
        fill(others, "b.db", state(2))  # on what was just moved there
        patch(others, "a.db", 5000, b"moved on")

    answer_lost(world, "b.db/head", go_on)
    with pytest.raises(Busy):
        machine.rename("a.db", "b.db")
    assert same(world.content("b.db"), state(2))
    assert world.content("a.db")[5000:5008] == b"moved on"


def test_a_writer_sees_its_own_commit_although_others_deleted_the_database(world: World) -> None:
    scene = Scene(world)
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    answer_lost(world, f"{PREFIX}/head", lambda: world.machine(faulty=False).remove(PREFIX))
    writer.finalise()
    assert same(scene.shown(), state(2))  # still in its transaction: an empty file would look malformed to SQLite
    writer.unlock()


def test_a_process_that_was_stopped_in_its_commit_does_not_trust_its_lease(world: World) -> None:
    """What it shows after that is the newest state, although the answer says that the lease is its own."""
    scene = Scene(world, lease_s=10.0, refresh_s=0)
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))

    def stopped(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            world.store.rule = None
            world.runtime.sleep(60)
            scene.commit_elsewhere(3)

    world.store.rule = stopped
    writer.commit()
    reader = scene.process(2)
    reader.shared()
    assert same(scene.shown(), state(3))
    reader.unlock()


def test_a_lease_that_is_being_given_back_is_not_trusted(world: World) -> None:
    """Others may have it, and have committed, before the answer comes."""
    scene = Scene(world, lease_s=10.0, refresh_s=0)
    writer, reader = scene.process(1), scene.process(2)
    writer.begin()
    scene.database.write(0, state(2))
    writer.commit()
    seen: list[bool] = []

    def go_on() -> None:
        scene.commit_elsewhere(3)
        reader.shared()
        seen.append(same(scene.shown(), state(3)))
        reader.unlock()

    answer_lost(world, f"{PREFIX}/head", go_on)
    world.runtime.sleep(1)
    world.runtime.tick()
    assert seen == [True]
