"""Every request of a fixed scenario fails in every way: what was reported is what is there, whole.

A step that returned is there on a clean machine; one that failed definitely is not; one whose outcome is unknown is
there or not, and says so by itself once the store answers. After each fault the scenario goes on where it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from engine import Call, Delayed, InlineRuntime, Process, World, shrink_limits, sqlite_page

from s3blockfs.catalog import Catalog
from s3blockfs.errors import DatabaseNotFound, OutcomeUnknown, RequestInDoubt, S3BlockFSError, StoreUnavailable

PREFIX = "a.db"
PAGE = 4096

#: Nobody holds the database open whose creation or deletion is in doubt, so a late request may still land.
NOT_SETTLED = ("create", "delete", "re-create")

#: How far the scenario goes on after the step with the fault.
STEPS_AFTER = 4

#: What a database holds; None: there is none.
State = bytes | None


def noise(number: int, length: int) -> bytes:
    """Not compressible, so that the limits of tail and segments are reached."""
    return Random(number).randbytes(length)


@dataclass(frozen=True)
class Step:
    """`act` on the machine; afterwards the database holds `result(what it held before)`."""

    name: str
    act: Callable[[Catalog, State], None]
    result: Callable[[State], State]


def create(machine: Catalog, before: State) -> None:
    machine.release(machine.create(PREFIX, exclusive=True))


def remove(machine: Catalog, before: State) -> None:
    machine.remove(PREFIX)


def rewrite(change: Callable[[bytes], bytes], journal: bool = True) -> tuple[Callable[[Catalog, State], None], object]:
    """A transaction that makes `change` of the whole file, as SQLite does, or without journal and locks like `cp`."""

    def act(machine: Catalog, before: State) -> None:
        assert before is not None
        database = machine.open(PREFIX)
        process = Process(machine, database, 1)
        try:
            after = counted(change(before))
            if journal:
                process.begin()
                assert same(process.images, before)
            for start in range(0, len(after), PAGE):
                if after[start : start + PAGE] != before[start : start + PAGE]:
                    database.write(start, after[start : start + PAGE])
            database.truncate(len(after))
            if journal:
                process.commit()
            else:
                database.close_handle(1)
        finally:
            process.close()
            machine.release(database)

    return act, lambda before: counted(change(before))


def counted(content: bytes) -> bytes:
    """With the page count that SQLite would have written."""
    return content[:28] + (len(content) // PAGE).to_bytes(4, "big") + content[32:]


def with_page(number: int, seed: int) -> Callable[[bytes], bytes]:
    def change(before: bytes) -> bytes:
        grown = before.ljust((number + 1) * PAGE, b"\0")
        return grown[: number * PAGE] + noise(seed, PAGE) + grown[(number + 1) * PAGE :]

    return change


def bulk(before: bytes) -> bytes:
    return sqlite_page(1, 20) + noise(99, 19 * PAGE)


def scattered(before: bytes) -> bytes:
    content = bytearray(before.ljust(20 * PAGE, b"\0"))
    for page in range(1, 20, 3):
        content[page * PAGE : (page + 1) * PAGE] = noise(page, PAGE)
    return bytes(content)


def reopen(machine: Catalog, before: State) -> None:
    machine.close()


def keep(before: State) -> State:
    return before


def steps() -> list[Step]:
    plan: list[tuple[str, object]] = [
        ("create", (create, lambda before: b"")),
        ("first", rewrite(lambda before: sqlite_page(1, 1))),
        ("small 1", rewrite(with_page(1, 1))),
        ("small 2", rewrite(with_page(2, 2))),
        ("small 3", rewrite(with_page(1, 3))),
        ("bulk", rewrite(bulk, journal=False)),
        ("small 4", rewrite(with_page(3, 4))),
        ("reopen", (reopen, keep)),
        ("scattered", rewrite(scattered)),
        ("truncate", rewrite(lambda before: before[: 2 * PAGE])),
        ("grow", rewrite(with_page(6, 5))),
        ("bulk again", rewrite(bulk)),
        ("delete", (remove, lambda before: None)),
        ("re-create", (create, lambda before: b"")),
        ("other", rewrite(lambda before: sqlite_page(1, 2) + noise(7, PAGE))),
        ("reopen again", (reopen, keep)),
        ("last", rewrite(with_page(1, 8))),
    ]
    return [Step(name, *pair) for name, pair in plan]  # type: ignore[misc]


def same(content: State, expected: State) -> bool:
    """The engine sets the change counter."""
    if content is None or expected is None:
        return content is expected
    return content[:24] + content[28:92] + content[96:] == expected[:24] + expected[28:92] + expected[96:]


@dataclass
class Run:
    """The scenario on one machine, with the fault at one request."""

    world: World
    fault: str
    at: int
    number: int = -1
    hit: Call | None = None
    swaps: int = 0
    answered: int = 0
    down: bool = False
    outcomes: list[str] = field(default_factory=list)

    def rule(self, call: Call, when: str) -> None:
        if self.down:
            raise StoreUnavailable("outage")
        swap = call.operation == "PUT" and call.conditional
        if when == "before":
            self.number += 1
            self.swaps += swap
        else:
            self.answered += 1
        if self.number != self.at:
            return
        kind, _, then = self.fault.partition(", ")
        if kind == "delayed" and swap:
            self._begin(call, then)
            raise Delayed
        if kind != "delayed" and kind.endswith(when):
            self._begin(call, then)
            error = RequestInDoubt if swap and not kind.startswith("not sent") else StoreUnavailable
            raise error(f"fault at request {self.at}, {call.operation} {call.key}")

    def _begin(self, call: Call, then: str) -> None:
        self.hit = call
        self.down = then == "outage"

    def go(self) -> None:
        machine = self.world.machine(block_size=PAGE)
        self.world.store.rule = self.rule
        state: State = None
        later = 0
        for step in steps():
            if self.hit is not None and (later := later + 1) > STEPS_AFTER:
                break
            if (state is None) != (step.name in ("create", "re-create")):
                continue  # an earlier fault left nothing to delete, or nothing to create over
            if step.name.startswith("reopen"):
                machine.close()
                machine = self.world.machine(block_size=PAGE)
                continue
            allowed: tuple[State, ...] = (step.result(state),)
            outcome = "done"
            try:
                step.act(machine, state)
            except OutcomeUnknown:
                allowed, outcome = (state, step.result(state)), "unknown"
            except (S3BlockFSError, OSError):
                allowed, outcome = (state,), "failed"
            self.outcomes.append(outcome)
            self.down, self.world.store.rule = False, None
            if outcome == "unknown":
                settled = self._wait_until_settled(machine)
                if step.name not in NOT_SETTLED:
                    allowed = tuple(one for one in allowed if same(settled, one))
            self.world.store.deliver()  # what is still on its way arrives, and changes nothing
            found = self._found()
            where = f"step {step.name!r} {outcome} after {self.fault!r} at request {self.at} ({self.hit})"
            assert any(same(found, one) for one in allowed), where
            assert same(self._shown(machine), found), where
            state = found
            self.world.store.rule = self.rule
        machine.close()

    def _wait_until_settled(self, machine: Catalog) -> State:
        """By itself: a call that fails sets it going. What it settled on is how it stays."""
        for _ in range(5):
            self.world.runtime.sleep(3)
            try:
                return self._shown(machine)
            except OutcomeUnknown:
                continue
        raise AssertionError("never settled")

    def _found(self) -> State:
        try:
            return self.world.content(PREFIX)
        except DatabaseNotFound:
            return None

    def _shown(self, machine: Catalog) -> State:
        """What a new transaction on the same machine reads."""
        try:
            database = machine.open(PREFIX)
        except DatabaseNotFound:
            return None
        process = Process(machine, database, 2)
        try:
            process.shared()
            return database.read(0, database.size)
        finally:
            process.unlock()
            machine.release(database)


#: How a step may end. A single fault that is retried is not felt; a request that was never sent leaves no doubt.
EXPECTED = {
    ("before", "once"): {"done", "failed"},
    ("after", "once"): {"done", "failed"},
    ("not sent before", "once"): {"done", "failed"},
    ("delayed", "once"): {"done"},
    ("before", "outage"): {"done", "failed", "unknown"},
    ("after", "outage"): {"done", "failed", "unknown"},
    ("not sent before", "outage"): {"done", "failed"},
    ("delayed", "outage"): {"unknown", "done"},
}


def run(fault: str, at: int) -> Run:
    with World(InlineRuntime()) as world:
        made = Run(world, fault, at)
        made.go()
        return made


@pytest.mark.parametrize(("kind", "then"), EXPECTED)
def test_every_request_fails(kind: str, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request fails, before or after it was applied, or is delayed; once, or all of them until the step ends."""
    shrink_limits(monkeypatch)
    undisturbed = run(kind, -2)
    assert set(undisturbed.outcomes) == {"done"} and len(undisturbed.outcomes) == 15
    hits = 0
    outcomes: set[str] = set()
    for at in range(undisturbed.number + 1):
        done = run(f"{kind}, {then}", at)
        hits += done.hit is not None
        outcomes.update(done.outcomes)
    assert hits == {"delayed": undisturbed.swaps, "after": undisturbed.answered}.get(kind, undisturbed.number + 1)
    assert outcomes == EXPECTED[kind, then]
