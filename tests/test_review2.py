"""Interleavings found by reading the code against its invariants: each of these failed once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import apsw
import pytest
from engine import Call, InlineRuntime, Process, World, shrink_limits
from scenes import PAGE, state, without_counters
from swaps import applied_in_doubt, commit_mine, fates, followed_by
from test_lease import Writer

from s3blockfs import vfs
from s3blockfs.catalog import Catalog
from s3blockfs.errors import Busy, CommitLost, DatabaseGone, S3BlockFSError
from s3blockfs.prefetch import Readahead
from s3blockfs.snapshot import Version
from s3blockfs.vfs import _DatabaseFile


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


def fill(machine: Catalog, path: str, data: bytes) -> None:
    database = machine.create(path, exclusive=False)
    database.write(0, data)
    database.truncate(len(data))
    database.close_handle(0)
    machine.release(database)


def newest(world: World, path: str) -> Version:
    found = world.heads(path, faulty=False).read()
    assert found is not None
    return found


def at(world: World, site: str, act: Callable[[], object], when: str = "before", key: str = "") -> None:
    """The next request of this site: something else happens first, or before its answer."""

    def rule(call: Call, now: str) -> None:
        if call.site == site and now == when and call.key.startswith(key):
            world.store.rule = None
            act()

    world.store.rule = rule


# --- a commit and the successor of its database -----------------------------------------------------------


def successor(world: World, seq: int) -> Callable[[], None]:
    """Another database, at its commit `seq`, is renamed over a.db; all its commits before are forgotten."""

    def act() -> None:
        machine = world.machine(faulty=False)
        for _ in range(seq - 2):
            fill(machine, "s.db", b"s")
            machine.remove("s.db")
        fill(machine, "s.db", b"successor")
        machine.rename("s.db", "a.db")

    return act


@pytest.mark.parametrize("seq", [2, 3, 4, 5, 9])
def test_a_commit_is_told_from_those_of_a_successor(world: World, seq: int) -> None:
    """Its answer is lost, and another database, with commits of the same number, replaces this one."""
    fill(world.machine(faulty=False), "a.db", b"mine")
    base = newest(world, "a.db")
    fates(world, followed_by(successor(world, seq), applied_in_doubt))
    assert commit_mine(world.heads(), base).head.id != base.head.id


@pytest.mark.parametrize("seq", [2, 3, 4, 5, 9])
def test_a_commit_that_a_successor_was_faster_than_is_lost(world: World, seq: int) -> None:
    """It is no commit of unknown outcome: that would never be settled."""
    fill(world.machine(faulty=False), "a.db", b"mine")
    base = newest(world, "a.db")
    at(world, "swap", successor(world, seq))
    with pytest.raises(CommitLost):
        commit_mine(world.heads(), base)


# --- rename ----------------------------------------------------------------------------------------------


def test_what_was_renamed_is_kept_when_its_old_name_is_used_again_at_once(world: World) -> None:
    """The tombstone's answer is lost, and what is found there is somebody's new database."""
    machine, other = world.machine(), world.machine(faulty=False)
    fill(machine, "a.db", state(1))
    fates(
        world,
        lambda when: None,  # the target's head
        followed_by(lambda: fill(other, "a.db", state(2)), applied_in_doubt),
    )
    machine.rename("a.db", "b.db")
    assert without_counters(world.content("b.db")) == without_counters(state(1))
    assert without_counters(world.content("a.db")) == without_counters(state(2))


@pytest.mark.parametrize("again", [False, True])
def test_what_was_copied_is_kept_when_the_source_is_deleted_meanwhile(world: World, again: bool) -> None:
    """Both happened: the data is under the new name, and not under the old one."""
    machine, other = world.machine(), world.machine(faulty=False)
    fill(machine, "a.db", state(1))

    def act() -> None:
        other.remove("a.db")
        if again:
            fill(other, "a.db", state(2))

    at(world, "mark-deleted", act)
    machine.rename("a.db", "b.db")
    assert without_counters(world.content("b.db")) == without_counters(state(1))
    assert (machine.lookup("a.db") is not None) == again


def test_no_change_counter_comes_back_when_a_target_is_put_back(world: World) -> None:
    """SQLite keeps its page cache while the counter is the same: a reader that saw the renamed database, and then what
    was committed on the one put back, would mix them."""
    machine, other = world.machine(), world.machine(faulty=False)
    fill(machine, "a.db", state(1))
    fill(machine, "b.db", state(5))
    seen: dict[bytes, bytes] = {}
    seqs: list[int] = []

    def look() -> None:
        content = world.content("b.db")
        assert seen.setdefault(content[24:28], content) == content
        seqs.append(newest(world, "b.db").head.seq)

    def act() -> None:
        look()
        fill(other, "a.db", state(3))

    look()
    at(world, "mark-deleted", act)
    with pytest.raises(Busy):
        machine.rename("a.db", "b.db")
    look()
    assert without_counters(world.content("b.db")) == without_counters(state(5))
    fill(machine, "b.db", state(6))
    look()
    assert len(seen) == 4 and seqs == sorted(set(seqs))


@pytest.mark.parametrize("journal", [True, False])
@pytest.mark.parametrize("act", ["rename", "remove", "replace"])
def test_a_transaction_whose_database_was_renamed_or_removed_does_not_succeed(
    world: World, act: str, journal: bool
) -> None:
    """It began while the rename was under way, and its bytes were dropped. Without a journal fsync is the commit."""
    machine = world.machine()
    fill(machine, "a.db", state(1))
    fill(machine, "b.db", state(5))
    database = machine.open("b.db" if act == "replace" else "a.db")
    writer = Process(machine, database, 1)

    def begin() -> None:
        writer.begin() if journal else [step() for step in (writer.shared, writer.reserved, writer.exclusive)]
        database.write(0, state(2))

    at(world, "mark-deleted", begin)
    machine.remove("a.db") if act == "remove" else machine.rename("a.db", "b.db")
    with pytest.raises(S3BlockFSError):
        database.finalise_journal(1) if journal else database.sync(1)
    assert not writer.journal_exists  # or a database made under that name would be rolled back by it
    writer.unlock()


# --- the lease -------------------------------------------------------------------------------------------


def test_a_lease_that_is_not_in_the_head_saves_no_look(world: World) -> None:
    """`--refresh 0` looks every time, also after the lease went with a database that was replaced."""
    first, other = Writer(world, 1), world.machine(faulty=False)
    first.write(1)
    first.begin()
    other.remove("a.db")
    fill(other, "a.db", state(2))
    first.database.write(0, state(9))
    with pytest.raises(CommitLost):
        first.process.commit()
    fill(other, "a.db", state(3))
    first.process.shared()
    assert first.database.read(30, PAGE) == state(3)[30 : 30 + PAGE]


def test_whoever_is_interrupted_between_lease_and_lock_does_not_keep_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others of the process would be busy for ever, and the lease be renewed for ever."""
    machine = world.machine(lease_s=10.0)
    fill(machine, "a.db", state(1))
    first, second = (machine.connection("a.db", f"a.db#{number}", create=False) for number in range(2))
    stopped, going_on = Process(machine, first, 1), Process(machine, second, 1)
    stopped.shared()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(first.locks, "try_lock", fail_with(KeyboardInterrupt()))
        stopped.reserved()
    stopped.unlock()
    machine.release(first)
    going_on.begin()
    second.write(0, state(2))
    going_on.commit()
    machine.release(second)


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_lease_that_is_slow_to_renew_takes_one_thread() -> None:
    """Ticks go on while a renewal hangs. If each took an I/O thread, nothing else could be read or written."""
    with World() as world:
        writer = Writer(world, 1)
        writer.begin()
        answer, asked = threading.Event(), threading.Semaphore(0)

        def rule(call: Call, when: str) -> None:
            asked.release()
            assert answer.wait(10)

        world.store.rule = rule
        world.runtime.sleep(4)
        try:
            writer.machine.tick()
            assert asked.acquire(timeout=10)
            for _ in range(20):
                writer.machine.tick()
            assert world.runtime.submit(lambda: "a thread is free").result(timeout=5)
        finally:
            answer.set()
        writer.commit(2)


# --- no request under the catalog's lock ------------------------------------------------------------------


def test_the_slower_of_two_opens_keeps_nobody_waiting(world: World) -> None:
    """It drops its database, and with it the lease that the faster one has just finished to use."""
    fill(world.machine(faulty=False), "a.db", state(1))
    machine = world.machine(lease_s=10.0)
    locked = []

    def faster() -> None:
        database = machine.open("a.db")
        process = Process(machine, database, 1)
        process.begin()
        database.write(0, state(2))
        process.commit()
        world.store.rule = lambda call, when: locked.append(machine._lock.locked())

    at(world, "head", faster, when="after")
    machine.open("a.db")
    assert not any(locked)


# --- signals in the in-process face ------------------------------------------------------------------------


class Stop(Exception):
    """What a program's signal handler raises."""


@pytest.mark.parametrize("begun", [True, False])
def test_a_signal_while_the_thread_of_a_commit_starts(
    world: World, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """`Thread.start` waits for the thread, and a handler may run then: SQLite must not be told yet that it failed."""
    machine = world.machine()
    fill(machine, "a.db", state(1))
    file = _DatabaseFile(machine, machine.connection("a.db", "a.db#1", create=False), Readahead(0))
    done, started = threading.Event(), threading.Event()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.undo()
        if begun:
            start(thread)
            assert started.wait(10)
        raise Stop

    def publish(pid: int) -> None:
        started.set()
        threading.Event().wait(0.2)
        done.set()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    if begun:
        file.commit_point(publish)
        assert done.is_set()
        with pytest.raises(Stop):
            file.raise_interrupt()
    else:
        with pytest.raises(Stop):
            file.commit_point(publish)
        assert not started.wait(0.1)
    machine.release(file.database)


def test_an_interrupted_read_keeps_no_frame_from_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claimed and never fetched, these bytes could not be read for as long as the process lives."""
    shrink_limits(monkeypatch)
    content = state(1, 64)
    fill(world.machine(faulty=False, block_size=4096), "a.db", content)
    machine = world.machine()
    database = machine.connection("a.db", "a.db#1", create=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world.runtime, "submit", fail_with(KeyboardInterrupt()))
        database.read(0, database.size)
    monkeypatch.setattr(machine._cache, "_patience_s", 0.1)
    assert database.read(0, database.size) == content
    machine.release(database)


# --- names -------------------------------------------------------------------------------------------------


def test_a_folder_is_not_moved_into_itself(world: World) -> None:
    machine = world.machine()
    fill(machine, "x/a.db", state(1))
    with pytest.raises(OSError, match="into itself"):
        machine.rename("x", "x/y")
    assert [name for name, _ in machine.listing("x")] == ["a.db"]


def test_deleting_by_key_prefix_takes_no_other_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount shows `acme` as `acme.sqlite`; in process names are key prefixes as they are."""
    machine = world.machine()
    machine.release(machine.connection("acme", "acme#1", create=True))
    monkeypatch.setattr(vfs, "engine", lambda *_: machine)
    with pytest.raises(apsw.Error):
        vfs.S3VFS("bucket").xDelete("acme.sqlite", False)
    assert machine.lookup("acme") is not None


def test_a_head_that_was_read_for_somebody_else_is_as_old_as_it_is(world: World) -> None:
    """The refresh interval counts from the look at the store, not from the opening by what it had found."""
    machine, other = world.machine(refresh_s=1.0), world.machine(faulty=False)
    fill(other, "a.db", state(1))
    machine.release(machine.connection("a.db", "a.db#1", create=False))
    world.runtime.sleep(0.9)
    database = machine.connection("a.db", "a.db#2", create=False)
    fill(other, "a.db", state(2))
    world.runtime.sleep(0.9)
    Process(machine, database, 1).shared()
    assert without_counters(database.read(0, database.size)) == without_counters(state(2))


def test_full_tail_waits_for_no_roll_that_has_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: all I/O threads may be busy with commits that wait like this one."""
    shrink_limits(monkeypatch)
    monkeypatch.setattr("s3blockfs.commit.ROLL_BYTES", 3000)
    with World() as world:
        database, done = world.machine().create("a.bin", exclusive=True), threading.Event()

        def commit_all() -> None:
            for number in range(8):
                database.write(number * 4096, random.Random(number).randbytes(3000))
                database.close_handle(0)

        for _ in range(4):
            world.runtime.submit(done.wait)
        commits = threading.Thread(target=commit_all)
        commits.start()
        commits.join(20)
        waits = commits.is_alive()
        done.set()
        commits.join()
        assert not waits


def test_the_journal_of_a_successor_is_nobody_elses(world: World) -> None:
    """A commit without a journal (MEMORY, OFF) to a database that was deleted elsewhere and made anew fails, whatever
    transaction is open on the new one, and takes nothing from that."""
    machine, there = world.machine(), world.machine(faulty=False)
    fill(machine, "a.db", state(1))
    old = Process(machine, machine.open("a.db"), 1)
    old.shared()
    old.reserved()
    old.exclusive()
    old.database.write(0, state(2))
    there.remove("a.db")
    fill(there, "a.db", state(3))
    new = Process(machine, machine.create("a.db", exclusive=False), 2)
    assert new.database is not old.database
    new.begin()
    with pytest.raises(DatabaseGone):
        old.database.sync(1)
    old.unlock()
    old.database.close()
    assert new.journal_exists
    new.database.write(0, state(4))
    new.commit()
    there.open("a.db").refresh(0)
    assert without_counters(there.open("a.db").read(0, new.database.size)) == without_counters(state(4))
