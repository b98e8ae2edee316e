"""A commit whose outcome nobody can tell any more: its machine slept longer than the past is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from engine import CONFIG, InlineRuntime, World, shrink_limits
from scenes import PREFIX, Scene, same, state
from swaps import commit_others
from test_database_states import fall_silent

from s3blockfs.errors import OutcomeUnknown
from s3blockfs.fold import fold
from s3blockfs.gc import collect


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    shrink_limits(monkeypatch)
    with World(InlineRuntime()) as world:
        yield Scene(world)


def go_on(scene: Scene) -> None:
    """Another machine commits, folds what was before, and collects the past."""
    commit_others(scene.world, 12)
    machine = scene.world.machine(faulty=False)
    source, heads = machine.at(PREFIX)
    version = heads.read()
    assert version is not None and fold(source, heads, CONFIG, version) is not None
    scene.commit_elsewhere(20)
    scene.world.runtime.sleep(10)
    collect(source, heads, retain_s=5)


def replace_it(scene: Scene) -> None:
    """It is removed, collected, and made anew."""
    machine = scene.world.machine(faulty=False)
    machine.remove(PREFIX)
    collect(*machine.at(PREFIX), retain_s=5)
    machine.create(PREFIX, exclusive=True)
    scene.commit_elsewhere(20)


@pytest.mark.parametrize("meanwhile", [go_on, replace_it])
def test_a_database_opens_again_when_nobody_can_tell(scene: Scene, meanwhile: Callable[[Scene], None]) -> None:
    """It was said that the outcome is unknown. Then it shows the newest state, and can be written."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    fall_silent(scene.world, "applied")
    with pytest.raises(OutcomeUnknown):
        writer.commit()
    meanwhile(scene)
    scene.world.store.rule = None
    scene.world.runtime.sleep(3)
    with pytest.raises(OutcomeUnknown):  # asks again, in the background
        scene.database.read(0, 10)
    reader = scene.process(2)
    reader.shared()
    assert same(scene.shown(), state(20)) and not writer.journal_exists
    reader.unlock()
    reader.begin()
    scene.database.write(0, state(21))
    reader.commit()
    assert scene.published(21)
