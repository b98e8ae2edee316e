"""Uploads that break, or do not begin."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import pytest
from engine import Call, InlineRuntime, ManualRuntime, World, shrink_limits
from test_commit import MIB, commit_noise, head_of, new_database, noise, noise_file, save

from s3blockfs import commit
from s3blockfs.format.data import OBJECT_BYTES

T = TypeVar("T")


def test_an_upload_that_broke_in_a_way_nobody_foresaw_is_not_referred_to() -> None:
    """I2: who met that may go on, and commit."""
    with World(InlineRuntime()) as world:
        database = new_database(world, memory=OBJECT_BYTES)
        content = noise(12 * MIB)

        def rule(call: Call, when: str) -> None:
            if call.site == "data":
                world.store.rule = None
                raise MemoryError

        world.store.rule = rule
        with pytest.raises(MemoryError):
            database.write(0, content)
        save(database, (8 * MIB, content[8 * MIB :]))
        assert world.content() == content


def test_a_commit_waits_for_no_roll_that_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """All I/O threads may be taken, by commits that wait like this one."""

    class Queued(Future[T]):
        def exception(self, timeout: float | None = None) -> BaseException | None:
            raise AssertionError("for ever")

    class Taken(ManualRuntime):
        def submit(self, function: Callable[[], T]) -> Future[T]:
            return Queued()

    shrink_limits(monkeypatch)
    monkeypatch.setattr(commit, "FULL_TAIL_BYTES", 20_000)
    with World(Taken()) as world:
        commit_noise(new_database(world), 20)
        assert head_of(world).segments and world.content() == noise_file(20)
