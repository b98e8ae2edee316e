"""Which past commits can be opened, after copies and renames over other databases too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine import InlineRuntime, World, shrink_limits, small_leaves
from story import PREFIX, Story

from s3blockfs.gc import collect
from s3blockfs.history import commits, open_at

OTHER = "b.db"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    shrink_limits(monkeypatch)
    small_leaves(monkeypatch)
    with World(InlineRuntime()) as world:
        yield world


def by_id(*stories: Story) -> dict[bytes, bytes]:
    """What each commit looked like."""
    found = {}
    for story in stories:
        for commit in commits(story.new_source(), story.heads()):
            found[commit.id] = story.states[commit.seq]
    return found


@pytest.mark.parametrize("how", ["copy", "rename", "new name"])
@pytest.mark.parametrize("seed", range(6))
def test_commits_that_came_by_a_copy(world: World, seed: int, how: str) -> None:
    """Blocks that they replaced stayed under the old name, so they are shown only as far as nothing is missing."""
    mine, over = Story(world, seed, 4096), Story(world, f"over {seed}", 4096, prefix=OTHER)
    for story in (mine, over):
        for _ in range(3):
            story.live(story.rng.randrange(1, 12))
            story.write(0, story.rng.randbytes(40_000))
            story.commit()
            story.live(story.rng.randrange(6))
            if story.rng.random() < 0.5:
                story.fold()
    known = by_id(mine, over)
    target = "c.db" if how == "new name" else OTHER
    if how == "rename":
        mine.machine.rename(PREFIX, target)
    else:
        mine.machine.copy(PREFIX, target, overwrite=True)
    after = Story(world, f"after {seed}", 4096, prefix=target)
    assert after.model == mine.model
    known[after.version().head.commit] = bytes(mine.model)
    after.live(4)
    after.fold()
    after.live(4)
    after.check_now()
    for retain_s in (1e6, 0):
        found = commits(after.new_source(), after.heads())
        assert found[0].seq == max(after.states)
        for commit in found:
            snapshot = open_at(after.new_source(), after.heads(), commit.seq)
            expected = known[commit.id] if commit.id in known else after.states[commit.seq]
            assert snapshot.head.commit == commit.id
            assert snapshot.read(0, 1 << 20) == expected
        assert {seq for seq in after.states if seq > 1} <= {commit.seq for commit in found} or retain_s == 0
        collect(after.new_source(), after.heads(), retain_s)
        world.runtime.sleep(10)
