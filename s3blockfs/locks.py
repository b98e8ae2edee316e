"""POSIX byte-range locks of one file, decided in this process, and SQLite's reading of them.

A mount that implements FUSE's `lock` must settle every conflict itself: the kernel then keeps no locks of its own. An
owner is FUSE's `lock_owner`, or any hashable. Ranges include both ends. Does not belong here: leases across machines.

Thread rule: any thread; only `wait_lock` blocks. Deadlocks are not looked for: a waiter can be interrupted, and SQLite
never waits. Invariants: an owner's locks are sorted, do not overlap, and adjacent ones of one kind are merged; no byte
that one owner holds for WRITE is held by another."""

import errno
import fcntl
import threading
from collections.abc import Callable, Hashable, Iterator
from enum import Enum, IntEnum
from typing import NamedTuple

TO_END = 2**63 - 1  # the largest offset of a lock, the kernel's OFFSET_MAX: "to the end of the file" (`l_len` 0)

#: Where SQLite locks a database file: https://sqlite.org/lockingv3.html, `PENDING_BYTE` in its src/os.h.
PENDING_BYTE, RESERVED_BYTE = 0x40000000, 0x40000001
SHARED_FIRST, SHARED_SIZE = 0x40000002, 510
SHARED_LAST = SHARED_FIRST + SHARED_SIZE - 1

POLL_S = 0.05  # how often a waiter asks whether its caller gave up: a killed process stays until it answers


class Kind(Enum):
    READ = fcntl.F_RDLCK  # shared with other READs
    WRITE = fcntl.F_WRLCK  # excludes every other owner


class Level(IntEnum):
    """SQLite's lock levels, in the order in which a connection climbs them."""

    NONE = 0
    SHARED = 1
    RESERVED = 2  # or PENDING, which a play-back holds without RESERVED
    EXCLUSIVE = 3


#: Looking up a member of an Enum takes as long as a call (Python 3.11), and a SELECT is four requests for locks.
READ, WRITE = Kind
NONE, SHARED, RESERVED, EXCLUSIVE = Level


class Lock(NamedTuple):
    """One lock that is held; as an answer, the one of another owner that is in the way."""

    owner: Hashable
    kind: Kind
    start: int
    end: int
    pid: int

    def overlaps(self, start: int, end: int) -> bool:
        return self.start <= end and start <= self.end


def reserves(kind: Kind, start: int, end: int) -> bool:
    """Whether this lock begins a write transaction."""
    return start == RESERVED_BYTE == end and kind is WRITE


class RangeLocks:
    """The byte-range locks of one file, with the semantics of fcntl(2): advisory, per owner, per byte."""

    def __init__(self, held: list[Lock] | None = None) -> None:
        self._lock = threading.RLock()  # a Condition's own `with` is Python, and four calls of it make a SELECT
        self._changed, self._waiting = threading.Condition(self._lock), 0
        self._held = held or []

    def __iter__(self) -> Iterator[Hashable]:
        """The owners that hold something now."""
        return iter({lock.owner for lock in self._held})

    def try_lock(self, owner: Hashable, kind: Kind, start: int, end: int, pid: int) -> Lock | None:
        """F_SETLK: None when granted (in place of what `owner` held there), else what is in the way."""
        self._lock.acquire()  # `with` takes twice as long
        try:
            if (conflict := self.test(owner, kind, start, end)) is None:
                self._replace(owner, start, end, Lock(owner, kind, start, end, pid))
            return conflict
        finally:
            self._lock.release()

    def unlock(self, owner: Hashable, start: int, end: int) -> None:
        """F_UNLCK: give back every byte of the range that `owner` holds."""
        self._lock.acquire()
        try:
            self._replace(owner, start, end)
        finally:
            self._lock.release()

    def test(self, owner: Hashable, kind: Kind, start: int, end: int) -> Lock | None:
        """F_GETLK: the lock that would refuse this one, or None."""
        if not 0 <= start <= end <= TO_END:
            raise ValueError(f"a lock on bytes {start}..{end} is not possible")
        for lock in self._held:
            if lock.owner != owner and lock.overlaps(start, end) and WRITE in (lock.kind, kind):
                return lock
        return None

    def wait_lock(
        self, owner: Hashable, kind: Kind, start: int, end: int, pid: int, interrupted: Callable[[], bool]
    ) -> None:
        """F_SETLKW: return once granted, or raise InterruptedError when `interrupted`, asked on this thread, tells."""
        while True:
            with self._changed:
                if self.try_lock(owner, kind, start, end, pid) is None:
                    return
                self._waiting += 1
                try:
                    self._changed.wait(POLL_S)
                finally:
                    self._waiting -= 1
            if interrupted():
                raise InterruptedError(errno.EINTR, "the wait for a lock was interrupted: try again")

    def holds(self, owner: Hashable, start: int, end: int) -> bool:
        """Whether `owner` has a lock of any kind there."""
        return any(lock.owner == owner and lock.overlaps(start, end) for lock in self._held)

    def level(self, owner: Hashable) -> Level:
        """What SQLite calls the locks of `owner` on a database file (not on `-shm`, where the bytes mean WAL locks)."""
        level = NONE
        for holder, kind, start, end, _ in self._held:
            if holder == owner:
                writes = kind is WRITE
                if writes and start <= SHARED_FIRST and end >= SHARED_LAST:
                    return EXCLUSIVE
                if writes and start <= RESERVED_BYTE and end >= PENDING_BYTE:
                    level = RESERVED
                elif level is NONE and start <= SHARED_LAST and end >= SHARED_FIRST:
                    level = SHARED  # any byte of the range: whoever might read counts
        return level

    def pids(self, owner: Hashable = None) -> set[int]:
        """The processes that hold something now, for this owner if there is one."""
        return {lock.pid for lock in self._held if owner in (None, lock.owner)}

    def writers(self) -> list[tuple[Hashable, int]]:
        """(owner, pid) of everybody at RESERVED or above."""
        pids = {lock.owner: lock.pid for lock in self._held}
        return [(owner, pid) for owner, pid in pids.items() if self.level(owner) >= RESERVED]

    def _replace(self, owner: Hashable, start: int, end: int, new: Lock | None = None) -> None:
        """Put `new` in the place of what the owner has in the range. `_held` is a new list: others may be reading."""
        kept: list[Lock] = []
        gone, simple = False, True
        for held in self._held:
            holder, _, low, high, _ = held
            if holder == owner and start <= low and high <= end:
                gone = True
                continue
            if holder == owner and high + 1 >= start and (new is not None or low <= end):
                simple = False  # to be cut, or merged, or the new one comes before it
            kept.append(held)
        if not simple:
            kept = self._merged(owner, start, end, new)
        elif new is not None:
            kept.append(new)
        self._held = kept
        if self._waiting and (gone or not simple):
            self._changed.notify_all()

    def _merged(self, owner: Hashable, start: int, end: int, new: Lock | None) -> list[Lock]:
        own = [held for held in self._held if held.owner == owner]
        result = [held for held in self._held if held.owner != owner]
        before = [held if held.end < start else held._replace(end=start - 1) for held in own if held.start < start]
        after = [held if held.start > end else held._replace(start=end + 1) for held in own if held.end > end]
        for piece in (*before, *([] if new is None else [new]), *after):
            last = result[-1] if result else None
            if last and (last.owner, last.kind, last.end + 1) == (owner, piece.kind, piece.start):
                result[-1] = piece._replace(start=last.start)
            else:
                result.append(piece)
        return result
