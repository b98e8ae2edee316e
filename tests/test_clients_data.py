"""Clients for data: SQLAlchemy, pandas, DuckDB, sqlite-utils. (docs/CLIENTS.md has all clients.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clienting import PROGRAMS, Desks, again, module, run, running, said_until_killed
from mounting import Place, fresh_name, mounted, numbers, sqlite

pytestmark = [pytest.mark.mount, pytest.mark.clients]


@pytest.fixture
def name() -> str:
    return fresh_name()


# --- SQLAlchemy ----------------------------------------------------------------------------------------------


def test_sqlalchemy_orm(desks: Desks, name: str) -> None:
    left, books = run("sqlalchemy", "orm", desks.here / name)
    assert left == 3, "Solaris goes with Lem, until the rollback"
    assert books == {"Le Guin": ["Lavinia", "The Dispossessed"], "Lem": ["Solaris"], "Strugatsky": ["Roadside Picnic"]}
    told = desks.told(name, "SELECT name, title FROM book JOIN author ON author.id = author_id ORDER BY title")
    assert told.split("\n")[0] == "Le Guin|Lavinia" and told.count("\n") == 3


def test_sqlalchemy_core(desks: Desks, name: str) -> None:
    assert run("sqlalchemy", "core", desks.here / name, "1000") == [1000, "FOREIGN KEY constraint failed"]
    assert (
        desks.told(name, "SELECT count(*), count(DISTINCT title), count(DISTINCT author_id) FROM book") == "1000|1000|1"
    )


def test_sqlalchemy_engines_on_two_machines(desks: Desks, name: str) -> None:
    """Four threads share three connections of one engine, a second engine writes on the other machine: no count is
    lost, nobody gets an error."""
    errors, counted, connections = run("sqlalchemy", "engines", desks.here / name, desks.there / name, "4", "10")
    assert errors == []
    assert counted == {"here": 40, "there": 10, "both": 50}
    assert connections == 3
    assert desks.told(name, "SELECT n FROM counter ORDER BY engine") == "50\n40\n10"


def test_sqlalchemy_and_wal(desks: Desks, name: str) -> None:
    """A `connect` event asks for WAL and NORMAL; commits and rollbacks, a reader beside a writer without a wait."""
    assert run("sqlalchemy", "wal", desks.here / name) == [["wal", 1], ["one"], ["one", "two"]]
    assert desks.told(name, "PRAGMA journal_mode", "SELECT name FROM author ORDER BY id") == "wal\none\ntwo"


def test_sqlalchemy_when_the_daemon_is_killed(place: Place, tmp_path: Path) -> None:
    """What it had committed is there after a new start with nothing but S3. Connections in the pool are of no use any
    more, which `pool_pre_ping` does not see; after `dispose()` the program goes on."""
    line = [sys.executable, PROGRAMS / "with_sqlalchemy.py", "until_it_fails"]
    with (
        mounted(place, tmp_path, "--lease", "1") as mount,
        running([*line, mount / "a.db"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program,
    ):
        *numbers_, ended = said_until_killed(program, mount)
        assert ended == "ended disk I/O error"
        last = int(numbers_[-1])
        with again(place, mount) as remounted:
            said, _ = program.communicate("\n", timeout=60)
            before, (authors, books) = json.loads(said)
            assert before == "disk I/O error"
            assert authors == books and last + 1 <= authors <= last + 2
            pairs = "SELECT count(*), min(title IN (name, 'book ' || name)) FROM book JOIN author"
            whole = f"{pairs} ON author.id = author_id"
            assert sqlite(remounted / "a.db", "PRAGMA integrity_check", whole) == f"ok\n{authors}|1"


# --- pandas ----------------------------------------------------------------------------------------------------


def test_pandas_over_sqlite3(desks: Desks, name: str) -> None:
    totals, chunks = run("pandas", "frames", desks.here / name)
    assert totals == run("pandas", "expected") and chunks == [1000, 1000, 300]
    assert desks.told(name, 'SELECT count(*), sum("count"), max("when") FROM weather') == (
        f"2300|{sum(range(2000)) + sum(range(300))}|2024-03-24 07:00:00"
    )


def test_pandas_over_sqlalchemy(desks: Desks, name: str) -> None:
    assert run("pandas", "over_sqlalchemy", desks.here / name) == [2000, sum(range(2000)), True]
    assert (
        desks.told(name, "SELECT count(*), sum(degrees) FROM weather")
        == f"2000|{sum(i % 40 - 9.5 for i in range(2000))}"
    )


# --- DuckDB ----------------------------------------------------------------------------------------------------


def test_duckdb_attach(desks: Desks, name: str) -> None:
    rows, scanned = run("duckdb", "attached", desks.here / name)
    kinds = {k: [-1 if i == 7 else i / 4 for i in range(5000) if i % 3 == k and i != 8] for k in range(3)}
    assert rows == [[k, len(prices), sum(prices)] for k, prices in kinds.items()]
    assert scanned == [4999, 4999 / 4]
    told = desks.told(name, "SELECT count(*), sum(price), max(length(data)) FROM event", "PRAGMA journal_mode")
    assert told == f"4999|{sum(map(sum, kinds.values()))}|5\ndelete"


def test_duckdb_reads_what_another_client_wrote(desks: Desks, name: str) -> None:
    """On the other machine, and something newer when that is committed."""
    sqlite(
        desks.here / name,
        "CREATE TABLE t(a INTEGER, b TEXT)",
        f"INSERT INTO t SELECT i, 'x' || i FROM ({numbers(5000)})",
    )
    query = "SELECT count(*), sum(a), max(b) FROM t"
    assert desks.told(name, query) == "5000|12502500|x999"
    assert run("duckdb", "queried", desks.there / name, query) == [[[5000, 12502500, "x999"]]]
    sqlite(desks.here / name, "DELETE FROM t WHERE a > 10")
    assert desks.told(name, query) == "10|55|x9"
    assert run("duckdb", "queried", desks.there / name, query, "SELECT b FROM t WHERE a = 3") == [
        [[10, 55, "x9"]],
        [["x3"]],
    ]


def test_duckdb_beside_sqlite3_in_one_process(desks: Desks, name: str) -> None:
    """Two SQLite libraries in one process would undo each other's locks of one file. On two mounts they do not."""
    errors, seen = run("duckdb", "beside", desks.here / name, desks.there / name)
    assert errors == []
    assert all(first == last and count == 20_000 for first, last, count in seen)
    counts = [first for first, *_ in seen]
    assert counts == sorted(counts) and len(set(counts)) >= 3


def test_duckdb_and_wal(desks: Desks, name: str) -> None:
    """ATTACH with JOURNAL_MODE 'WAL'; another process reads beside its transaction."""
    assert run("duckdb", "wal", desks.here / name) == [["wal", "1"], [[1], [2]]]
    assert desks.told(name, "PRAGMA journal_mode", "SELECT a FROM t") == "wal\n1\n2"


# --- sqlite-utils ----------------------------------------------------------------------------------------------


def test_sqlite_utils_insert_and_upsert(desks: Desks, name: str, tmp_path: Path) -> None:
    """From JSON, CSV and files, as the program itself has it."""
    path, lines, rows = desks.here / name, tmp_path / "lines.csv", tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": 1, "name": "Ann", "city": "Oslo"}, {"id": 2, "name": "Bob", "city": "Rome"}]))
    module("sqlite_utils", "insert", path, "person", rows, "--pk", "id")
    rows.write_text(json.dumps([{"id": 2, "name": "Bobby"}, {"id": 3, "name": "Cy"}]))
    module("sqlite_utils", "upsert", path, "person", rows, "--pk", "id")
    lines.write_text("id,what\n" + "".join(f"{i},line {i}\n" for i in range(3000)))
    module("sqlite_utils", "insert", path, "line", lines, "--csv", "--pk", "id")
    module("sqlite_utils", "insert-files", path, "file", lines)
    assert desks.told(name, "SELECT * FROM person", "SELECT count(*), max(what) FROM line").splitlines() == [
        *("1|Ann|Oslo", "2|Bobby|Rome", "3|Cy|"),
        "3000|line 999",
    ]
    assert (
        desks.told(name, "SELECT size, length(content) FROM file") == f"{lines.stat().st_size}|{lines.stat().st_size}"
    )
    assert json.loads(module("sqlite_utils", desks.there / name, "SELECT name FROM person WHERE id = 2")) == [
        {"name": "Bobby"}
    ]


def test_sqlite_utils_search_and_transform(desks: Desks, name: str, tmp_path: Path) -> None:
    """Full text search kept up to date by triggers; a table made anew under its readers; columns moved to a table."""
    path, rows = desks.here / name, tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": i, "title": f"title {i}", "kind": f"kind {i % 3}"} for i in range(300)]))
    module("sqlite_utils", "insert", path, "page", rows, "--pk", "id")
    module("sqlite_utils", "enable-fts", path, "page", "title", "--create-triggers", "--tokenize", "porter")
    sqlite(path, "INSERT INTO page VALUES (300, 'running late', 'kind 0')")
    assert [row["id"] for row in json.loads(module("sqlite_utils", "search", desks.here / name, "page", "run"))] == [
        300
    ]
    module(
        "sqlite_utils",
        "transform",
        path,
        "page",
        "--rename",
        "kind",
        "sort",
        "--default",
        "title",
        "none",
        "-o",
        "id",
        "-o",
        "kind",
    )
    module("sqlite_utils", "extract", path, "page", "sort")
    assert desks.told(
        name, "SELECT count(*), count(DISTINCT sort_id) FROM page", "SELECT sort FROM sort ORDER BY id"
    ) == ("301|3\nkind 0\nkind 1\nkind 2")
    found = json.loads(module("sqlite_utils", "search", desks.there / name, "page", "title", "--limit", "1000"))
    assert len(found) == 300


def test_sqlite_utils_and_wal(desks: Desks, name: str) -> None:
    """`enable-wal`, rows, `disable-wal`, rows."""
    sqlite(desks.here / name, "CREATE TABLE t(a)")
    for number, (command, mode) in enumerate([("enable-wal", "wal"), ("disable-wal", "delete")], 1):
        module("sqlite_utils", command, desks.here / name)
        module("sqlite_utils", "query", desks.here / name, f"INSERT INTO t VALUES ({number})")
        assert desks.told(name, "PRAGMA journal_mode", "SELECT max(a), count(*) FROM t") == f"{mode}\n{number}|{number}"
