"""Past commits to look at: `.snapshots` of a mount, `at` of a connection in process."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from fcntl import F_RDLCK, F_SETLK, F_WRLCK
from pathlib import Path
from typing import Any

import apsw
import pytest
from engine import Call, World, shrink_limits
from inprocess import bucket_of, connect, key, rows
from mounting import Place, command, mounted, shell, sqlite
from scenes import Scene, same, state, store_down
from test_catalog import fill, make_nameless
from test_mount_files import client
from test_review import face, handle, wish

import s3blockfs
from s3blockfs import errors, gc, past
from s3blockfs.format.head import NamedSnapshot
from s3blockfs.history import forget, keep
from s3blockfs.locks import RESERVED_BYTE, SHARED_FIRST, SHARED_SIZE
from s3blockfs.vfs import S3VFS

A = "/.snapshots/a.db"


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """`a.db` in states 1, 2, 3, 4: commits 2 to 5."""
    shrink_limits(monkeypatch)
    with World() as world:
        scene = Scene(world)
        for number in (2, 3, 4):
            world.runtime.sleep(60)
            scene.commit_elsewhere(number, pages=40)
        yield scene


def named(scene: Scene, label: str, change: Any = keep) -> None:
    source, heads, version = scene.world.machine(faulty=False).find("a.db")
    change(source, heads, version, label)


def listed(system: Any, path: str) -> list[str]:
    return [name for name, _ in system.readdir(path)]


def opened(system: Any, path: str, flags: int = os.O_RDONLY) -> Any:
    info = handle(flags)
    system.open(path, info)
    return info


def content(system: Any, path: str) -> bytes:
    info = opened(system, path)
    try:
        data: bytes = system.read(None, 1 << 20, 0, info)
        return data
    finally:
        system.flush(None, info)
        system.release(None, info)


def refusal(system: Any, operation: str, *arguments: Any) -> str:
    with pytest.raises((OSError, errors.S3BlockFSError)) as caught:
        getattr(system, operation)(*arguments)
    return errno.errorcode[caught.value.errno]


# --- the folder of a mount ---------------------------------------------------------------------------------


def test_every_commit_is_a_file_that_stays_what_it_is(scene: Scene) -> None:
    system, _ = face(scene.machine)
    assert listed(system, A) == ["5.sqlite", "4.sqlite", "3.sqlite", "2.sqlite", "1.sqlite"]
    seen = {seq: opened(system, f"{A}/{seq}.sqlite") for seq in (2, 3, 5)}
    scene.commit_elsewhere(9, pages=2000)
    scene.machine.copy("a.db", "a.db", overwrite=True, at=3)
    for seq, pages in ((2, 3), (3, 40), (5, 40)):
        for data in (system.read(None, 1 << 20, 0, seen[seq]), content(system, f"{A}/{seq}.sqlite")):
            assert same(data, state(seq - 1, pages)), seq
    assert listed(system, A) == [f"{seq}.sqlite" for seq in range(7, 0, -1)]
    scene.machine.remove("a.db")
    assert refusal(system, "getattr", A, None) == "ENOENT" and listed(system, "/.snapshots") == []
    fill(scene.machine, "a.db")
    assert "7.sqlite" not in listed(system, A), "its past ends with it"


def test_its_attributes_are_those_of_the_commit(scene: Scene) -> None:
    system, _ = face(scene.machine)
    found = dict(system.readdir(A))
    for seq, pages in ((2, 3), (4, 40)):
        path = f"{A}/{seq}.sqlite"
        shown = system.getattr(path, None)
        assert shown == found[f"{seq}.sqlite"] == system.getattr(None, opened(system, path))
        assert (shown["st_mode"], shown["st_size"]) == (stat.S_IFREG | 0o400, pages * 4096)
        assert shown["st_mtime"] == (1000 + 60 * (seq - 2)) * 10**9
    for path in ("/.snapshots", A):
        assert system.getattr(path, None)["st_mode"] == stat.S_IFDIR | 0o500


def test_only_its_name_leads_to_the_past(scene: Scene) -> None:
    """Not a listing: `cp -r` and `find` would go through all of it. What the bucket has there is hidden by it."""
    fill(scene.machine, ".snapshots/b.db")
    fill(scene.machine, "x/y.z/.snapshots/c.db")
    make_nameless(scene.world, "x/acme")
    system, _ = face(scene.machine)
    assert listed(system, "/") == ["a.db", "x"] and listed(system, "/x/y.z") == [".snapshots"]
    assert listed(system, "/.snapshots") == [".snapshots", "a.db", "x"]
    assert listed(system, "/.snapshots/x") == ["acme.sqlite", "y.z"]
    assert listed(system, "/.snapshots/x/acme.sqlite") == ["2.sqlite", "1.sqlite"]
    assert content(system, "/.snapshots/x/acme.sqlite/2.sqlite") == b"content"
    assert content(system, "/x/y.z/.snapshots/c.db") == b"content"
    for name in ("b.db", "a.db/99.sqlite", "a.db/2", "a.db/2.sqlite/x", "a.db/monday.sqlite", "x/2.sqlite", "2.sqlite"):
        assert refusal(system, "getattr", f"/.snapshots/{name}", None) == "ENOENT", name
        # ESTALE: the kernel looks the name up anew, and then says ENOENT.
        assert refusal(system, "open", f"/.snapshots/{name}", handle(os.O_RDONLY)) in ("ENOENT", "ESTALE"), name
    for suffix in ("-journal", "-wal", "-shm"):
        assert refusal(system, "getattr", f"{A}/2.sqlite{suffix}", None) == "ENOENT"


def test_a_named_snapshot_is_a_link_to_its_commit(scene: Scene) -> None:
    """So one state is one inode, also when the label is given to another one later."""
    system, _ = face(scene.machine)
    named(scene, "monday")
    link = f"{A}/monday.sqlite"
    assert system.readlink(link) == "5.sqlite" and stat.S_ISLNK(system.getattr(link, None)["st_mode"])
    assert listed(system, A)[:2] == ["monday.sqlite", "5.sqlite"]
    named(scene, "monday", forget)
    assert refusal(system, "getattr", link, None) == "ENOENT"
    scene.commit_elsewhere(8)
    named(scene, "monday")
    assert system.readlink(link) == "6.sqlite" and same(content(system, f"{A}/6.sqlite"), state(8))


def test_labels_of_a_hostile_head_are_no_names(scene: Scene) -> None:
    _, heads, version = scene.machine.find("a.db")
    archive = next(listed.key for listed in scene.world.store.inner.list("a.db/archive/", site="test"))
    bad = tuple(NamedSnapshot(label, archive) for label in ("../up", "a/b", "", "7", "x\0"))
    heads.swap(version, lambda head: replace(head, snapshots=bad))
    assert [name for name in listed(face(scene.machine)[0], A) if not name[0].isdigit()] == []


def test_the_newest_are_listed_and_all_are_found(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "LISTED", 2)
    system, _ = face(scene.machine)
    assert listed(system, A) == ["5.sqlite", "4.sqlite"]
    assert same(content(system, f"{A}/2.sqlite"), state(1))


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT])
def test_opening_it_for_writing_is_refused(scene: Scene, flags: int) -> None:
    system, _ = face(scene.machine)
    assert refusal(system, "open", f"{A}/2.sqlite", handle(flags)) == "EROFS"
    assert same(content(system, f"{A}/2.sqlite"), state(1))


def test_nothing_is_made_or_removed_there(scene: Scene) -> None:
    system, _ = face(scene.machine)
    file, before = f"{A}/2.sqlite", scene.world.store.count("PUT")
    for operation, *arguments in (
        ("create", f"{A}/new.db", 0o600, handle()),
        ("create", f"{file}-journal", 0o600, handle()),
        ("mknod", f"{A}/new.db", stat.S_IFREG, 0),
        ("unlink", file),
        ("truncate", file, 0, None),
        ("rename", file, "/b.db"),
        ("rename", "/a.db", f"{A}/b.db"),
        ("rename", "/.snapshots", "/x"),
        ("mkdir", "/.snapshots", 0o700),
        ("mkdir", "/.snapshots/x", 0o700),
        ("rmdir", A),
        ("rmdir", "/.snapshots"),
        ("create", "/.snapshots", 0o600, handle()),
    ):
        assert refusal(system, operation, *arguments) == "EROFS", (operation, arguments)
    info = opened(system, file)
    assert refusal(system, "write", None, b"x", 0, info) == "EROFS"
    assert refusal(system, "truncate", None, 0, info) == "EROFS"
    assert scene.world.store.count("PUT") == before
    assert scene.machine.side_files.names_under("a.db") == []


def test_read_locks_are_granted_and_write_locks_are_not(scene: Scene) -> None:
    system, kernel = face(scene.machine)
    reader, other = opened(system, f"{A}/2.sqlite"), opened(system, f"{A}/2.sqlite")
    other.lock_owner = 2
    for info in (reader, other):
        system.lock(None, info, F_SETLK, wish(F_RDLCK, SHARED_FIRST, SHARED_SIZE))
    assert refusal(system, "lock", None, reader, F_SETLK, wish(F_WRLCK, RESERVED_BYTE, 1)) == "EROFS"
    assert opened(system, f"{A}/2.sqlite").keep_cache == 1
    scene.commit_elsewhere(9)
    scene.machine.open("a.db").refresh(0)
    system.lock(None, reader, F_SETLK, wish(F_RDLCK, SHARED_FIRST, SHARED_SIZE))
    assert kernel.invalidated == [] and same(system.read(None, 1 << 20, 0, other), state(1))


def test_what_is_known_is_not_asked_for_again(scene: Scene) -> None:
    system, _ = face(scene.machine)
    listed(system, A), content(system, f"{A}/3.sqlite")
    calls = scene.world.store.calls
    scene.commit_elsewhere(9)
    calls.clear()
    for _ in range(3):
        system.getattr(f"{A}/4.sqlite", None)
        content(system, f"{A}/3.sqlite")
    assert {call.site for call in calls} <= {"refresh"}, "is there still a database of that name?"
    calls.clear()
    assert listed(system, A)[0] == "6.sqlite" and "roots" in {call.site for call in calls}
    calls.clear()
    assert len(listed(system, A)) == 6 and {call.site for call in calls} == {"refresh"}


def test_few_are_kept_open(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "OPENED_KEPT", 2)
    system, _ = face(scene.machine)
    first = opened(system, f"{A}/2.sqlite")
    for seq in (3, 4, 5, 2):
        assert same(content(system, f"{A}/{seq}.sqlite"), state(seq - 1, 3 if seq == 2 else 40))
    assert same(system.read(None, 1 << 20, 0, first), state(1))
    system.flush(None, first), system.release(None, first)
    assert scene.machine.opened() == [scene.database]


def test_a_commit_that_was_collected_is_gone(scene: Scene) -> None:
    system, _ = face(scene.machine)
    info = opened(system, f"{A}/3.sqlite")
    for number in (6, 7, 8):
        scene.world.runtime.sleep(48 * 3600)
        scene.commit_elsewhere(number, pages=2000)
        source, heads, _ = scene.machine.find("a.db")
        gc.collect(source, heads, 3600)
    assert "3.sqlite" not in listed(system, A)
    assert refusal(system, "getattr", f"{A}/3.sqlite", None) == "ENOENT"
    assert refusal(system, "read", None, 1 << 20, 0, info) == "ESTALE"


def test_a_store_that_is_down_is_no_empty_past(scene: Scene) -> None:
    system, _ = face(scene.machine)
    store_down(scene.world)
    assert refusal(system, "getattr", f"{A}/3.sqlite", None) == "EREMOTEIO"
    with pytest.raises(errors.StoreUnavailable):
        listed(system, A)
    scene.world.store.rule = None
    assert len(listed(system, A)) == 5


def test_a_damaged_archive_is_named(scene: Scene) -> None:
    archives = [each.key for each in scene.world.store.inner.list("a.db/archive/", site="test")]
    scene.world.store.inner.put(archives[0], b"broken", site="test")
    with pytest.raises(errors.DamagedObject, match=archives[0]):
        listed(face(scene.machine)[0], A)


def test_a_database_of_sqlite_s3vfs_has_no_past(scene: Scene) -> None:
    """Its number stays 1 whatever that library writes; so it gets one when it is converted."""
    scene.world.store.inner.put("old.db/0000000000", state(5, 1), site="test")
    system, _ = face(scene.machine)
    assert listed(system, "/.snapshots/old.db") == []
    database = scene.machine.open("old.db")
    database.write(4096, b"x")
    database.close_handle(0)
    assert listed(system, "/.snapshots/old.db") == ["2.sqlite", "1.sqlite"]
    assert content(system, "/.snapshots/old.db/1.sqlite") == state(5, 1)


# --- in process --------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Scene]:
    """`a.db` is a real database: its table `t` holds 1 at commit 3, 2 at 4 (`monday`), and is gone at 5."""
    with World() as world:
        scene = Scene(world)
        with closing(sqlite3.connect(tmp_path / "a", isolation_level=None)) as local:
            for statement in ("CREATE TABLE t(x); INSERT INTO t VALUES (1)", "UPDATE t SET x = 2", "DROP TABLE t"):
                local.executescript(statement)
                world.runtime.sleep(60)
                scene.database.write(0, (tmp_path / "a").read_bytes())
                scene.database.truncate((tmp_path / "a").stat().st_size)
                scene.database.close_handle(0)
                if "UPDATE" in statement:
                    keep(*scene.machine.find("a.db"), "monday")
        yield scene


def at(scene: Scene, which: object, machine: Any = None) -> apsw.Connection:
    vfs = S3VFS.over(machine or scene.machine)
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
    return apsw.Connection(f"file:a.db?at={which}", flags, vfs.name)


@pytest.mark.parametrize(("which", "value"), [(3, 1), (4, 2), ("70s", 1), ("1970-01-01T00:18:50Z", 2), ("monday", 2)])
def test_a_past_state_answers_queries(real: Scene, which: object, value: int) -> None:
    with closing(at(real, which)) as connection:
        assert rows(connection) == [(value,)]
        assert rows(connection, "PRAGMA integrity_check") == [("ok",)] and connection.readonly("main")


def test_it_is_read_only_and_never_moves(real: Scene) -> None:
    with closing(at(real, 3)) as connection:
        for statement in ("INSERT INTO t VALUES (5)", "PRAGMA user_version=5", "VACUUM", "DROP TABLE t"):
            with pytest.raises(apsw.ReadOnlyError):
                connection.execute(statement)
        rows(connection, "PRAGMA journal_mode=MEMORY; PRAGMA locking_mode=EXCLUSIVE; BEGIN")
        real.commit_elsewhere(9)
        assert rows(connection) == [(1,)]
        connection.execute("COMMIT")
        assert rows(connection) == [(1,)]
    assert real.published(9)


def test_then_and_now_in_one_query(real: Scene) -> None:
    """And what was opened in the past is not taken for the newest state afterwards."""
    machine = real.world.machine(refresh_s=1e9)
    vfs = S3VFS.over(machine)
    with closing(at(real, 4, machine)) as now:
        now.execute("ATTACH 'file:a.db?at=3' AS before")
        assert rows(now, "SELECT a.x, b.x FROM main.t a, before.t b") == [(2, 1)]
    with closing(apsw.Connection("a.db", vfs=vfs.name)) as connection:
        assert rows(connection, "SELECT name FROM sqlite_schema") == []
    assert machine.opened() == []


@pytest.mark.parametrize("which", ["99", "tuesday", "1969-01-01", "9h", "nonsense!", "-1", "", "9" * 5000])
def test_what_is_not_there_cannot_be_opened(real: Scene, which: str) -> None:
    with pytest.raises(apsw.CantOpenError):
        at(real, which)
    assert real.machine.opened() == [real.database]


def test_the_store_may_be_down(real: Scene) -> None:
    def rule(call: Call, when: str) -> None:
        raise errors.StoreUnavailable("down")

    real.world.store.rule = rule
    with pytest.raises(apsw.IOError):
        at(real, 3)


@pytest.mark.s3
def test_connect_at(place: Place) -> None:
    name = "what? 100% #1.sqlite"
    with closing(connect(place, name)) as db:
        db.execute("CREATE TABLE t(x)")
        db.execute("INSERT INTO t VALUES (1)")
        done = command(place, "snapshot", "create", f"{place.target}/{name}", "full", "--endpoint-url", place.url)
        assert done.returncode == 0, done.stderr
        db.execute("DROP TABLE t")
        for which in (3, "3", "full"):
            with closing(connect(place, name, at=which)) as then:
                assert rows(then) == [(1,)]
    with pytest.raises(apsw.CantOpenError, match="no commit 99 yet"):
        connect(place, name, at=99)
    then = s3blockfs.connect(bucket=bucket_of(place), name=key(place, name), at="0s")
    assert rows(then, "SELECT count(*) FROM sqlite_schema") == [(0,)]  # and it is left open, until the end of Python


# --- a real mount ------------------------------------------------------------------------------------------


@pytest.mark.mount
def test_a_dropped_table_is_still_there(place: Place, tmp_path: Path) -> None:
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "app.sqlite", "CREATE TABLE t(x); CREATE TABLE big(b)", "INSERT INTO t VALUES ('precious')")
        sqlite(mount / "app.sqlite", "INSERT INTO big VALUES (randomblob(2000000))")
        done = command(place, "snapshot", "create", f"{place.target}/app.sqlite", "full", "--endpoint-url", place.url)
        assert done.returncode == 0, done.stderr
        old = mount / ".snapshots" / "app.sqlite"
        names = shell("ls", old).stdout.split()
        newest = max(int(name[:-7]) for name in names if name[0].isdigit())
        sqlite(mount / "app.sqlite", "DROP TABLE t", "DELETE FROM big", "VACUUM")
        for file in (old / "full.sqlite", old / f"{newest}.sqlite"):
            assert sqlite(file, "SELECT x FROM t", "PRAGMA integrity_check") == "precious\nok"
            assert sqlite(f"file:{file}?mode=ro", "SELECT length(b) FROM big") == "2000000"
            assert "readonly database" in sqlite(file, "INSERT INTO t VALUES (1)", check=False)
        assert sqlite(mount / "app.sqlite", "SELECT name FROM sqlite_schema") == "big"
        both = sqlite(
            mount / "app.sqlite", f"ATTACH '{old}/full.sqlite' AS old", "CREATE TABLE t AS SELECT * FROM old.t"
        )
        assert both == "" and sqlite(mount / "app.sqlite", "SELECT x FROM t") == "precious"
        assert shell("ls", "-A", mount.directory).stdout == "app.sqlite\n"
        script = f"""
os.chdir(".snapshots/app.sqlite")
old, new = "{newest}.sqlite", max((n for n in os.listdir() if n[0].isdigit()), key=lambda n: int(n[:-7]))
for name, act, *arguments in (
    ("write", os.open, old, os.O_RDWR), ("truncate", os.open, old, os.O_RDONLY | os.O_TRUNC),
    ("truncate(2)", os.truncate, old, 0), ("create", os.open, "x.db", os.O_RDWR | os.O_CREAT),
    ("unlink", os.unlink, old), ("rename", os.rename, old, "x"), ("rename away", os.rename, old, "../../x.db"),
    ("rename into", os.rename, "../../app.sqlite", "x"), ("mkdir", os.mkdir, "x"),
    ("journal", os.open, old + "-journal", os.O_RDWR | os.O_CREAT), ("none", os.stat, "99.sqlite"),
):
    result[name] = errno_of(act, *arguments)
with open(old, "rb") as first, open(new, "rb") as second:
    inodes = [os.fstat(file.fileno()).st_ino for file in (first, second)]
    result["inodes"] = len({{*inodes, os.stat("../../app.sqlite").st_ino}})
    result["stat"] = os.fstat(first.fileno()) == os.stat(old) and os.stat(old).st_size == len(first.read())
    fcntl.lockf(first, fcntl.LOCK_SH | fcntl.LOCK_NB)
result["link"] = os.readlink("full.sqlite") == old
"""
        changes = ("write", "truncate", "truncate(2)", "create", "unlink", "rename", "mkdir", "journal")
        refused = dict.fromkeys((*changes, "rename away", "rename into"), "EROFS") | {"none": "ENOENT"}
        assert client(mount.directory, script) == {**refused, "inodes": 3, "stat": True, "link": True}
