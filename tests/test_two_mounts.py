"""Writers on two machines: two daemons that share nothing but the store, several processes on each.

Without `busy_timeout` the second writer gets SQLITE_BUSY at once; with it everybody gets a turn and nothing is lost.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import PATIENCE_S, Client, Place, SqlError, fresh_name, mounted, numbers, sqlite
from pairs import Pair, same_everywhere, two_mounts
from proxy import Fault, FaultProxy

from s3blockfs.lease import LINGER_S

pytestmark = pytest.mark.mount

LEASE_S = 2


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place, folder = mount_bucket.inside(fresh_name("writers")), tmp_path_factory.mktemp("pair")
    with two_mounts(place, folder, "--lease", str(LEASE_S)) as pair:
        yield pair


@pytest.fixture
def pair(mounts: Pair) -> Iterator[Pair]:
    mounts.proxy.reset()
    yield mounts
    mounts.proxy.reset()


@pytest.fixture
def name() -> str:
    return fresh_name()


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", file=sys.stderr)


def eventually(ask: Callable[[], Any], expected: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (answer := ask()) != expected:
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def files_of(process: int) -> set[str]:
    """What a daemon has open for writing or keeps data in: regular files, by device and inode; sockets of its own."""
    found = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = link.stat()
            if not str(link.readlink()).startswith(("/dev/", "anon_inode:")):
                found.add(f"{status.st_dev}:{status.st_ino}")
    return found


def test_the_daemons_share_nothing(pair: Pair, name: str) -> None:
    """No open file, pipe or socket in common, in the middle of a transaction on each."""
    with Client(pair.here / name) as one, Client(pair.elsewhere / f"z{name}") as two:
        for client in (one, two):
            client("CREATE TABLE t(a)", "PRAGMA cache_size=2", "BEGIN")
            client(f"INSERT INTO t SELECT randomblob(900) FROM ({numbers(200)})")
        here, elsewhere = (files_of(mount.process.pid) for mount in (pair.here, pair.elsewhere))
        assert len(here) > 3 and len(elsewhere) > 3
        assert not here & elsewhere
        assert pair.here.process.pid != pair.elsewhere.process.pid and pair.here.spill != pair.elsewhere.spill


# --- at once ---------------------------------------------------------------------------------------------------

#: Counts up for some seconds; at the end its number of commits, its longest wait, and errors by name.
COUNTER = """
import json, sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0)
db.execute("PRAGMA busy_timeout=20000")
commits, longest, errors, end = 0, 0.0, {}, time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    began = time.monotonic()
    try:
        db.execute("BEGIN IMMEDIATE")
        (number,) = db.execute("SELECT n FROM t").fetchone()
        db.execute("UPDATE t SET n = ?", (number + 1,))
        db.execute("COMMIT")
        commits += 1
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", str(error))
        errors[name] = errors.get(name, 0) + 1
        if db.in_transaction:
            db.execute("ROLLBACK")
    longest = max(longest, time.monotonic() - began)
print(json.dumps([commits, longest, errors]))
"""

#: Moves money between accounts at random for some seconds, like the above.
TRANSFERS = COUNTER.replace(
    """        (number,) = db.execute("SELECT n FROM t").fetchone()
        db.execute("UPDATE t SET n = ?", (number + 1,))
""",
    """        a, b, amount = random.randrange(200), random.randrange(200), random.randrange(1, 9)
        for account, change in ((a, -amount), (b, amount)):
            (balance,) = db.execute("SELECT balance FROM t WHERE id = ?", (account,)).fetchone()
            db.execute("UPDATE t SET balance = ? WHERE id = ?", (balance + change, account))
        db.execute("UPDATE transfers SET n = n + 1")
""",
).replace("import json,", "import json, random,")


def run(program: str, *paths: Path, seconds: float) -> list[tuple[int, float, dict[str, int]]]:
    """The program on each path at once, a process each; what they say at the end."""
    lines = [[sys.executable, "-c", program, str(path), str(seconds)] for path in paths]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen(line, stdout=subprocess.PIPE, text=True)) for line in lines]
        for process in running:
            stack.callback(process.kill)
        return [json.loads(process.communicate(timeout=PATIENCE_S)[0]) for process in running]


def show(capsys: pytest.CaptureFixture[str], what: str, seconds: float, said: list[tuple[int, float, Any]]) -> None:
    rates = ", ".join(f"{commits / seconds:.1f}" for commits, _, _ in said)
    say(capsys, f"{what}: commits/s by writer {rates}; longest wait {max(wait for _, wait, _ in said):.1f} s")
    assert all(set(errors) <= {"SQLITE_BUSY"} for _, _, errors in said)
    assert all(commits > 0 for commits, _, _ in said)
    assert max(wait for _, wait, _ in said) < 15  # busy_timeout is 20 s


@pytest.mark.long  # test_writers.py has more of them
def test_four_writers_count_up(pair: Pair, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes on each of two machines: the sum is exact, nobody starves, no error but BUSY."""
    sqlite(pair.here / name, "CREATE TABLE t(n)", "INSERT INTO t VALUES (0)")
    said = run(COUNTER, *[pair.here / name, pair.elsewhere / name] * 2, seconds=10)
    show(capsys, "four writers on two machines", 10, said)
    total = sum(commits for commits, _, _ in said)
    assert same_everywhere(pair, name, "SELECT n FROM t") == str(total)
    assert pair.commits(name) >= total


@pytest.mark.long  # test_writers.py has more of them
def test_transfers_keep_the_sum(pair: Pair, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Readers on both machines, with connections that stay open, see the same sum in every state and no state twice."""
    sqlite(pair.here / name, "CREATE TABLE t(id INTEGER PRIMARY KEY, balance, filler)", "CREATE TABLE transfers(n)")
    sqlite(pair.here / name, f"INSERT INTO t SELECT i - 1, 100, zeroblob(300) FROM ({numbers(200)})")
    sqlite(pair.here / name, "INSERT INTO transfers VALUES (0)")
    seen: dict[Path, list[int]] = {pair.here / name: [], pair.elsewhere / name: []}
    wrong: list[object] = []
    enough = threading.Event()

    def watch(path: Path) -> None:
        with Client(path) as reader:
            reader("PRAGMA busy_timeout=20000")
            while not enough.is_set():
                reader("BEGIN")
                [[number]], [[total]] = reader("SELECT n FROM transfers"), reader("SELECT sum(balance) FROM t")
                reader("COMMIT")
                seen[path].append(number)
                if total != 20_000:
                    wrong.append((path, number, total))
            if reader("PRAGMA integrity_check") != [["ok"]]:
                wrong.append((path, "integrity"))

    threads = [threading.Thread(target=watch, args=[path]) for path in seen]
    for thread in threads:
        thread.start()
    try:
        said = run(TRANSFERS, *seen, seconds=8)
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    show(capsys, "transfers on two machines, with readers", 8, said)
    assert wrong == []
    for numbers_seen in seen.values():
        assert numbers_seen == sorted(numbers_seen)
        assert len(set(numbers_seen)) > 3
    total = sum(commits for commits, _, _ in said)
    assert same_everywhere(pair, name, "SELECT n FROM transfers", "SELECT sum(balance) FROM t") == f"{total}\n20000"


def test_without_busy_timeout_the_second_writer_is_told_at_once(pair: Pair, name: str) -> None:
    """BUSY at BEGIN IMMEDIATE, never an I/O error; readers read on; a deferred one is BUSY at its first write."""
    with Client(pair.here / name) as one, Client(pair.elsewhere / name) as two:
        one("CREATE TABLE t(a)", "INSERT INTO t VALUES (0)")
        two("BEGIN", "SELECT * FROM t")
        one("BEGIN IMMEDIATE", "INSERT INTO t VALUES (1)")
        with pytest.raises(SqlError, match="SQLITE_BUSY"):
            two("INSERT INTO t VALUES (2)")
        two("ROLLBACK")
        for _ in range(20):
            began = time.monotonic()
            with pytest.raises(SqlError, match="SQLITE_BUSY"):
                two("BEGIN IMMEDIATE")
            assert time.monotonic() - began < 3
            assert two("SELECT count(*) FROM t") == [[1]]
        two("BEGIN", "SELECT * FROM t")
        one("COMMIT")
        with pytest.raises(SqlError, match="SQLITE_BUSY"):
            two("INSERT INTO t VALUES (2)")  # also with busy_timeout: waiting cannot make its state the newest one
        assert two("SELECT count(*) FROM t") == [[1]]
        two("ROLLBACK", "PRAGMA busy_timeout=20000")
        began = time.monotonic()
        two("INSERT INTO t VALUES (2)")
        assert time.monotonic() - began < LINGER_S + 5  # a lease that is not given back lasts for twice that
        assert one("SELECT group_concat(a) FROM t") == [["0,1,2"]]
    same_everywhere(pair, name)


# --- readers ---------------------------------------------------------------------------------------------------


def test_a_long_reader_keeps_its_state_and_holds_up_no_writer_elsewhere(pair: Pair, name: str) -> None:
    with Client(pair.here / name) as writer, Client(pair.elsewhere / name) as reader:
        writer("CREATE TABLE t(n, a)", f"INSERT INTO t SELECT 0, randomblob(900) FROM ({numbers(300)})")
        reader("BEGIN", "SELECT min(n), max(n) FROM t")
        for turn in range(1, 6):
            writer(f"UPDATE t SET n = {turn}, a = randomblob(900)")
            assert reader("SELECT min(n), max(n) FROM t") == [[0, 0]]
        reader("COMMIT")
        assert reader("SELECT min(n), max(n) FROM t") == [[5, 5]]
    same_everywhere(pair, name)


def test_overlapping_readers_come_to_the_newest_state(pair: Pair, name: str) -> None:
    """Two connections that always overlap hold an old state; new readers are held back until it can move."""
    with Client(pair.here / name) as writer, contextlib.ExitStack() as stack:
        writer("CREATE TABLE t(n)", "INSERT INTO t VALUES (0)")
        readers = [stack.enter_context(Client(pair.elsewhere / name)) for _ in range(2)]
        readers[0]("BEGIN", "SELECT n FROM t")
        writer("UPDATE t SET n = 1")
        deadline = time.monotonic() + PATIENCE_S
        turn = 0
        while True:
            turn += 1
            leaving, coming = readers[(turn - 1) % 2], readers[turn % 2]
            coming("BEGIN")
            try:
                seen = coming("SELECT n FROM t")
            except SqlError as error:
                assert "SQLITE_BUSY" in str(error)
                leaving("ROLLBACK")
                seen = coming("SELECT n FROM t")
            else:
                leaving("ROLLBACK")
            if seen == [[1]]:
                break
            assert time.monotonic() < deadline


#: Readers of one process of which one leaves only when another has come (or was refused), a writer, and a connection
#: that is only open, by a URI.
SHARING = """
import json, sqlite3, sys, threading, time
changed, refused, stop, holding = threading.Condition(), threading.Event(), threading.Event(), 0
def connect():
    return sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0.3)
def read():
    global holding
    db = connect()
    while not stop.is_set():
        try:
            db.execute("BEGIN")
            db.execute("SELECT n FROM t").fetchone()
        except sqlite3.OperationalError:
            refused.set()
            db.execute("ROLLBACK")
            continue
        with changed:
            holding += 1
            changed.notify_all()
            while not (holding > 1 or refused.is_set() or stop.is_set()):
                changed.wait(0.01)
            holding -= 1
            db.execute("ROLLBACK")
readers = [threading.Thread(target=read) for _ in range(3)]
idle = sqlite3.connect(sys.argv[2], uri=True)
for reader in readers:
    reader.start()
while holding == 0:
    time.sleep(0.01)
print("reading", flush=True)
sys.stdin.readline()
db, busy = connect(), []
while True:
    step = "BEGIN IMMEDIATE"
    try:
        for step in ("BEGIN IMMEDIATE", "UPDATE t SET n = n + 10", "COMMIT"):
            db.execute(step)
        break
    except sqlite3.OperationalError as error:
        busy.append([step, str(error)])
        if db.in_transaction:
            db.execute("ROLLBACK")
        time.sleep(0.05)
stop.set()
for reader in readers:
    reader.join()
print(json.dumps(busy), flush=True)
"""


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_one_process_that_never_lets_go_of_shared(pair: Pair, name: str, mode: str) -> None:
    """Its connections share one SHARED on an old state. New readers are held back, and the writer waits for those under
    way. If one is read-only that cannot be done: COMMIT is BUSY in the end; after ROLLBACK it goes on."""
    sqlite(pair.here / name, "CREATE TABLE t(n)", "INSERT INTO t VALUES (0)")
    path = str(pair.elsewhere / name)
    line = [sys.executable, "-c", SHARING, path, f"file:{path}?mode={mode}"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "reading\n"
            sqlite(pair.here / name, "UPDATE t SET n = 1")
            busy = json.loads(process.communicate("go\n", timeout=PATIENCE_S)[0])
        finally:
            process.kill()
    assert {error for _, error in busy} == {"database is locked"}
    assert {step for step, _ in busy} == ({"BEGIN IMMEDIATE"} if mode == "rw" else {"BEGIN IMMEDIATE", "COMMIT"})
    assert same_everywhere(pair, name, "SELECT n FROM t") == "11"


# --- sessions, and machines that vanish --------------------------------------------------------------------------


def test_an_exclusive_session_keeps_others_out(pair: Pair, name: str) -> None:
    """locking_mode=EXCLUSIVE, for longer than leases last and tenures take: no commit of it fails, each is seen
    elsewhere as soon as it returned, and whoever wants to write there is BUSY until the session ends."""
    with Client(pair.elsewhere / name) as other, Client(pair.here / name) as session:
        session("CREATE TABLE t(n, a)", f"INSERT INTO t SELECT 0, randomblob(900) FROM ({numbers(100)})")
        session("PRAGMA locking_mode=EXCLUSIVE")
        refused, turn, end = 0, 0, time.monotonic() + 3 * LEASE_S
        while time.monotonic() < end:
            turn += 1
            session("BEGIN", f"UPDATE t SET n = {turn}", "COMMIT")
            assert other("SELECT DISTINCT n FROM t") == [[turn]]
            with pytest.raises(SqlError, match="SQLITE_BUSY"):
                other("BEGIN IMMEDIATE")
            refused += 1
            time.sleep(0.1)
        assert refused > 5
        session("PRAGMA locking_mode=NORMAL", "SELECT 1 FROM t")
        other("PRAGMA busy_timeout=20000", "UPDATE t SET n = -1")
        assert session("SELECT DISTINCT n FROM t") == [[-1]]
    same_everywhere(pair, name)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_machine_that_vanishes_in_mid_transaction(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: signal.Signals
) -> None:
    """Its lease is taken over after its time, and nothing of its transaction is anywhere. When it comes back it loses
    cleanly: an error at COMMIT, then the rows of the other."""
    with (
        mounted(place, tmp_path, "--lease", str(LEASE_S)) as other,
        mounted(place, tmp_path, "--lease", str(LEASE_S)) as mount,
        Client(other / "a.db") as client,
        Client(mount / "a.db") as lost,
    ):
        client("PRAGMA busy_timeout=20000", "CREATE TABLE t(n, a)")
        lost("PRAGMA busy_timeout=20000", "PRAGMA cache_size=2", "BEGIN IMMEDIATE")
        lost(f"INSERT INTO t SELECT 1, randomblob(900) FROM ({numbers(200)})")
        time.sleep(LEASE_S)  # long enough that it must have been renewed
        mount.signal(how)
        began = time.monotonic()
        client("INSERT INTO t VALUES (2, 'other')")
        waited = time.monotonic() - began
        say(capsys, f"lease of {LEASE_S} s of a machine that was {how.name}: taken over after {waited:.1f} s")
        assert LEASE_S / 2 < waited < LEASE_S + 5
        assert client("SELECT n FROM t") == [[2]]
        if how is signal.SIGSTOP:
            mount.signal(signal.SIGCONT)
            with pytest.raises(SqlError, match="I/O"):
                lost("COMMIT")
            with pytest.raises(SqlError, match="no transaction is active"):
                lost("ROLLBACK")
            assert lost("SELECT n, a FROM t") == [[2, "other"]]
            lost("INSERT INTO t VALUES (3, 'again')")
            assert client("SELECT n FROM t") == [[2], [3]]
            assert lost("PRAGMA integrity_check") == [["ok"]]
        else:
            lost.kill()
            mount.wait()
        assert client("PRAGMA integrity_check") == [["ok"]]


def test_of_two_commits_without_leases_one_is_lost_with_an_error(place: Place, tmp_path: Path) -> None:
    """Leases are politeness: with `--lease 0` the second to commit gets an error, nothing of it is anywhere, and its
    connection can go on."""
    with two_mounts(place, tmp_path, "--lease", "0") as pair:
        for mode in ("DELETE", "TRUNCATE", "PERSIST", "MEMORY"):
            name = fresh_name()
            with Client(pair.here / name) as one, Client(pair.elsewhere / name) as two:
                one("CREATE TABLE t(a, b)", f"INSERT INTO t SELECT i, 0 FROM ({numbers(500)})")
                for client, mark in ((one, 1), (two, 2)):
                    client(f"PRAGMA journal_mode={mode}", "PRAGMA cache_size=3")
                    client("BEGIN IMMEDIATE", f"UPDATE t SET b = {mark}")
                one("COMMIT")
                with pytest.raises(SqlError):
                    two("COMMIT")
                with contextlib.suppress(SqlError):
                    two("ROLLBACK")
                for client in (one, two):
                    assert client("SELECT min(b), max(b) FROM t") == [[1, 1]]
                two("UPDATE t SET b = 3")
                assert one("SELECT min(b), max(b) FROM t") == [[3, 3]]
            assert same_everywhere(pair, name, "SELECT DISTINCT b FROM t") == "3"


def test_a_store_that_hangs(place: Place, tmp_path: Path, proxy: FaultProxy) -> None:
    """BEGIN IMMEDIATE ends by the deadline of a request, COMMIT by that of a transaction; then all goes on."""
    limits = ("--request-deadline", "1", "--transaction-deadline", "3")
    with mounted(place.via(proxy.url), tmp_path, *limits) as mount, Client(mount / "a.db") as client:
        client("CREATE TABLE t(a)", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (1)")
        for step, limit_s in (("COMMIT", 3), ("BEGIN IMMEDIATE", 1)):
            proxy.rule = lambda request: Fault(hang_s=30)
            began = time.monotonic()
            with pytest.raises(SqlError):
                client(step)
            assert time.monotonic() - began < 2 * limit_s + 2
            proxy.rule = None
            eventually(lambda: answer_of(client, "SELECT count(*) FROM t"), [[0]])
        eventually(lambda: answer_of(client, "INSERT INTO t VALUES (2)"), [])
    with mounted(place, tmp_path) as mount:
        assert sqlite(mount / "a.db", "SELECT a FROM t") == "2"


def answer_of(client: Client, statement: str) -> object:
    try:
        return client(statement)
    except SqlError as error:
        return str(error)
