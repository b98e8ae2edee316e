"""The lease: who may write, one at a time in a process and across machines, without wall clocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine import InlineRuntime, Process, World
from scenes import PAGE, state

from s3blockfs.errors import Busy, StoreUnavailable
from s3blockfs.lease import CONTENDED_S, LINGER_S, POLL_S, REST_S, TENURE_S, Stale
from s3blockfs.locks import Level

LEASE_S = 10.0


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


class Writer:
    """One machine with the database open, and a process on it."""

    def __init__(self, world: World, pid: int, **changes: object) -> None:
        self.world = world
        self.machine = world.machine(lease_s=LEASE_S, refresh_s=0.0, **changes)
        self.database = self.machine.create("a.db", exclusive=False)
        self.process = Process(self.machine, self.database, pid)

    def begin(self) -> None:
        """BEGIN IMMEDIATE; what was locked is given up when it fails, as SQLite does."""
        self.process.shared()
        try:
            self.process.reserved()
        except Exception:
            self.process.unlock()
            raise
        self.process.write_journal()
        self.process.exclusive()

    def commit(self, number: int) -> None:
        self.database.write(0, state(number))
        self.process.commit()

    def write(self, number: int) -> None:
        self.begin()
        self.commit(number)


@pytest.fixture
def pair(world: World) -> tuple[Writer, Writer]:
    first, second = Writer(world, 1), Writer(world, 2)
    first.write(1)
    world.runtime.sleep(LINGER_S)
    first.machine.tick()
    world.runtime.sleep(CONTENDED_S)
    return first, second


def lease_in_head(world: World) -> object:
    version = world.heads(faulty=False).read()
    assert version is not None
    return version.head.lease


def test_the_second_writer_is_busy_until_the_first_has_finished(world: World, pair: tuple[Writer, Writer]) -> None:
    first, second = pair
    first.begin()
    with pytest.raises(Busy):
        second.begin()
    first.commit(2)
    with pytest.raises(Busy):  # it is kept for a moment: bursts cost one request a commit
        second.begin()
    world.runtime.sleep(LINGER_S)
    first.machine.tick()
    assert lease_in_head(world) is None
    world.runtime.sleep(POLL_S)
    second.write(3)
    assert world.content() == second.database.read(0, PAGE * 4)[: len(world.content())]
    first.process.shared()
    assert first.database.read(30, 50) == second.database.read(30, 50)


def test_a_burst_costs_one_request_a_commit(world: World, pair: tuple[Writer, Writer]) -> None:
    first, _ = pair
    first.write(2)
    before = len(world.store.calls)
    for number in range(3, 13):
        first.write(number)
    assert [(call.operation, call.site) for call in world.store.calls[before:]] == [("PUT", "swap")] * 10


def test_a_lease_that_shows_no_life_is_taken_over_and_its_holder_loses_cleanly(
    world: World, pair: tuple[Writer, Writer]
) -> None:
    first, second = pair
    first.begin()
    with pytest.raises(Busy):
        second.begin()
    world.runtime.sleep(LEASE_S - 1)
    with pytest.raises(Busy):
        second.begin()
    world.runtime.sleep(1)
    second.write(3)
    first.database.write(0, state(2))
    with pytest.raises(Exception, match="committed first"):
        first.process.commit()
    first.process.shared()
    assert first.database.read(30, 50) == state(3)[30:80]


def test_a_long_transaction_renews_its_lease(world: World, pair: tuple[Writer, Writer]) -> None:
    first, second = pair
    first.begin()
    for _ in range(8):
        world.runtime.sleep(LEASE_S / 2)
        first.machine.tick()
        with pytest.raises(Busy):
            second.begin()
    first.commit(2)


def test_after_a_long_tenure_others_get_in(world: World, pair: tuple[Writer, Writer]) -> None:
    first, second = pair
    first.begin()
    with pytest.raises(Busy):
        second.begin()
    first.commit(2)
    world.runtime.sleep(POLL_S)
    with pytest.raises(Busy):
        second.begin()
    # No wait: the tenure has lasted long enough by the clock of the holder, which writes on and on.
    clock = 0.0
    number = 3
    while lease_in_head(world) is not None and clock < TENURE_S * 2:
        first.write(number)
        number, clock = number + 1, clock + 0.25
        world.runtime.sleep(0.25)
    assert clock <= TENURE_S + 0.5
    world.runtime.sleep(POLL_S)
    second.begin()  # while the first one rests
    second.commit(90)
    before = world.runtime.monotonic()
    with pytest.raises(Busy):
        first.begin()
    assert world.runtime.monotonic() - before <= REST_S


def test_a_holder_rests_though_it_never_met_anybody(world: World, pair: tuple[Writer, Writer]) -> None:
    """Who waits leaves no trace in the head, so the holder cannot know of them."""
    first, _ = pair
    first.write(2)
    number = 3
    while lease_in_head(world) is not None:
        world.runtime.sleep(LINGER_S - 0.1)
        first.write(number)
        number += 1
    before = world.runtime.monotonic()
    first.write(number)
    assert REST_S / 2 <= world.runtime.monotonic() - before <= REST_S


@pytest.mark.parametrize("after_a_burst", [False, True])
def test_an_exclusive_session_keeps_its_lease(world: World, pair: tuple[Writer, Writer], after_a_burst: bool) -> None:
    """locking_mode=EXCLUSIVE: one write lock, many commits, so others are kept out for as long as it takes."""
    first, second = pair
    number = 2
    while after_a_burst and number < 7:
        first.write(number)
        number += 1
        world.runtime.sleep(TENURE_S / 5)
    first.begin()
    world.runtime.sleep(0.1)  # so this is just after a tenure
    for turn in range(12):
        first.database.write(0, state(number + turn))
        first.process.finalise()
        first.process.write_journal()
        # The tail of a burst looks like one more transaction of it; the next commit takes the lease back.
        assert (lease_in_head(world) is None) == (after_a_burst and turn == 0)
        if turn > 0:
            with pytest.raises(Busy):
                second.begin()
        world.runtime.sleep(TENURE_S / 4)
        first.machine.tick()


def test_a_stale_reader_cannot_start_to_write(world: World, pair: tuple[Writer, Writer]) -> None:
    first, second = pair
    first.process.shared()
    second.write(2)
    world.runtime.sleep(LINGER_S)
    second.machine.tick()
    with pytest.raises(Stale):
        first.process.reserved()
    first.process.unlock()
    world.runtime.sleep(POLL_S)
    first.write(3)
    assert first.database.read(30, 50) == state(3)[30:80]


def test_readers_that_overlap_do_not_keep_an_old_state_shown_for_ever(
    world: World, pair: tuple[Writer, Writer]
) -> None:
    """New SHARED locks are held back, as PENDING does, once a newer state waits and a writer was refused."""
    first, second = pair
    reader = Process(first.machine, first.database, 7)
    reader.shared()
    second.write(2)
    with pytest.raises(Busy):
        first.process.shared()
    reader.unlock()
    first.process.shared()
    assert first.database.read(30, 50) == state(2)[30:80]


def test_one_process_that_never_lets_go_of_shared_comes_to_a_busy_commit(
    world: World, pair: tuple[Writer, Writer]
) -> None:
    """Connections of one process share a SHARED: RESERVED is granted on the old state, EXCLUSIVE is not."""
    first, second = pair
    first.process.shared()
    second.write(2)
    world.runtime.sleep(LINGER_S)
    second.machine.tick()
    for _ in range(2):
        with pytest.raises(Stale):
            first.process.reserved()
        world.runtime.sleep(1.0)
    first.process.reserved()
    with pytest.raises(Busy):
        first.process.exclusive()
    assert first.database.locks.level(first.process) == Level.RESERVED
    first.process.unlock()
    first.write(3)
    assert first.database.read(30, 50) == state(3)[30:80]


def test_lease_0_takes_none(world: World) -> None:
    writer = Writer(world, 1)
    writer.machine.close()
    plain = world.machine(lease_s=0.0, refresh_s=0.0)
    database = plain.open("a.db")
    process = Process(plain, database, 5)
    process.begin()
    for number in (4, 5):  # two commits under one write lock
        database.write(0, state(number))
        process.finalise()
        process.write_journal()
        assert lease_in_head(world) is None


def test_closing_gives_the_lease_back(world: World, pair: tuple[Writer, Writer]) -> None:
    first, _ = pair
    first.write(2)
    assert lease_in_head(world) is not None
    first.process.close()
    first.machine.release(first.database)
    first.machine.close()
    assert lease_in_head(world) is None


def test_an_outage_while_giving_back_harms_nobody(world: World, pair: tuple[Writer, Writer]) -> None:
    first, second = pair
    first.write(2)

    def rule(call: object, when: str) -> None:
        raise StoreUnavailable("the store is down")

    world.store.rule = rule
    world.runtime.sleep(LINGER_S)
    first.machine.tick()
    world.store.rule = None
    with pytest.raises(Busy):
        second.begin()
    world.runtime.sleep(LEASE_S)
    second.write(3)
    world.runtime.sleep(LINGER_S)
    second.machine.tick()
    world.runtime.sleep(POLL_S)
    first.write(4)
    assert world.content()[30:80] == state(4)[30:80]


def test_whoever_holds_the_lease_needs_no_look_before_reading(world: World, pair: tuple[Writer, Writer]) -> None:
    first, _ = pair
    first.write(2)
    before = len(world.store.calls)
    first.process.shared()
    assert first.database.read(30, 50) == state(2)[30:80]
    assert len(world.store.calls) == before


def test_a_hostile_lease_cannot_lock_others_out_for_ever(world: World, pair: tuple[Writer, Writer]) -> None:
    first, _ = pair
    heads = world.heads(faulty=False)
    version = heads.read()
    assert version is not None
    from s3blockfs.format.head import Lease

    heads.swap(version, lambda head: replace(head, lease=Lease("evil", "x", 1 << 62)))
    with pytest.raises(Busy):
        first.begin()
    world.runtime.sleep(601)
    first.write(2)
