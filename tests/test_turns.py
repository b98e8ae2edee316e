"""Whose turn it is among the processes of one machine, and what their locks are worth."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine import InlineRuntime, Process, World
from scenes import Writer, state

from s3blockfs.errors import Busy, CommitLost
from s3blockfs.lease import CONTENDED_S, GIVES_UP_S, LINGER_S, PATIENT_S, POLL_S
from s3blockfs.locks import TO_END


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


@pytest.fixture
def pair(world: World) -> tuple[Writer, Writer]:
    first, second = Writer(world, 1), Writer(world, 2)
    first.write(1)
    world.runtime.sleep(LINGER_S)
    first.machine.tick()
    world.runtime.sleep(CONTENDED_S)
    return first, second


def take_turn(writer: Writer, number: int, other: Process) -> bool:
    """A transaction, in the middle of which another process of the machine asks in vain. False if it may not begin."""
    writer.process.shared()
    try:
        writer.process.reserved()
    except Busy:
        writer.process.unlock()
        return False
    other.shared()
    with pytest.raises(Busy):
        other.reserved()
    other.unlock()
    writer.process.write_journal()
    writer.process.exclusive()
    writer.commit(number)
    return True


def test_who_has_waited_for_longer_on_this_machine_goes_first(world: World, pair: tuple[Writer, Writer]) -> None:
    """Two processes on one mount. The one that has just written does not get its next turn before the other."""
    first, _ = pair
    other = Process(first.machine, first.database, 8)
    first.write(2)
    turns = 0
    while take_turn(first, 3 + turns, other):
        turns += 1
        world.runtime.sleep(POLL_S)
        assert turns < 2 * PATIENT_S / POLL_S
    assert turns >= PATIENT_S / POLL_S
    other.begin()
    first.database.write(0, state(90))
    other.commit()
    first.write(91)


def test_who_does_not_ask_any_more_holds_up_nobody(world: World, pair: tuple[Writer, Writer]) -> None:
    first, _ = pair
    other = Process(first.machine, first.database, 8)
    turns = 0
    while take_turn(first, 2 + turns, other):
        turns += 1
        world.runtime.sleep(POLL_S)
    world.runtime.sleep(GIVES_UP_S)
    first.write(90)


def test_who_is_refused_at_shared_has_not_given_up(world: World, pair: tuple[Writer, Writer]) -> None:
    """Most of what a waiting writer tries fails there, while the others are in their commits."""
    first, _ = pair
    other = Process(first.machine, first.database, 8)
    assert take_turn(first, 2, other)
    first.begin()
    for _ in range(round(2 * GIVES_UP_S / POLL_S)):
        with pytest.raises(Busy):
            other.shared()
        world.runtime.sleep(POLL_S)
    first.commit(3)
    with pytest.raises(Busy):
        first.begin()
    other.begin()
    other.unlock()
    first.write(4)


@pytest.mark.parametrize("somebody_else_commits", [False, True])
def test_locks_that_another_library_of_the_process_gave_up(
    world: World, pair: tuple[Writer, Writer], somebody_else_commits: bool
) -> None:
    """POSIX gives up all locks of a process with any descriptor; SQLite does not notice, what it read may be old."""
    first, _ = pair
    first.process.shared()
    first.process.reserved()
    first.database.unlock(first.process, 0, TO_END)
    if somebody_else_commits:
        other = Process(first.machine, first.database, 8)
        other.begin()
        first.database.write(0, state(2))
        other.commit()
        with pytest.raises(CommitLost):
            first.process.exclusive()
        first.process.unlock()
        assert first.database.read(30, 50) == state(2)[30:80]
    else:
        first.process.write_journal()
        first.process.exclusive()
        first.commit(2)
    first.write(3)
