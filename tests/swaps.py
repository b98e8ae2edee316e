"""Helpers for tests of the head: what becomes of a swap on its way, and what others do meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from engine import Call, Delayed, World

from s3blockfs.errors import PreconditionFailed, RequestInDoubt, S3BlockFSError, StoreUnavailable
from s3blockfs.format.data import Commit
from s3blockfs.format.head import Head, Lease
from s3blockfs.format.tail import LogCommit
from s3blockfs.head import HeadFile, Unsettled
from s3blockfs.snapshot import Version

PREFIX = "a.db"
KEY = f"{PREFIX}/head"
MINE = b"my own commit id"

#: What becomes of one swap: called with "before" and "after" it is applied.
Fate = Callable[[str], None]


def fine(when: str) -> None:
    pass


def fails(error: S3BlockFSError, at: str) -> Fate:
    def fate(when: str) -> None:
        if when == at:
            raise error

    return fate


applied_in_doubt = fails(RequestInDoubt("answer lost"), "after")
not_applied_in_doubt = fails(RequestInDoubt("request lost"), "before")
applied_and_repeated = fails(PreconditionFailed("a duplicate was refused"), "after")
not_sent = fails(StoreUnavailable("no connection"), "before")


def delayed(when: str) -> None:
    raise Delayed


def after(action: Callable[[], object], fate: Fate = fine) -> Fate:
    """Something else happens just before this swap arrives."""

    def both(when: str) -> None:
        if when == "before":
            action()
        fate(when)

    return both


def followed_by(action: Callable[[], object], fate: Fate) -> Fate:
    """Something else happens between the swap and its answer."""

    def both(when: str) -> None:
        if when == "after":
            action()
        fate(when)

    return both


def fates(world: World, *plan: Fate, then: Fate = fine) -> None:
    """What becomes of the next swaps, one each, and of all later ones."""
    rest = list(plan)
    now = fine

    def rule(call: Call, when: str) -> None:
        nonlocal now
        if call.site == "swap":
            if when == "before":
                now = rest.pop(0) if rest else then
            now(when)

    world.store.rule = rule


def unreachable(world: World) -> None:
    """From now on nothing answers; what was sent was sent."""
    world.store.rule = lambda call, when: not_sent(when)


def make_commit(base: Version, commit: bytes = MINE) -> Callable[[Head], Head]:
    def make(replaced: Head) -> Head:
        record = Commit(base.head.seq + 1, commit, 0, 4, 0)
        tail = replaced.tail.append(LogCommit(record, ((0, commit[:4]),)))
        return replace(replaced, seq=record.seq, commit=commit, size=4, tail=tail)

    return make


def commit_mine(heads: HeadFile, base: Version) -> Version:
    return heads.swap(base, make_commit(base), commit=True)


def lease(replaced: Head) -> Head:
    return replace(replaced, lease=Lease("somebody", "00", 10))


def create(world: World) -> Version:
    world.machine(faulty=False).create(PREFIX, exclusive=True)
    return read(world)


def read(world: World) -> Version:
    found = world.heads(faulty=False).read()
    assert found is not None
    return found


def take_lease(world: World) -> None:
    """A swap of somebody else that is no commit."""
    world.heads(faulty=False).swap(read(world), lease)


def commit_others(world: World, count: int = 1) -> None:
    machine = world.machine(faulty=False)
    database = machine.open(PREFIX)
    for number in range(count):
        database.write(number * 100, random.Random(number).randbytes(3000))
        database.close_handle(0)
    machine.release(database)


def delete(world: World) -> None:
    world.machine(faulty=False).remove(PREFIX)


def delete_and_recreate(world: World) -> None:
    delete(world)
    world.machine(faulty=False).create(PREFIX, exclusive=True)


def doubt_of(world: World, act: Callable[[], object], fate: Fate) -> Unsettled:
    """The first PUT has this fate, then nothing answers any more."""
    fates(world, followed_by(lambda: unreachable(world), fate) if fate is applied_in_doubt else fate)
    before = world.store.rule

    def rule(call: Call, when: str) -> None:
        assert before is not None
        try:
            before(call, when)
        except (Delayed, RequestInDoubt):
            unreachable(world)
            raise

    world.store.rule = rule
    with pytest.raises(Unsettled) as caught:
        act()
    return caught.value


def vanish(world: World) -> None:
    world.store.inner.delete([KEY], site="test")
