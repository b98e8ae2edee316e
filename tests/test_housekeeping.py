"""Fold and collection in the background of a process that writes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from engine import Call, InlineRuntime, World, shrink_limits
from scenes import state

from s3blockfs import fold, housekeeping
from s3blockfs.catalog import Catalog
from s3blockfs.errors import StoreUnavailable

PAGE = 4096


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    shrink_limits(monkeypatch)
    with World(InlineRuntime()) as made:
        yield made


def write_much(machine: Catalog, commits: int = 120) -> None:
    database = machine.create("a.db", exclusive=False)
    for number in range(commits):
        database.write(number % 7 * PAGE + 200, random.Random(number).randbytes(1500))
        database.close_handle(0)
    machine.release(database)


def segments(world: World) -> int:
    version = world.heads(faulty=False).read()
    assert version is not None
    return len(version.head.segments)


def test_a_writer_folds_its_log(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "DUE_SEGMENTS", 3)
    machine = world.machine()
    write_much(machine)
    before, content = segments(world), world.content()
    assert before >= 3
    machine.tick()
    assert segments(world) == 0 and world.content() == content
    calls = len(world.store.calls)
    world.runtime.sleep(housekeeping.PAUSE_S)
    machine.tick()
    assert len(world.store.calls) == calls


def test_a_reader_folds_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "DUE_SEGMENTS", 3)
    write_much(world.machine())
    machine = world.machine()
    database = machine.open("a.db")
    assert database.read(0, PAGE)
    calls = len(world.store.calls)
    world.runtime.sleep(2 * housekeeping.COLLECT_EVERY_S)
    machine.tick()
    assert len(world.store.calls) == calls


def test_an_outage_is_waited_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not tried again at each tick."""
    monkeypatch.setattr(fold, "DUE_SEGMENTS", 3)
    machine = world.machine()
    write_much(machine)
    tried = 0

    def rule(call: Call, when: str) -> None:
        nonlocal tried
        tried += 1
        raise StoreUnavailable("the store is down")

    world.store.rule = rule
    for _ in range(20):
        machine.tick()
        world.runtime.sleep(0.25)
    first = tried
    world.store.rule = None
    assert 0 < first < 40 and segments(world) >= 3
    world.runtime.sleep(housekeeping.PAUSE_S)
    machine.tick()
    assert segments(world) == 0


def test_a_writer_collects_what_is_older_than_the_retention(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "DUE_SEGMENTS", 3)
    machine = world.machine(retain_s=3600.0)
    for _ in range(6):
        write_much(machine)
        machine.tick()
        world.runtime.sleep(3700)
    write_much(machine)
    machine.tick()
    keys = [entry.key for entry in world.store.inner.list("a.db/", site="test")]
    uploaded = sum(call.operation == "PUT" and call.site in ("data", "roll") for call in world.store.calls)
    assert len(keys) < uploaded / 3, keys
    assert world.content()[:200] == bytes(200)


def test_clean_up_of_a_deleted_database_leaves_its_tombstone(world: World) -> None:
    machine = world.machine()
    database = machine.create("a.db", exclusive=False)
    for number in range(3):
        database.write(0, state(number, 30))
        database.close_handle(0)
    machine.release(database)
    machine.remove("a.db")
    source = machine._source("a.db")
    housekeeping.clean_up(source, world.heads(), machine._config)
    assert [entry.key for entry in world.store.inner.list("a.db/", site="test")] == ["a.db/head"]
