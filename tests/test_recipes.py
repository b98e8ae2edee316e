"""docs/RECIPES.md is run, block by block: each prints what it shows, and both faces leave the same rows behind."""

from __future__ import annotations

import os
import re
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from duckclient import Duck
from inprocess import ELSEWHERE, connect, rows
from kv_costs import compared, money
from mounting import Client, Mount, Place, Shared, SqlError, mounted, numbers, shell
from proxy import FaultProxy

RECIPES = (Path(__file__).parent.parent / "docs/RECIPES.md").read_text()
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

clients = pytest.mark.clients

#: What the key-value chapter has to show, by its headings.
VERBS = [
    "Insert",
    "Insert a string",
    "Select",
    "Delete",
    "Query by any subset of columns",
    "Distinct",
    "Count",
    "A random key, a random row",
    "Keys, sorted",
    "Copy between tables",
    "Copy between buckets",
    "List and drop tables",
    "List databases",
]


def section(heading: str) -> str:
    (found,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", RECIPES, re.MULTILINE | re.DOTALL)
    return str(found)


def blocks(heading: str, kind: str) -> list[str]:
    return re.findall(rf"^```python {kind}\n(.*?)^```", section(heading), re.MULTILINE | re.DOTALL)


def shown(code: str) -> str:
    return "".join(f"{line[3:]}\n" for line in code.splitlines() if line.startswith("#> "))


def run(code: str, place: Place, other: Place, folder: Path) -> str:
    """What a program of this code prints, in a folder in which `mnt` and `other` are mounts; the places are its own."""
    assert place.prefix == other.prefix
    for name, where in (("my-bucket", place), ("other-bucket", other)):
        code = code.replace(f'"{name}/kv"', f'"{where.target}"').replace(f'"{name}"', f'"{where.bucket}"')
    code = code.replace('name="kv/', f'name="{place.prefix}/').replace('"old/', f'"{place.prefix}/old/')
    assert "-bucket" not in code, "a place that is not replaced"
    (folder / "program.py").write_text(code)
    environment = place.environment | {"AWS_ENDPOINT_URL": place.url, "PATH": PATH, "HOME": str(folder)}
    done = shell(sys.executable, "program.py", cwd=folder, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def contents(place: Place) -> dict[str, list[Any]]:
    """Every table, as another machine sees it, which finds the database sound."""
    database = connect(place, "app.sqlite", **ELSEWHERE)
    try:
        assert rows(database, "PRAGMA integrity_check") == [("ok",)]
        names = [name for (name,) in rows(database, "SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: sorted(rows(database, f"SELECT * FROM {name}"), key=repr) for name in names}
    finally:
        database.close()


def in_process(verb: str, place: Place, other: Place, folder: Path) -> None:
    (prepare,), (code,) = blocks("Key-value tables", "process"), blocks(verb, "process")
    folder.mkdir()
    assert shown(code)
    assert run(prepare + code, place, other, folder) == shown(code)


@pytest.fixture(scope="module")
def second_bucket(mount_bucket: Place) -> Place:
    bucket = replace(mount_bucket, bucket="recipes-other")
    bucket.create_bucket()
    return bucket


@pytest.fixture
def other(second_bucket: Place, place: Place) -> Place:
    return second_bucket.inside(place.prefix)


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, second_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Places in both buckets, and their mounts."""
    folder, name = tmp_path_factory.mktemp("recipes"), uuid.uuid4().hex
    place, other = mount_bucket.inside(name), second_bucket.inside(name)
    with mounted(place, folder) as mnt, mounted(other, folder) as second:
        yield (place, mnt), (other, second)


@pytest.fixture
def mounted_places(mounts: Any, tmp_path: Path) -> tuple[Place, Place, Path]:
    """A folder of each for one test, below `mnt` and `other` in the folder to be in."""
    name, working = uuid.uuid4().hex, tmp_path / "working"
    working.mkdir()
    for (_, mount), link in zip(mounts, ("mnt", "other"), strict=True):
        assert shell("mkdir", mount / name).returncode == 0
        (working / link).symlink_to(mount / name)
    (place, _), (other, _) = mounts
    return place.inside(name), other.inside(name), working


# --- key-value tables -------------------------------------------------------------------------------------


def test_every_verb_is_there_once_for_each_face() -> None:
    chapter = RECIPES.partition("\n## Key-value tables\n")[2].partition("\n## ")[0]
    headings = re.findall(r"^### (.*)$", chapter, re.MULTILINE)
    assert headings == [*VERBS, "WITHOUT ROWID or not"]
    assert len(re.findall("^```python ", RECIPES, re.MULTILINE)) == 2 * (len(VERBS) + 1) + 1 + 4


@pytest.mark.s3
@pytest.mark.parametrize("verb", VERBS)
def test_in_process(verb: str, place: Place, other: Place, tmp_path: Path) -> None:
    in_process(verb, place, other, tmp_path / "process")


@clients
@pytest.mark.mount
@pytest.mark.parametrize("verb", VERBS)
def test_on_the_mount(
    verb: str, mounted_places: tuple[Place, Place, Path], place: Place, other: Place, tmp_path: Path
) -> None:
    """And what is in S3 afterwards is what the same verb leaves there in process."""
    (prepare,), (code,) = blocks("Key-value tables", "mount"), blocks(verb, "mount")
    here, there, working = mounted_places
    assert shown(code)
    assert run(prepare + code, here, there, working) == shown(code)
    in_process(verb, place, other, tmp_path / "process")
    assert contents(here) == contents(place)
    assert contents(here)["events"]
    if "buckets" in verb:
        assert contents(there) == contents(other)
        assert len(contents(there)["events"]) == 2


@pytest.mark.s3
def test_import_of_one_object_per_row(place: Place, other: Place, tmp_path: Path) -> None:
    """More than one page of a listing; again; after changes; and with a key that is none, which changes nothing."""
    (code,) = blocks("Importing one object per row", "import")
    expected = {(i, 2020, 1, day): f"{i}:{day}".encode() * 10 for i in range(55) for day in range(1, 21)}

    def put(key: tuple[int, ...]) -> None:
        place.put("old/events/{}/{:04}/{:02}/{:02}".format(*key), expected[key])

    place.put("old/eventsother/1/2020/01/01", b"of another table")
    put((0, 2020, 1, 1))  # the client is made by one thread
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, expected))
    assert run(code, place, other, tmp_path) == "1100\n"
    assert run(code, place, other, tmp_path) == "0\n"
    expected |= {(1, 2020, 1, 1): b"changed", (99, 2020, 12, 31): b""}
    put((1, 2020, 1, 1))
    put((99, 2020, 12, 31))
    assert run(code, place, other, tmp_path) == "2\n"
    assert {row[:4]: row[4] for row in contents(place)["events"]} == expected
    put((2, 2020, 1, 1))
    place.put("old/events/1/2020/01/readme.txt", b"not a row")
    place.put("old/events/2/2020/01/01", b"changed, too")
    with pytest.raises(AssertionError, match=r"invalid literal for int\(\) with base 10: 'readme.txt'"):
        run(code, place, other, tmp_path)
    assert {row[:4]: row[4] for row in contents(place)["events"]} == expected


@pytest.mark.s3
def test_costs_are_measured(place: Place) -> None:
    """`scripts/kv_costs` in small: both layouts give the same answers, and cost what the document says they do."""
    lines = {line["what"]: line for line in compared(place, seed=1, delay_s=0, days=1)}
    assert all(found == same for found, same in (line["answers"] for line in lines.values()))
    together, singly = lines["insert 1,000 rows together"], lines["insert 1,000 rows one by one"]
    assert together["objects"] == singly["objects"] == {"PUT": 100}
    assert together["table"]["PUT"] <= 4
    assert 100 <= singly["table"]["PUT"] <= 106
    assert money(together["objects"]) > 20 * money(together["table"])
    by_month = lines["query `month = ?`, 400 rows, cold"]
    assert by_month["objects"]["GET"] == 40 > sum(by_month["table"].values())


# --- Ibis -------------------------------------------------------------------------------------------------


@clients
@pytest.mark.mount
@pytest.mark.parametrize(("heading", "number"), [("A todo list", 0), ("A todo list", 1), ("A file lake", 0)])
def test_state_management_with_ibis(heading: str, number: int, mounted_places: tuple[Place, Place, Path]) -> None:
    (prepare,), code = blocks("State management with Ibis", "ibis"), blocks(heading, "ibis")[number]
    here, there, working = mounted_places
    assert shown(code)
    assert run(prepare + code, here, there, working) == shown(code)


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where DuckDB installs its extension."""
    return tmp_path_factory.mktemp("extensions")


@clients
@pytest.mark.mount
def test_duckdb_holds_no_lock_between_queries(shared: Shared, extensions: Path) -> None:
    _, mount, _ = shared
    assert shell("mkdir", mount.directory).returncode == 0
    with Client(mount / "a.db") as writer, Duck(extensions) as duck:
        writer("CREATE TABLE t(a)", "INSERT INTO t VALUES (1)")
        assert duck(f"SELECT count(*) FROM sqlite_scan('{mount / 'a.db'}', 't')") == [[1]]
        writer("BEGIN EXCLUSIVE", "INSERT INTO t VALUES (2)", "COMMIT")  # without waiting
        assert duck(f"SELECT count(*) FROM sqlite_scan('{mount / 'a.db'}', 't')") == [[2]]


@clients
@pytest.mark.mount
def test_duckdb_sees_the_newest_commit_of_another_machine(
    place: Place, machines: tuple[Place, Mount, Mount], tmp_path: Path, extensions: Path
) -> None:
    """At once with `--refresh 0`, within a second or so by default."""
    here, mount, other = machines
    with mounted(here, tmp_path, refresh="1") as third, Client(mount / "new.db") as writer, Duck(extensions) as duck:
        writer("CREATE TABLE t(a)")
        for number in range(1, 4):
            writer(f"INSERT INTO t VALUES ({number})")
            assert duck(f"SELECT count(*) FROM sqlite_scan('{other / 'new.db'}', 't')") == [[number]]
        end = time.monotonic() + 20
        while duck(f"SELECT count(*) FROM sqlite_scan('{third / 'new.db'}', 't')") != [[3]]:
            assert time.monotonic() < end
            time.sleep(0.1)


@clients
@pytest.mark.mount
def test_duckdb_during_a_write_transaction(shared: Shared, extensions: Path) -> None:
    _, mount, other = shared
    assert shell("mkdir", mount.directory).returncode == 0
    scan = "SELECT count(*) FROM sqlite_scan('{}', 't')"
    with Client(mount / "a.db") as writer, Duck(extensions) as duck:
        writer("CREATE TABLE t(a)", "INSERT INTO t VALUES (1)")
        writer("BEGIN IMMEDIATE", "INSERT INTO t VALUES (2)")
        assert duck(scan.format(mount / "a.db"), scan.format(other / "a.db")) == [[1]]
        writer("COMMIT", "BEGIN EXCLUSIVE", "INSERT INTO t VALUES (3)")
        assert duck(scan.format(other / "a.db")) == [[2]]
        began = time.monotonic()
        with pytest.raises(SqlError, match="database is locked"):
            duck(scan.format(mount / "a.db"))
        assert 4 < time.monotonic() - began < 20
        writer("COMMIT")
        assert duck(scan.format(mount / "a.db")) == [[3]]


@clients
@pytest.mark.mount
def test_duckdb_sees_one_commit_when_attached(shared: Shared, extensions: Path) -> None:
    """`sqlite_scan`, which is `read_sqlite`, moves on between two reads of one DuckDB transaction; ATTACH does not."""
    _, mount, other = shared
    assert shell("mkdir", mount.directory).returncode == 0
    scan, attached = f"SELECT count(*) FROM sqlite_scan('{other / 'a.db'}', 't')", "SELECT count(*) FROM state.t"
    with Client(mount / "a.db") as writer, Duck(extensions) as duck:
        writer("CREATE TABLE t(a)", "INSERT INTO t VALUES (1)")
        duck(f"ATTACH '{other / 'a.db'}' AS state (TYPE sqlite, READ_ONLY)", "BEGIN")
        assert duck(scan) == [[1]]
        writer("INSERT INTO t VALUES (2)")
        assert duck(scan) == [[2]]
        assert duck("COMMIT", "BEGIN", attached) == [[2]]
        writer("INSERT INTO t VALUES (3)")
        assert duck(attached) == [[2]]
        assert duck("COMMIT", attached) == [[3]]


@clients
@pytest.mark.mount
def test_duckdb_lists_files_without_their_contents(
    place: Place, tmp_path: Path, proxy: FaultProxy, extensions: Path
) -> None:
    """Columns before the large one; behind it, all of it has to be read to get there."""
    with mounted(place, tmp_path) as mount, Client(mount / "a.db") as writer:
        for name, columns in (("good", "size INTEGER, data BLOB"), ("bad", "data BLOB, size INTEGER")):
            writer(f"CREATE TABLE {name}(id INTEGER PRIMARY KEY, {columns})")
            writer(f"INSERT INTO {name}(size, data) SELECT 3000000, randomblob(3000000) FROM ({numbers(4)})")
    with mounted(place.via(proxy.url), tmp_path) as mount, Duck(extensions) as duck:
        received = {}
        for name in ("good", "bad"):
            proxy.reset()
            query = f"SELECT sum(size) FROM sqlite_scan('{mount / 'a.db'}', '{name}') WHERE size > 0"
            assert duck(query) == [[12_000_000]]
            received[name] = proxy.received
    assert received["good"] < 4_000_000 < 11_000_000 < received["bad"], received
