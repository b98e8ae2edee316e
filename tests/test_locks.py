"""Byte-range locks: fcntl semantics against a naive model, waiting, and SQLite's levels."""

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
    Kind,
    Level,
    Lock,
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
        st.sampled_from([READ, WRITE, None]),
        st.integers(0, SIZE - 1),
        st.integers(0, SIZE - 1),
    ),
    max_size=40,
)


@given(steps)
def test_agrees_with_a_naive_model(history: list[tuple[str, Kind | None, int, int]]) -> None:
    """Grants, refusals, what is held afterwards and the lock that is reported are those of fcntl, byte by byte."""
    locks, naive = RangeLocks(), Naive()
    for owner, kind, one, other in history:
        start, end = sorted((one, other))
        if kind is None:
            locks.unlock(owner, start, end)
            naive.set(owner, None, start, end)
        else:
            expected = naive.conflicts(owner, kind, start, end)
            tested = locks.test(owner, kind, start, end)
            got = locks.try_lock(owner, kind, start, end, pid=OWNERS.index(owner))
            assert tested == got
            assert (got is not None) == bool(expected)
            if got is None:
                naive.set(owner, kind, start, end)
            else:
                assert got.owner in expected and got.pid == OWNERS.index(str(got.owner))
                assert got.start <= end and start <= got.end
                held = [byte.get(str(got.owner)) is got.kind for byte in naive.bytes]
                assert all(held[got.start : got.end + 1])
                assert not any(held[byte] for byte in (got.start - 1, got.end + 1) if 0 <= byte < SIZE)  # merged
        assert set(locks) == {name for byte in naive.bytes for name in byte}
        for byte, holders in enumerate(naive.bytes):
            assert (locks.test("nobody", WRITE, byte, byte) is not None) == bool(holders)
            assert (locks.test("nobody", READ, byte, byte) is not None) == (WRITE in holders.values())


def test_own_locks_split_and_merge() -> None:
    locks = RangeLocks()
    locks.try_lock("a", READ, 0, 9, pid=1)
    locks.try_lock("a", WRITE, 4, 5, pid=1)
    assert locks.test("b", READ, 0, 9) == Lock("a", WRITE, 4, 5, 1)
    assert locks.test("b", WRITE, 0, 3) == Lock("a", READ, 0, 3, 1)
    locks.try_lock("a", READ, 4, 5, pid=1)
    assert locks.test("b", WRITE, 0, 3) == Lock("a", READ, 0, 9, 1)


def test_a_refused_lock_changes_nothing() -> None:
    locks = RangeLocks()
    locks.try_lock("a", WRITE, 5, 5, pid=1)
    locks.try_lock("b", READ, 0, 4, pid=2)
    assert locks.try_lock("b", WRITE, 0, 9, pid=2) is not None
    assert locks.test("c", WRITE, 0, 9) == Lock("a", WRITE, 5, 5, 1)
    assert locks.test("c", WRITE, 0, 4) == Lock("b", READ, 0, 4, 2)
    assert locks.test("c", READ, 0, 4) is None


def test_to_the_end_covers_every_later_byte() -> None:
    locks = RangeLocks()
    locks.try_lock("a", WRITE, 100, TO_END, pid=1)
    assert locks.try_lock("b", READ, 2**62, 2**62, pid=2) == Lock("a", WRITE, 100, TO_END, 1)
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
    """Run wait_lock in a thread; yields, when it waits, a list that gets its outcome: None, or the OSError. Joined at
    the end."""
    outcome: list[object] = []
    asked = threading.Event()

    def ask() -> bool:
        asked.set()
        return interrupted()

    def run() -> None:
        try:
            locks.wait_lock(owner, kind, start, end, pid, ask)
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert asked.wait(10)
    yield outcome
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("release", ["unlock", "downgrade"])
def test_a_waiter_is_granted_when_the_holder_gives_way(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiter is woken: after the first look it would not find out by polling before the test gives up."""

    def look_no_more() -> bool:
        monkeypatch.setattr("s3blockfs.locks.POLL_S", 300)
        return False

    locks = RangeLocks()
    locks.try_lock("a", WRITE, 0, 9, pid=1)
    with waiting(locks, "b", READ, 0, 9, 2, look_no_more) as outcome:
        assert outcome == []
        if release == "unlock":
            locks.unlock("a", 0, 9)
        else:
            locks.try_lock("a", READ, 0, 9, pid=1)
    assert outcome == [None]
    assert locks.test("c", WRITE, 0, 9) and set(locks) == ({"b"} if release == "unlock" else {"a", "b"})


def test_an_interrupted_wait_ends_with_eintr_and_holds_nothing() -> None:
    locks, stop = RangeLocks(), threading.Event()
    locks.try_lock("a", WRITE, 0, 0, pid=1)
    with waiting(locks, "b", WRITE, 0, 0, 2, interrupted=stop.is_set) as outcome:
        assert outcome == []
        stop.set()
    assert isinstance(outcome[0], InterruptedError) and outcome[0].errno == errno.EINTR
    assert set(locks) == {"a"}


def test_waiters_in_a_deadlock_stay_interruptible() -> None:
    """Deadlocks are not detected: they last until one of the waiters is interrupted and gives way."""
    locks, stop = RangeLocks(), threading.Event()
    for owner in "ab":
        locks.try_lock(owner, READ, 0, 0, pid=1)
    with waiting(locks, "a", WRITE, 0, 0, 1) as first:
        with waiting(locks, "b", WRITE, 0, 0, 1, interrupted=stop.is_set) as second:
            assert first == second == []
            stop.set()
        assert isinstance(second[0], InterruptedError)
        assert first == []
        locks.unlock("b", 0, 0)
    assert first == [None]


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


def test_a_lock_on_a_part_of_the_shared_range_is_a_reader_and_never_an_exclusive_writer() -> None:
    locks = RangeLocks()
    locks.try_lock("a", WRITE, SHARED_FIRST + 5, SHARED_LAST, pid=1)
    assert locks.level("a") is Level.SHARED and locks.writers() == []
    locks.try_lock("a", WRITE, 0, SHARED_FIRST + 4, pid=1)
    assert locks.level("a") is Level.EXCLUSIVE and locks.writers() == [("a", 1)]


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
    assert locks.writers() == [("a", 1)]
    locks.try_lock("a", WRITE, PENDING_BYTE, PENDING_BYTE, pid=1)
    assert locks.try_lock("a", WRITE, SHARED_FIRST, SHARED_LAST, pid=1) is not None
    assert locks.level("a") is Level.RESERVED
    locks.unlock("a", RESERVED_BYTE, RESERVED_BYTE)
    assert locks.level("a") is Level.RESERVED  # PENDING alone is what a play-back holds
    assert locks.writers() == [("a", 1)]
    locks.unlock("b", 0, TO_END)
    locks.try_lock("a", WRITE, SHARED_FIRST, SHARED_LAST, pid=1)
    assert locks.level("a") is Level.EXCLUSIVE
    locks.try_lock("a", READ, SHARED_FIRST, SHARED_LAST, pid=1)
    locks.unlock("a", PENDING_BYTE, RESERVED_BYTE)
    assert locks.level("a") is Level.SHARED
    assert locks.writers() == []
    assert (PENDING_BYTE, RESERVED_BYTE, SHARED_FIRST, SHARED_LAST) == (
        1 << 30,
        (1 << 30) + 1,
        (1 << 30) + 2,
        1073742335,
    )
