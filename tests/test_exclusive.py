"""`mount --exclusive`: the lease for as long as a database is open, locks in the kernel. What the engine then knows of
transactions, and what happens when the lease is lost in spite of it. `here` is such a mount, `elsewhere` is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import PATIENCE_S, Client, Place, SqlError, command, fresh_name, mounted, numbers, shell, sqlite
from pairs import Pair, same_everywhere
from proxy import Fault, FaultProxy, Request

pytestmark = pytest.mark.mount

LEASE_S = 2
OPTIONS = "--lease", str(LEASE_S), "--request-deadline", "2", "--transaction-deadline", "3"
JOURNALLED = ("DELETE", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("TRUNCATE", "PERSIST")))
STATE = "SELECT count(*), sum(n), max(n) FROM t"
BEFORE = [[200, 0, 0]]
SPILLS = "PRAGMA cache_size=2", "BEGIN", "UPDATE t SET n = 2, a = randomblob(800)"


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place, folder = mount_bucket.inside(fresh_name("exclusive")), tmp_path_factory.mktemp("pair")
    with (
        FaultProxy(place.url) as proxy,
        mounted(place.via(proxy.url), folder, "--exclusive", *OPTIONS, refresh="60") as here,
        mounted(place, folder, *OPTIONS) as elsewhere,
    ):
        yield Pair(here, elsewhere, proxy, place)


@pytest.fixture
def pair(mounts: Pair) -> Iterator[Pair]:
    mounts.proxy.reset()
    yield mounts
    mounts.proxy.reset()


@pytest.fixture
def name(pair: Pair) -> str:
    """A database with 200 rows."""
    made = fresh_name()
    sqlite(pair.elsewhere / made, "CREATE TABLE t(id INTEGER PRIMARY KEY, n, a)")
    sqlite(pair.elsewhere / made, f"INSERT INTO t(n, a) SELECT 0, randomblob(800) FROM ({numbers(200)})")
    return made


def eventually(ask: Callable[[], object], expected: object, within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while (answer := ask()) != expected:
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def said(client: Client, *statements: str) -> object:
    """The rows, or what went wrong."""
    try:
        return client(*statements)
    except SqlError as error:
        return str(error)


def heads_of(name: str, fault: Fault) -> Callable[[Request], Fault | None]:
    return lambda each: fault if each.method == "PUT" and name in each.path else None


# --- who may write ---------------------------------------------------------------------------------------------


def test_others_read_and_cannot_write_while_it_is_open(pair: Pair, name: str) -> None:
    with Client(pair.here / name) as holder, Client(pair.elsewhere / name) as other:
        assert holder(STATE) == BEFORE
        for n in range(3):
            with pytest.raises(SqlError, match="locked"):
                other("INSERT INTO t(n) VALUES (99)")
            holder(f"INSERT INTO t(n) VALUES ({n})")
            assert other("SELECT count(*) FROM t") == [[201 + n]]
            time.sleep(LEASE_S / 2)  # longer than the lease lasts, in all
        with Client(pair.here / name) as neighbour:
            assert neighbour("INSERT INTO t(n) VALUES (7)", STATE) == holder(STATE)
        with pytest.raises(SqlError, match="locked"):
            other("INSERT INTO t(n) VALUES (99)")
    with Client(pair.elsewhere / name) as other:
        eventually(lambda: said(other, "INSERT INTO t(n) VALUES (8)"), [], within_s=3)
    assert sqlite(pair.here / name, "SELECT count(*), max(n) FROM t") == "205|8"


@pytest.mark.long
def test_it_is_not_opened_while_another_machine_has_it(pair: Pair, name: str, tmp_path: Path) -> None:
    """Neither for reading only: a state that stands still would be taken for the newest. It waits as long as it takes
    to find out whether that machine is dead; and then it gets it."""
    with mounted(pair.place, tmp_path, "--exclusive", *OPTIONS) as there, Client(there / name) as holder:
        holder("INSERT INTO t(n) VALUES (1)")
        began_s = time.monotonic()
        assert "unable to open database" in sqlite(pair.here / name, STATE, check=False)
        assert LEASE_S < time.monotonic() - began_s < 3 * LEASE_S + 3
        assert "is writing" in pair.here.log
        assert "Device or resource busy" in shell("cat", pair.here / name).stderr
        holder("INSERT INTO t(n) VALUES (2)")
        there.kill()
        began_s = time.monotonic()
        time.sleep(LEASE_S)
        assert sqlite(pair.here / name, STATE) == "202|3|2"
        assert time.monotonic() - began_s < 2 * LEASE_S + 4


def test_options_that_contradict_it_are_refused(place: Place, tmp_path: Path) -> None:
    for option in (["--read-only"], ["--lease", "0"]):
        done = command(place, "mount", "-f", place.target, str(tmp_path), "--exclusive", *option)
        assert done.returncode == 2
        assert "--exclusive" in done.stderr


# --- transactions that nobody reports --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*JOURNALLED, "MEMORY", pytest.param("OFF", marks=pytest.mark.long)])
def test_a_client_killed_in_a_transaction(pair: Pair, name: str, mode: str) -> None:
    """In its middle, with changed pages in the file: they are gone at once, also for those who may not play back."""
    with Client(pair.here / name) as neighbour, Client(f"file:{pair.here / name}?mode=ro") as reader:
        assert neighbour(STATE) == reader(STATE) == BEFORE
        with Client(pair.here / name) as killed:
            killed(f"PRAGMA journal_mode={mode}", *SPILLS)
            killed.kill()
        assert reader(STATE) == BEFORE
        assert neighbour(STATE) == BEFORE
        neighbour("INSERT INTO t(n) VALUES (1)")
        assert reader(STATE) == [[201, 1, 1]]
    assert same_everywhere(pair, name, STATE) == "201|1|1"


@pytest.mark.parametrize("mode", JOURNALLED)
def test_an_outage_at_commit(pair: Pair, name: str, mode: str) -> None:
    """The transaction is rolled back without S3, everybody here sees the old state meanwhile, and the same connection
    goes on when S3 is back."""
    with Client(pair.here / name) as writer, Client(pair.here / name) as reader:
        writer(f"PRAGMA journal_mode={mode}")
        for turn in range(2):
            before = reader(STATE)
            writer(*SPILLS)
            pair.proxy.rule = lambda _: Fault(status=403, code="AccessDenied")
            assert "I/O" in str(said(writer, "COMMIT"))
            assert said(writer, STATE) == before
            assert reader(STATE, STATE) == before
            with Client(pair.here / name) as newcomer:
                assert newcomer(STATE) == before
            pair.proxy.rule = None
            writer(f"INSERT INTO t(n) VALUES ({turn})")
            assert reader("SELECT count(*) FROM t") == [[201 + turn]]
    assert same_everywhere(pair, name, STATE) == "202|1|1"


@pytest.mark.parametrize("mode", ["MEMORY", "OFF"])
def test_an_outage_at_commit_without_a_journal(pair: Pair, name: str, mode: str) -> None:
    """Nothing tells when such a transaction is over: its connection gets I/O errors until it is closed."""
    with Client(pair.here / name) as reader:
        with Client(pair.here / name) as writer:
            writer(f"PRAGMA journal_mode={mode}", *SPILLS)
            pair.proxy.rule = lambda _: Fault(status=403, code="AccessDenied")
            assert "I/O" in str(said(writer, "COMMIT"))
            pair.proxy.rule = None
            assert reader(STATE) == BEFORE
            assert "I/O" in str(said(writer, "INSERT INTO t(n) VALUES (1)"))
            assert reader(STATE) == BEFORE
        reader("INSERT INTO t(n) VALUES (1)")
    assert same_everywhere(pair, name, STATE) == "201|1|1"


@pytest.mark.parametrize("applies", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", [*JOURNALLED, pytest.param("OFF", marks=pytest.mark.long)])
def test_a_commit_in_doubt(pair: Pair, name: str, mode: str, applies: bool) -> None:
    """The answer never comes. Until it is settled nobody here reads what may not be; then everybody reads what is."""
    with Client(pair.here / name) as writer, Client(pair.here / name) as reader:
        writer(f"PRAGMA journal_mode={mode}")
        assert reader(STATE) == BEFORE
        writer("BEGIN", "UPDATE t SET n = 2")
        first = [applies]

        def rule(each: Request) -> Fault | None:
            put = each.method == "PUT" and name in each.path
            return Fault(cut=True, apply=put and bool(first) and first.pop()) if name in each.path else None

        pair.proxy.rule = rule
        assert "I/O" in str(said(writer, "COMMIT"))
        assert "error" in str(said(reader, STATE))
        pair.proxy.rule = None
        after = [[200, 400, 2]] if applies else BEFORE
        eventually(lambda: said(reader, STATE), after)
        with Client(pair.here / name) as again:
            again("INSERT INTO t(n) VALUES (1)")
            assert reader("SELECT count(*) FROM t") == [[201]]
    assert sqlite(pair.elsewhere / name, STATE) == ("201|401|2" if applies else "201|1|1")


def test_the_daemon_is_killed_in_a_transaction(pair: Pair, name: str, tmp_path: Path) -> None:
    with mounted(pair.place, tmp_path, "--exclusive", *OPTIONS) as there, Client(there / name) as client:
        client("INSERT INTO t(n) VALUES (5)", *SPILLS)
        there.kill()
    time.sleep(LEASE_S)
    assert sqlite(pair.here / name, STATE) == "201|5|5"
    assert same_everywhere(pair, name, STATE) == "201|5|5"


def test_a_journal_that_somebody_else_removes(pair: Pair, name: str) -> None:
    with Client(pair.here / name) as writer:
        writer(*SPILLS)
        assert "busy" in shell("rm", pair.here / f"{name}-journal").stderr
        writer("ROLLBACK")
        assert writer(STATE) == BEFORE


def test_sizes(pair: Pair, name: str) -> None:
    """Every change of the size goes elsewhere, and is seen by those who have it open here."""
    with Client(pair.here / name) as writer, Client(pair.here / name) as reader:
        for change in (
            f"INSERT INTO t(n, a) SELECT 1, randomblob(900) FROM ({numbers(2000)})",
            "DELETE FROM t WHERE id > 150",
            "VACUUM",
            "PRAGMA page_size=8192; VACUUM",
            "PRAGMA auto_vacuum=FULL; VACUUM",
            "DELETE FROM t WHERE id > 50",
        ):
            for each in change.split(";"):
                writer(each)
            assert reader(STATE, "PRAGMA integrity_check") == [["ok"]]
            same_everywhere(pair, name)
    assert shell("truncate", "-s", "0", pair.here / name).returncode == 0
    assert shell("stat", "-c", "%s", pair.elsewhere / name).stdout == "0\n"


def test_attached_databases_fail_together(pair: Pair, name: str) -> None:
    """A super-journal works. If one of two cannot be published, the other one is put back as well."""
    second = f"z{name}"
    with Client(pair.here / name) as writer:
        writer(f"ATTACH '{pair.here / second}' AS b", "CREATE TABLE b.t(n)")
        both = "INSERT INTO main.t(n) VALUES (1)", "INSERT INTO b.t VALUES (1)"
        writer("BEGIN", *both, "COMMIT")
        writer("BEGIN", *both)
        pair.proxy.rule = heads_of(f"/{second}/", Fault(status=403, code="AccessDenied"))
        said(writer, "COMMIT")
        pair.proxy.rule = None
        said(writer, "ROLLBACK")
        assert writer("SELECT (SELECT count(*) FROM main.t), (SELECT count(*) FROM b.t)") == [[201, 1]]
    assert same_everywhere(pair, name, STATE) == "201|1|1"
    assert same_everywhere(pair, second, "SELECT count(*) FROM t") == "1"


def test_wal_is_refused_and_read(pair: Pair, name: str) -> None:
    """The locks of a write-ahead log would be what publishes. A database in that mode is shown in rollback mode."""
    with Client(pair.here / name) as writer:
        assert "I/O" in str(said(writer, "PRAGMA journal_mode=WAL"))
        writer("INSERT INTO t(n) VALUES (1)")
        assert writer("PRAGMA journal_mode", "PRAGMA journal_mode") == [["delete"]]
    assert "journal_mode=WAL is not possible on a mount with --exclusive" in pair.here.log
    time.sleep(1)
    assert sqlite(pair.elsewhere / name, "PRAGMA journal_mode=WAL", "INSERT INTO t(n) VALUES (2)") == "wal"
    assert sqlite(pair.here / name, "INSERT INTO t(n) VALUES (3)", STATE) == "203|6|3"
    assert sqlite(pair.elsewhere / name, STATE, "PRAGMA integrity_check") == "203|6|3\nok"


COUNTER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
for _ in range(int(sys.argv[2])):
    db.execute("BEGIN IMMEDIATE")
    [[n]] = db.execute("SELECT n FROM t WHERE id = 1").fetchall()
    db.execute("UPDATE t SET n = ? WHERE id = 1", [n + 1])
    db.execute("UPDATE t SET n = (SELECT n FROM t WHERE id = 1) WHERE id > 190")
    db.execute("COMMIT")
"""


def test_many_processes_write(pair: Pair, name: str) -> None:
    """SQLite's own locks hold among them, and readers here and elsewhere see one state at a time."""
    one_state = "SELECT count(DISTINCT n) FROM t WHERE id > 190 OR id = 1"
    line = [sys.executable, "-c", COUNTER, str(pair.here / name), "15"]
    writers = [subprocess.Popen(line) for _ in range(4)]
    with Client(pair.here / name) as reader, Client(pair.elsewhere / name) as other:
        for each in (reader, other):
            each("PRAGMA busy_timeout=20000")
        while any(writer.poll() is None for writer in writers):
            assert reader(one_state) == other(one_state) == [[1]]
        assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
        assert reader("SELECT n FROM t WHERE id = 1") == [[60]]
    assert same_everywhere(pair, name, "SELECT n FROM t WHERE id = 199") == "60"


# --- the lease is lost all the same ----------------------------------------------------------------------------


def take_over(pair: Pair, name: str, n: int) -> None:
    """An operator ends the lease, and another machine commits."""
    done = command(pair.place, "lease", "break", f"{pair.place.target}/{name}", "--endpoint-url", pair.place.url)
    assert done.returncode == 0, done.stderr
    sqlite(pair.elsewhere / name, f"UPDATE t SET n = {n}")


def test_a_lease_that_was_lost(pair: Pair, name: str) -> None:
    """What was open gets errors until it is opened again, in the middle of a read, of a write or between transactions;
    what is opened now sees the newest state, while those still have it open. Nobody ever sees both."""
    with Client(pair.here / name) as reader, Client(pair.here / name) as idle:
        reader("PRAGMA cache_size=2", "BEGIN", "SELECT count(*) FROM t WHERE id < 50")
        assert idle(STATE) == BEFORE
        take_over(pair, name, 3)
        old = "SELECT max(n) FROM t"
        deadline = time.monotonic() + 3 * LEASE_S
        while "I/O" not in (answer := str(said(reader, old))):
            assert answer == "[[0]]"
            assert time.monotonic() < deadline
        for _ in range(3):
            with Client(pair.here / name) as fresh:
                assert fresh(STATE, "PRAGMA integrity_check", STATE) == [[200, 600, 3]]
            assert "I/O" in str(said(reader, old))
            assert "I/O" in str(said(idle, STATE))
        assert "I/O" in str(said(idle, "INSERT INTO t(n) VALUES (9)"))
    assert "the lease was lost" in pair.here.log
    sqlite(pair.here / name, "INSERT INTO t(n) VALUES (4)")
    assert same_everywhere(pair, name, STATE) == "201|604|4"


def test_a_commit_after_the_lease_was_lost(pair: Pair, name: str) -> None:
    with Client(pair.here / name) as writer:
        writer(*SPILLS)
        take_over(pair, name, 3)
        assert "I/O" in str(said(writer, "COMMIT"))
        eventually(lambda: "I/O" in str(said(writer, STATE)), True)
    assert sqlite(pair.here / name, STATE) == "200|600|3"
    assert same_everywhere(pair, name, STATE) == "200|600|3"


@pytest.mark.long
def test_a_state_that_came_without_a_lease(pair: Pair, name: str) -> None:
    """`restore` and its like take none: it is found out when the lease is renewed."""
    with Client(pair.here / name) as writer:
        writer("INSERT INTO t(n) VALUES (1)")
        target = f"{pair.place.target}/{name}"
        done = command(pair.place, "restore", target, "--to", "2", "--endpoint-url", pair.place.url)
        assert done.returncode == 0, done.stderr
        eventually(lambda: "I/O" in str(said(writer, STATE)), True, within_s=3 * LEASE_S)
    assert sqlite(pair.here / name, "SELECT count(*) FROM sqlite_master") == "1"
    same_everywhere(pair, name)


def test_a_machine_that_slept(pair: Pair, name: str, tmp_path: Path) -> None:
    """Another one took the lease over and committed. The first one notices when it wakes, and mixes nothing."""
    with mounted(pair.place, tmp_path, "--exclusive", *OPTIONS, refresh="60") as there:
        with Client(there / name) as sleeper, Client(pair.elsewhere / name) as other:
            assert sleeper(STATE) == BEFORE
            there.signal(signal.SIGSTOP)
            try:
                eventually(lambda: said(other, "UPDATE t SET n = 3"), [])
            finally:
                there.signal(signal.SIGCONT)
            states = []
            deadline = time.monotonic() + PATIENCE_S
            while "I/O" not in str(states[-1:]):
                assert time.monotonic() < deadline
                states.append(said(sleeper, STATE))
            assert all(state == BEFORE for state in states[:-1])
        assert sqlite(there / name, STATE) == "200|600|3"


def test_deleted_and_renamed_while_open(pair: Pair, name: str) -> None:
    with Client(pair.here / name) as client:
        assert client(STATE) == BEFORE
        assert shell("mv", pair.here / name, pair.here / f"b{name}").returncode == 0
        assert "SQLITE_READONLY_DBMOVED" in str(said(client, "INSERT INTO t(n) VALUES (1)"))
    assert sqlite(pair.here / f"b{name}", "INSERT INTO t(n) VALUES (1)", STATE) == "201|1|1"
    with Client(pair.here / f"b{name}") as client:
        assert client(STATE) == [[201, 1, 1]]
        assert shell("rm", pair.here / f"b{name}").returncode == 0
        assert "SQLITE_" in str(said(client, "INSERT INTO t(n) VALUES (1)"))
        sqlite(pair.here / f"b{name}", "CREATE TABLE t(id INTEGER PRIMARY KEY, n)")
    assert same_everywhere(pair, f"b{name}", "SELECT count(*) FROM t") == "0"
