"""SQLite on a mount: ATTACH, VACUUM, locks, readers, and what another machine (a second daemon) sees.
Journal modes are in test_mount_modes.py, writers on two machines in test_two_mounts.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from mounting import PATIENCE_S, Client, Place, SqlError, fresh_name, numbers, shell, sqlite
from pairs import Pair, same_everywhere, size_of, two_mounts
from proxy import Fault, Request

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_mounts(mount_bucket.inside(fresh_name("sqlite")), tmp_path_factory.mktemp("pair")) as pair:
        yield pair


@pytest.fixture
def pair(mounts: Pair) -> Iterator[Pair]:
    """The two mounts, used by one test after the other, each with databases of its own."""
    mounts.proxy.reset()
    yield mounts
    mounts.proxy.reset()


@pytest.fixture
def name() -> str:
    return fresh_name()


# --- several databases -------------------------------------------------------------------------------------


def test_attached_databases_commit_together(pair: Pair, name: str) -> None:
    """A transaction over two databases is in both or in neither, in each journal mode that promises it."""
    second = fresh_name()
    with Client(pair.here / name) as writer:
        writer(f"ATTACH '{pair.here / second}' AS b", "CREATE TABLE main.t(a)", "CREATE TABLE b.t(a)")
        for row, mode in enumerate(("DELETE", "TRUNCATE", "PERSIST"), 1):
            writer(f"PRAGMA main.journal_mode={mode}", f"PRAGMA b.journal_mode={mode}")
            both = [f"INSERT INTO main.t VALUES ({row})", f"INSERT INTO b.t VALUES ({row})"]
            writer("BEGIN", *both, "ROLLBACK")
            writer("BEGIN", *both, "COMMIT")
            for each in (name, second):
                assert sqlite(pair.elsewhere / each, "SELECT count(*), max(a) FROM t") == f"{row}|{row}"
    for each in (name, second):
        same_everywhere(pair, each)
    assert not [left for left in shell("ls", pair.here.directory).stdout.split() if left.startswith(f"{name}-mj")]


def test_attached_databases_when_one_commit_fails(pair: Pair, name: str) -> None:
    """The store refuses the second database: COMMIT is an error and the first has nothing of the transaction either."""
    second = "z" + name
    with Client(pair.here / name) as writer:
        writer(f"ATTACH '{pair.here / second}' AS b", "CREATE TABLE main.t(a)", "CREATE TABLE b.t(a)")
        writer("BEGIN", "INSERT INTO main.t VALUES (1)", "INSERT INTO b.t VALUES (1)")

        def refuse(request: Request) -> Fault | None:
            refused = (request.method, request.kind) == ("PUT", "head") and second in request.path
            return Fault(status=403, code="AccessDenied") if refused else None

        pair.proxy.rule = refuse
        with pytest.raises(SqlError, match="I/O"):
            writer("COMMIT")
        pair.proxy.rule = None
    for each in (name, second):
        assert sqlite(pair.here / each, "SELECT count(*) FROM t") == "0"
        assert same_everywhere(pair, each, "SELECT count(*) FROM t") == "0"


# --- changes of size ---------------------------------------------------------------------------------------


def filled(pair: Pair, name: str, *pragmas: str, rows: int = 1500) -> int:
    """A database of `rows` KiB, two thirds of it deleted again; its size."""
    sqlite(pair.here / name, *pragmas, "CREATE TABLE t(id INTEGER PRIMARY KEY, a)")
    sqlite(pair.here / name, f"INSERT INTO t SELECT i, randomblob(1000) FROM ({numbers(rows)})")
    size = size_of(pair.elsewhere / name)
    assert size > rows * 1000
    return size


@pytest.mark.parametrize(
    "shrink",
    [
        "DELETE FROM t WHERE id % 3; VACUUM",
        "DELETE FROM t WHERE id % 3; PRAGMA page_size=1024; VACUUM",
        "DELETE FROM t WHERE id % 3; PRAGMA page_size=65536; VACUUM",
        "DELETE FROM t; VACUUM",
    ],
)
def test_vacuum(pair: Pair, name: str, shrink: str) -> None:
    """Shorter, with another page size or not: both mounts agree in size, bytes and rows; an open reader follows."""
    before = filled(pair, name)
    with Client(pair.elsewhere / name) as reader:
        assert reader("SELECT count(*) FROM t") == [[1500]]
        sqlite(pair.here / name, shrink)
        rows = 500 if "%" in shrink else 0
        assert reader("SELECT count(*) FROM t") == [[rows]]
        assert int(same_everywhere(pair, name, "SELECT count(*) FROM t")) == rows
        assert size_of(pair.elsewhere / name) < before / 2
        sqlite(pair.elsewhere / name, ".timeout 60000", "INSERT INTO t VALUES (5000, 'again')")
        assert int(same_everywhere(pair, name, "SELECT count(*) FROM t")) == rows + 1


def test_auto_vacuum(pair: Pair, name: str) -> None:
    """The file is cut after the commit: what was published has the new size already, and a rollback the old one."""
    before = filled(pair, name, "PRAGMA auto_vacuum=FULL")
    sqlite(pair.here / name, "BEGIN; DELETE FROM t WHERE id > 300; ROLLBACK")
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == "1500"
    sqlite(pair.here / name, "DELETE FROM t WHERE id > 300")
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == "300"
    assert size_of(pair.elsewhere / name) < before / 2


def test_incremental_vacuum(pair: Pair, name: str) -> None:
    before = filled(pair, name, "PRAGMA auto_vacuum=INCREMENTAL")
    sqlite(pair.here / name, "DELETE FROM t WHERE id > 300")
    assert size_of(pair.elsewhere / name) == before
    sqlite(pair.here / name, "PRAGMA incremental_vacuum(100)")
    same_everywhere(pair, name)
    assert size_of(pair.elsewhere / name) == before - 100 * 4096
    sqlite(pair.here / name, "PRAGMA incremental_vacuum")
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == "300"


# --- locks and crashes of clients -----------------------------------------------------------------------------


def test_locks_between_processes(pair: Pair, name: str) -> None:
    """BUSY while another process writes, readers go on until it commits; a waiting one gets its turn."""
    with Client(pair.here / name) as one, Client(pair.here / name) as two:
        one("CREATE TABLE t(a)", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (1)")
        with pytest.raises(SqlError, match="locked"):
            two("BEGIN IMMEDIATE")
        assert two("SELECT count(*) FROM t") == [[0]]
        two("PRAGMA busy_timeout=60000")
        one("PRAGMA busy_timeout=60000")  # its COMMIT may meet the SHARED lock of the other's attempts
        two.send("INSERT INTO t VALUES (2)")
        one("COMMIT")
        two.receive()
        one("BEGIN", "SELECT * FROM t")
        two("PRAGMA busy_timeout=0")
        with pytest.raises(SqlError, match="locked"):
            two("INSERT INTO t VALUES (3)")
        one("COMMIT")
        two("INSERT INTO t VALUES (3)")
    assert same_everywhere(pair, name, "SELECT group_concat(a) FROM t") == "1,2,3"


def test_many_writers_on_one_mount(pair: Pair, name: str) -> None:
    """Four processes count up one number with busy_timeout: no update is lost and none fails."""
    sqlite(pair.here / name, "CREATE TABLE t(n); INSERT INTO t VALUES (0)")
    turns = "UPDATE t SET n = n + 1;" * 10
    line = ["sqlite3", "-batch", "-bail", pair.here / name, ".timeout 60000", turns]
    writers = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        assert [writer.communicate(timeout=PATIENCE_S)[1] for writer in writers] == [""] * 4
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert same_everywhere(pair, name, "SELECT n FROM t") == "40"


# --- two machines ----------------------------------------------------------------------------------------------


def test_two_mounts_write_in_turns(pair: Pair, name: str) -> None:
    """Connections stay open on both; each sees all of the other's commits and none is lost."""
    with Client(pair.here / name) as one, Client(pair.elsewhere / name) as two:
        one("CREATE TABLE t(a)", "PRAGMA busy_timeout=60000")
        two("PRAGMA busy_timeout=60000")
        for turn in range(12):
            writer, reader = (one, two) if turn % 2 else (two, one)
            if turn % 3 == 0:
                writer("BEGIN IMMEDIATE", f"INSERT INTO t VALUES ({turn})", "COMMIT")
            else:
                writer(f"INSERT INTO t VALUES ({turn})")
            assert reader("SELECT count(*), max(a) FROM t") == [[turn + 1, turn]]
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == str(sum(range(12)))


def test_a_long_open_reader_sees_each_commit_whole(pair: Pair, name: str) -> None:
    """All rows of a table carry one number at every commit; a reader with a warm cache never sees two."""
    sqlite(pair.here / name, f"CREATE TABLE t AS SELECT 0 AS n, zeroblob(500) AS filler FROM ({numbers(400)})")
    seen: list[int] = []
    enough = threading.Event()
    with Client(pair.elsewhere / name) as reader, Client(pair.here / name) as writer:

        def write() -> None:
            turn = 0
            while not enough.is_set():
                turn += 1
                writer(f"UPDATE t SET n = {turn}")

        thread = threading.Thread(target=write)
        thread.start()
        try:
            while len(set(seen)) < 10:
                assert thread.is_alive()
                rows = reader("SELECT DISTINCT n FROM t")
                assert len(rows) == 1
                seen.append(rows[0][0])
        finally:
            enough.set()
            thread.join()
        assert seen == sorted(seen)
        assert reader("SELECT DISTINCT n FROM t") == writer("SELECT DISTINCT n FROM t")


def test_a_transaction_of_a_reader_stays_on_its_state(pair: Pair, name: str) -> None:
    """A commit elsewhere does not move a snapshot under an open read transaction; the next one sees it."""
    with Client(pair.here / name) as writer, Client(pair.elsewhere / name) as reader:
        writer("CREATE TABLE t(a)", f"INSERT INTO t SELECT randomblob(900) FROM ({numbers(300)})")
        reader("BEGIN", "SELECT count(*) FROM (SELECT 1 FROM t LIMIT 1)")
        writer("DELETE FROM t WHERE rowid > 7")
        assert reader("SELECT count(*) FROM t") == [[300]]
        with pytest.raises(SqlError, match="locked"):
            reader("INSERT INTO t VALUES (1)")
        reader("ROLLBACK")
        assert reader("SELECT count(*) FROM t") == [[7]]


def test_a_stopped_client_does_not_hold_up_other_databases(pair: Pair, name: str) -> None:
    """A process that was stopped in mid-transaction keeps its lock; everything else on the mount goes on."""
    with Client(pair.here / name) as stopped:
        stopped("CREATE TABLE t(a)", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (1)")
        stopped.process.send_signal(signal.SIGSTOP)
        try:
            assert sqlite(pair.here / name, "SELECT count(*) FROM t") == "0"
            assert "locked" in sqlite(pair.here / name, "INSERT INTO t VALUES (2)", check=False)
            assert sqlite(pair.here / fresh_name(), "CREATE TABLE t(a); SELECT count(*) FROM t") == "0"
        finally:
            stopped.process.send_signal(signal.SIGCONT)
        stopped("COMMIT")
    assert same_everywhere(pair, name, "SELECT a FROM t") == "1"


# --- two copies of SQLite in one process --------------------------------------------------------------------

#: As when DuckDB or APSW join Python's sqlite3: POSIX lets go of a process's locks when either of them does. On any
#: file system the transaction goes on without locks, and may destroy the database.
TWO_COPIES = """
import contextlib, sqlite3, subprocess, sys
import apsw
path, rows, when, *insert = sys.argv[1:]
rows = f"WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<{rows}) SELECT 'mine', randomblob(500) FROM n"
writer = sqlite3.connect(path, isolation_level=None, timeout=0)
writer.execute("PRAGMA cache_size=5")
writer.execute("BEGIN IMMEDIATE")
try:
    if when == "before":
        writer.execute(f"INSERT INTO t {rows}")
    second = apsw.Connection(path, apsw.SQLITE_OPEN_READONLY)
    with contextlib.suppress(apsw.Error), contextlib.closing(second):
        second.execute("SELECT count(*) FROM t").get
    subprocess.run(insert)
    if when == "after":
        writer.execute(f"INSERT INTO t {rows}")
    writer.execute("COMMIT")
    print("committed")
except sqlite3.Error as error:
    print("failed:", error)
writer.close()
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rows", [1, 500])
def test_a_transaction_that_lost_its_locks_destroys_nothing(rows: int, when: str, pair: Pair, name: str) -> None:
    """500 rows are more than the page cache holds, so some are written before COMMIT. They are inserted before or after
    the locks are lost, and another process commits as soon as they are."""
    path = pair.here / name
    sqlite(path, "CREATE TABLE t(a, b)", "INSERT INTO t VALUES ('first', '')")
    insert = ["sqlite3", "-cmd", ".timeout 2000", path, "INSERT INTO t VALUES ('other', '')"]
    done = shell(sys.executable, "-c", TWO_COPIES, path, rows, when, *insert)
    found = sqlite(pair.elsewhere / name, "PRAGMA integrity_check", "SELECT a, count(*) FROM t GROUP BY a ORDER BY a")
    lines = found.splitlines()
    assert lines[0] == "ok"
    assert "first|1" in lines
    assert ("committed" in done.stdout) == (f"mine|{rows}" in lines), (done, lines)
    assert ("locked" not in done.stderr) == ("other|1" in lines), (done, lines)
