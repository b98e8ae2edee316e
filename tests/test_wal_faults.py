"""WAL mode on the engine alone: every request of a fixed story fails in every way, and nothing is torn or comes back.
What a connection does is in `walclient.py`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from engine import Call, Delayed, InlineRuntime, ManualRuntime, World, shrink_limits
from memory_fs import until
from walclient import (
    FRAME,
    MY_READ,
    NAME,
    Connection,
    elsewhere,
    first,
    insert,
    make,
    ran,
    wait,
    wal_machine,
    when_settled,
)

from s3blockfs import wal
from s3blockfs.errors import Busy, OutcomeUnknown, RequestInDoubt, S3BlockFSError, StoreUnavailable
from s3blockfs.locks import Kind
from s3blockfs.walmode import CHECKPOINT, WRITE

#: How far the story goes on after the step with the fault.
STEPS_AFTER = 3


@dataclass(frozen=True)
class Step:
    """`durable`: when it returns, what was committed is in S3."""

    name: str
    act: Callable[[Connection], None]
    sql: tuple[str, ...] = ()
    durable: bool = True


def commit(name: str, *sql: str, sync: bool = True) -> Step:
    return Step(name, lambda connection: connection.commit(*sql, sync=sync), sql, durable=sync)


def checkpoint(mode: str, *sql: str) -> Step:
    mode, _, off = mode.partition(", ")
    return Step(f"{mode} {off}", lambda connection: connection.checkpoint(mode, *sql, sync=not off), sql)


#: Of a page that no other statement writes to: what a commit that failed left of it would stay.
COUNT = "UPDATE u SET n = n + 1"

STEPS = [
    commit("one", insert(1, 3, 100)),
    commit("large", "BEGIN", insert(100, 40, 900), COUNT, "COMMIT"),
    commit("normal", insert(200, 2, 50), sync=False),
    commit("normal again", "UPDATE t SET b = a WHERE a < 3", sync=False),
    Step("wait", wait, durable=False),
    checkpoint("PASSIVE"),
    commit("full on top", "BEGIN", "DELETE FROM t WHERE a = 101", COUNT, "COMMIT"),
    commit("normal in between", insert(300, 1, 2000), sync=False),
    commit("full with it", insert(310, 1, 20)),
    checkpoint("RESTART", insert(400, 5, 700)),
    commit("shrink", "DELETE FROM t WHERE a % 4", "VACUUM"),
    checkpoint("TRUNCATE"),
    commit("new log", "BEGIN", insert(500, 3, 100), COUNT, "COMMIT"),
    commit("left to a log that restarts", insert(505, 1, 100), sync=False),
    checkpoint("RESTART, synchronous=OFF", insert(506, 1, 100)),
    commit("before the close", insert(510, 3, 100), sync=False),
    Step("close", Connection.close),
    commit("reopened", insert(600, 2, 100)),
]


@dataclass
class Run:
    """The story on one machine, with the fault at one request."""

    world: World
    fault: str
    at: int
    number: int = -1
    hit: Call | None = None
    down: bool = False
    outcomes: list[str] = field(default_factory=list)

    def rule(self, call: Call, when: str) -> None:
        if self.down:
            raise StoreUnavailable("outage")
        swap = call.operation == "PUT" and call.conditional
        self.number += when == "before"
        if self.number != self.at:
            return
        kind, _, then = self.fault.partition(", ")
        if (kind == "delayed" and swap and when == "before") or kind == when:
            self.hit, self.down = call, then == "outage"
            if kind == "delayed":
                raise Delayed
            error = RequestInDoubt if swap else StoreUnavailable
            raise error(f"fault at request {self.at}, {call.operation} {call.key}")

    def go(self) -> None:
        machine = wal_machine(self.world)
        make(machine)
        connection: Connection | None = None
        local = published = ran((first(), b""))[1]
        steps_after = 0
        for step in STEPS:
            steps_after += self.hit is not None
            if steps_after > STEPS_AFTER:
                break
            if connection is None:
                connection = when_settled(self.world, lambda: Connection(machine))
            new = ran(connection.files(), *step.sql)[1]
            self.world.store.rule = self.rule
            try:
                step.act(connection)
                outcome, allowed = "done", [new]
            except OutcomeUnknown:
                outcome, allowed = "unknown", [local, new]
            except (S3BlockFSError, OSError):
                outcome, allowed = "failed", [local]
            self.outcomes.append(outcome)
            self.down, self.world.store.rule = False, None
            where = f"step {step.name!r} {outcome} after {self.fault!r} at request {self.at} ({self.hit})"
            found = elsewhere(self.world)
            if outcome == "done" and step.durable:
                assert found == new, where
            else:  # a prefix, which never gets shorter
                assert found in (published, local, new), where
            published = found
            if step.name == "close":
                connection = None
                continue
            local = when_settled(self.world, connection.rows)
            assert local in allowed, where
            self.world.store.deliver()  # what is still on its way arrives, and changes nothing
            assert elsewhere(self.world) in (published, local), where
            if step.name == "wait" or outcome == "unknown":
                wait(connection)
                published = elsewhere(self.world)
                assert published == local == connection.rows(), where
        machine.close()
        assert elsewhere(self.world) == local


FAULTS = [f"{kind}, {then}" for then in ("once", "outage") for kind in ("before", "after", "delayed")]
SAMPLE = 0, 4, 5


def run(fault: str, at: int) -> Run:
    with World(InlineRuntime()) as world:
        made = Run(world, fault, at)
        made.go()
        return made


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=() if number in SAMPLE else pytest.mark.long) for number, fault in enumerate(FAULTS)],
)
def test_every_request_fails(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or after it was applied, or it is delayed; once, or all of them until the step ends."""
    shrink_limits(monkeypatch)
    undisturbed = run(fault, -2)
    assert set(undisturbed.outcomes) == {"done"} and len(undisturbed.outcomes) == len(STEPS)
    outcomes: set[str] = set()
    hits = 0
    for at in range(undisturbed.number + 1):
        made = run(fault, at)
        hits += made.hit is not None
        outcomes.update(made.outcomes)
    print(fault, undisturbed.number + 1, hits, outcomes)
    assert hits > 10
    assert "done" in outcomes and ("unknown" in outcomes or fault != "after, outage")


@contextlib.contextmanager
def connected(sync: bool) -> Iterator[tuple[World, Connection]]:
    """A machine with one connection, which has committed a row."""
    with World(InlineRuntime()) as world:
        machine = wal_machine(world)
        make(machine)
        connection = Connection(machine)
        connection.commit(insert(1, 1, 100), sync=sync)
        yield world, connection


def test_a_publish_that_cannot_even_begin_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the state it is based on has to be loaded first, say, and cannot be."""

    def fails() -> None:
        raise StoreUnavailable("outage")

    with connected(sync=False) as (world, connection):
        with monkeypatch.context() as patch:
            patch.setattr(connection.database, "_require_writable", fails)
            wait(connection)
        assert elsewhere(world) != connection.rows()
        wait(connection)
        assert elsewhere(world) == connection.rows()


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("fault", ["before", "after", "delayed"])
def test_publish_in_doubt_beside_a_writer(fault: str, sync: bool, ends: bool) -> None:
    """What was committed before stays, whatever becomes of the PUT; NORMAL's next commit, too, and FULL's never is.
    Also when the machine `ends` in doubt."""

    def rule(call: Call, when: str) -> None:
        nonlocal sent
        if sent:
            raise StoreUnavailable("outage")
        sent = when == fault or fault == "delayed"
        if sent:
            raise Delayed if fault == "delayed" else RequestInDoubt("cut")

    sent = False
    with connected(sync=False) as (world, connection):
        old = connection.rows()
        with connection.locked(Kind.READ, MY_READ), connection.locked(Kind.WRITE, WRITE):
            before = connection.files()
            (_, log), new = ran(before, insert(2, 1, 100))
            world.store.rule = rule
            wait(connection)
            world.store.rule = None
            assert connection.database.in_doubt
            with pytest.raises(OutcomeUnknown) if sync else contextlib.nullcontext():
                connection.append(before[1], log, sync)
        kept = old if sync else new
        if ends:
            connection.machine.close()
            assert elsewhere(world) == kept
            return
        assert when_settled(world, connection.rows) == kept
        world.store.deliver()
        wait(connection)
        assert elsewhere(world) == connection.rows() == kept
        connection.commit(insert(3, 1, 100), sync=True)
        assert elsewhere(world) == connection.rows() != kept
        new = connection.rows()
        connection.close()
        assert elsewhere(world) == new


def test_commit_during_a_publish_is_published() -> None:
    """It is noted while the background is publishing those before it."""

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            world.store.rule = None
            ends.close()

    with connected(sync=False) as (world, connection), contextlib.ExitStack() as ends:
        ends.enter_context(connection.locked(Kind.READ, MY_READ))
        ends.enter_context(connection.locked(Kind.WRITE, WRITE))
        before = connection.files()
        (_, log), new = ran(before, insert(2, 1, 100))
        connection.append(before[1], log, sync=False)
        world.store.rule = rule
        wait(connection)
        assert elsewhere(world) != new == connection.rows()
        wait(connection)
        assert elsewhere(world) == new


@pytest.mark.parametrize("taken", [False, True])
def test_writer_beside_a_checkpoint_needs_the_lease(taken: bool) -> None:
    """A thread checkpoints, so that its process's write lock could be for that; but another one commits."""
    with World(InlineRuntime()) as world:
        machines = wal_machine(world), wal_machine(world)
        make(machines[0])
        here = Connection(machines[0])
        here.commit(insert(1, 1, 100), sync=True)
        there = Connection(machines[1])
        world.runtime.sleep(2)
        machines[0]._runtime.tick()
        before = here.files()
        (_, log), _ = ran(before, insert(2, 1, 100))
        with contextlib.ExitStack() as locks:
            if taken:
                locks.enter_context(there.locked(Kind.READ, MY_READ))
                locks.enter_context(there.locked(Kind.WRITE, WRITE))
            locks.enter_context(here.locked(Kind.WRITE, CHECKPOINT))
            locks.enter_context(here.locked(Kind.WRITE, WRITE))
            locks.enter_context(here.locked(Kind.READ, MY_READ))
            with pytest.raises(Busy) if taken else contextlib.nullcontext():
                here.append(before[1], log, sync=True)
            assert here.database._lease.is_held is not taken


@pytest.mark.parametrize("looked", [False, True], ids=["", "the background looked before its fsync"])
def test_failed_commit_of_an_exclusive_writer_never_counts(looked: bool) -> None:
    """It has no locks of the index, so its log cannot be cut under it: nothing of it is published, until it lets go."""

    def rule(call: Call, when: str) -> None:
        raise StoreUnavailable("outage")

    with connected(sync=True) as (world, connection):
        old = connection.rows()
        with connection.locked(Kind.READ, MY_READ):
            connection.process.exclusive()
        before = connection.files()
        (_, log), _ = ran(before, insert(2, 1, 100))
        world.store.rule = rule
        connection.append(before[1], log, sync=False)
        if looked:
            until(lambda: wait(connection) or len(connection.database._pending) > 0)
        with pytest.raises(StoreUnavailable):
            connection.database.log_sync(1, 1)
        world.store.rule = None
        with pytest.raises(OSError, match="a commit failed"):
            connection.database.log_sync(1, 1)  # its next checkpoint
        with pytest.raises(OSError, match="a commit failed"):
            connection.database.log_write(len(before[1]))
        wait(connection)
        assert elsewhere(world) == old
        connection.process.unlock()
        connection.process.shared()
        assert elsewhere(world) == connection.rows() == old
        connection.commit(insert(3, 1, 100), sync=True)
        assert elsewhere(world) == connection.rows() != old


def test_checkpoint_in_an_outage_takes_nothing_from_an_exclusive_session() -> None:
    """With synchronous=NORMAL: several transactions without an fsync have been acknowledged."""

    def rule(call: Call, when: str) -> None:
        raise StoreUnavailable("outage")

    with connected(sync=True) as (world, connection):
        with connection.locked(Kind.READ, MY_READ):
            connection.process.exclusive()
        before = connection.files()
        after, new = ran(before, insert(2, 1, 100), insert(3, 1, 100))
        connection.append(before[1], after[1], sync=False)
        world.store.rule = rule
        with pytest.raises(StoreUnavailable):
            connection.database.log_sync(1, 1)
        world.store.rule = None
        wait(connection)
        assert elsewhere(world) == new


def test_writer_that_died_leaves_nothing_that_looks_begun() -> None:
    """Its lock of the index went with the index: the next writer needs the lease as any other."""
    with connected(sync=True) as (world, connection):
        with connection.locked(Kind.READ, MY_READ), connection.locked(Kind.WRITE, WRITE):
            connection.process.close()
            connection.machine.open(NAME).tidy()
            assert connection.machine.side_files.get(f"{NAME}-wal") is None
        world.runtime.sleep(2)
        connection.machine.tick()
        connection = Connection(connection.machine)
        (_, log), _ = ran(connection.files(), insert(2, 1, 100))
        with connection.locked(Kind.WRITE, WRITE), connection.locked(Kind.READ, MY_READ):
            connection.append(b"", log, sync=False)
            assert connection.database._lease.is_held


def test_writer_that_recovered_the_index_outwaits_the_lease_of_a_machine_that_died() -> None:
    """SQLite asks a hundred times, and pauses for 10 s in all."""
    with World(InlineRuntime()) as world:
        here, there = wal_machine(world), wal_machine(world)
        make(here)
        dead = Connection(there)
        dead.commit(insert(1, 1, 100), sync=True)
        with dead.locked(Kind.READ, MY_READ), dead.locked(Kind.WRITE, WRITE):
            connection, since_s, tries = Connection(here), world.runtime.monotonic(), 0
            with connection.locked(Kind.WRITE, WRITE):
                while world.runtime.monotonic() - since_s < 30:
                    try:
                        with connection.locked(Kind.READ, MY_READ):
                            break
                    except Busy:
                        tries += 1
            assert world.runtime.monotonic() - since_s >= 10.0
            assert tries < 40, "not before the lease ended, or too often"
            assert connection.database._lease.is_held


def test_checkpoint_that_fails_takes_nothing_from_a_writer_of_its_process() -> None:
    """Another thread's frames look committed before it has told the index, and it may never sync them."""

    def rule(call: Call, when: str) -> None:
        raise StoreUnavailable("outage")

    with connected(sync=False) as (world, connection):
        with connection.locked(Kind.READ, MY_READ), connection.locked(Kind.WRITE, WRITE):
            before = connection.files()
            (_, log), new = ran(before, insert(2, 1, 100))
            connection.append(before[1], log, sync=False)
            world.store.rule = rule
            with connection.locked(Kind.WRITE, CHECKPOINT, thread=2), pytest.raises(StoreUnavailable):
                connection.database.log_sync(1, 2)
            world.store.rule = None
        assert connection.files()[1] == log
        wait(connection)
        assert elsewhere(world) == new == connection.rows()


def test_end_of_an_exclusive_session_keeps_the_lease_until_all_is_published() -> None:
    """With synchronous=NORMAL, and locking_mode=NORMAL again: others must not come in between."""
    with connected(sync=True) as (world, connection):
        with connection.locked(Kind.READ, MY_READ):
            connection.process.exclusive()
        before = connection.files()
        (_, log), new = ran(before, insert(2, 1, 100))
        connection.append(before[1], log, sync=False)
        connection.process.unlock()
        connection.process.shared()
        world.runtime.sleep(0.7)
        connection.machine.tick()
        there = Connection(wal_machine(world))
        with pytest.raises(Busy):
            there.commit(insert(3, 1, 100), sync=True)
        wait(connection)
        assert elsewhere(world) == new == connection.rows()
        world.runtime.sleep(2)
        connection.machine.tick()
        there.commit(insert(3, 1, 100), sync=True)


@pytest.mark.parametrize("told", [False, True])
def test_writer_that_died_right_after_its_commit_keeps_it(told: bool) -> None:
    """Others may read it as soon as the index tells of it: then its frames must not be overwritten."""
    with connected(sync=False) as (world, connection):
        old = connection.rows()
        with connection.locked(Kind.READ, MY_READ), connection.locked(Kind.WRITE, WRITE):
            before = connection.files()
            (_, log), new = ran(before, insert(2, 1, 100))
            connection.append(before[1], log, sync=False)
            one = bytearray(wal.empty_index(log[16:24])[: wal.INDEX_HEADERS_BYTES // 2])
            one[16:20] = ((len(log if told else before[1]) - wal.HEADER_BYTES) // FRAME).to_bytes(4, sys.byteorder)
            connection.machine.side_files.create(f"{NAME}-shm").write(0, bytes(one) * 2)
            connection.database.index_closes(connection.process)
        kept = new if told else old
        assert connection.rows() == kept
        wait(connection)
        assert elsewhere(world) == kept


def test_what_waits_for_a_slow_publish_leaves_it_threads_to_upload_with() -> None:
    """The ticker goes on meanwhile. That of a large transaction took longer than it takes to have them all waiting."""
    with World(ManualRuntime()) as world:
        machine = wal_machine(world)
        make(machine)
        connection = Connection(machine)
        connection.commit(insert(1, 400, 900), sync=False)
        new = connection.rows()
        connection.process.close()  # it died
        with connection.database._gate:
            for _ in range(8):
                machine.tick()
        until(lambda: not connection.database.is_logged, 10)
        assert elsewhere(world) == new


def test_large_commit_needs_no_thread_that_waits_for_it() -> None:
    """As those do that publish the same database in the background."""
    with World(ManualRuntime()) as world:
        machine = wal_machine(world)
        make(machine)
        connection, done = Connection(machine), threading.Event()
        try:
            for _ in range(4):
                world.runtime.submit(done.wait)
            connection.commit(insert(1, 400, 900), sync=True)
        finally:
            done.set()
        assert elsewhere(world) == connection.rows()
