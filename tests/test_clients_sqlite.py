"""Clients that come with SQLite itself: its command line, Python's sqlite3, APSW. (docs/CLIENTS.md has all clients.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from clienting import Desks, run, running, said_until_killed
from mounting import Place, fresh_name, mounted, numbers, shell, sqlite

pytestmark = pytest.mark.mount

#: A little of everything that a database can hold.
SCHEMA = """
    CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT NOT NULL, price REAL, photo BLOB, total AS (price * 1.2));
    CREATE TABLE pair(a, b, PRIMARY KEY(a, b)) WITHOUT ROWID;
    CREATE INDEX by_name ON item(name COLLATE NOCASE) WHERE price > 1;
    CREATE VIEW dear AS SELECT name FROM item WHERE price > 400;
    CREATE TRIGGER noted AFTER INSERT ON item BEGIN INSERT INTO pair VALUES (new.id, new.name); END;
    CREATE VIRTUAL TABLE words USING fts5(text);
    INSERT INTO item(id, name, price, photo)
        SELECT i, 'it''s ' || i || char(10, 233), i / 3.0, CASE WHEN i % 2 THEN randomblob(i) END FROM
        (WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<1500) SELECT i FROM n);
    INSERT INTO words SELECT 'the ' || name FROM item;
"""
SUMS = "SELECT count(*), sum(price), sum(total), sum(length(photo)), count(DISTINCT photo) FROM item"


@pytest.fixture
def name() -> str:
    return fresh_name()


@pytest.fixture
def filled(desks: Desks, name: str) -> str:
    """A database on the mount; its content as SQLite itself sums it up."""
    sqlite(desks.here / name, SCHEMA)
    return content(desks.here / name)


def content(path: Path) -> str:
    return sqlite(path, ".sha3sum --schema", SUMS)


# --- the command line ----------------------------------------------------------------------------------------


def test_cli_backup_and_restore(desks: Desks, name: str, filled: str, tmp_path: Path) -> None:
    """`.backup` from the mount, `.restore` into it, `.backup` from a local file to the mount, `.clone` on it."""
    sqlite(desks.here / name, f".backup {tmp_path / 'copy.db'}")
    assert content(tmp_path / "copy.db") == filled
    sqlite(tmp_path / "copy.db", f".backup {desks.here / ('b' + name)}")
    sqlite(desks.here / ("r" + name), "CREATE TABLE other(a)", f".restore {tmp_path / 'copy.db'}")
    for copy in ("b" + name, "r" + name):
        assert desks.told(copy, ".sha3sum --schema", SUMS) == filled
    assert shell("cmp", tmp_path / "copy.db", desks.there / ("b" + name)).returncode == 0
    simple, clone = desks.here / ("s" + name), desks.here / ("c" + name)  # `.clone` knows no generated columns
    sqlite(simple, "CREATE TABLE item(id PRIMARY KEY, data)", f"INSERT INTO item SELECT i, i * i FROM ({numbers(99)})")
    sqlite(simple, f".clone {clone}")
    assert desks.told("c" + name, ".sha3sum --schema") == sqlite(simple, ".sha3sum --schema")


def test_cli_dump_and_import(desks: Desks, name: str, filled: str, tmp_path: Path) -> None:
    """`.dump` into the shell on another name, also from the other machine; `.import` and `.output` of CSV."""
    for copy, source in (("d" + name, desks.here / name), ("e" + name, desks.there / name)):
        desks.told(name)
        script = tmp_path / "script.sql"
        sqlite(source, f".output {script}", ".dump")
        with script.open() as text:
            done = shell("sqlite3", "-bail", desks.here / copy, stdin=text)
        assert (done.returncode, done.stderr) == (0, "")
        assert desks.told(copy, SUMS, "SELECT count(*) FROM words('it')") == f"{filled.splitlines()[-1]}\n1500"
    lines = tmp_path / "items.csv"
    sqlite(desks.here / name, ".mode csv", ".headers on", f".once {lines}", "SELECT id, name, price FROM item")
    sqlite(desks.here / name, f".import --csv {lines} again")
    same = "SELECT count(*) FROM item JOIN again USING (id, name) WHERE abs(item.price - again.price) < 0.0001"
    assert desks.told(name, same) == "1500"


def test_cli_vacuum_into_a_name_on_the_mount(desks: Desks, name: str, filled: str, tmp_path: Path) -> None:
    """From the mount and from a local file, and never over what is there; VACUUM itself shrinks it everywhere."""
    sqlite(desks.here / name, f"VACUUM INTO '{desks.here / ('v' + name)}'", f"VACUUM INTO '{tmp_path / 'copy.db'}'")
    sqlite(tmp_path / "copy.db", f"VACUUM INTO '{desks.here / ('w' + name)}'")
    for copy in ("v" + name, "w" + name):
        assert desks.told(copy, ".sha3sum --schema", SUMS) == filled
    said = sqlite(desks.here / name, f"VACUUM INTO '{desks.here / ('v' + name)}'", check=False)
    assert "output file already exists" in said
    before = int(desks.told(name, "PRAGMA page_count"))
    sqlite(desks.here / name, "DELETE FROM item WHERE id > 100", "VACUUM")
    assert int(desks.told(name, "PRAGMA page_count")) < before / 2


def test_cli_archive(desks: Desks, name: str, tmp_path: Path) -> None:
    """A folder into an archive on the mount, updated, listed and unpacked on the other machine."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    (source / "text").write_text("words\n" * 50_000)
    (source / "sub" / "random").write_bytes(os.urandom(300_000))
    (source / "sub" / "program").write_text("#!/bin/sh\n")
    (source / "sub" / "program").chmod(0o750)
    made = shell("sqlite3", desks.here / name, "-A", "--create", "text", "sub", cwd=source)
    assert (made.returncode, made.stderr) == (0, "")
    (source / "text").write_text("other words\n")
    os.utime(source / "text", (2e9, 2e9))  # it looks for whole seconds
    made = shell("sqlite3", desks.here / name, "-A", "--update", "text", "sub", cwd=source)
    assert (made.returncode, made.stderr) == (0, "")
    assert desks.told(name, ".archive --list").split() == ["sub", "sub/program", "sub/random", "text"]
    done = shell("sqlite3", desks.there / name, "-A", "--extract", cwd=target)
    assert (done.returncode, done.stderr) == (0, "")
    assert shell("diff", "-r", source, target).stdout == ""
    assert (target / "sub" / "program").stat().st_mode & 0o777 == 0o750


def test_cli_and_wal(desks: Desks, name: str) -> None:
    """There and back; a second shell reads what was there before beside an open transaction of the first."""
    here = desks.here / name
    sqlite(here, "CREATE TABLE t(a)", "INSERT INTO t VALUES (1)")
    assert sqlite(here, "PRAGMA journal_mode=WAL") == "wal"
    beside = f".shell sqlite3 {here} 'PRAGMA journal_mode; SELECT count(*) FROM t'"
    assert sqlite(here, "BEGIN IMMEDIATE", "INSERT INTO t VALUES (2)", beside, "COMMIT") == "wal\n1"
    assert desks.told(name, "PRAGMA journal_mode", "SELECT a FROM t") == "wal\n1\n2"
    assert sqlite(here, "PRAGMA journal_mode=DELETE", "INSERT INTO t VALUES (3)") == "delete"
    assert desks.told(name, "PRAGMA journal_mode", "SELECT count(*) FROM t") == "delete\n3"


def test_cli_when_the_daemon_is_killed(place: Place, tmp_path: Path) -> None:
    """The shell ends with an error; what it had committed is on a machine that has nothing but S3, and it goes on."""
    script = tmp_path / "script.sql"
    with script.open("w") as file:
        for i in range(1, 5000):
            print(f"BEGIN; INSERT INTO t VALUES ({i}); INSERT INTO t VALUES ({i}); COMMIT; SELECT {i};", file=file)
    with mounted(place, tmp_path, "--lease", "1") as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(a)")
        line = ["stdbuf", "-oL", "sqlite3", "-batch", "-bail", mount / "a.db"]
        with (
            script.open() as statements,
            running(line, stdin=statements, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shell_,
        ):
            last = int(said_until_killed(shell_, mount)[-1])
            assert shell_.wait() != 0 and shell_.stderr is not None
            assert "disk I/O error" in shell_.stderr.read()
    with mounted(place, tmp_path, "--lease", "1") as mount:
        whole = f"SELECT count(*) = 2 * max(a) AND max(a) BETWEEN {last} AND {last} + 1 FROM t"
        assert sqlite(mount / "a.db", "PRAGMA integrity_check", whole) == "ok\n1"
        sqlite(mount / "a.db", ".timeout 30000", f"INSERT INTO t {numbers(10)}")


# --- Python's sqlite3 ------------------------------------------------------------------------------------------


def test_sqlite3_context_manager(desks: Desks, name: str) -> None:
    assert run("sqlite3", "context_manager", desks.here / name) == [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]
    assert desks.told(name, "SELECT * FROM note") == "1|one\n2|two"


def test_sqlite3_backup(desks: Desks, name: str, tmp_path: Path) -> None:
    """A backup that is overtaken by a commit begins again, as with any file, and has the commit."""
    second = "b" + name
    done = run("sqlite3", "backup", desks.here / name, tmp_path / "copy.db", desks.here / second)
    assert done["rows"] == 201 and done["went back"] and done["steps"] > 6
    for each in (name, second):
        assert desks.told(each, "SELECT count(*), max(hex(b)) FROM t").startswith("201|C8")


def test_sqlite3_iterdump(desks: Desks, name: str) -> None:
    one, two, tall = run("sqlite3", "iterdump", desks.here / name, desks.here / ("d" + name))
    assert one == two and "INSERT INTO \"person\" VALUES(1,'Zoë',X'00FF10',1.91);" in one
    assert tall == [["Zoë"]]
    assert desks.told("d" + name, "SELECT id, name, hex(photo) FROM person WHERE id < 3") == "1|Zoë|00FF10\n2|it's|"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Connection.blobopen came with Python 3.11")
def test_sqlite3_blobs(desks: Desks, name: str) -> None:
    assert run("sqlite3", "blobs", desks.here / name) == [3_000_000, "\0in the middle", "\0end"]
    parts = "SELECT substr(data, 2000001, 13), substr(data, -3), length(replace(hex(data), '00', '')) FROM file"
    assert desks.told(name, parts) == "in the middle|end|32"


def test_sqlite3_functions(desks: Desks, name: str) -> None:
    assert run("sqlite3", "functions", desks.here / name) == {
        "found": [["caa", "aac"]],
        "by the index": True,
        "longest": "caa",
        "sorted": ["caa", "ba", "ab"],
    }


def test_sqlite3_threads(desks: Desks, name: str) -> None:
    assert run("sqlite3", "threads", desks.here / name, "5", "10") == [[], [["common", 50], ["own", 50]]]
    assert desks.told(name, "SELECT name, n FROM counter ORDER BY name") == "common|50\nown|50"


def test_sqlite3_read_only(desks: Desks, name: str) -> None:
    assert run("sqlite3", "read_only", desks.here / name) == [[[1]], "attempt to write a readonly database"]


def test_sqlite3_and_wal(desks: Desks, name: str) -> None:
    """What a second connection sees beside an open transaction; after it; and a second machine, all still open."""
    assert run("sqlite3", "wal", desks.here / name, desks.there / name) == ["wal", [1], [1, 2], [1, 2]]
    assert desks.told(name, "PRAGMA journal_mode", "SELECT a FROM t") == "wal\n1\n2"


# --- APSW ----------------------------------------------------------------------------------------------------


def test_apsw_transactions(desks: Desks, name: str) -> None:
    assert run("apsw", "transactions", desks.here / name) == [[1, "one"], [2, "two"]]
    assert desks.told(name, "SELECT * FROM note") == "1|one\n2|two"


def test_apsw_backup_and_blobs(desks: Desks, name: str) -> None:
    steps, data, sound = run("apsw", "backup_and_blobs", desks.here / name, desks.here / ("b" + name))
    assert (data, sound) == ("here", "ok") and steps > 3
    assert desks.told("b" + name, "SELECT length(data), substr(data, 200001, 4) FROM file") == "300000|here"


def test_apsw_full_text_and_virtual_tables(desks: Desks, name: str) -> None:
    assert run("apsw", "full_text", desks.here / name) == [[["a"]], [["a", 1]]]
    assert desks.told(name, "SELECT title FROM page('sleep')", "SELECT count(*) FROM page") == "b\n502"


def test_apsw_and_wal(desks: Desks, name: str) -> None:
    """`apsw.bestpractice.recommended` includes WAL; all of it works."""
    assert run("apsw", "best_practice", desks.here / name) == ["wal", 1, [[1]], [[1], [2]]]
    assert desks.told(name, "PRAGMA journal_mode", "SELECT a FROM t") == "wal\n1\n2"
