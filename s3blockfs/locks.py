"""POSIX byte-range locks of one file, decided in this process, and SQLite's reading of them.

A mount that implements FUSE's `lock` operation must settle every conflict itself (the kernel then keeps no locks of its
own). One `RangeLocks` holds the locks of one file; an owner is any hashable, in the mount FUSE's `lock_owner`, which
stands for one process's descriptor table. Ranges are inclusive at both ends and `TO_END` is "however far the file
grows" (`l_len == 0`). Does not belong here: leases across machines, what a level means for a transaction.

Thread rule: every method may be called from any thread; only `wait_lock` blocks.

Invariants (`_replace` is the only place that changes `_held`):
    an owner's ranges are sorted, do not overlap, and adjacent ones of one kind and pid are merged
    no byte that one owner holds for WRITE is held by another owner
    an owner without ranges has no entry, so nothing grows with the number of owners ever seen
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

#: The largest offset a lock can name: the kernel's OFFSET_MAX, which stands for "to the end of the file".
TO_END = 2**63 - 1

#: Where SQLite locks a database file: https://sqlite.org/lockingv3.html and `PENDING_BYTE` in src/os.h
#: (https://sqlite.org/src/file/src/os.h). These bytes are never stored, so page contents cannot matter.
PENDING_BYTE = 0x40000000
RESERVED_BYTE = PENDING_BYTE + 1
SHARED_FIRST = PENDING_BYTE + 2
SHARED_SIZE = 510

#: How often a waiter looks whether its caller gave up, in seconds. FUSE reports that only when asked, and a killed
#: process stays until its waiter answers: short enough not to be felt, long enough to cost nothing.
POLL_S = 0.05


class Kind(Enum):
    """READ is shared with other READs; WRITE excludes every other owner."""

    READ = "read"
    WRITE = "write"


class Level(IntEnum):
    """SQLite's lock levels, in the order in which a connection climbs them."""

    NONE = 0
    SHARED = 1
    RESERVED = 2
    PENDING = 3
    EXCLUSIVE = 4


@dataclass(frozen=True, slots=True)
class Conflict:
    """The lock of another owner that is in the way; what F_GETLK reports."""

    owner: Hashable
    kind: Kind
    start: int
    end: int
    pid: int


class _Range(NamedTuple):
    start: int
    end: int
    kind: Kind
    pid: int


class _Wish(NamedTuple):
    owner: Hashable
    kind: Kind
    start: int
    end: int


class RangeLocks:
    """The byte-range locks of one file, with the semantics of fcntl(2): advisory, per owner, per byte."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._held: dict[Hashable, list[_Range]] = {}
        self._waiting: dict[int, _Wish] = {}  # by thread: one owner (a process) may wait in several threads

    def __iter__(self) -> Iterator[Hashable]:
        """The owners that hold something now."""
        with self._changed:
            return iter(list(self._held))

    def try_lock(self, owner: Hashable, kind: Kind, start: int, end: int, pid: int) -> Conflict | None:
        """F_SETLK: None when granted, else what is in the way and nothing changed.

        Replaces whatever `owner` held in the range, so WRITE over READ upgrades, READ over WRITE downgrades.
        """
        with self._changed:
            conflict = self._conflict(_Wish(owner, kind, start, end))
            if conflict is None:
                self._replace(owner, start, end, kind, pid)
            return conflict

    def unlock(self, owner: Hashable, start: int, end: int) -> None:
        """F_UNLCK: give back every byte of the range that `owner` holds; others are no error."""
        with self._changed:
            self._replace(owner, start, end)

    def drop_owner(self, owner: Hashable) -> None:
        """Give back everything: the owner closed the file or died."""
        self.unlock(owner, 0, TO_END)

    def test(self, owner: Hashable, kind: Kind, start: int, end: int) -> Conflict | None:
        """F_GETLK: the lock that would refuse this one, or None."""
        with self._changed:
            return self._conflict(_Wish(owner, kind, start, end))

    def holds(self, owner: Hashable, kind: Kind, start: int, end: int) -> bool:
        """Whether `owner` holds every byte of the range at least as strongly as `kind`."""
        with self._changed:
            return self._holds(owner, kind, start, end)

    def wait_lock(
        self, owner: Hashable, kind: Kind, start: int, end: int, pid: int, interrupted: Callable[[], bool]
    ) -> None:
        """F_SETLKW: return once granted.

        `interrupted` is asked every POLL_S seconds, in the calling thread; when it says yes: InterruptedError (EINTR).
        OSError (EDEADLK) when the owner in the way waits, directly or through others, for `owner`. Only this file's
        waiters are looked at: a cycle through two files lasts until one of the waiters is interrupted.
        """
        wish = _Wish(owner, kind, start, end)
        me = threading.get_ident()
        try:
            while True:
                with self._changed:
                    if self._conflict(wish) is None:
                        return self._replace(owner, start, end, kind, pid)
                    if self._would_deadlock(wish):
                        raise OSError(errno.EDEADLK, "the lock's holder waits for this owner: release a lock and retry")
                    self._waiting[me] = wish
                    self._changed.wait(POLL_S)
                if interrupted():
                    raise InterruptedError(errno.EINTR, "the wait for a lock was interrupted: try again")
        finally:
            with self._changed:
                self._waiting.pop(me, None)

    def level(self, owner: Hashable) -> Level:
        """What SQLite calls the locks of `owner` on a database file (not on `-shm`, where the bytes mean WAL locks)."""
        last = SHARED_FIRST + SHARED_SIZE - 1
        with self._changed:
            if self._holds(owner, Kind.WRITE, SHARED_FIRST, last):
                return Level.EXCLUSIVE
            if self._holds(owner, Kind.WRITE, PENDING_BYTE, PENDING_BYTE):
                return Level.PENDING
            if self._holds(owner, Kind.WRITE, RESERVED_BYTE, RESERVED_BYTE):
                return Level.RESERVED
            return Level.SHARED if self._holds(owner, Kind.READ, SHARED_FIRST, last) else Level.NONE

    def writers(self) -> list[tuple[Hashable, int]]:
        """(owner, pid) of everybody at RESERVED or above."""
        with self._changed:
            held = [(owner, ranges[0].pid) for owner, ranges in self._held.items()]
        return [(owner, pid) for owner, pid in held if self.level(owner) >= Level.RESERVED]

    # --- with the condition's lock held --------------------------------------------------------------------

    def _conflicts(self, wish: _Wish) -> Iterator[Conflict]:
        for owner, ranges in self._held.items():
            if owner == wish.owner:
                continue
            for held in ranges:
                overlaps = held.start <= wish.end and wish.start <= held.end
                if overlaps and Kind.WRITE in (held.kind, wish.kind):
                    yield Conflict(owner, held.kind, held.start, held.end, held.pid)

    def _conflict(self, wish: _Wish) -> Conflict | None:
        if not 0 <= wish.start <= wish.end <= TO_END:
            raise ValueError(f"a lock on bytes {wish.start}..{wish.end} is not possible")
        return next(self._conflicts(wish), None)

    def _holds(self, owner: Hashable, kind: Kind, start: int, end: int) -> bool:
        for held in self._held.get(owner, ()):
            if held.start <= start <= held.end and (held.kind is Kind.WRITE or kind is Kind.READ):
                if end <= held.end:
                    return True
                start = held.end + 1  # READ and WRITE may adjoin without being merged
        return False

    def _replace(self, owner: Hashable, start: int, end: int, kind: Kind | None = None, pid: int = 0) -> None:
        """Cut the range out of the owner's locks and, with a kind, put one lock in its place."""
        pieces = [_Range(start, end, kind, pid)] if kind else []
        for old in self._held.get(owner, ()):
            if old.start < start:
                pieces.append(old._replace(end=min(old.end, start - 1)))
            if old.end > end:
                pieces.append(old._replace(start=max(old.start, end + 1)))
        merged: list[_Range] = []
        for piece in sorted(pieces, key=lambda piece: piece.start):
            last = merged[-1] if merged else None
            if last and last.end + 1 == piece.start and (last.kind, last.pid) == (piece.kind, piece.pid):
                merged[-1] = last._replace(end=piece.end)
            else:
                merged.append(piece)
        if merged:
            self._held[owner] = merged
        else:
            self._held.pop(owner, None)
        self._changed.notify_all()

    def _would_deadlock(self, wish: _Wish) -> bool:
        """Whether somebody in the way waits, directly or through others, for the owner of `wish`."""
        seen: set[Hashable] = set()
        ahead = {conflict.owner for conflict in self._conflicts(wish)}
        while ahead and wish.owner not in ahead:
            seen |= ahead
            wishes = [waiting for waiting in self._waiting.values() if waiting.owner in ahead]
            ahead = {conflict.owner for waiting in wishes for conflict in self._conflicts(waiting)} - seen
        return bool(ahead)
