"""What a database of a mount with `--exclusive` makes of a newer head that it hears of, by the engine alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine import InlineRuntime, World
from scenes import LEASE_S, PREFIX, Scene, Writer, same, state

from s3blockfs.errors import Busy, DatabaseGone
from s3blockfs.exclusive import ExclusiveDatabase
from s3blockfs.locks import RESERVED_BYTE, Kind, Lock

LATER_S = LEASE_S / 2  # the lease is due


class Held(Scene):
    """State 1, and a handle on it."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.machine = world.machine(lease_s=LEASE_S, refresh_s=60.0)
        self.machine.kind = ExclusiveDatabase
        opened = self.machine.open(PREFIX)
        assert isinstance(opened, ExclusiveDatabase)
        self.database = self.exclusive = opened
        opened.hold(lambda: False)

    def later(self) -> None:
        """The lease is renewed, by which the newest head becomes known; then that is looked at."""
        for _ in range(2):
            self.world.runtime.sleep(LATER_S)
            self.machine.tick()


@pytest.fixture
def held() -> Iterator[Held]:
    with World(InlineRuntime()) as world:
        made = Held(world)
        yield made
        made.exclusive.let_go()


def test_a_newer_head_of_the_same_commit_is_adopted(held: Held) -> None:
    """What it replaced, as a fold does, is going to be collected."""
    before = held.database.version.head
    held.later()
    assert held.database.version.head.rev > before.rev and held.database.version.head.commit == before.commit
    assert held.shown() == state(1) and not held.exclusive.is_lost


def test_but_not_under_uncommitted_bytes(held: Held) -> None:
    writer = Lock(1, Kind.WRITE, RESERVED_BYTE, RESERVED_BYTE, 1)
    held.exclusive.kernel_locks.look = lambda: [writer]
    held.database.write(0, state(2))
    held.later()
    assert held.shown() == state(2) and held.published(1)
    held.database.sync(1)
    held.exclusive.kernel_locks.look = list
    held.later()
    assert held.published(2) and same(held.shown(), state(2)) and not held.exclusive.is_lost


def test_the_commit_of_somebody_who_took_no_lease_ends_it(held: Held) -> None:
    """`restore`, `mv` and `cp` of s3blockfs: the lease is still this machine's."""
    held.commit_elsewhere(9)
    assert held.shown() == state(1)
    held.later()
    assert held.exclusive.is_lost
    with pytest.raises(DatabaseGone, match="the lease was lost; open it again"):
        held.shown()
    assert held.published(9)


def test_a_lease_that_was_taken_over_ends_it(held: Held) -> None:
    """Before anything is committed: from then on it may be, at any moment."""
    other = Writer(held.world, 2)
    while True:
        try:
            other.begin()
            break
        except Busy:
            held.world.runtime.sleep(LEASE_S)  # this machine sleeps
    held.later()
    assert held.exclusive.is_lost and held.published(1)
    other.commit(5)
    assert held.published(5)


def test_a_lost_lease_is_noticed_also_when_there_was_no_thread_for_it(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(_: object) -> None:
        raise RuntimeError("can't start new thread")

    held.commit_elsewhere(2)
    held.exclusive._heads.read_if_changed(held.database.version)
    with monkeypatch.context() as patch:
        patch.setattr(held.world.runtime, "submit", exhausted)
        held.machine.tick()
    held.machine.tick()
    assert held.exclusive.is_lost
