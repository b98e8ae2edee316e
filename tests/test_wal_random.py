"""WAL mode on the engine alone: one or two machines commit, checkpoint, close and die at random, while requests fail,
are delayed or applied without an answer. Nothing that was acknowledged is lost, nothing that failed comes back."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator

import apsw
import pytest
from engine import Call, Delayed, InlineRuntime, World, shrink_limits
from walclient import MY_READ, NAME, Connection, insert, make, ran, wal_machine

from s3blockfs import header
from s3blockfs.errors import OutcomeUnknown, RequestInDoubt, S3BlockFSError, StoreUnavailable
from s3blockfs.locks import Kind
from s3blockfs.walmode import CHECKPOINT, WRITE

STEPS, SEEDS = 60, int(os.environ.get("WAL_SEEDS", "12"))


def numbers(content: bytes) -> set[int]:
    """The rows of a database file without a log."""
    with contextlib.closing(apsw.Connection(":memory:")) as run:
        run.deserialize("main", header.in_rollback_mode(0, content))
        assert run.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {number for (number,) in run.execute("SELECT a FROM t")}


class Machine:
    def __init__(self, story: Story) -> None:
        self.catalog = wal_machine(story.world)
        self.connection: Connection | None = None
        self.normal: set[int] = set()  # acknowledged, and not yet known to be in S3

    def connected(self) -> Connection:
        if self.connection is None:
            self.connection = Connection(self.catalog)
        return self.connection


class Losses(logging.Handler):
    """Commits with NORMAL may be lost when others took the lease over meanwhile: then the log says so."""

    def __init__(self, story: Story) -> None:
        super().__init__(logging.ERROR)
        self.story = story

    def emit(self, record: logging.LogRecord) -> None:
        if "are lost" in record.getMessage():
            self.story.counts["lost"] += 1
            assert len(self.story.machines) > 1, "nobody else was there"
            self.story.forget()


class Story:
    """Each commit inserts a row with a number of its own."""

    def __init__(self, world: World, seed: int, machines: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.trouble, self.depth, self.next = 0.0, 0, 1
        self.durable: set[int] = set()
        self.failed: set[int] = set()
        self.counts = dict.fromkeys(("full", "normal", "failed", "unknown", "lost", "crash", "close", "read"), 0)
        first = wal_machine(world)
        make(first)
        first.close()
        self.machines = [Machine(self) for _ in range(machines)]
        self.acting = self.machines[0]
        self.world.store.rule = self.rule

    def forget(self, *machines: Machine) -> None:
        """Whatever was not in S3 may be lost."""
        for machine in machines or self.machines:
            machine.normal.clear()

    def rule(self, call: Call, when: str) -> None:
        swap = call.operation == "PUT" and call.conditional
        if self.random.random() < self.trouble:
            how = self.random.choice(("before", "after", "delayed")) if swap and when == "before" else "before"
            if how == "delayed":
                raise Delayed
            if how == "before":
                raise (RequestInDoubt if swap else StoreUnavailable)("fault")
        if self.depth == 0 and when == "before" and self.random.random() < 0.03:
            self.elsewhere()

    def elsewhere(self) -> None:
        """Something that another machine does in the middle of a step."""
        self.depth += 1
        try:
            if others := [machine for machine in self.machines if machine is not self.acting]:
                self.act(self.random.choice(others))
        finally:
            self.depth -= 1

    @contextlib.contextmanager
    def committing(self, machine: Machine, full: bool) -> Iterator[int]:
        number, self.next = self.next, self.next + 1
        try:
            yield number
        except OutcomeUnknown:
            self.counts["unknown"] += 1
            raise
        except (S3BlockFSError, OSError):
            self.failed.add(number)
            self.counts["failed"] += 1
            raise
        self.counts["full" if full else "normal"] += 1
        if full:
            self.durable |= machine.normal | {number}
            machine.normal.clear()
        else:
            machine.normal.add(number)

    def commit(self, machine: Machine) -> None:
        connection, full = machine.connected(), self.random.random() < 0.5
        with self.committing(machine, full) as number, contextlib.ExitStack() as locks:
            if beside := self.random.random() < 0.1:  # another thread of its process
                locks.enter_context(connection.locked(Kind.WRITE, CHECKPOINT, thread=2))
            if waits_first := self.random.random() < 0.3:  # SQLITE_ENABLE_SETLK_TIMEOUT
                locks.enter_context(connection.locked(Kind.WRITE, WRITE))
            locks.enter_context(connection.locked(Kind.READ, MY_READ))
            before = connection.files()
            (_, log), _ = ran(before, insert(number, 1, self.random.choice((20, 3000))))
            self.interlude(machine)
            if not waits_first:
                locks.enter_context(connection.locked(Kind.WRITE, WRITE))
            self.interlude(machine)
            connection.append(before[1], log, sync=False)
            self.interlude(machine)
            if beside:
                with contextlib.suppress(S3BlockFSError, OSError):
                    connection.database.log_sync(1, 2)
            if full:
                connection.database.log_sync(1, 1)
            self.interlude(machine)

    def checkpoint(self, machine: Machine) -> None:
        mode, sync = self.random.choice(("PASSIVE", "FULL", "RESTART", "TRUNCATE")), self.random.random() < 0.7
        if mode == "PASSIVE" or self.random.random() < 0.5:
            machine.connected().checkpoint(mode, sync=sync)
            return
        with self.committing(machine, full=True) as number:
            machine.connected().checkpoint(mode, insert(number, 1, 50), sync=sync)

    def read(self, machine: Machine) -> None:
        connection = machine.connected()
        with connection.locked(Kind.READ, MY_READ):
            rows = numbers(ran(connection.files(), "PRAGMA wal_checkpoint")[0][0])
        self.counts["read"] += 1
        assert machine.normal <= rows, "its own commits are not shown"
        assert not self.failed & rows, "a failed commit is shown"

    def close(self, machine: Machine) -> None:
        if (connection := machine.connection) is not None:
            machine.connection = None
            self.counts["close"] += 1
            connection.close()

    def crash(self, machine: Machine) -> None:
        """Without a word; what it sent may still arrive."""
        self.counts["crash"] += 1
        self.world.machines.remove(machine.catalog)
        self.forget(machine)
        self.machines[self.machines.index(machine)] = self.acting = Machine(self)

    def pass_time(self, machine: Machine) -> None:
        self.world.runtime.sleep(self.random.choice((0.1, 0.6, 1.5, 4.0)))
        machine.catalog.tick()

    def interlude(self, machine: Machine) -> None:
        if self.depth == 0 and self.random.random() < 0.25:
            if self.random.random() < 0.6:
                self.pass_time(machine)
            else:
                self.elsewhere()

    def act(self, machine: Machine) -> None:
        acts = [self.commit] * 8 + [self.checkpoint] * 3 + [self.read] * 2 + [self.pass_time] * 5 + [self.close]
        before, self.acting = self.acting, machine
        with contextlib.suppress(S3BlockFSError, OSError):
            self.random.choice(acts)(machine)
        if self.depth:
            self.acting = before

    def step(self) -> None:
        if self.random.random() < 0.1:
            self.trouble = 0.0 if self.trouble else self.random.choice((0.05, 0.3, 0.95))
        if self.random.random() < 0.1:
            self.world.store.deliver()
        machine = self.random.choice([self.acting, *self.machines])  # two that take turns mostly meet a lease
        if self.random.random() < 0.02:
            self.crash(machine)
        else:
            self.act(machine)

    def check(self) -> None:
        found = numbers(self.world.content(NAME))
        assert self.durable <= found, f"lost: {self.durable - found}"
        assert not self.failed & found, f"came back: {self.failed & found}"
        self.durable |= found
        for machine in self.machines:
            machine.normal -= found

    def run(self) -> None:
        for number in range(STEPS):
            self.step()
            if number % 4 == 0:
                self.check()
        self.world.store.rule = None
        self.world.store.deliver()
        for _ in range(6):
            self.world.runtime.sleep(3.0)
            for machine in self.machines:
                machine.catalog.tick()
        for machine in self.machines:
            with contextlib.suppress(S3BlockFSError, OSError):
                self.read(machine)
            machine.catalog.close()
            self.world.machines.remove(machine.catalog)
            self.durable |= machine.normal
        self.check()


@pytest.mark.parametrize("number", range(SEEDS))
def test_random_story(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`WAL_SEEDS` says how many; `WAL_SEED` repeats one."""
    shrink_limits(monkeypatch)
    seed = int(os.environ.get("WAL_SEED", random.SystemRandom().randrange(1 << 32)))
    print("seed", seed)
    with World(InlineRuntime(seed)) as world:
        story = Story(world, seed, machines=1 + number % 2)
        losses = Losses(story)
        logging.getLogger("s3blockfs").addHandler(losses)
        try:
            story.run()
        finally:
            logging.getLogger("s3blockfs").removeHandler(losses)
            print(story.counts)
