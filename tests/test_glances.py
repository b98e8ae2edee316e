"""`ls -l` of many databases: one small GET each, ahead of whoever asks; what it shows is what a look would show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from engine import Call, World

from s3blockfs.catalog import Catalog
from s3blockfs.errors import StoreUnavailable
from s3blockfs.format.head import glance
from s3blockfs.glances import AHEAD, IN_A_ROW
from s3blockfs.objectstore import StoredObject

COUNT = 100


@pytest.fixture
def world() -> Iterator[World]:
    """Databases of different sizes, one of them deleted."""
    with World() as made:
        machine = made.machine(faulty=False)
        for number in range(COUNT):
            machine.create(f"{number:03d}.db", exclusive=True).truncate(number * 4096)
            database = machine.open(f"{number:03d}.db")
            database.close_handle(0)
        machine.remove("077.db")
        yield made


def sites(world: World) -> Counter[str]:
    found = Counter(call.site for call in world.store.calls if call.operation == "GET")
    world.store.calls.clear()
    return found


def sizes(machine: Catalog, names: list[str]) -> list[int]:
    return [entry.size for name in names if (entry := machine.lookup(name)) is not None]


def listed(machine: Catalog, world: World) -> list[str]:
    names = [name for name, _ in machine.listing("")]
    world.store.calls.clear()
    return names


def test_names_asked_for_in_order_are_looked_at_once_and_ahead(world: World) -> None:
    """The kernel asks for each several times."""
    machine = world.machine(refresh_s=1.0)
    names = listed(machine, world)
    assert len(names) == COUNT - 1
    ahead = []
    for at, name in enumerate(names):
        for _ in range(3):
            assert sizes(machine, [name]) == [int(name[:3]) * 4096]
        ahead.append(sum(call.operation == "GET" for call in world.store.calls) - at - 1)
    assert max(ahead) >= AHEAD // 2
    asked = sites(world)
    assert asked.total() <= COUNT + 3
    assert asked["glance"] >= COUNT - IN_A_ROW - 3


@pytest.mark.parametrize("step", [2, -1])
def test_names_in_another_order_are_not_looked_at_ahead(world: World, step: int) -> None:
    machine = world.machine(refresh_s=1.0)
    names = listed(machine, world)[::step]
    assert sizes(machine, names[:20]) == [int(name[:3]) * 4096 for name in names[:20]]
    assert sites(world)["glance"] == 0


def test_details_of_a_listing_take_one_small_get_each(world: World) -> None:
    """As `s3blockfs ls -l` asks, and what it cannot tell is looked up."""
    machine = world.machine(refresh_s=1.0)
    machine.make_folder("folder.d")
    rows = dict(machine.listing(""))
    world.machine(faulty=False).remove("050.db")
    sites(world)
    found = {name: machine.detailed(name, entry) for name, entry in rows.items()}
    assert {name: entry.size for name, entry in found.items() if not (entry.is_folder or name == "050.db")} == {
        f"{number:03d}.db": number * 4096 for number in range(COUNT) if number not in (50, 77)
    }
    assert all(found[name].modified_s > 0 for name in ("000.db", "099.db"))
    assert found["folder.d"].is_folder
    assert found["050.db"].size == 0
    asked = sites(world)
    assert asked.pop("glance") == COUNT - 1
    assert asked.total() <= 3, asked


def test_what_was_seen_too_long_ago_is_looked_at_again(world: World) -> None:
    """A reader that is slow gets the truth, and less and less is looked at in vain."""
    machine, writer = world.machine(refresh_s=1.0), world.machine(faulty=False)
    names = listed(machine, world)
    for name in names[:70]:
        sizes(machine, [name])
    database = writer.open("075.db")
    database.truncate(4096)
    database.close_handle(0)
    sites(world)
    for name in names[70:]:
        world.runtime.sleep(2)
        assert sizes(machine, [name]) == [4096 if name == "075.db" else int(name[:3]) * 4096]
    assert sites(world)["glance"] <= COUNT


def test_a_slow_reader_is_kept_ahead_of_by_little(world: World) -> None:
    """So half of what was seen is still fresh when it comes to it."""
    machine = world.machine(refresh_s=1.0)
    names = listed(machine, world)
    sizes(machine, names[:20])
    for name in names[20:50]:
        world.runtime.sleep(0.4)
        sizes(machine, [name])
    sites(world)
    for name in names[50:]:
        world.runtime.sleep(0.4)
        sizes(machine, [name])
    found = sites(world)
    assert found.total() - found["glance"] <= 30


def test_what_lies_behind_is_not_looked_at(world: World) -> None:
    machine = world.machine(refresh_s=1.0)
    names = listed(machine, world)
    assert sizes(machine, names[60:70]) == [int(name[:3]) * 4096 for name in names[60:70]]
    assert {call.key.split("/")[0] for call in world.store.calls} <= set(names[60:])
    assert sites(world)["glance"] > 0


def test_they_are_small(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head nothing but its first line is fetched."""
    machine, get, lengths = world.machine(refresh_s=1.0), world.store.get, []

    def note(key: str, *, site: str, **options: Any) -> StoredObject:
        lengths.extend([options["length"]] if site == "glance" else [])
        return get(key, site=site, **options)

    monkeypatch.setattr(world.store, "get", note)
    sizes(machine, listed(machine, world))
    assert len(lengths) > COUNT // 2 and max(lengths) <= 8192


@pytest.mark.parametrize("trouble", ["the store", "threads"])
def test_a_look_ahead_that_fails_is_made_again(world: World, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever asks for that name, who gets what he would have got."""
    machine = world.machine(refresh_s=1.0)
    names = listed(machine, world)

    def refuse(call: Call, when: str) -> None:
        if call.site == "glance":
            raise StoreUnavailable("away")

    def no_more_threads(*_: object) -> Any:
        raise RuntimeError("can't start new thread")

    if trouble == "threads":
        monkeypatch.setattr(world.runtime, "submit", no_more_threads)
    else:
        world.store.rule = refuse
    assert sizes(machine, names) == [int(name[:3]) * 4096 for name in names]


def test_nothing_is_looked_at_ahead_where_every_look_counts(world: World) -> None:
    machine = world.machine(refresh_s=0.0)
    sizes(machine, listed(machine, world)[:20])
    assert sites(world)["glance"] == 0


def test_a_database_deleted_after_the_listing_is_gone(world: World) -> None:
    machine = world.machine(refresh_s=1.0)
    names = listed(machine, world)
    world.machine(faulty=False).remove("050.db")
    assert len(sizes(machine, names)) == COUNT - 2


def test_one_that_is_open_shows_its_own_size(world: World) -> None:
    """Also what is not published yet, and what was published here a moment ago."""
    machine = world.machine(refresh_s=1.0)
    names = listed(machine, world)
    database = machine.open("060.db")
    for name in names[:58]:
        sizes(machine, [name])
    database.truncate(4096)
    database.close_handle(0)
    assert sizes(machine, ["058.db", "059.db", "060.db"]) == [58 * 4096, 59 * 4096, 4096]
    machine.release(database)
    assert sizes(machine, ["060.db"]) == [4096]


@pytest.mark.parametrize(
    "start",
    [b"", b"{}\n", b"[]\n", b"7\n", b"{", b"\xff\n", b'{"format":1}\n', b"[" * 9000 + b"\n"]
    + [
        b'{"format":9,"deleted":false,"size_bytes":1,"time_ms":1}\n',
        b'{"format":1,"deleted":true,"size_bytes":1,"time_ms":1}\n',
        b'{"format":1,"deleted":false,"size_bytes":-1,"time_ms":1}\n',
        b'{"format":"1","deleted":false,"size_bytes":1,"time_ms":1}\n',
        b'{"format":1,"deleted":false,"size_bytes":1,"time_ms":"x"}\n',
        b'{"format":1,"deleted":false,"size_bytes":1,"time_ms":1}',
    ],
)
def test_what_does_not_tell_is_left_to_a_look(start: bytes) -> None:
    """Rubbish, tombstones, newer formats, and a line that did not fit."""
    assert glance(start) is None
    assert glance(b'{"format":1,"deleted":false,"size_bytes":8192,"time_ms":5}\n') == (8192, 5)
