"""Byte-range locks: fcntl semantics against a naive model, waiting, deadlocks, and SQLite's levels."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3blockfs.locks import (
    PENDING_BYTE,
    RESERVED_BYTE,
    SHARED_FIRST,
    SHARED_SIZE,
    TO_END,
    Conflict,
    Kind,
    Level,
    RangeLocks,
)

READ, WRITE = Kind.READ, Kind.WRITE
SHARED_LAST = SHARED_FIRST + SHARED_SIZE - 1
SIZE = 12  # bytes of the naive model; small, so that ranges collide, split and merge all the time
OWNERS = ("a", "b", "c")


def never() -> bool:
    return False


class Naive:
    """The reference: for every byte, who holds it and how."""

    def __init__(self) -> None:
        self.bytes: list[dict[str, Kind]] = [{} for _ in range(SIZE)]

    def conflicts(self, owner: str, kind: Kind, start: int, end: int) -> set[str]:
        return {
            other
            for byte in self.bytes[start : end + 1]
            for other, held in byte.items()
            if other != owner and WRITE in (kind, held)
        }

    def set(self, owner: str, kind: Kind | None, start: int, end: int) -> None:
        for byte in self.bytes[start : end + 1]:
            byte.pop(owner, None)
            if kind:
                byte[owner] = kind


steps = st.lists(
    st.tuples(
        st.sampled_from(OWNERS),
        st.sampled_from([READ, WRITE, None, "drop"]),
        st.integers(0, SIZE - 1),
        st.integers(0, SIZE - 1),
    ),
    max_size=40,
)


@given(steps)
def test_agrees_with_a_naive_model(history: list[tuple[str, Kind | str | None, int, int]]) -> None:
    locks, naive = RangeLocks(), Naive()
    for owner, what, one, other in history:
        start, end = sorted((one, other))
        if isinstance(what, Kind):
            expected = naive.conflicts(owner, what, start, end)
            tested = locks.test(owner, what, start, end)
            got = locks.try_lock(owner, what, start, end, pid=OWNERS.index(owner))
            assert tested == got
            assert (got is not None) == bool(expected)
            if got is None:
                naive.set(owner, what, start, end)
            else:
                assert got.owner in expected and got.pid == OWNERS.index(str(got.owner))
                assert all(naive.bytes[byte].get(str(got.owner)) is got.kind for byte in range(got.start, got.end + 1))
                assert got.start <= end and start <= got.end
        elif what is None:
            locks.unlock(owner, start, end)
            naive.set(owner, None, start, end)
        else:
            locks.drop_owner(owner)
            naive.set(owner, None, 0, SIZE - 1)
        assert set(locks) == {name for byte in naive.bytes for name in byte}
        for name in OWNERS:
            for kind in Kind:
                held = [byte.get(name) in (kind, WRITE) for byte in naive.bytes]
                assert [locks.holds(name, kind, byte, byte) for byte in range(SIZE)] == held
                assert locks.holds(name, kind, start, end) == all(held[start : end + 1])


def test_own_locks_split_and_merge() -> None:
    locks = RangeLocks()
    locks.try_lock("a", READ, 0, 9, pid=1)
    locks.try_lock("a", WRITE, 4, 5, pid=1)
    assert locks.test("b", READ, 0, 9) == Conflict("a", WRITE, 4, 5, 1)
    assert locks.test("b", WRITE, 0, 3) == Conflict("a", READ, 0, 3, 1)
    locks.try_lock("a", READ, 4, 5, pid=1)
    assert locks.test("b", WRITE, 0, 3) == Conflict("a", READ, 0, 9, 1)


def test_a_refused_lock_changes_nothing() -> None:
    locks = RangeLocks()
    locks.try_lock("a", WRITE, 5, 5, pid=1)
    locks.try_lock("b", READ, 0, 4, pid=2)
    assert locks.try_lock("b", WRITE, 0, 9, pid=2) is not None
    assert locks.holds("b", READ, 0, 4) and not locks.holds("b", WRITE, 0, 0)


def test_to_the_end_covers_every_later_byte() -> None:
    locks = RangeLocks()
    locks.try_lock("a", WRITE, 100, TO_END, pid=1)
    assert locks.try_lock("b", READ, 2**62, 2**62, pid=2) == Conflict("a", WRITE, 100, TO_END, 1)
    assert locks.try_lock("b", READ, 0, 99, pid=2) is None


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, TO_END + 1)])
def test_an_impossible_range_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not possible"):
        RangeLocks().try_lock("a", READ, start, end, pid=1)


# --- waiting ------------------------------------------------------------------------------------------------


@contextmanager
def waiting(
    locks: RangeLocks, owner: str, kind: Kind, start: int, end: int, pid: int, interrupted: Callable[[], bool] = never
) -> Iterator[list[object]]:
    """Run wait_lock in a thread; yields a list that gets its outcome: None, or the OSError. Joined at the end."""
    outcome: list[object] = []

    def run() -> None:
        try:
            locks.wait_lock(owner, kind, start, end, pid, interrupted)
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(0.12)  # more than two polls: it is waiting now, unless it was granted at once
    yield outcome
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("release", ["unlock", "downgrade", "drop"])
def test_a_waiter_is_granted_when_the_holder_gives_way(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3blockfs.locks.POLL_S", 30)  # so it is woken, and does not find out by polling
    locks = RangeLocks()
    locks.try_lock("a", WRITE, 0, 9, pid=1)
    with waiting(locks, "b", READ, 0, 9, 2) as outcome:
        assert outcome == []
        if release == "unlock":
            locks.unlock("a", 0, 9)
        elif release == "downgrade":
            locks.try_lock("a", READ, 0, 9, pid=1)
        else:
            locks.drop_owner("a")
    assert outcome == [None]
    assert locks.holds("b", READ, 0, 9)


def test_an_interrupted_wait_ends_with_eintr_and_holds_nothing() -> None:
    locks, stop = RangeLocks(), threading.Event()
    locks.try_lock("a", WRITE, 0, 0, pid=1)
    with waiting(locks, "b", WRITE, 0, 0, 2, interrupted=stop.is_set) as outcome:
        assert outcome == []
        stop.set()
    assert isinstance(outcome[0], InterruptedError) and outcome[0].errno == errno.EINTR
    assert set(locks) == {"a"}


def test_a_cycle_of_three_owners_is_a_deadlock() -> None:
    locks = RangeLocks()
    for byte, owner in enumerate("abc"):
        locks.try_lock(owner, WRITE, byte, byte, pid=byte)
    with waiting(locks, "a", WRITE, 1, 1, 0) as first, waiting(locks, "b", WRITE, 2, 2, 1) as second:
        with pytest.raises(OSError, match="release a lock") as caught:
            locks.wait_lock("c", READ, 0, 0, 2, never)
        assert caught.value.errno == errno.EDEADLK
        assert first == second == []
        locks.drop_owner("c")
        locks.drop_owner("b")
    assert first == second == [None]


def test_two_upgraders_are_a_deadlock() -> None:
    locks = RangeLocks()
    for owner in "ab":
        locks.try_lock(owner, READ, 0, 0, pid=1)
    with waiting(locks, "a", WRITE, 0, 0, 1) as outcome:
        with pytest.raises(OSError, match="release a lock"):
            locks.wait_lock("b", WRITE, 0, 0, 1, never)
        locks.drop_owner("b")
    assert outcome == [None]


def test_a_chain_without_a_cycle_is_no_deadlock() -> None:
    locks = RangeLocks()
    locks.try_lock("a", WRITE, 0, 0, pid=1)
    locks.try_lock("b", WRITE, 1, 1, pid=2)
    with waiting(locks, "b", WRITE, 0, 0, 2) as second, waiting(locks, "c", WRITE, 1, 1, 3) as third:
        assert second == third == []
        locks.drop_owner("a")
        locks.unlock("b", 1, 1)
    assert second == third == [None]


def test_counting_under_a_contended_lock_loses_nothing() -> None:
    locks, counter = RangeLocks(), [0]

    def work(owner: int) -> None:
        for _ in range(50):
            locks.wait_lock(owner, WRITE, 0, 0, owner, never)
            value = counter[0]
            time.sleep(0)  # invites a switch between the read and the write
            counter[0] = value + 1
            locks.unlock(owner, 0, 0)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counter == [300] and list(locks) == []


# --- SQLite's view --------------------------------------------------------------------------------------------


def test_levels_along_the_life_of_a_transaction() -> None:
    locks = RangeLocks()
    assert locks.level("a") is Level.NONE
    locks.try_lock("a", READ, PENDING_BYTE, PENDING_BYTE, pid=1)
    assert locks.level("a") is Level.NONE  # on the way to SHARED
    locks.try_lock("a", READ, SHARED_FIRST, SHARED_LAST, pid=1)
    locks.unlock("a", PENDING_BYTE, PENDING_BYTE)
    assert locks.level("a") is Level.SHARED
    locks.try_lock("a", WRITE, RESERVED_BYTE, RESERVED_BYTE, pid=1)
    assert locks.level("a") is Level.RESERVED
    locks.try_lock("b", READ, SHARED_FIRST, SHARED_LAST, pid=2)
    locks.try_lock("a", WRITE, PENDING_BYTE, PENDING_BYTE, pid=1)
    assert locks.try_lock("a", WRITE, SHARED_FIRST, SHARED_LAST, pid=1) is not None
    assert locks.level("a") is Level.PENDING
    locks.drop_owner("b")
    locks.try_lock("a", WRITE, SHARED_FIRST, SHARED_LAST, pid=1)
    assert locks.level("a") is Level.EXCLUSIVE
    locks.try_lock("a", READ, SHARED_FIRST, SHARED_LAST, pid=1)
    locks.unlock("a", PENDING_BYTE, RESERVED_BYTE)
    assert locks.level("a") is Level.SHARED
    assert (PENDING_BYTE, RESERVED_BYTE, SHARED_FIRST, SHARED_LAST) == (
        1 << 30,
        (1 << 30) + 1,
        (1 << 30) + 2,
        1073742335,
    )
