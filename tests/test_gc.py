"""Garbage: nothing that a head or a root needs is ever deleted, and everything else is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
from engine import Call, InlineRuntime, World, shrink_limits, small_leaves
from story import PREFIX, Story

from s3blockfs import gc
from s3blockfs.errors import DamagedObject, DatabaseNotFound, S3BlockFSError, StoreUnavailable, TooOld
from s3blockfs.fold import DUE_SEGMENTS, is_due
from s3blockfs.format.head import NamedSnapshot
from s3blockfs.format.keys import ObjectRef, rev_of
from s3blockfs.gc import Report, collect
from s3blockfs.history import commits, keep, open_at, roots
from s3blockfs.snapshot import Snapshot

RETAIN_S = 1000.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    shrink_limits(monkeypatch)
    small_leaves(monkeypatch)
    with World(InlineRuntime()) as world:
        yield world


def check_roots(story: Story) -> None:
    """Every root, read completely."""
    source, version = story.new_source(), story.version()
    for root in roots(source, version.head):
        story.check(Snapshot.load(source, root), root.head.seq)


def check_retention(story: Story) -> None:
    """Every commit of the last RETAIN_S is kept, and what is kept is right."""
    kept = story.check_past()
    young = {seq for seq, then in story.times.items() if then > story.world.runtime.monotonic() - RETAIN_S}
    assert young <= kept


def long_pause(story: Story) -> None:
    """Longer than the retention, with a collection at its end."""
    story.live(2)
    story.world.runtime.sleep(2 * RETAIN_S)
    story.live(1)
    story.collect(RETAIN_S)


@pytest.mark.parametrize("block_size", [512, 4096, 16384])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_needed_stays(world: World, seed: int, block_size: int) -> None:
    """Commits, folds, late folds and collectors at every step of each other, over many times the retention."""
    story = Story(world, seed, block_size)
    rng = story.rng
    deleted = 0
    for _ in range(40):
        story.live(rng.randrange(6))
        world.runtime.sleep(rng.choice([0, 50, 300, 1100]))
        happening = rng.choice(
            [None, lambda: story.live(2), lambda: story.collect(RETAIN_S), lambda: long_pause(story)]
        )
        if rng.random() < 0.5:
            with suppress(StoreUnavailable):  # its swap met a pause longer than its deadline
                version = rng.choice([None, None, *story.versions[-3:]])
                story.fold(version, happens=happening, before=rng.choice(["data", "archive"]))
        if rng.random() < 0.5:
            with suppress(StoreUnavailable):
                site = rng.choice(["roots", "collect", "swap"])
                deleted += story.collect(RETAIN_S, happens=happening, before=site).deleted
        story.check_now()
        check_roots(story)
    check_retention(story)
    assert deleted


def keys(world: World) -> set[str]:
    return {entry.key for entry in world.store.inner.list("", site="test")}


def grown(world: World) -> Story:
    """With several folds in its past."""
    story = Story(world, 5, 4096)
    for _ in range(6):
        story.live(8)
        world.runtime.sleep(200)
        story.fold()
    return story


def age(story: Story) -> None:
    """Everything there is becomes older than the retention and is replaced, by a head that becomes as old."""
    story.world.runtime.sleep(2 * RETAIN_S)
    story.live(3)
    story.fold()
    story.world.runtime.sleep(2 * RETAIN_S)


def test_what_nobody_needs_goes(world: World) -> None:
    """After the retention only what the head refers to is left, and then idle is idle."""
    story = grown(world)
    before = keys(world)
    age(story)
    report = story.collect(RETAIN_S)
    assert report.deleted and report.deleted_bytes and before - keys(world)
    for _ in range(4):  # a compaction may leave something again
        world.runtime.sleep(2 * RETAIN_S)
        report = story.collect(RETAIN_S)
    assert not report.sparse
    needed = gc._reachable(story.new_source(), story.version())[0]
    assert keys(world) - {f"{PREFIX}/head"} == needed
    rev = story.version().head.rev
    for _ in range(3):
        world.runtime.sleep(2 * RETAIN_S)
        assert story.collect(RETAIN_S).deleted == 0
    assert story.version().head.rev == rev, "a floor that frees nothing is not raised"
    story.check_now()


def test_nothing_goes_within_the_retention(world: World) -> None:
    """Neither what was replaced nor what an upload of a transaction that is still open left."""
    story = grown(world)
    lonely = ObjectRef(story.version().head.rev, b"12345678", b"12345678").key(PREFIX)
    world.store.inner.put(lonely, b"an upload", site="test")
    before = keys(world)
    assert story.collect(1e6).deleted == 0
    assert keys(world) == before
    age(story)
    story.collect(RETAIN_S)
    assert lonely not in keys(world)


def test_a_named_snapshot_stays(world: World) -> None:
    """With everything that it needs, whatever the floor; without its name it goes."""
    story = grown(world)
    seq = story.version().head.seq
    story.fold(extra=range(20))
    archive = max(entry.key for entry in world.store.inner.list(f"{PREFIX}/archive/", site="test"))
    name = NamedSnapshot("before", archive)
    story.heads().swap(story.version(), lambda head: replace(head, snapshots=(name,)))
    for _ in range(3):
        age(story)
        story.collect(RETAIN_S)
    assert story.version().head.floor > max(rev_of(PREFIX, archive) or 0, 0)
    opened = open_at(story.new_source(), story.heads(), "before")
    story.check(opened, seq)
    story.check(open_at(story.new_source(), story.heads(), seq), seq)
    story.check_past()
    with pytest.raises(DatabaseNotFound, match="no snapshot 'after'"):
        open_at(story.new_source(), story.heads(), "after")
    story.heads().swap(story.version(), lambda head: replace(head, snapshots=()))
    for _ in range(2):
        age(story)
        story.collect(RETAIN_S)
    assert archive not in keys(world)


def test_a_tombstone_keeps_nothing(world: World) -> None:
    """Deletion is followed by the collection of everything, and another database under the name goes on."""
    story = grown(world)
    story.machine.remove(PREFIX)
    story.collect(RETAIN_S)
    assert keys(world) == {f"{PREFIX}/head", f".s3blockfs/deleted/{PREFIX}"}
    with pytest.raises(DatabaseNotFound):
        commits(story.new_source(), story.heads())
    story.database = story.machine.create(PREFIX, exclusive=True)
    story.model = bytearray()
    story.states = {story.version().head.seq: b""}
    story.live(20)
    story.fold()
    story.collect(RETAIN_S)
    assert story.check_past() == set(story.states)


def test_what_is_not_ours_stays(world: World) -> None:
    """Keys that cannot be parsed, and other databases, are never touched."""
    story = grown(world)
    foreign = {
        f"{PREFIX}/data/readme",
        f"{PREFIX}/data/{'0' * 16}-{'0' * 15}",
        f"{PREFIX}/data/{'0' * 16}-{'0' * 16}.bak",
        f"{PREFIX}/data/x/{'0' * 16}-{'0' * 16}",
        f"{PREFIX}/0000000000",
        f"{PREFIX}2/data/{'0' * 16}-{'0' * 16}",
    }
    for key in foreign:
        world.store.inner.put(key, b"", site="test")
    age(story)
    assert story.collect(RETAIN_S).deleted
    assert foreign <= keys(world)


@pytest.mark.parametrize("folder", ["archive", "map"])
def test_a_root_that_cannot_be_read_stops_the_collection(world: World, folder: str) -> None:
    """What it needs is not known, so nothing is deleted."""
    story = grown(world)
    head = story.version().head
    root = list(roots(story.new_source(), head))[-1]
    damaged = {leaf.key(PREFIX) for leaf in root.head.leaves}
    if folder == "archive":
        found = world.store.inner.list(f"{PREFIX}/archive/", site="test")
        damaged = {entry.key for entry in found if rev_of(PREFIX, entry.key) == root.head.rev}
    for key in damaged:
        world.store.inner.put(key, b"damaged", site="test")
    story.heads().swap(story.version(), lambda head: replace(head, floor=root.head.rev - 1))
    before = keys(world)
    with pytest.raises(DamagedObject):
        story.collect(1e6)
    assert damaged and keys(world) == before


def test_a_reader_of_a_collected_state_is_told_so(world: World) -> None:
    """Never wrong data, and no talk of damage; commits that are gone or not there yet are errors of their own."""
    story = grown(world)
    story.live(9)
    version = story.version()
    source = story.new_source(0)
    reader = Snapshot.load(source, version)
    age(story)
    story.collect(RETAIN_S)
    with pytest.raises(TooOld, match="older than the retention"):
        reader.read(0, 1 << 20)
    said = set()
    for at in range(0, reader.head.size, reader.head.block_size):  # also of blocks with no log over them
        for look in (reader.prefetch, lambda start, end: reader.read(start, end - start)):
            try:
                look(at, at + 1)
            except S3BlockFSError as error:
                said.add(type(error))
    assert said == {TooOld}
    with pytest.raises(TooOld, match="older than the retention"):
        Snapshot.load(story.new_source(), version)
    with pytest.raises(TooOld, match="commit 2 is not kept any more"):
        open_at(source, story.heads(), 2)
    with pytest.raises(DatabaseNotFound, match="no commit 999 yet"):
        open_at(source, story.heads(), 999)
    now = story.version()
    ref = next(Snapshot.load(source, now).map.find(0, 99)).ref
    world.store.inner.delete([ref.key(PREFIX)], site="test")
    with pytest.raises(DamagedObject, match="missing"):
        Snapshot.load(source, now).read(0, 1 << 20)


def test_roots_that_are_collected_meanwhile_are_not_taken_for_never_having_been(world: World) -> None:
    """A look at the past that a collector overtakes looks again."""
    story = grown(world)
    for seq in sorted(story.states):
        with story.meanwhile("roots", lambda: (age(story), story.collect(RETAIN_S))):
            try:
                opened = open_at(story.new_source(), story.heads(), seq)
            except TooOld:
                continue
        story.check(opened, seq)


def test_a_restore_from_a_root_that_is_collected_then(world: World) -> None:
    """Between the LIST and the GETs of a collector's roots: it does not know what the new head needs (I5)."""
    story, machine = Story(world, 1, 4096), world.machine(faulty=False)

    def aged(offset: int) -> None:
        story.write(offset, b"x")
        story.commit()
        world.runtime.sleep(2 * RETAIN_S)
        story.collect(RETAIN_S)

    story.write(0, story.rng.randbytes(40_000))
    story.commit()
    keep(story.new_source(), story.heads(), story.version(), "small")
    story.write(40_000, story.rng.randbytes(40_000))
    story.commit()
    for offset in range(3):
        aged(offset)
    large, content = story.version().head, bytes(story.model)
    machine.copy(PREFIX, PREFIX, overwrite=True, at="small")

    def restored_and_collected() -> None:
        machine.copy(PREFIX, PREFIX, overwrite=True, at=large.seq)
        world.runtime.sleep(2 * RETAIN_S)
        for offset in range(3):
            aged(offset)

    asked: list[str] = []

    def rule(call: Call, when: str) -> None:
        if when == "before" and call.site == "roots" and call.operation == "GET":
            asked.append(call.key)
            if len(asked) == 1:
                world.store.rule = None
                restored_and_collected()

    world.store.rule = rule
    report = collect(story.new_source(), story.heads(), RETAIN_S)
    world.store.rule = None
    assert asked and report == Report()
    found = Snapshot.load(story.new_source(), story.version())
    assert found.read(3, 80_000) == content[3:]


def test_mostly_dead_objects_are_compacted(world: World) -> None:
    """What is left in them moves on, so that they can go."""
    story = Story(world, 1, 4096)
    story.write(0, story.rng.randbytes(32 * 4096))
    story.commit()
    first = story.version().head.extents[0].ref.key(PREFIX)
    for page in range(8):
        if page != 5:
            story.write(page * 4096, story.rng.randbytes(4096))
            story.commit()
    story.live(10)
    story.fold()
    report = collect(story.new_source(), story.heads(), RETAIN_S)
    assert 5 in report.sparse
    assert story.fold(extra=report.sparse) is not None
    age(story)
    story.collect(RETAIN_S)
    assert first not in keys(world)
    story.check_now()


@pytest.mark.parametrize("commits", [5000, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_everything_is_bounded(commits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head, tail, segments, map, history, garbage and requests for each commit, however many commits there were: one
    every 10 s, small ones mostly at the same places, with the background work that belongs to them."""
    shrink_limits(monkeypatch)
    with World(InlineRuntime()) as world:
        _live_long(world, commits)


def _live_long(world: World, commits: int) -> None:
    story = Story(world, 1, 4096, counted=True)
    rng = story.rng
    most: list[Counter[str]] = []
    for number in range(commits):
        for _ in range(rng.choice([1, 1, 1, 2, 12])):
            story.write(rng.choice([rng.randrange(10), rng.randrange(100)]) * 4096, rng.randbytes(600))
        story.commit()
        world.runtime.sleep(10)
        version = story.database.version
        if is_due(version.head):
            story.fold(version)
        if number % 50 == 0:
            story.collect(RETAIN_S)
        if number % 1000 == 0:
            story.forget(2 * RETAIN_S)
            most.append(Counter())
            world.store.calls.clear()
        listed = list(world.store.inner.list(f"{PREFIX}/", site="test")) if number % 10 == 0 else []
        most[-1] |= Counter(
            head=len(version.body),
            tail=len(version.head.tail.commits),
            segments=len(version.head.segments),
            leaves=len(version.head.leaves),
            objects=len(listed),
            stored=sum(entry.size_bytes for entry in listed),
            requests=len(world.store.calls) if number % 1000 == 999 else 0,
        )
    for what, bound in most[1].items():
        assert all(part[what] <= 1.5 * bound for part in most[2:]), [part[what] for part in most]
    assert most[-1]["segments"] < 2 * DUE_SEGMENTS and most[-1]["requests"] < 7000
    story.check_now()
    story.check_past()


def test_opening_with_what_is_known_from_before_a_long_outage(world: World) -> None:
    """What the head refers to that was seen last is collected by now: the newest one is asked for."""
    story = Story(world, 1, 512)
    story.live(20)
    machine = world.machine(faulty=False)
    heads = machine._head_file(PREFIX)
    machine.release(machine.connection(PREFIX, "side", create=False))
    for _ in range(4):
        story.live(20)
        long_pause(story)
    heads.cut_off_s = world.runtime.monotonic()
    database = machine.connection(PREFIX, "side", create=False)
    assert database.version.head.rev == story.version().head.rev
    machine.release(database)
