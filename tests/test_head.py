"""Every outcome of a swap of the head, by the letters of head.py's docstring: commits, other swaps, creations."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from engine import CONFIG, Call, Delayed, World, shrink_limits, small_leaves, sqlite_page

from s3blockfs.errors import (
    AccessDenied,
    CommitLost,
    DatabaseExists,
    DatabaseGone,
    PreconditionFailed,
    RequestInDoubt,
    S3BlockFSError,
    StoreUnavailable,
)
from s3blockfs.format import head as codec
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


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


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
    return heads.swap(base, make_commit(base), commit=MINE)


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


# --- (d) -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("fate", [applied_in_doubt, not_applied_in_doubt, delayed])
def test_unreachable_then_settled(world: World, fate: Fate) -> None:
    """(d) Unknown while nothing answers; then `settle` says which, and a late PUT never makes that wrong."""
    base = create(world)
    heads = world.heads()
    error = doubt_of(world, lambda: commit_mine(heads, base), fate)
    with pytest.raises(Unsettled):
        heads.settle(error.doubt)
    world.store.rule = None
    settled = heads.settle(error.doubt)
    if fate is applied_in_doubt:
        assert settled is not None and settled.etag == read(world).etag
        assert settled.head.commit == MINE
    else:
        assert settled is None
        assert world.store.deliver() in ([], [False])
        assert read(world).head.commit == base.head.commit


@pytest.mark.parametrize("fate", [applied_in_doubt, not_applied_in_doubt, delayed])
@pytest.mark.parametrize("others", [commit_others, take_lease, delete, delete_and_recreate])
def test_settled_after_others_went_on(world: World, fate: Fate, others: Callable[[World], None]) -> None:
    """(d) While in doubt here, others commit, delete or create anew: `settle` still finds out, without a swap."""
    base = create(world)
    heads = world.heads()
    error = doubt_of(world, lambda: commit_mine(heads, base), fate)
    others(world)
    world.store.rule = None
    sent = len(world.store.swaps)
    assert (heads.settle(error.doubt) is not None) == (fate is applied_in_doubt)
    assert len(world.store.swaps) == sent
    assert world.store.deliver() in ([], [False])


def test_the_delayed_request_arrives_before_it_is_settled(world: World) -> None:
    """(d) "May still land": it landed after the deadline, and is found."""
    base = create(world)
    heads = world.heads()
    error = doubt_of(world, lambda: commit_mine(heads, base), delayed)
    assert world.store.deliver() == [True]
    world.store.rule = None
    settled = heads.settle(error.doubt)
    assert settled is not None and settled.head.commit == MINE


def test_the_delayed_request_arrives_while_it_is_settled(world: World) -> None:
    """(d) It lands between the look and the no-op swap: that gets 412, and the commit is found."""
    base = create(world)
    heads = world.heads()
    error = doubt_of(world, lambda: commit_mine(heads, base), delayed)
    fates(world, after(lambda: world.store.deliver()))
    settled = heads.settle(error.doubt)
    assert settled is not None and settled.head.commit == MINE and settled.etag == read(world).etag


def test_a_no_op_swap_in_doubt_is_settled_later(world: World) -> None:
    """(d) The no-op swap itself may be in doubt: unknown until the next look."""
    base = create(world)
    heads = world.heads()
    error = doubt_of(world, lambda: commit_mine(heads, base), delayed)
    fates(world, applied_in_doubt)
    with pytest.raises(Unsettled):
        heads.settle(error.doubt)
    assert heads.settle(error.doubt) is None
    assert world.store.deliver() == [False]


# --- (e) -------------------------------------------------------------------------------------------------


def vanish(world: World) -> None:
    world.store.inner.delete([KEY], site="test")


@pytest.mark.parametrize("fate", [fine, not_applied_in_doubt, applied_and_repeated])
def test_a_vanished_head_is_a_database_that_is_gone(world: World, fate: Fate) -> None:
    """(e) 404 on If-Match, for a commit and for another swap; nothing is put in its place."""
    base = create(world)
    when_gone = followed_by if fate is applied_and_repeated else after
    for swap in (lambda: commit_mine(world.heads(), base), lambda: world.heads().swap(base, lease)):
        world.store.inner.put(KEY, base.body, site="test")
        fates(world, when_gone(lambda: vanish(world), fate))
        with pytest.raises(DatabaseGone):
            swap()
        assert world.heads(faulty=False).read() is None
    with pytest.raises(DatabaseGone):
        world.heads().read_if_changed(base)


def test_settling_does_not_bring_a_vanished_head_back(world: World) -> None:
    """(d, e) The head vanished while in doubt: gone. A head without the objects it refers to would be worse."""
    base = create(world)
    heads = world.heads()
    error = doubt_of(world, lambda: commit_mine(heads, base), not_applied_in_doubt)
    world.store.rule = None
    vanish(world)
    with pytest.raises(DatabaseGone):
        heads.settle(error.doubt)
    assert heads.read() is None


def test_deleted_while_committing(world: World) -> None:
    """A commit never replaces a tombstone."""
    base = create(world)
    fates(world, after(lambda: delete(world)))
    with pytest.raises(DatabaseGone):
        commit_mine(world.heads(), base)
    assert read(world).head.deleted


def test_created_anew_while_committing(world: World) -> None:
    """A commit never replaces the head of another database, though `seq` may be what it expects."""
    base = create(world)
    fates(world, after(lambda: delete_and_recreate(world)))
    with pytest.raises(CommitLost):
        commit_mine(world.heads(), base)
    head = read(world).head
    assert head.id != base.head.id and head.seq == base.head.seq + 1 and head.size == 0


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

    return world.heads().create(base, make)


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


# --- invariants over many swaps ----------------------------------------------------------------------------


def watch_heads(world: World, rule: Callable[[Call, str], None] | None = None) -> list[Version]:
    """Every head that was applied from now on through the faulty store."""
    applied: list[Version] = []

    def watching(call: Call, when: str) -> None:
        if when == "after" and call.key == KEY and call.operation == "PUT":
            applied.append(read(world))
        if rule is not None:
            rule(call, when)

    world.store.rule = watching
    return applied


def test_counters_never_repeat(world: World) -> None:
    """I1, I6: `rev` +1 per swap, `seq` +1 per commit and creation, floor never falls; nonces and ETags never repeat."""
    rng = random.Random(5)

    def doubtful(call: Call, when: str) -> None:
        if call.conditional and call.operation == "PUT" and rng.random() < 0.2:
            raise RequestInDoubt("cut")

    applied = watch_heads(world, doubtful)
    machines = [world.machine() for _ in range(3)]
    for _ in range(150):
        machine = rng.choice(machines)
        action = rng.random()
        if action < 0.1 and machine.lookup(PREFIX):
            machine.remove(PREFIX)
        elif action < 0.2:
            world.heads().swap(read(world), lease) if applied else None
        else:
            database = machine.create(PREFIX, exclusive=False)
            database.refresh(0)
            database.write(rng.randrange(9000), rng.randbytes(100))
            database.close_handle(0)
            machine.release(database)
    heads = [version.head for version in applied]
    assert len(heads) > 100 and any(head.deleted for head in heads)
    assert [head.rev for head in heads] == list(range(1, len(heads) + 1))
    for before, now in pairwise(heads):
        is_commit = now.commit != before.commit
        assert now.seq == before.seq + is_commit
        assert now.floor >= before.floor
        assert (now.id != before.id) == before.deleted or now.deleted
    assert len({head.nonce for head in heads}) == len({version.etag for version in applied}) == len(heads)
    assert json.loads(applied[-1].body.split(b"\n")[0])["rev"] == heads[-1].rev


def test_a_head_is_archived_before_its_references_are_dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a replaced head referred to and the new one does not is kept by an archive written before the swap."""
    shrink_limits(monkeypatch)
    small_leaves(monkeypatch)
    machine = world.machine(block_size=512)
    database = machine.create(PREFIX, exclusive=True)
    rng = random.Random(2)
    previous = read(world)
    dropping = 0

    def references(head: Head) -> set[str]:
        extents = {extent.ref.key(PREFIX) for extent in head.extents}
        leaves = {leaf.key(PREFIX) for leaf in head.leaves}
        for leaf in leaves:
            decoded = codec.extents.decode(world.store.inner.get(leaf, site="test").body, leaf)
            extents |= {extent.ref.key(PREFIX) for extent in decoded}
        return extents | leaves | {segment.ref.key(PREFIX) for segment in head.segments}

    for step in range(40):
        database.write(rng.randrange(0, 500) * 512, rng.randbytes(rng.choice([50, 9000, 40000])))
        if step == 20:
            database.truncate(100_000)
        database.close_handle(0)
        if step == 39:
            machine.remove(PREFIX)
        now = read(world)
        if references(previous.head) - references(now.head):
            dropping += 1
            start = f"{PREFIX}/archive/{previous.head.rev:016x}-"
            archived = [e.key for e in world.store.inner.list(start, site="test")]
            assert [world.store.inner.get(key, site="test").body for key in archived] == [previous.body]
            puts = [call.key for call in world.store.calls if call.operation == "PUT"]
            assert puts.index(archived[0]) < len(puts) - 1 - puts[::-1].index(KEY)
        previous = now
    assert dropping > 5
    assert previous.head.deleted


def test_the_first_line_is_readable(world: World) -> None:
    """`head -1` of the object shows the fields; the body verifies itself; the deadline is the transaction's."""
    machine = world.machine()
    database = machine.create(PREFIX, exclusive=True)
    database.write(0, sqlite_page(1, 1))
    database.close_handle(0)
    fields = json.loads(read(world).body.split(b"\n")[0])
    assert (fields["size_bytes"], fields["seq"], fields["counter"]) == (4096, 2, 1)
    assert fields["tail_bytes"] > 0 and CONFIG.transaction_deadline_s == 20
