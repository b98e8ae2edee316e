"""Names, aliases, listings, creation and deletion, in buckets that others fill with anything."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine import CONFIG, Call, InlineRuntime, World, sqlite_page

from s3blockfs.catalog import Catalog
from s3blockfs.errors import (
    DamagedObject,
    DatabaseExists,
    DatabaseGone,
    DatabaseNotFound,
    OutcomeUnknown,
    ReadOnly,
    RequestInDoubt,
    S3BlockFSError,
    StoreUnavailable,
    UsageError,
)


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


def fill(machine: Catalog, path: str, content: bytes = b"content") -> None:
    database = machine.create(path, exclusive=True)
    database.write(0, content)
    database.close_handle(0)
    machine.release(database)


def read(machine: Catalog, path: str) -> bytes:
    database = machine.open(path)
    try:
        return database.read(0, database.size)
    finally:
        machine.release(database)


def put(world: World, key: str, body: bytes = b"x") -> None:
    world.store.inner.put(key, body, site="test")


def make_nameless(world: World, prefix: str, content: bytes = b"content") -> None:
    """As if made in process, or adopted: the head records no file name."""
    fill(world.machine(faulty=False), prefix, content)
    heads = world.heads(prefix, faulty=False)
    version = heads.read()
    assert version is not None
    heads.swap(version, lambda replaced: replace(replaced, name=None))


def names(machine: Catalog, folder: str = "") -> list[str]:
    return [name + "/" * entry.is_folder for name, entry in machine.listing(folder)]


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a.sqlite", "plain", "f/g/deep.db", "spaces and ünïcödé.db3", "x.txt", "a\nb\\%2F"])
def test_a_name_is_kept_exactly(world: World, path: str) -> None:
    """What was created under a name is found, listed and opened under it, here and elsewhere, and under no other."""
    fill(world.machine(), path)
    folder, _, name = path.rpartition("/")
    for machine in (world.machine(), *world.machines[:1]):
        entry = machine.lookup(path)
        assert entry is not None and (entry.prefix, entry.is_folder, entry.size) == (path, False, 7)
        assert names(machine, folder) == [name]
        assert read(machine, path) == b"content"
        assert machine.lookup(path + ".sqlite") is None


def test_a_nameless_database_has_two_names(world: World) -> None:
    """`acme` is listed as `acme.sqlite`, found under both names, and is one database under both."""
    make_nameless(world, "t/acme")
    machine = world.machine()
    assert names(machine, "t") == ["acme.sqlite"]
    assert machine.opened_at("t/acme") is None
    by_alias, by_name = machine.open("t/acme.sqlite"), machine.open("t/acme")
    assert by_alias is by_name is machine.opened_at("t/acme") is machine.opened_at("t/acme.sqlite")
    assert by_alias.path == "t/acme"
    machine.remove("t/acme.sqlite")
    assert machine.lookup("t/acme") is None is machine.lookup("t/acme.sqlite")
    assert names(machine, "t") == []


def test_exact_names_win(world: World) -> None:
    """With `acme` and `acme.sqlite` both there, the second is what `acme.sqlite` means; none is lost from sight."""
    make_nameless(world, "acme", b"alias")
    fill(world.machine(), "acme.sqlite", b"exact")
    machine = world.machine()
    assert (read(machine, "acme.sqlite"), read(machine, "acme")) == (b"exact", b"alias")
    assert names(machine).count("acme.sqlite") == 1
    machine.remove("acme.sqlite")
    assert machine.lookup("acme.sqlite") is None  # a tombstone is exact as well
    assert read(machine, "acme") == b"alias"


def test_folders(world: World) -> None:
    """Prefixes above databases are folders, until nothing is below them; a database's own keys are no files."""
    machine = world.machine()
    fill(machine, "f/g/a.db")
    fill(machine, "f/b.db", b"x" * 300_000)
    for path, is_folder in (("", True), ("f", True), ("f/g", True), ("f/g/a.db", False)):
        entry = machine.lookup(path)
        assert entry is not None and entry.is_folder == is_folder
    for path in ("g", "f/x", "f/b.db/head", "f/b.db/nothing", "f/b", "F"):
        assert machine.lookup(path) is None, path
    assert names(machine) == ["f/"] and names(machine, "f") == ["b.db", "g/"] and names(machine, "nowhere") == []
    for path in ("f", "f/x"):
        with pytest.raises(DatabaseNotFound):
            machine.open(path)
        with pytest.raises(DatabaseNotFound):
            machine.remove(path)


def test_a_root_shows_what_is_below_it(world: World) -> None:
    """A mounted prefix: other databases are out of sight, keys carry the prefix, names do not."""
    fill(world.machine(), "in/side.db")
    fill(world.machine(), "out.db")
    inside = Catalog(world.store, world.runtime, CONFIG, "in")
    world.machines.append(inside)
    assert names(inside) == ["side.db"] and inside.lookup("out.db") is None
    assert inside.open("side.db").path == "side.db"
    fill(inside, "new.db")
    assert read(world.machine(), "in/new.db") == b"content"
    inside.remove("new.db")
    assert names(inside) == ["side.db"]


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "a//b", "/a", "a/", ".", "..", "a/../b", "a/./b", "nul\0", "x" * 256, "ü" * 128, "\udcff.db",
        "/".join(["d" * 200] * 5), ".s3blockfs", ".s3blockfs/store", "a/.s3blockfs/deleted/b", ".s3blockfs/x.db",
    ],
)  # fmt: skip
def test_names_that_cannot_be_created(world: World, path: str) -> None:
    """UsageError, nothing written; looking them up finds no database, and raises nothing."""
    machine = world.machine()
    with pytest.raises(UsageError):
        machine.create(path, exclusive=False)
    assert list(world.store.inner.list("", site="test")) == []
    entry = machine.lookup(path)
    assert entry is None or (entry.is_folder and path == "")


def test_the_longest_name(world: World) -> None:
    """Every key of the longest database that can be created fits into the 1024 bytes of S3."""
    path = "/".join(["d" * 200] * 4 + ["e" * (1024 - 48 - 804)])
    machine = world.machine()
    database = machine.create(path, exclusive=True)
    for number in range(3):
        database.write(0, sqlite_page(number, 300) + bytes([number]) * 300 * 4096)
        database.close_handle(0)
    machine.release(database)
    machine.remove(path)
    keys = [listed.key for listed in world.store.inner.list("", site="test")]
    assert 1010 < max(len(key) for key in keys if key.startswith(path)) <= 1024
    with pytest.raises(UsageError):
        machine.create(path + "e", exclusive=True)


HOSTILE = [
    "/head", "//head", "../head", "./head", "f//a.db/head", "f/../b.db/head", "f/./head", "..",
    ".s3blockfs/head", ".s3blockfs/x.db/head", "f/.s3blockfs/head",
    "k" * 1000 + ".db/head", "f/" + "n" * 256 + "/head",
    "f/\u202eevil.db/head", "f/\u00a0/head", "f/ /head", "f/😀.db/head", "f/a\tb.db/head", "f/-rf.db/head",
    "file", "f/file.db", "f/half.db/data/0000000000000001-0000000000000001",
]  # fmt: skip


def test_hostile_keys(world: World) -> None:
    """Whatever others put into the bucket: listings show legal names only, and never fail."""
    fill(world.machine(), "f/good.db")
    for key in HOSTILE:
        put(world, key)
    machine = world.machine()
    assert names(machine) == ["f/"]
    found, shown = names(machine, "f"), ["good.db", "file.db", "half.db", "😀.db", "\u202eevil.db", "a\tb.db", "-rf.db"]
    assert set(shown) <= set(found)
    assert all(0 < len(name.encode()) <= 256 and name.strip("/") not in ("", ".", "..", ".s3blockfs") for name in found)
    assert machine.lookup("f/half.db") is None and (entry := machine.lookup("f/file.db")) and entry.is_fixed
    for path in ("..", "f/..", "f/.", ".s3blockfs", "f/.s3blockfs", "f//a.db", "k" * 1000 + ".db"):
        assert machine.lookup(path) is None, path
    assert read(machine, "f/good.db") == b"content"


def test_what_is_called_head_but_is_none(world: World) -> None:
    """Somebody's photos/head: its folder's listing goes on, and using it is an error that names the object."""
    fill(world.machine(), "good.db")
    put(world, "photos/head", b"\x89PNG\r\n")
    machine = world.machine()
    assert "good.db" in names(machine) and any(name.startswith("photos") for name in names(machine))
    with pytest.raises(DamagedObject, match="photos/head"):
        machine.open("photos")


# --- what listings cost ------------------------------------------------------------------------------------


def test_known_suffixes_are_listed_without_looking(world: World) -> None:
    """Two LISTs, however many databases there are, whether made here or elsewhere."""
    maker = world.machine(faulty=False)
    for suffix in ("sqlite", "sqlite3", "db", "db3", "s3db", "sl3"):
        fill(maker, f"f/a.{suffix}")
    machine = world.machine()
    for _ in range(2):
        world.store.calls.clear()
        assert len(machine.listing("f")) == 6
        assert Counter(call.operation for call in world.store.calls) == {"LIST": 2}


def test_other_names_are_looked_at(world: World) -> None:
    """One GET for each name that could be either; a folder is remembered as one."""
    maker = world.machine(faulty=False)
    for path in ("plain", "x.txt", "folder/a.db", "b.db"):
        fill(maker, path)
    machine = world.machine()
    assert names(machine) == ["b.db", "folder/", "plain", "x.txt"]
    looked_at = sorted(call.key for call in world.store.calls if call.operation == "GET")
    assert looked_at == ["folder/0000000000", "folder/head", "plain/head", "x.txt/head"]
    world.store.calls.clear()
    assert names(machine) == ["b.db", "folder/", "plain", "x.txt"]
    assert world.store.count("GET") == 2 and world.store.count("LIST") == 2


def test_looking_up_costs_one_get(world: World) -> None:
    """And nothing within the refresh interval, also for what is not there; (sqlite-s3vfs? an object?)."""
    fill(world.machine(faulty=False), "a.db")
    machine = world.machine(refresh_s=1.0)
    for path, found, gets in (("a.db", True, 1), ("b.db", False, 3)):
        world.store.calls.clear()
        for _ in range(3):
            assert (machine.lookup(path) is not None) == found
        assert len(world.store.calls) == gets, path
    fill(world.machine(faulty=False), "b.db")
    world.runtime.sleep(2)
    assert machine.lookup("b.db") is not None


# --- creation and deletion ---------------------------------------------------------------------------------


def test_create_open_and_exists(world: World) -> None:
    """`exclusive` refuses what exists; without it that is opened; one database object per prefix."""
    machine, other = world.machine(), world.machine()
    fill(machine, "a.db")
    created = machine.open("a.db")
    for one in (machine, other):
        with pytest.raises(DatabaseExists):
            one.create("a.db", exclusive=True)
        assert one.create("a.db", exclusive=False).read(0, 10) == b"content"
    assert machine.open("a.db") is created


def test_removed_is_gone_everywhere(world: World) -> None:
    """The tombstone is hidden from look-ups, listings and opening; what was not committed is dropped."""
    machine, other = world.machine(), world.machine()
    fill(machine, "f/a.db")
    fill(machine, "f/plain")
    held = machine.open("f/a.db")
    held.write(0, b"uncommitted")
    for path in ("f/a.db", "f/plain"):
        machine.remove(path)
        for one in (machine, other):
            assert one.lookup(path) is None
            with pytest.raises(DatabaseNotFound):
                one.open(path)
            with pytest.raises(DatabaseNotFound):
                one.remove(path)
    assert names(machine, "f") == names(other, "f") == []
    assert held.read(0, 20) == b"content" and held.is_gone and not held.is_dirty
    with pytest.raises(DatabaseGone):
        held.write(0, b"x")
    machine.release(held)


def test_recreated_is_another_database(world: World) -> None:
    """Created over the tombstone: empty, another id, counters going on; listed again; the old object stays gone."""
    machine, other = world.machine(), world.machine()
    fill(machine, "a.db", b"old")
    held = machine.open("a.db")
    before = held.version.head
    machine.remove("a.db")
    fill(other, "a.db", b"new")
    created = machine.open("a.db")
    head = created.version.head
    assert created is not held and created.read(0, 10) == b"new"
    assert head.id != before.id and head.seq > before.seq and head.rev > before.rev + 1
    assert head.floor == before.rev
    assert names(machine) == names(other) == ["a.db"]
    with pytest.raises(DatabaseGone):
        held.write(0, b"x")
    machine.release(held)
    assert machine.opened_at("a.db") is created


def test_recreated_here_with_the_old_one_open(world: World) -> None:
    """`rm` and `sqlite3` again while a process holds the old file: two files, and only the new one is published."""
    machine = world.machine()
    fill(machine, "a.db", b"old")
    old = machine.open("a.db")
    machine.remove("a.db")
    fill(machine, "a.db", b"new")
    new = machine.open("a.db")
    old.close_handle(0)
    machine.release(old)
    assert old.is_gone and old is not new is machine.open("a.db")
    assert read(world.machine(), "a.db") == b"new"


def test_a_closed_database_is_opened_without_loading(world: World) -> None:
    """Idle ones are kept with their heads: one conditional GET, and what changed elsewhere is seen."""
    machine = world.machine()
    fill(machine, "a.db")
    world.store.calls.clear()
    assert read(machine, "a.db") == b"content"
    assert {(call.operation, call.conditional) for call in world.store.calls} == {("GET", True)}
    database = world.machine(faulty=False).open("a.db")
    database.write(0, b"CHANGED")
    database.close_handle(0)
    assert read(machine, "a.db") == b"CHANGED"


def test_what_is_not_published_is_forgotten_with_the_last_user(world: World) -> None:
    """As the face did not publish it when the handle was flushed."""
    machine = world.machine()
    fill(machine, "a.db")
    first, second = machine.open("a.db"), machine.open("a.db")
    first.write(0, b"pending")
    machine.release(first)
    assert second.read(0, 10) == b"pending"
    machine.release(second)
    assert read(machine, "a.db") == b"content"


@pytest.mark.parametrize("over_tombstone", [False, True])
def test_exactly_one_exclusive_creator_wins(over_tombstone: bool) -> None:
    """Eight machines at once: one creates, the others get DatabaseExists; with no `exclusive` all open the same one."""
    with World() as world:
        if over_tombstone:
            fill(world.machine(), "a.db")
            world.machine().remove("a.db")
        machines = [world.machine() for _ in range(8)]
        start = threading.Barrier(8)
        results: list[str] = []

        def race(machine: Catalog, exclusive: bool) -> None:
            start.wait(30)
            try:
                database = machine.create("a.db", exclusive=exclusive)
                results.append(database.version.head.id.hex())
            except S3BlockFSError as error:
                results.append(type(error).__name__)

        for exclusive in (True, False):
            results.clear()
            threads = [threading.Thread(target=race, args=(machine, exclusive)) for machine in machines]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            counted = Counter(results)
            if exclusive:
                assert counted.pop("DatabaseExists") == 7 and list(counted.values()) == [1]
            else:
                assert list(counted.values()) == [8] and "DatabaseExists" not in counted


def test_threads_share_one_database(world: World) -> None:
    """Two threads of one machine that open at once get one object: locks and uncommitted bytes are shared."""
    machine = world.machine()
    fill(machine, "a.db")
    fresh = world.machine()
    first: list[object] = []

    def rule(call: Call, when: str) -> None:
        if call.key == "a.db/head" and when == "after" and not first:
            first.append(None)
            first[0] = fresh.open("a.db")  # another thread, just faster

    world.store.rule = rule
    assert fresh.open("a.db") is first[0]


def test_somebody_removes_first(world: World) -> None:
    """The tombstone of another machine, or a database made anew, is not mine to remove."""
    for recreate in (False, True):
        machine, other = world.machine(), world.machine(faulty=False)
        fill(other, "a.db")

        def rule(call: Call, when: str, other: Catalog = other, recreate: bool = recreate) -> None:
            if call.site == "swap" and when == "before":
                world.store.rule = None
                other.remove("a.db")
                if recreate:
                    fill(other, "a.db", b"new")

        world.store.rule = rule
        with pytest.raises(DatabaseNotFound):
            machine.remove("a.db")
        assert other.lookup("a.db") is None or read(other, "a.db") == b"new"
        if recreate:
            other.remove("a.db")


def test_a_commit_that_comes_before_the_removal(world: World) -> None:
    """Removing is no commit: it starts again on the newer head."""
    machine, other = world.machine(), world.machine(faulty=False)
    fill(machine, "a.db")

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            world.store.rule = None
            database = other.open("a.db")
            database.write(0, b"later")
            database.close_handle(0)

    world.store.rule = rule
    machine.remove("a.db")
    assert machine.lookup("a.db") is None
    head = world.heads("a.db").read()
    assert head is not None and (head.head.deleted, head.head.seq) == (True, 3)


def test_a_removal_in_an_outage(world: World) -> None:
    """A failure before the swap leaves the database as it was, listed and open; in doubt says so."""
    machine = world.machine()
    fill(machine, "a.db")
    for site, error, expected in (
        ("mark-deleted", StoreUnavailable("down"), StoreUnavailable),
        ("archive", StoreUnavailable("down"), StoreUnavailable),
        ("swap", RequestInDoubt("cut"), OutcomeUnknown),
    ):

        def rule(call: Call, when: str, site: str = site, error: S3BlockFSError = error) -> None:
            if call.site == site and when == "before":
                world.store.rule = lambda call, when: (_ for _ in ()).throw(StoreUnavailable("down"))
                raise error

        world.store.rule = rule
        with pytest.raises(expected):
            machine.remove("a.db")
        world.store.rule = None
        assert names(machine) == ["a.db"] and read(machine, "a.db") == b"content"


def test_a_creation_whose_database_is_deleted_at_once(world: World) -> None:
    """The answer was lost, another machine deleted it meanwhile: there is no database to hand out."""
    machine, other = world.machine(), world.machine(faulty=False)

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            world.store.rule = None
            other.remove("a.db")
            raise RequestInDoubt("answer lost")

    world.store.rule = rule
    with pytest.raises(S3BlockFSError):
        machine.create("a.db", exclusive=True)
    fill(machine, "a.db")
    assert read(other, "a.db") == b"content"


# --- read-only ---------------------------------------------------------------------------------------------


def test_read_only(world: World) -> None:
    """Nothing is created or removed, nothing is probed, everything is read."""
    fill(world.machine(), "a.db")
    world.store.calls.clear()
    machine = world.machine(read_only=True, only_writer=False)
    for act in (lambda: machine.create("b.db", False), lambda: machine.remove("a.db"), machine.require_writable):
        with pytest.raises(ReadOnly):
            act()
    assert (read(machine, "a.db"), names(machine), world.store.count("PUT")) == (b"content", ["a.db"], 0)


def test_the_store_is_probed_before_the_first_write_only(world: World) -> None:
    """Readers never probe; the first creation does; the answer is remembered in the bucket for other processes."""
    machine = world.machine(only_writer=False)
    assert machine.lookup("a.db") is None and world.store.count("PUT") == 0
    fill(machine, "a.db")
    assert any(call.key.startswith(".s3blockfs/") for call in world.store.calls if call.operation == "PUT")
    world.store.calls.clear()
    fill(machine, "b.db")
    fill(world.machine(only_writer=False), "c.db")
    assert not any(call.key.startswith(".s3blockfs/") for call in world.store.calls if call.operation == "PUT")
    assert names(machine) == ["a.db", "b.db", "c.db"]
