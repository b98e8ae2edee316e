"""Outcomes (d) and (e) of a swap of the head, and what holds over many swaps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from engine import CONFIG, Call, Delayed, World, shrink_limits, small_leaves, sqlite_page
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
    read,
    take_lease,
    vanish,
)

from s3blockfs.errors import CommitLost, DatabaseGone, PreconditionFailed, RequestInDoubt, TooOld
from s3blockfs.format import head as codec
from s3blockfs.format.head import Head
from s3blockfs.gc import collect
from s3blockfs.head import Unsettled
from s3blockfs.snapshot import Version


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


# --- (d) -------------------------------------------------------------------------------------------------


def test_a_store_that_refuses_every_swap_ends_in_an_unknown_outcome(world: World) -> None:
    """I8: a 412 after which the head is still the old one tells nothing, however often it is repeated; a later
    `settle`, when the store compares ETags again, does."""
    base = create(world)
    fates(world, then=fails(PreconditionFailed("always"), "before"))
    with pytest.raises(Unsettled) as caught:
        commit_mine(world.heads(), base)
    assert len(world.store.swaps) < 100
    with pytest.raises(Unsettled):
        world.heads().settle(caught.value.doubt)
    world.store.rule = None
    assert world.heads().settle(caught.value.doubt) is None
    assert read(world).head.commit == base.head.commit


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


def recreate_by_rename(world: World) -> None:
    machine = world.machine(faulty=False)
    machine.create("b.db", exclusive=True)
    machine.rename("b.db", PREFIX)


@pytest.mark.parametrize("others", [delete_and_recreate, recreate_by_rename])
def test_an_archive_below_the_floor_does_not_tell_who_came_last(world: World, others: Callable[[World], None]) -> None:
    """(d) Found by the small model: my commit applied, the database was replaced, its archives were collected; then an
    archive of the head before my commit, sent by a swap that came to nothing, arrived. It proves no loss."""
    base = create(world)

    def late_archive(call: Call, when: str) -> None:
        if call.site == "archive":
            raise Delayed

    world.store.rule = late_archive
    with pytest.raises(RequestInDoubt):
        world.heads().swap(base, lease, archives=True)
    heads = world.heads()
    error = doubt_of(world, lambda: commit_mine(heads, base), applied_in_doubt)
    others(world)
    world.runtime.sleep(10)
    take_lease(world)
    world.runtime.sleep(10)
    collect(*world.machine(faulty=False).at(PREFIX), retain_s=5)
    world.store.rule = None
    assert world.store.deliver() == [True]
    with pytest.raises(Unsettled) as caught:
        heads.settle(error.doubt)
    assert isinstance(caught.value.__cause__, TooOld)


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
