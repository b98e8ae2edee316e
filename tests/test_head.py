"""Every outcome of a swap of the head, by the letters of head.py's docstring: (a), (b), (c), and creation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from engine import Call, Delayed, World, shrink_limits
from swaps import (
    KEY,
    MINE,
    PREFIX,
    Fate,
    after,
    applied_and_repeated,
    applied_in_doubt,
    commit_mine,
    commit_others,
    create,
    delayed,
    delete,
    delete_and_recreate,
    doubt_of,
    fails,
    fates,
    fine,
    followed_by,
    lease,
    not_applied_in_doubt,
    not_sent,
    read,
    take_lease,
    vanish,
)

from s3blockfs.errors import AccessDenied, CommitLost, DatabaseExists, StoreUnavailable
from s3blockfs.format.head import Head, Lease
from s3blockfs.head import Unsettled
from s3blockfs.snapshot import Version


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


# --- (a) and (b) -----------------------------------------------------------------------------------------


def test_a_commit_that_is_answered_is_one_request(world: World) -> None:
    """(a) 200: one PUT and nothing else; seq and rev grow by one; what is returned is what is stored."""
    base = create(world)
    version = commit_mine(world.heads(), base)
    assert [(call.operation, call.key) for call in world.store.calls] == [("PUT", KEY)]
    assert (version.head.seq, version.head.rev) == (base.head.seq + 1, base.head.rev + 1)
    assert (version.body, version.etag) == (read(world).body, read(world).etag)


def in_the_tail(world: World) -> None:
    commit_others(world)
    assert MINE in [commit.record.id for commit in read(world).head.tail.commits]


def in_a_segment(world: World) -> None:
    commit_others(world, 8)
    head = read(world).head
    assert MINE not in [commit.record.id for commit in head.tail.commits] and head.segments


def in_an_archive(world: World) -> None:
    delete_and_recreate(world)
    head = read(world).head
    assert MINE not in [commit.record.id for commit in head.tail.commits] and not head.segments


@pytest.mark.parametrize("fate", [applied_and_repeated, applied_in_doubt])
@pytest.mark.parametrize("bury", [in_the_tail, in_a_segment, in_an_archive])
def test_own_commit_is_found_under_later_ones(
    world: World, fate: Fate, bury: Callable[[World], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(b, c) My commit applied, its answer was lost, others committed on top: success, and not committed again."""
    shrink_limits(monkeypatch)
    base = create(world)
    fates(world, followed_by(lambda: bury(world), fate))
    version = commit_mine(world.heads(), base)
    assert version.etag == read(world).etag
    assert world.store.count("PUT", "swap") == 1


def test_another_commit_wins(world: World) -> None:
    """(b) Another's commit at my seq: lost, and nothing of mine is ever visible."""
    base = create(world)
    fates(world, after(lambda: commit_others(world)))
    with pytest.raises(CommitLost):
        commit_mine(world.heads(), base)
    assert [c.record.id == MINE for c in read(world).head.tail.commits] == [False, False]
    assert world.store.count("PUT", "swap") == 1


@pytest.mark.parametrize("fate", [fine, applied_in_doubt, not_applied_in_doubt, applied_and_repeated])
def test_a_commit_is_rebased_over_other_swaps(world: World, fate: Fate) -> None:
    """(b) Only a lease came in between: the commit is made again on it, applied once, and keeps the lease."""
    base = create(world)
    fates(world, after(lambda: take_lease(world)), fate)
    version = commit_mine(world.heads(), base)
    head = read(world).head
    assert version.head == head
    assert (head.seq, head.rev) == (base.head.seq + 1, base.head.rev + 2)
    assert [c.record.id for c in head.tail.commits].count(MINE) == 1
    assert head.lease == Lease("somebody", "00", 10)


def test_other_swaps_start_again_from_the_new_head(world: World) -> None:
    """(b) A swap that is no commit keeps what was committed meanwhile."""
    base = create(world)
    fates(world, after(lambda: commit_others(world)))
    version = world.heads().swap(base, lease)
    assert (version.head.seq, version.head.rev) == (base.head.seq + 1, base.head.rev + 2)
    assert version.head.lease is not None


@pytest.mark.parametrize("fate", [fine, applied_in_doubt, not_applied_in_doubt])
def test_a_swap_of_a_tombstone_starts_again_too(world: World, fate: Fate) -> None:
    """(b) A swap of a tombstone that came second (garbage collection raises its floor) is not taken for applied."""
    create(world)
    delete(world)
    base = read(world)
    fates(world, after(lambda: take_lease(world), fate))
    version = world.heads().swap(base, lambda replaced: replace(replaced, floor=replaced.rev))
    assert version.head.floor == read(world).head.floor == base.head.rev + 1
    assert version.head.lease is not None


def test_swaps_that_always_come_second_end(world: World) -> None:
    """I8: when other swaps win until the deadline, that is an error that says nothing was applied."""
    base = create(world)
    fates(world, then=after(lambda: take_lease(world)))
    with pytest.raises(StoreUnavailable):
        commit_mine(world.heads(), base)
    assert read(world).head.seq == base.head.seq


def test_a_lost_commit_id_is_an_unknown_outcome(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """(b) 412, and no record of my seq can be had: unknown, never "lost"."""
    shrink_limits(monkeypatch)
    base = create(world)
    commit_others(world, 8)
    segment = read(world).head.segments[0]

    def rule(call: Call, when: str) -> None:
        if call.site == "settle" and call.key == segment.ref.key(PREFIX):
            raise StoreUnavailable("no answer")

    world.store.rule = rule
    with pytest.raises(Unsettled):
        commit_mine(world.heads(), base)


# --- (c) -------------------------------------------------------------------------------------------------


def test_in_doubt_and_applied(world: World) -> None:
    """(c) My id is in the head: done, without another PUT."""
    base = create(world)
    fates(world, applied_in_doubt)
    version = commit_mine(world.heads(), base)
    assert version.head.commit == MINE and version.etag == read(world).etag
    assert len(world.store.swaps) == 1


def test_in_doubt_and_not_applied(world: World) -> None:
    """(c) The old ETag: the very same bytes are PUT again, so that two that arrive are one."""
    base = create(world)
    fates(world, not_applied_in_doubt, not_applied_in_doubt)
    version = commit_mine(world.heads(), base)
    assert len(world.store.swaps) == 3 and len(set(world.store.swaps)) == 1
    assert version.head.rev == base.head.rev + 1


@pytest.mark.parametrize("repeat", [fine, applied_in_doubt])
def test_a_delayed_request_and_its_repetition_are_one(world: World, repeat: Fate) -> None:
    """(c) The first PUT arrives when its repetition was applied: the store refuses it, the commit is there once."""
    base = create(world)
    fates(world, delayed, repeat)
    version = commit_mine(world.heads(), base)
    assert world.store.deliver() == [False]
    assert read(world).etag == version.etag and version.head.rev == base.head.rev + 1


def test_a_delayed_request_overtakes_its_repetition(world: World) -> None:
    """(c, b) The repetition gets 412 for the commit's own success."""
    base = create(world)
    fates(world, delayed, after(lambda: world.store.deliver()))
    version = commit_mine(world.heads(), base)
    assert read(world).etag == version.etag and version.head.rev == base.head.rev + 1


def refused_until_given_up(world: World) -> None:
    """The first PUT is delayed, its repetitions never get through; the no-op swap does."""
    first: list[bytes] = []

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            if not first:
                first.append(world.store.swaps[-1])
                raise Delayed
            if world.store.swaps[-1] == first[0]:
                raise StoreUnavailable("no connection")

    world.store.rule = rule


@pytest.mark.parametrize("own_commit", [True, False])
def test_giving_up_makes_a_delayed_request_harmless(world: World, own_commit: bool) -> None:
    """(c) A no-op swap, then "nothing was changed": the delayed PUT is refused whenever it arrives."""
    base = create(world)
    refused_until_given_up(world)
    with pytest.raises(StoreUnavailable):
        if own_commit:
            commit_mine(world.heads(), base)
        else:
            world.heads().swap(base, lease)
    given_up = read(world)
    assert world.store.deliver() == [False]
    assert read(world).etag == given_up.etag != base.etag
    expected = replace(base.head, rev=base.head.rev + 1, nonce=given_up.head.nonce)
    assert given_up.head == expected


def test_a_refusal_while_in_doubt_is_not_the_end(world: World) -> None:
    """(c) The first PUT is still on its way when the repetition is definitely refused: the doubt remains."""
    base = create(world)
    fates(world, delayed, then=fails(AccessDenied("key revoked"), "before"))
    with pytest.raises(Unsettled) as caught:
        commit_mine(world.heads(), base)
    assert world.store.deliver() == [True]
    settled = world.heads(faulty=False).settle(caught.value.doubt)
    assert settled is not None and settled.head.commit == MINE


def test_a_refusal_without_doubt_is_definite(world: World) -> None:
    """A definite refusal of the only PUT is reported as it is, and nothing was applied."""
    base = create(world)
    fates(world, then=fails(AccessDenied("key revoked"), "before"))
    with pytest.raises(AccessDenied):
        commit_mine(world.heads(), base)
    assert read(world).etag == base.etag and len(world.store.swaps) == 1


def test_a_damaged_head_while_in_doubt_is_an_unknown_outcome(world: World) -> None:
    """(c) The commit may be in the past of a head that cannot be read: that must not be reported as a failure."""
    base = create(world)
    fates(world, followed_by(lambda: world.store.inner.put(KEY, b"rubbish", site="test"), applied_in_doubt))
    with pytest.raises(Unsettled):
        commit_mine(world.heads(), base)


# --- creation --------------------------------------------------------------------------------------------


@pytest.fixture(params=["nothing", "tombstone"])
def place(request: pytest.FixtureRequest, world: World) -> Version | None:
    """What a database is created over."""
    if request.param == "nothing":
        return None
    create(world)
    delete(world)
    return read(world)


def create_mine(world: World, base: Version | None) -> Version:
    def make(replaced: Head | None) -> Head:
        seq = 1 if replaced is None else replaced.seq + 1
        return Head(b"m" * 16, 0, seq, MINE, 0, 4096, bytes(8))

    return world.heads().swap(base, make)


def test_every_way_to_create(world: World, place: Version | None) -> None:
    """(a, b, c) However the PUT ends, the database is made once, by the first bytes that were sent."""
    rev = 1 if place is None else place.head.rev + 1
    plans: list[tuple[Fate, ...]] = [
        (fine,),
        (applied_in_doubt,),
        (applied_and_repeated,),
        (not_applied_in_doubt, not_applied_in_doubt),
        (not_sent,),
        (delayed,),
        (delayed, after(lambda: world.store.deliver())),
    ]
    for plan in plans:
        world.store.swaps.clear()
        if place is None:
            vanish(world)
        else:
            world.store.inner.put(KEY, place.body, site="test")
        fates(world, *plan)
        version = create_mine(world, place)
        assert version.etag == read(world).etag and version.head.rev == rev
        assert len(set(world.store.swaps)) == 1
        assert world.store.deliver() in ([], [False])


@pytest.mark.parametrize("fate", [fine, not_applied_in_doubt])
def test_somebody_else_creates_first(world: World, place: Version | None, fate: Fate) -> None:
    """(b) Exactly one creator wins; the other is told so."""
    other = world.machine(faulty=False)
    fates(world, after(lambda: other.create(PREFIX, exclusive=True), fate))
    with pytest.raises(DatabaseExists):
        create_mine(world, place)
    assert read(world).head.commit != MINE


def test_created_and_deleted_by_others_first(world: World, place: Version | None) -> None:
    """(b) What is in the way is a newer tombstone: created over that, counters going on."""

    def both() -> None:
        create(world)
        delete(world)

    fates(world, after(both))
    version = create_mine(world, place)
    assert version.head.rev == (0 if place is None else place.head.rev) + 3
    assert version.head.commit == MINE


@pytest.mark.parametrize("fate", [applied_in_doubt, not_applied_in_doubt, delayed])
def test_a_creation_in_doubt_is_settled(world: World, place: Version | None, fate: Fate) -> None:
    """(d) Settled as created, or, over a tombstone, perhaps as not; a late PUT never makes that wrong."""
    error = doubt_of(world, lambda: create_mine(world, place), fate)
    world.store.rule = None
    settled = world.heads().settle(error.doubt)
    world.store.deliver()
    assert (settled is not None) == (read(world).head.commit == MINE)
    assert settled is not None or not (place is None or fate is applied_in_doubt)
