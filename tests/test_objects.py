"""SQLite files that are plain objects: read-only databases in process and on a mount, and imported from there."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import apsw
import pytest
from commanding import commanded, run
from engine import World
from inprocess import rows

import s3blockfs
from s3blockfs import errors, vfs
from s3blockfs.catalog import Catalog
from s3blockfs.objectfile import BLOCK_BYTES
from s3blockfs.vfs import S3VFS

ADVICE = "s3blockfs import"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Whatever bucket a command or connection names is the one of this world."""
    with commanded(monkeypatch) as made:
        machine = made.machine(refresh_s=1.0)
        monkeypatch.setattr(vfs, "engine", lambda *_: machine)
        yield made


def sqlite_file(*values: int, wal: bool = False, padding: int = 0) -> bytes:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE t(x)")
        db.executemany("INSERT INTO t VALUES (?)", [(value,) for value in values])
        db.execute("CREATE TABLE big AS SELECT ? AS b", (Random(values[0]).randbytes(padding),))
        db.commit()
        data = bytearray(db.serialize())
    if wal:
        data[18:20] = b"\2\2"
    return bytes(data)


def put(world: World, key: str, body: bytes) -> None:
    world.store.inner.put(key, body)


def names(machine: Catalog, folder: str = "") -> dict[str, bool]:
    """What is listed, and whether it is a plain object."""
    return {name + "/" * entry.is_folder: entry.is_fixed for name, entry in machine.listing(folder)}


def make(world: World, name: str, value: int) -> None:
    S3VFS.over(world.machine(faulty=False)).deserialize_iter(name, [sqlite_file(value)])


def connect(**options: Any) -> apsw.Connection:
    return s3blockfs.connect(bucket="any", **options)


# --- names -------------------------------------------------------------------------------------------------


def test_listings_show_objects_and_ask_for_none(world: World) -> None:
    for key in ("a.sqlite", "notes.txt", "f/b.db", "f/g/c.sqlite3", "noname", "f/.db", "f/x.sqlite-wal"):
        put(world, key, b"x" * len(key))
    make(world, "real.sqlite", 1)
    machine = world.machine(refresh_s=1.0)
    world.store.calls.clear()
    listed = dict(machine.listing(""))
    assert {name: entry.is_fixed for name, entry in listed.items() if not entry.is_folder} == {
        "a.sqlite": True,
        "real.sqlite": False,
    }
    entry = listed["a.sqlite"]
    assert (entry.size, entry.modified_s) == (8, world.store.inner.server_time_s())
    assert machine.lookup("a.sqlite") == entry
    assert [call.operation for call in world.store.calls if call.key.startswith("a.sqlite")] == []
    assert names(machine, "f") == {"b.db": True, ".db": True, "g/": False}
    assert names(machine, "f/g") == {"c.sqlite3": True}
    for path, size in (("f/b.db", 6), ("f/g/c.sqlite3", 13)):  # by another machine, which listed nothing
        found = world.machine().lookup(path)
        assert found and found.is_fixed and found.size == size
    assert world.machine().lookup("notes.txt") is None is world.machine().lookup("noname")


def test_a_database_wins_over_an_object_of_its_name(world: World) -> None:
    for name in ("both.sqlite", "acme", "gone.sqlite"):
        make(world, name, 2)
    for key in ("both.sqlite", "acme.sqlite", "gone.sqlite"):
        put(world, key, sqlite_file(1))
    world.machine().remove("gone.sqlite")
    machine = world.machine()
    assert names(machine) == {"both.sqlite": False, "acme.sqlite": False, "gone.sqlite": True}
    for name, fixed in names(machine).items():
        entry = machine.lookup(name)
        assert entry is not None and entry.is_fixed == fixed, name


def test_a_new_object_is_seen_after_the_refresh_interval(world: World) -> None:
    machine = world.machine(refresh_s=1.0)
    assert machine.lookup("f/a.db") is None
    put(world, "f/a.db", b"one")
    world.runtime.sleep(2)
    assert machine.lookup("f/a.db").size == 3
    put(world, "f/a.db", b"other")
    assert machine.lookup("f/a.db").size == 3
    world.runtime.sleep(2)
    assert machine.lookup("f/a.db").size == 5
    world.store.inner.delete(["f/a.db"])
    world.runtime.sleep(2)
    assert machine.lookup("f/a.db") is None


def test_every_change_is_refused(world: World) -> None:
    put(world, "f/a.db", sqlite_file(1))
    make(world, "f/other.db", 2)
    machine = world.machine()
    for act in (
        lambda: machine.remove("f/a.db"),
        lambda: machine.rename("f/a.db", "f/b.db"),
        lambda: machine.rename("f/other.db", "f/a.db"),
        lambda: machine.copy("f/a.db", "f/b.db"),
        lambda: machine.copy("f/other.db", "f/a.db", overwrite=True),
        lambda: machine.rename("f", "g"),
        lambda: machine.open("f/a.db").truncate(0),
        lambda: machine.open("f/a.db").write(0, b"x"),
    ):
        with pytest.raises(errors.ReadOnly, match=r"f/a\.db: a plain object, read-only; `s3blockfs import"):
            act()
    with pytest.raises(errors.DatabaseExists):
        machine.make_folder("f/a.db")
    with pytest.raises(OSError, match="not empty"):
        machine.remove_folder("f")
    assert world.store.inner.get("f/a.db").body == sqlite_file(1)
    assert names(world.machine(), "f") == {"a.db": True, "other.db": False}


# --- in process --------------------------------------------------------------------------------------------


def test_queries_writes_and_attach(world: World) -> None:
    put(world, "f/what? 100% #1.db", sqlite_file(1, 2))
    put(world, "other", sqlite_file(3, wal=True))
    with closing(connect(object="f/what? 100% #1.db")) as db:
        assert rows(db) == [(1,), (2,)] and rows(db, "PRAGMA integrity_check") == [("ok",)]
        assert db.readonly("main")
        for statement in ("INSERT INTO t VALUES (5)", "PRAGMA user_version=5", "DROP TABLE t", "VACUUM"):
            with pytest.raises(apsw.ReadOnlyError):
                db.execute(statement)
        db.execute("ATTACH 'file:other?object=1' AS other")
        assert rows(db, "SELECT count(*), max(b.x) FROM main.t, other.t AS b") == [(2, 3)]
    assert vfs.engine().opened() == []


def test_a_file_in_wal_mode_needs_no_log(world: World) -> None:
    put(world, "a.db", sqlite_file(1, wal=True))
    put(world, "a.db-wal", b"")
    with closing(connect(object="a.db")) as db:
        assert rows(db) == [(1,)]
    put(world, "a.db-wal", b"rows")
    with pytest.raises(apsw.CantOpenError, match="rows are in its write-ahead log"):
        connect(object="a.db")
    put(world, "a.db", sqlite_file(1))
    world.runtime.sleep(2)
    with closing(connect(object="a.db")) as db:  # in rollback mode it means nothing
        assert rows(db) == [(1,)]


def test_replaced_is_an_error_and_never_a_mixture(world: World) -> None:
    put(world, "a.db", sqlite_file(1, padding=9 * BLOCK_BYTES))
    with closing(connect(object="a.db", readahead_size=0)) as old:
        assert rows(old) == [(1,)]
        put(world, "a.db", sqlite_file(2, padding=9 * BLOCK_BYTES))
        assert rows(old) == [(1,)]
        with pytest.raises(apsw.IOError, match=r"a\.db: replaced or deleted since it was opened; open it") as caught:
            rows(old, "SELECT length(hex(b)) FROM big")
        assert isinstance(caught.value.__cause__, errors.ObjectReplaced)
        world.runtime.sleep(2)
        with closing(connect(object="a.db")) as new:
            assert rows(new) == [(2,)] and rows(new, "SELECT length(b) FROM big") == [(9 * BLOCK_BYTES,)]
        assert rows(old) == [(1,)]


def test_arguments(world: World) -> None:
    put(world, "a.db", sqlite_file(1))
    for wrong in ({}, {"name": "a", "object": "a.db"}, {"object": "a.db", "at": 3}):
        with pytest.raises(errors.UsageError, match="name a database"):
            connect(**wrong)
    for name in ("none.db", "a.db/", "f//a.db"):
        with pytest.raises(apsw.CantOpenError):
            connect(object=name)
    put(world, "text.db", b"no database")
    with closing(connect(object="text.db")) as db, pytest.raises(apsw.NotADBError):
        rows(db)


def test_no_empty_database_is_made_over_an_object(world: World) -> None:
    put(world, "a.db", sqlite_file(1))
    with pytest.raises(apsw.CantOpenError, match=r"a plain object, read-only; open it with connect\(object=\.\.\.\)"):
        connect(name="a.db")
    with pytest.raises(errors.ReadOnly):
        make(world, "a.db", 2)
    assert [entry.key for entry in world.store.inner.list("")] == ["a.db"]


def test_a_point_query_and_a_scan(world: World) -> None:
    """One request opens it, one more reads ahead of the first pages; who reads on gets megabytes at a time."""
    put(world, "a.db", sqlite_file(*range(100), padding=200 * BLOCK_BYTES))
    with closing(connect(object="a.db")) as db:
        assert rows(db, "SELECT count(*) FROM t") == [(100,)] and len(world.store.calls) <= 2
        assert rows(db, "SELECT length(hex(b)) FROM big") == [(400 * BLOCK_BYTES,)]
        assert len(world.store.calls) < 20
        lengths = [call.operation for call in world.store.calls]
        assert set(lengths) == {"GET"}


# --- import ------------------------------------------------------------------------------------------------


def content(world: World, name: str, folder: Path) -> list[Any]:
    (folder / "copy").write_bytes(world.content(name))
    with closing(sqlite3.connect(folder / "copy")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return db.execute("SELECT x FROM t").fetchall()


def test_import(world: World, capsys: Any, tmp_path: Path) -> None:
    put(world, "f/a.db", sqlite_file(1, 2, padding=3 << 20, wal=True))
    assert run(capsys, "import", "s3://any/f/a.db", "bucket/new.db") == (0, "")
    assert content(world, "new.db", tmp_path) == [(1,), (2,)]
    code, shown = run(capsys, "import", "s3://any/f/a.db", "bucket/new.db")
    assert code == 7 and "overwrite it with --force" in shown
    put(world, "f/a.db", sqlite_file(3))
    assert run(capsys, "import", "s3://any/f/a.db", "bucket/new.db", "--force") == (0, "")
    assert content(world, "new.db", tmp_path) == [(3,)]


def test_import_under_the_name_of_the_object(world: World, capsys: Any, tmp_path: Path) -> None:
    """The object stays, and from then on the database is what is shown; another import takes the object again."""
    put(world, "a.db", sqlite_file(1))
    assert run(capsys, "import", "s3://any/a.db", "bucket/a.db") == (0, "")
    assert names(world.machine()) == {"a.db": False} and world.store.inner.get("a.db").body == sqlite_file(1)
    assert content(world, "a.db", tmp_path) == [(1,)]
    put(world, "a.db", sqlite_file(2))
    assert run(capsys, "import", "s3://any/a.db", "bucket/a.db", "--force") == (0, "")
    assert content(world, "a.db", tmp_path) == [(2,)]


def test_import_of_what_changes_meanwhile(world: World, capsys: Any) -> None:
    put(world, "a.db", sqlite_file(1, padding=40 << 20))
    replaced = sqlite_file(2, padding=40 << 20)
    seen: list[int] = []

    def rule(call: Any, when: str) -> None:
        if (call.site, when) == ("block", "after") and call.key == "a.db":
            seen.append(1)
            if len(seen) == 2:
                put(world, "a.db", replaced)

    world.store.rule = rule
    code, shown = run(capsys, "import", "s3://any/a.db", "bucket/new.db")
    world.store.rule = None
    assert (code, "replaced or deleted since" in shown) == (7, True), shown
    assert "new.db" not in names(world.machine())


def test_what_cannot_be_imported(world: World, capsys: Any) -> None:
    put(world, "text", b"SQLite format 4\n" * 100)
    put(world, "short", sqlite_file(1, padding=100_000)[:-4096])
    put(world, "wal", sqlite_file(1, wal=True))
    put(world, "wal-wal", b"rows")
    for name, code in (("text", 2), ("short", 2), ("none", 3), ("wal", 1)):
        assert run(capsys, "import", f"s3://any/{name}", "bucket/new.db")[0] == code, name
    assert names(world.machine()) == {}


def test_commands_say_what_it_is(world: World, capsys: Any) -> None:
    put(world, "a.db", sqlite_file(1))
    for command in ("info", "check", "history", "rm"):
        code, shown = run(capsys, command, "bucket/a.db")
        assert code == 4 and ADVICE in shown, command
    assert run(capsys, "ls", "bucket") == (0, "a.db\n")
    assert f"{len(sqlite_file(1))}" in run(capsys, "ls", "-l", "bucket")[1]
    assert '"type": "object"' in run(capsys, "ls", "--json", "bucket")[1]
