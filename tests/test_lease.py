"""The lease: who may write, one at a time in a process and across machines, without wall clocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine import InlineRuntime, Process, World
from scenes import LEASE_S, PAGE, Writer, state

from s3blockfs.errors import Busy, CommitLost, StoreUnavailable
from s3blockfs.format import head as codec
from s3blockfs.lease import COMES_S, CONTENDED_S, LINGER_S, LONGEST_LINE, POLL_S, REST_S, TENURE_S, Stale
from s3blockfs.locks import Level
from s3blockfs.overlap import MountedDatabase


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


def test_a_burst_costs_one_request_a_commit(
    world: World, pair: tuple[Writer, Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no pause, not even one of 0 s, in which other programs of a busy machine would have their turns."""
    first, _ = pair
    first.write(2)
    before = len(world.store.calls)
    monkeypatch.setattr(world.runtime, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
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


def refused(writer: Writer, seconds: float) -> None:
    """As with `busy_timeout`: ask again and again, in vain."""
    for _ in range(round(seconds / POLL_S) + 2):
        with pytest.raises(Busy):
            writer.begin()
        writer.world.runtime.sleep(POLL_S)


def line(world: World) -> tuple[str, ...]:
    lease = lease_in_head(world)
    assert isinstance(lease, codec.Lease)
    return lease.waiting


def owner_of(world: World) -> str:
    lease = lease_in_head(world)
    assert isinstance(lease, codec.Lease)
    return lease.owner


def test_after_a_long_tenure_others_get_in_and_in_turn(world: World, pair: tuple[Writer, Writer]) -> None:
    """Who is refused for a while lines up in the head; the holder, which never pauses, passes the lease on."""
    first, second = pair
    third = Writer(world, 3)
    first.write(2)
    refused(second, LINGER_S)
    refused(third, LINGER_S)
    assert len(line(world)) == 2
    number = 3
    before = world.runtime.monotonic()
    holder = owner_of(world)
    while owner_of(world) == holder:
        first.write(number)
        number += 1
        world.runtime.sleep(POLL_S)
    assert world.runtime.monotonic() - before <= TENURE_S / 2
    assert len(line(world)) == 2 and line(world)[-1] == holder  # it goes on, so it wants another turn
    for writer in (first, third):
        with pytest.raises(Busy):  # it is not their turn
            writer.begin()
    world.runtime.sleep(POLL_S)
    second.write(90)
    world.runtime.sleep(LINGER_S)
    second.machine.tick()
    with pytest.raises(Busy):
        first.begin()
    world.runtime.sleep(POLL_S)
    third.write(91)
    world.runtime.sleep(LINGER_S)
    third.machine.tick()
    world.runtime.sleep(POLL_S)
    first.write(92)
    assert line(world) == ()


def test_who_is_next_and_does_not_come_is_passed_over(world: World, pair: tuple[Writer, Writer]) -> None:
    first, second = pair
    first.write(2)
    refused(second, LINGER_S)
    world.runtime.sleep(LINGER_S)
    first.machine.tick()
    with pytest.raises(Busy):
        first.begin()
    world.runtime.sleep(COMES_S)
    first.write(3)
    second.process.shared()
    assert second.database.read(30, 50) == state(3)[30:80]


def test_a_holder_that_nobody_waits_for_keeps_its_lease_and_pauses_now_and_then(
    world: World, pair: tuple[Writer, Writer]
) -> None:
    """Whoever commits all the time wins every race for the head, so who would line up needs that moment."""
    first, _ = pair
    first.write(2)
    calls, pauses = len(world.store.calls), []
    for number in range(3, 103):
        before = world.runtime.monotonic()
        first.write(number)
        if (paused := world.runtime.monotonic() - before) > 0:
            pauses.append(paused)
        world.runtime.sleep(POLL_S)
    assert sum(call.site == "swap" for call in world.store.calls[calls:]) == 100
    assert 2 <= len(pauses) <= 3
    assert max(pauses) <= REST_S / 2


def test_the_line_is_bounded(world: World, pair: tuple[Writer, Writer]) -> None:
    first, second = pair
    first.begin()
    heads = world.heads(faulty=False)
    version = heads.read()
    assert version is not None
    strangers = tuple(map(str, range(LONGEST_LINE)))
    heads.swap(version, lambda head: replace(head, lease=head.lease._replace(waiting=strangers)))
    refused(second, LINGER_S * 2)
    assert line(world) == strangers
    first.commit(2)


@pytest.mark.parametrize("after_a_burst", [False, True])
def test_an_exclusive_session_keeps_its_lease(world: World, pair: tuple[Writer, Writer], after_a_burst: bool) -> None:
    """locking_mode=EXCLUSIVE: one write lock, many commits, so others are kept out for as long as it takes."""
    first, second = pair
    first.write(2)
    if after_a_burst:
        refused(second, LINGER_S)
        for number in range(3, 13):
            first.write(number)
            world.runtime.sleep(POLL_S)
    owner = owner_of(world)
    first.begin()
    world.runtime.sleep(TENURE_S)
    for turn in range(12):
        first.database.write(0, state(20 + turn))
        first.process.finalise()
        first.process.write_journal()
        # The tail of a burst looks like one more transaction of it; the next commit takes the lease back.
        assert (owner_of(world) != owner) == (after_a_burst and turn == 0)
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


def come_to_pending(world: World, pair: tuple[Writer, Writer]) -> Writer:
    """Connections of one process share a SHARED, and one of them is read-only: RESERVED is granted on the old state in
    the end."""
    first, second = Writer(world, 3, MountedDatabase), pair[1]
    assert isinstance(first.database, MountedDatabase)
    first.database.only_read = Counter([first.process.pid])
    first.process.shared()
    second.write(2)
    world.runtime.sleep(LINGER_S)
    second.machine.tick()
    for _ in range(3):
        with pytest.raises(Stale):
            first.process.reserved()
        world.runtime.sleep(0.7)
    first.process.reserved()
    return first


def test_one_process_that_never_lets_go_of_shared_comes_to_a_busy_commit(
    world: World, pair: tuple[Writer, Writer]
) -> None:
    first = come_to_pending(world, pair)
    with pytest.raises(Busy):
        first.process.exclusive()
    assert first.database.locks.level(first.process) == Level.RESERVED
    first.process.unlock()
    first.write(3)
    assert first.database.read(30, 50) == state(3)[30:80]


def test_a_commit_that_must_not_be_does_not_hold_up_others_for_long(world: World, pair: tuple[Writer, Writer]) -> None:
    """With a long busy_timeout SQLite would go on asking; the journal it leaves must not be played back by others."""
    first = come_to_pending(world, pair)
    first.process.write_journal()
    with pytest.raises(Busy):
        first.process.exclusive()
    world.runtime.sleep(2.0)
    with pytest.raises(CommitLost):
        first.process.exclusive()
    first.process.play_back()
    assert first.process.journal_exists
    first.process.unlock()
    assert not first.process.journal_exists
    assert first.database.read(30, 50) == state(2)[30:80]
    first.write(3)
    assert first.database.read(30, 50) == state(3)[30:80]


def test_a_writer_that_comes_late_to_an_old_state_is_refused(world: World, pair: tuple[Writer, Writer]) -> None:
    """A reader has kept it for long, and this machine was stopped meanwhile. Granted, it would keep out everybody."""
    first, second = pair
    reader = Process(first.machine, first.database, 7)
    reader.shared()
    first.process.shared()
    second.write(2)
    first.database.refresh(0)
    world.runtime.sleep(60.0)
    with pytest.raises(Stale):
        first.process.reserved()


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
    heads.swap(version, lambda head: replace(head, lease=codec.Lease("evil", "x", 1 << 62)))
    with pytest.raises(Busy):
        first.begin()
    world.runtime.sleep(601)
    first.write(2)
