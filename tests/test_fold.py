"""Folding: no byte of any state changes, whatever happens at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from engine import CONFIG, Call, InlineRuntime, World, shrink_limits, small_leaves
from story import PREFIX, Story

from s3blockfs.blockmap import BlockMap
from s3blockfs.commit import ROLL_SEGMENTS
from s3blockfs.errors import OutcomeUnknown, StoreError, StoreUnavailable
from s3blockfs.fold import fold
from s3blockfs.format.data import Commit
from s3blockfs.format.head import Head, Segment
from s3blockfs.format.tail import LogCommit
from s3blockfs.history import open_at
from s3blockfs.snapshot import Snapshot
from s3blockfs.uploads import upload_map

BLOCK_SIZES = [512, 4095, 4096, 16384, 65536]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    shrink_limits(monkeypatch)
    small_leaves(monkeypatch)
    with World(InlineRuntime()) as world:
        yield world


def another_fold(story: Story) -> Callable[[], None]:
    """Of a newer head, by another machine, with commits around it."""

    def happens() -> None:
        story.live(2)
        fold(story.new_source(), story.world.heads(), CONFIG, story.version())
        story.live(2)

    return happens


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_no_state_changes(world: World, seed: int, block_size: int) -> None:
    """Commits, cuts, growth, bulk commits, folds of the newest and of older heads, with anything in between."""
    story = Story(world, seed, block_size)
    rng = story.rng
    for _ in range(25):
        story.live(rng.randrange(1, 8))
        version = rng.choice([None, None, None, *story.versions[-4:]])
        extra = rng.sample(range(40), rng.randrange(8)) if rng.random() < 0.3 else ()
        happening = rng.choice([None, lambda: story.live(rng.randrange(1, 6)), another_fold(story)])
        story.fold(version, extra=extra, happens=happening)
        story.check_now()
    assert story.check_past() == set(story.states), "nothing was collected, so everything is kept"


def bulk(story: Story, blocks: int = 4) -> None:
    """A commit that becomes block objects."""
    story.write(0, story.rng.randbytes(blocks * 16384))
    story.commit()


def waiting(head: Head) -> list[Segment]:
    """Segments whose commits' records have left the tail."""
    return [segment for segment in head.segments if segment.last_seq < head.tail.commits[0].record.seq]


def folded_story(world: World) -> Story:
    """With blocks in the base and a log over them, cut in its middle and grown again."""
    story = Story(world, 1, 16384)
    bulk(story)
    for size in (50_000, 10_000, 60_000, 45_000):
        story.truncate(size)
        story.live(4)
    return story


def test_folding_twice_does_nothing(world: World) -> None:
    """Idle means no requests."""
    story = folded_story(world)
    made = story.fold()
    assert made is not None and not waiting(made.head)
    assert made.head.seq == story.versions[-1].head.seq and made.head.tail == story.versions[-1].head.tail
    world.store.calls.clear()
    assert story.fold(made) is None and not world.store.calls
    story.check_now()


def test_the_log_of_a_fold_is_dropped_and_the_state_before_it_archived(world: World) -> None:
    """One archive, one swap, one object for each 4 MiB of touched blocks; nothing is deleted."""
    story = folded_story(world)
    before, body = story.version(), world.store.inner.get(f"{PREFIX}/head", site="test").body
    world.store.calls.clear()
    assert story.fold(before) is not None
    sites = [call.site for call in world.store.calls if call.operation == "PUT"]
    assert (sites.count("archive"), sites.count("swap")) == (1, 1)
    assert world.store.count("DELETE") == 0
    archives = [entry.key for entry in world.store.inner.list(f"{PREFIX}/archive/", site="test")]
    assert body in [world.store.inner.get(key, site="test").body for key in archives]


def test_indexes_of_what_was_folded_are_forgotten(world: World) -> None:
    """Those of the log that goes on are not: a reader of the new head asks for none of them."""
    story = folded_story(world)
    source, version = story.source, story.version()
    assert {*Snapshot.load(source, version).head.segments} > {*waiting(version.head)} != set()
    made = fold(source, story.heads(), CONFIG, version)
    assert made is not None and {*source._indexes} == {segment.ref for segment in made.head.segments} != set()


def test_a_fold_that_fails_changes_nothing(world: World) -> None:
    """Whichever of its requests fails, also when the answer to its swap is lost; the next one does the work."""
    story = folded_story(world)
    before = story.version()
    left = 0

    def rule(call: Call, when: str) -> None:
        nonlocal left
        left -= when == "before"
        if left < 0:
            raise StoreUnavailable("the store is down")

    for requests in range(100):
        left, world.store.rule = requests, rule
        try:
            assert fold(story.new_source(), world.heads(), CONFIG, before) is not None
            break
        except (StoreError, OutcomeUnknown):
            world.store.rule = None
            assert story.version() == before
            story.check_now()
    world.store.rule = None
    assert 6 <= requests < 99 and world.store.count("DELETE") == 0 and not waiting(story.version().head)
    story.check_now()
    assert story.check_past() == set(story.states)


def test_a_fold_whose_uploads_may_be_garbage_is_given_up(world: World) -> None:
    """The floor rose above the head it was based on: a collector may have taken them."""
    story = folded_story(world)
    version = story.version()

    def raise_floor() -> None:
        story.heads().swap(story.version(), lambda head: replace(head, floor=head.rev))

    assert story.fold(version, happens=raise_floor) is None
    assert story.version().head.segments == version.head.segments
    story.check_now()
    assert story.fold() is not None
    story.check_now()


def test_a_fold_of_a_database_that_was_replaced_stops(world: World) -> None:
    """Its blocks belong to another database."""
    story = folded_story(world)
    version = story.version()
    story.machine.remove(PREFIX)
    assert story.fold(version) is None
    story.machine.create(PREFIX, exclusive=True)
    assert story.fold(version) is None
    head = story.version().head
    assert (head.size, head.extents, head.leaves) == (0, (), ())
    assert story.fold() is None


def test_blocks_can_be_moved_without_a_log(world: World) -> None:
    """A compaction: the same bytes in one new object; a block that somebody else moved first is left alone."""
    story = folded_story(world)
    story.fold()
    version = story.version()
    made = story.fold(version, extra=[0, 2, 99])
    assert made is not None and made.head.floor == version.head.floor
    homes = list(BlockMap.of(made.head.extents, made.head.leaves, story.source.load_leaf).find(0, 3))
    assert homes[0].ref == homes[-1].ref and homes[0].ref.rev == version.head.rev
    story.check_now()
    assert story.fold(version, extra=[2]) is None
    story.check_now()


def test_a_head_may_refer_to_an_earlier_state(world: World) -> None:
    """A restore: its map as it was, its segments cut at the commit; what was newer never shows, now or later."""
    story = Story(world, 3, 4096)
    bulk(story)
    story.live(30)
    for seq in sorted(story.states)[3::4]:
        old = open_at(story.new_source(), story.heads(), seq)

        def restored(replaced: Head, old: Snapshot = old) -> Head:
            encoded = upload_map(story.source, old.map, replaced.rev)
            record = Commit(replaced.seq + 1, bytes(16), 0, old.head.size, old.head.size)
            return replace(
                old.head,
                floor=replaced.floor,
                id=replaced.id,
                seq=record.seq,
                commit=record.id,
                extents=encoded.extents,
                leaves=encoded.leaves,
                tail=old.head.tail.append(LogCommit(record, ())),
            )

        made = story.heads().swap(story.version(), restored, archives=True)
        story.model = bytearray(story.states[seq])
        story.states[made.head.seq] = story.states[seq]
        story.check_now()
        story.live(story.rng.randrange(9))
        story.fold()
        story.check_now()
    assert story.check_past() == set(story.states)


def test_large_commits_are_folded_too(world: World) -> None:
    """Their records are rolled out of the tail in time, though they take no space in it."""
    story = Story(world, 1, 16384)
    for number in range(60):
        for page in range(0, 40, 2):  # scattered: no run of whole blocks
            story.write(page * 4096, bytes([number]) * 4096)
        story.commit()
        assert len(story.version().head.segments) <= 3 * ROLL_SEGMENTS
        if waiting(story.version().head):
            story.fold()
    story.check_now()
