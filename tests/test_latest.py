"""What a HeadFile remembers of its head, who may replace it, and heads that change without a commit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from engine import Call, World, shrink_limits
from scenes import Scene, same, state
from swaps import (
    KEY,
    MINE,
    PREFIX,
    after,
    applied_in_doubt,
    commit_mine,
    commit_others,
    create,
    delete,
    delete_and_recreate,
    fates,
    followed_by,
    lease,
    make_commit,
    read,
    take_lease,
    vanish,
)

from s3blockfs.errors import CommitLost, DatabaseExists, DatabaseGone
from s3blockfs.format.extents import Extent
from s3blockfs.format.head import Head, Lease
from s3blockfs.format.keys import ObjectRef
from s3blockfs.head import HeadFile
from s3blockfs.snapshot import Version


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def requests(world: World) -> list[tuple[str, str]]:
    """(operation, site) since the last look."""
    found = [(call.operation, call.site) for call in world.store.calls]
    world.store.calls.clear()
    return found


# --- where a swap starts -----------------------------------------------------------------------------------


def test_a_commit_starts_from_our_own_lease(world: World) -> None:
    """The transaction read the head before the lease; its commit is one PUT all the same, and keeps the lease."""
    base = create(world)
    heads = world.heads()
    heads.swap(base, lease)
    requests(world)
    version = commit_mine(heads, base)
    assert requests(world) == [("PUT", "swap")]
    assert version.head.rev == base.head.rev + 2 and version.head.lease is not None
    assert heads.latest == version == read(world)


def test_what_was_seen_counts_as_well(world: World) -> None:
    """A lease of somebody else that a look has shown."""
    base = create(world)
    heads = world.heads()
    take_lease(world)
    assert heads.read_if_changed(base).head.lease is not None
    requests(world)
    assert commit_mine(heads, base).head.lease is not None
    assert requests(world) == [("PUT", "swap")]


def test_a_commit_known_to_be_lost_is_not_sent(world: World) -> None:
    """Another commit is known to be there: lost, without a request. Other swaps go on from it."""
    base = create(world)
    heads = world.heads()
    commit_others(world)
    heads.read()
    requests(world)
    with pytest.raises(CommitLost):
        commit_mine(heads, base)
    assert requests(world) == []
    version = heads.swap(base, lease)
    assert requests(world) == [("PUT", "swap")] and version.head.seq == base.head.seq + 1


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("others", [delete, delete_and_recreate])
@pytest.mark.parametrize("commit", [True, False])
def test_every_swap_requires_the_database_it_is_based_on(
    world: World, known: bool, others: Callable[[World], None], commit: bool
) -> None:
    """A tombstone has the id and the commit of what was deleted; a successor the next seq. Neither is replaced,
    whether it was seen before or first met in a 412, and `make` never sees it."""
    base = create(world)
    heads = world.heads()
    if known:
        others(world)
        heads.read()
    else:
        fates(world, after(lambda: others(world)))
    met: list[bytes] = []

    def make(replaced: Head) -> Head:
        met.append(replaced.nonce)
        return make_commit(base)(replaced) if commit else lease(replaced)

    with pytest.raises(CommitLost if commit and others is delete_and_recreate else DatabaseGone):
        heads.swap(base, make, commit=commit)
    assert met == ([] if known else [base.head.nonce])
    assert read(world).head.lease is None and read(world).head.commit != MINE


def test_a_swap_of_a_tombstone_requires_a_tombstone(world: World) -> None:
    """Garbage collection of a deleted database never changes its successor; a creation is told that it exists."""
    create(world)
    delete(world)
    base = read(world)
    fates(world, after(lambda: world.machine(faulty=False).create(PREFIX, exclusive=True)))
    with pytest.raises(DatabaseGone):
        world.heads().swap(base, lambda replaced: replace(replaced, floor=replaced.rev))
    with pytest.raises(DatabaseExists):
        world.heads().swap(base, lambda replaced: Head(b"m" * 16, 0, 9, MINE, 0, 4096, bytes(8)))
    assert read(world).head.floor == base.head.floor and read(world).head.commit != MINE


def test_old_archives_are_not_asked_for_a_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit in doubt cannot be in an archive of a head before it."""
    shrink_limits(monkeypatch)
    create(world)
    for _ in range(5):
        delete_and_recreate(world)
    base = read(world)
    fates(world, followed_by(lambda: delete_and_recreate(world), applied_in_doubt))
    assert commit_mine(world.heads(), base).head.id != base.head.id
    assert requests(world).count(("GET", "settle")) == 1


# --- looking -----------------------------------------------------------------------------------------------


def test_nothing_new_is_the_very_object(world: World) -> None:
    """Callers compare by `is`: also when the head was read by another user of this HeadFile in between."""
    known = create(world)
    heads = world.heads()
    assert heads.read_if_changed(known) is known
    assert heads.read() is not known
    assert heads.read_if_changed(known) is known


def test_users_of_one_head_share_what_they_know(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One commits, the other looks: no body is transferred, and it gets the head that was written."""
    base = create(world)
    heads = world.heads()
    version = commit_mine(heads, base)
    answers: list[object] = []
    ask = world.store.inner.get_if_changed
    monkeypatch.setattr(
        world.store.inner, "get_if_changed", lambda *a, **o: answers.append(ask(*a, **o)) or answers[-1]
    )
    assert heads.read_if_changed(base) is version
    assert answers == [None]


def test_an_answer_that_comes_late_does_not_count(world: World) -> None:
    """A look was answered before a swap of another thread, and is taken in after it: what it returns is the swap's."""
    base = create(world)
    take_lease(world)
    heads = world.heads()
    swapped: list[Version] = []

    def rule(call: Call, when: str) -> None:
        if call.operation == "GET" and when == "after":
            world.store.rule = None
            swapped.append(heads.swap(base, lambda replaced: replace(replaced, lease=Lease("me", "01", 10))))

    world.store.rule = rule
    assert heads.read_if_changed(base) is swapped[0] is heads.latest
    world.store.rule = rule
    assert heads.read() is swapped[1] is heads.latest


def test_an_older_head_that_was_put_back_counts(world: World) -> None:
    """What errors tell an operator to do. It has a lower rev than what is remembered, and is the head all the same."""
    base = create(world)
    heads = world.heads()
    version = commit_mine(heads, base)
    world.store.inner.put(KEY, base.body, site="test")
    assert heads.read_if_changed(version).etag == base.etag
    assert commit_mine(heads, base).etag == read(world).etag


def test_created_anew_after_it_vanished(world: World) -> None:
    """Then rev begins at one again."""
    version = commit_mine(heads := world.heads(), create(world))
    vanish(world)
    with pytest.raises(DatabaseGone):
        heads.read_if_changed(version)
    anew = create(world)
    assert heads.read_if_changed(version).etag == anew.etag
    assert heads.swap(anew, lease).head.rev == anew.head.rev + 1 == 2


def test_a_tombstone_is_news(world: World) -> None:
    """Though it has the id and the commit of the database."""
    base = create(world)
    heads = world.heads()
    delete(world)
    for _ in range(2):
        assert heads.read_if_changed(base).head.deleted


def test_threads_share_a_head(world: World) -> None:
    """Swaps and looks of many threads: each swap is applied once, and what is remembered at the end is the head."""
    base = create(world)
    heads = world.heads(faulty=False)
    problems: list[BaseException] = []

    def work(heads: HeadFile, number: int) -> None:
        try:
            known = base
            for step in range(20):
                heads.swap(base, lambda replaced, step=step: replace(replaced, lease=Lease(str(number), str(step), 1)))
                found = heads.read_if_changed(known)
                assert found.head.rev >= known.head.rev + 1
                known = found
        except BaseException as error:  # noqa: BLE001  shown by the test
            problems.append(error)

    world.runtime.sleep = lambda seconds: None  # type: ignore[method-assign]  # or racing would use up the deadline
    threads = [threading.Thread(target=work, args=(heads, number)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert read(world).head.rev == base.head.rev + 120
    assert heads.latest == read(world)


# --- a head that changes without a commit ------------------------------------------------------------------


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(world)


def swap_elsewhere(scene: Scene, **changes: object) -> Version:
    return scene.world.heads(faulty=False).swap(read(scene.world), lambda replaced: replace(replaced, **changes))


@pytest.mark.parametrize("changes", [{"lease": Lease("other", "00", 10)}, {"floor": 1}])
def test_a_lease_or_a_floor_moves_nothing(scene: Scene, changes: dict[str, object]) -> None:
    """The kernel keeps its pages, nothing is indexed anew, and the new head is the one that is known."""
    before = scene.database._view.snapshot
    version = swap_elsewhere(scene, **changes)
    scene.database.refresh(0)
    shown = scene.database._view.snapshot
    assert scene.moves == 0 and scene.database.version == version
    assert shown._log is before._log and shown.map is before.map
    assert same(scene.shown(), state(1))
    assert requests(scene.world) == [("GET", "refresh")]
    scene.database.write(0, state(2))
    scene.database.close_handle(0)
    assert requests(scene.world) == [("PUT", "swap")] and scene.published(2)
    for field, value in changes.items():
        assert getattr(read(scene.world).head, field) == value


def test_a_swap_between_two_locks_does_not_refuse_a_writer(scene: Scene) -> None:
    """The transaction read the newest commit: RESERVED is granted, the commit is one PUT."""
    writer = scene.process(1)
    writer.shared()
    swap_elsewhere(scene, floor=0)
    writer.reserved()
    writer.unlock()
    writer.begin()
    scene.database.write(0, state(2))
    requests(scene.world)
    writer.commit()
    assert requests(scene.world) == [("PUT", "swap")] and scene.published(2)


def test_a_fold_is_read_by_its_new_places(scene: Scene) -> None:
    """The same bytes from other objects: the snapshot takes the new map, the kernel keeps its pages."""
    ref = ObjectRef(99, b"folded!!", b"folded!!")
    swap_elsewhere(scene, extents=(Extent(7, 1, ref, 0, 1),))
    scene.database.refresh(0)
    assert scene.moves == 0 and same(scene.shown(), state(1))
    assert [extent.ref for extent in scene.database._view.snapshot.map.find(0, 100)] == [ref]


def test_a_commit_elsewhere_still_moves(scene: Scene) -> None:
    """Also when a lease came with it; and a tombstone, which keeps id and commit, is no such swap."""
    swap_elsewhere(scene, lease=Lease("other", "00", 10))
    scene.commit_elsewhere(2)
    scene.database.refresh(0)
    assert scene.moves == 1 and same(scene.shown(), state(2))
    delete(scene.world)
    with pytest.raises(DatabaseGone):
        scene.database.refresh(0)
