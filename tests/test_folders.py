"""Folders on the in-memory store: made, listed, removed, here and elsewhere, with what deletions leave behind."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from engine import Call, InlineRuntime, World
from memorystore import MemoryStore
from test_catalog import fill, make_nameless, names, read

from s3blockfs.catalog import Catalog
from s3blockfs.errors import DatabaseExists, DatabaseGone, DatabaseNotFound, ReadOnly, StoreUnavailable, UsageError
from s3blockfs.format.keys import ObjectRef
from s3blockfs.objectstore import Listed

MARK, REMOVED = "f/.s3blockfs/folder", ".s3blockfs/deleted/f"


class SortedStore(MemoryStore):
    """Lists as S3 does."""

    def list(self, prefix: str, *, max_keys: int | None = None, **options: Any) -> Iterator[Listed]:
        found = super().list(prefix, **options)
        return islice(sorted(found, key=lambda listed: listed.key.encode()), max_keys)


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        made.store.inner = SortedStore(made.runtime)
        yield made


def keys(world: World) -> list[str]:
    return sorted(listed.key for listed in world.store.inner.list("", site="test"))


def is_folder(machine: Catalog, path: str) -> bool:
    entry = machine.lookup(path)
    return entry is not None and entry.is_folder


def refused_as_not_empty(machine: Catalog, path: str) -> bool:
    with pytest.raises(OSError) as caught:
        machine.remove_folder(path)
    return caught.value.errno == errno.ENOTEMPTY


def test_an_empty_folder_is_one_object(world: World) -> None:
    """Made by one PUT; found and listed by every machine; empty. What remains of it says that it was removed."""
    machine, other = world.machine(), world.machine()
    machine.make_folder("f")
    assert world.store.count("PUT") == 1 and keys(world) == [MARK]
    assert world.store.inner.get(MARK).body == b""
    for one in (machine, other):
        assert is_folder(one, "f") and names(one) == ["f/"] and names(one, "f") == []
    other.remove_folder("f")
    assert keys(world) == [REMOVED]
    for one in (machine, other):
        assert one.lookup("f") is None and names(one) == []


def test_folders_in_folders(world: World) -> None:
    machine = world.machine()
    machine.make_folder("f")
    machine.make_folder("f/g")
    assert names(machine) == ["f/"] and names(machine, "f") == ["g/"] and names(machine, "f/g") == []
    assert refused_as_not_empty(machine, "f")
    machine.remove_folder("f/g")
    assert names(machine, "f") == [] and is_folder(machine, "f")
    machine.remove_folder("f")
    assert names(machine) == [] and MARK not in keys(world)


def test_a_folder_below_a_root(world: World) -> None:
    """A mounted prefix: the mark lies below it."""
    inside = Catalog(world.store, world.runtime, world.machine()._config, "in")
    world.machines.append(inside)
    inside.make_folder("f")
    assert keys(world) == ["in/" + MARK] and names(inside) == ["f/"]
    fill(inside, "f/a.db")
    inside.remove("f/a.db")
    inside.remove_folder("f")
    assert names(inside) == [] and inside.lookup("f") is None and names(world.machine(), "in") == []


def test_the_last_database_leaves_its_folder(world: World) -> None:
    """Whether somebody made the folder or it came with the database: `rm f/*` is no `rmdir f`."""
    machine, other = world.machine(), world.machine()
    machine.make_folder("f")
    for folder in ("f", "g"):
        fill(machine, f"{folder}/a.db")
        assert refused_as_not_empty(machine, folder)
        machine.remove(f"{folder}/a.db")
        for one in (machine, other):
            assert is_folder(one, folder) and names(one) == [f"{folder}/"] and names(one, folder) == []
        other.remove_folder(folder)


@pytest.mark.parametrize("name", ["a.db", "-a.db", "a", "~"])
def test_what_deletions_leave_behind_is_no_folder(world: World, name: str) -> None:
    """Tombstones stay for ever. A removed folder with such is gone everywhere, until it is made or used again."""
    machine, other = world.machine(), world.machine()
    fill(machine, f"f/{name}")
    machine.remove(f"f/{name}")
    machine.remove_folder("f")
    assert f"f/{name}/head" in keys(world) and MARK not in keys(world)
    for again in ("make", "fill", "make and fill"):
        for one in (machine, other):
            assert one.lookup("f") is None and names(one) == [], again
            with pytest.raises(DatabaseNotFound):
                one.remove_folder("f")
        if "make" in again:
            machine.make_folder("f")
        if "fill" in again:
            fill(machine, "f/b.db")
        for one in (machine, other):
            assert is_folder(one, "f") and names(one) == ["f/"] and names(one, "f") == ["b.db"] * ("fill" in again)
        if "fill" in again:
            other.remove("f/b.db")
        if "make" in again:
            other.remove_folder("f")  # else it was no more than the prefix of its database


def test_removed_folders_inside_a_removed_folder(world: World) -> None:
    machine, other = world.machine(), world.machine()
    fill(machine, "f/g/a.db")
    machine.remove("f/g/a.db")
    assert refused_as_not_empty(machine, "f")
    machine.remove_folder("f/g")
    assert is_folder(other, "f") and names(other, "f") == []
    other.remove_folder("f")
    assert names(machine) == [] and machine.lookup("f") is None is machine.lookup("f/g")
    fill(other, "f/g/b.db")
    assert names(machine) == ["f/"] and names(machine, "f") == ["g/"]


def test_a_folder_with_a_journal_is_not_empty(world: World) -> None:
    machine = world.machine()
    machine.make_folder("f")
    machine.side_files.create("f/a.db-journal")
    assert refused_as_not_empty(machine, "f")
    machine.side_files.remove("f/a.db-journal")
    machine.remove_folder("f")


def test_what_cannot_be_made(world: World) -> None:
    """What exists, what would be taken for a database or a journal, what is no name; nothing is written."""
    machine = world.machine()
    fill(machine, "plain")
    fill(machine, "in/side.db")
    make_nameless(world, "acme")
    fill(machine, "deleted")
    machine.remove("deleted")
    before = keys(world)
    for path in ("plain", "in", "in/side.db", "acme", "acme.sqlite", ""):
        with pytest.raises(DatabaseExists):
            machine.make_folder(path)
    for path in (
        "deleted",
        "new.db",
        "in/new.sqlite3",
        "x.db-journal",
        "..",
        ".s3blockfs",
        "in/.s3blockfs",
        "a//b",
        "nul\0",
        "x" * 256,
    ):
        with pytest.raises(UsageError):
            machine.make_folder(path)
    assert keys(world) == before


def test_what_cannot_be_removed(world: World) -> None:
    machine = world.machine()
    fill(machine, "f/a.db")
    with pytest.raises(NotADirectoryError):
        machine.remove_folder("f/a.db")
    for path in ("nowhere", "f/nowhere", ".s3blockfs"):
        with pytest.raises(DatabaseNotFound):
            machine.remove_folder(path)
    with pytest.raises(OSError, match="root") as caught:
        machine.remove_folder("")
    assert caught.value.errno == errno.EBUSY


def test_read_only(world: World) -> None:
    world.machine().make_folder("f")
    machine = world.machine(read_only=True)
    for act in (lambda: machine.make_folder("g"), lambda: machine.remove_folder("f")):
        with pytest.raises(ReadOnly):
            act()
    assert keys(world) == [MARK] and names(machine) == ["f/"]


@pytest.mark.parametrize("site", ["folder", "mark-folder", "mark-deleted"])
def test_an_outage_is_an_error_and_no_half(world: World, site: str) -> None:
    """The folder is there or not, as before; once the store answers it can be made and removed."""
    machine = world.machine()
    fill(machine, "f/a.db")
    machine.remove("f/a.db")

    def rule(call: Call, when: str) -> None:
        if call.site == site and when == "before":
            raise StoreUnavailable("down")

    for there, act in ((True, machine.remove_folder), (False, machine.make_folder)):
        world.store.rule = rule
        if (there, site) != (True, "mark-folder") and (there, site) != (False, "mark-deleted"):
            with pytest.raises(StoreUnavailable):
                act("f")
            world.store.rule = None
            assert is_folder(machine, "f") == there == (names(machine) == ["f/"])
        world.store.rule = None
        if is_folder(machine, "f") == there:
            act("f")
        assert is_folder(machine, "f") != there


def test_an_alias_is_no_dead_link_when_its_exact_name_was_deleted(world: World) -> None:
    """`acme` beside a deleted `acme.sqlite`, whose name means nothing any more: shown and found as `acme`."""
    make_nameless(world, "acme", b"alias")
    machine = world.machine()
    fill(machine, "acme.sqlite", b"exact")
    for exact, shown in ((True, ["acme", "acme.sqlite"]), (False, ["acme"])):
        assert names(machine) == shown
        entry = machine.lookup("acme")
        assert entry is not None and entry.shown_as is None
        assert read(machine, "acme") == b"alias"
        if exact:
            machine.remove("acme.sqlite")


def test_made_anew_after_a_deletion_elsewhere(world: World) -> None:
    """A creation over another machine's tombstone is a new database, whatever is still known here of the old one."""
    machine, other = world.machine(), world.machine()
    fill(machine, "idle.db", b"old")
    fill(machine, "held.db", b"old")
    held = machine.open("held.db")
    for path in ("idle.db", "held.db"):
        other.remove(path)
        fill(machine, path, b"new")
        assert read(machine, path) == read(other, path) == b"new"
    assert held.is_gone and held.read(0, 9) == b"old"
    with pytest.raises(DatabaseGone):
        held.write(0, b"x")
    machine.release(held)


def test_a_listing_of_10000_databases_asks_for_lists_only(world: World) -> None:
    for number in range(10_000):
        world.store.inner.put(f"f/{number}.sqlite/head", b"", site="test")
    machine = world.machine()
    before = len(world.store.calls)
    assert len(machine.listing("f")) == 10_000
    assert {call.operation for call in world.store.calls[before:]} == {"LIST"}


def test_what_a_copy_that_died_left_is_no_folder(world: World) -> None:
    """Objects without a head: the copy can be made again, by mv as well. A folder beside them is one all the same."""
    machine = world.machine()
    fill(machine, "a.db")
    for name in ("acme", "other", "f"):
        world.store.inner.put(ObjectRef(0, bytes(8), bytes(8)).key(name), b"copied")
    fill(machine, "f/b.db")
    assert is_folder(machine, "f")
    machine.copy("a.db", "acme")
    machine.rename("a.db", "other")
    assert read(machine, "acme") == read(machine, "other")


def test_a_database_above_one_that_is_in_use(world: World) -> None:
    """Known before or made meanwhile, it is a file for everybody who can see it is there."""
    machine = world.machine()
    fill(machine, "a")
    below = machine.connection("a/b", "side", create=True)
    entry = machine.lookup("a")
    assert entry is not None and not entry.is_folder
    machine.remove("a")
    entry = machine.lookup("a")
    assert entry is not None and entry.is_folder
    machine.release(below)
