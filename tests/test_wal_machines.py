"""WAL mode across machines, failures of the store, and the death of the daemon: nothing acknowledged is lost, nothing
that failed comes back, no state is mixed."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from mounting import PATIENCE_S, Client, Place, SqlError, command, fresh_name, mounted, shell, sqlite
from pairs import Pair, same_everywhere, two_mounts
from proxy import Fault, FaultProxy, Request
from test_mount_kill import check, commit_until_killed

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place, folder = mount_bucket.inside(fresh_name("wal")), tmp_path_factory.mktemp("pair")
    limits = ("--lease", "2", "--request-deadline", "1", "--transaction-deadline", "2", "--group-commit", "0.3")
    with two_mounts(place, folder, *limits) as pair:
        yield pair


@pytest.fixture
def pair(mounts: Pair) -> Iterator[Pair]:
    mounts.proxy.reset()
    yield mounts
    mounts.proxy.reset()


@pytest.fixture
def name() -> str:
    return fresh_name()


def create(path: Path, *statements: str) -> None:
    assert sqlite(path, "PRAGMA journal_mode=WAL", "CREATE TABLE t(a PRIMARY KEY, b)", *statements) == "wal"


def in_time(do: Callable[[], object], needle: str = "locked") -> object:
    """Its result, as soon as SQLITE_BUSY or the like is over."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return do()
        except (SqlError, AssertionError) as error:
            if needle not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def is_commit(request: Request) -> bool:
    return request.method == "PUT" and request.kind == "head"


def test_machines_take_turns(pair: Pair, name: str) -> None:
    """Connections that stay open for ever on both; each sees what the other wrote, with its log and its page cache."""
    create(pair.here / name)
    with Client(pair.here / name) as one, Client(pair.elsewhere / name) as two, Client(pair.here / name) as watch:
        for number in range(6):
            for writer, reader in ((one, two), (two, one)):
                row = f"({number} * 2 + (SELECT count(*) FROM t) % 2, randomblob(7000))"
                in_time(partial(writer, f"INSERT INTO t VALUES {row}"))
                count = writer("SELECT count(*) FROM t")
                assert reader("SELECT count(*) FROM t") == watch("SELECT count(*) FROM t") == count
                assert reader("PRAGMA integrity_check") == watch("PRAGMA integrity_check") == [["ok"]]
            if number == 3:
                one("PRAGMA wal_checkpoint(TRUNCATE)")
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == "12"


def test_a_reader_keeps_its_state_while_others_commit(pair: Pair, name: str) -> None:
    create(pair.here / name, "INSERT INTO t VALUES (1, 1)")
    with (
        Client(pair.here / name) as reader,
        Client(pair.elsewhere / name) as writer,
        Client(pair.here / name) as behind,
    ):
        reader("BEGIN")
        assert reader("SELECT count(*) FROM t") == [[1]]
        for number in range(2, 5):
            in_time(partial(writer, f"INSERT INTO t VALUES ({number}, randomblob(5000))"))
            assert reader("SELECT count(*), sum(a) FROM t") == [[1, 1]]
        with pytest.raises(SqlError, match="locked"):
            behind("BEGIN IMMEDIATE")
        with pytest.raises(SqlError, match="locked"):
            reader("INSERT INTO t VALUES (9, 9)")
        began = time.monotonic()
        assert in_time(lambda: behind("SELECT count(*), sum(a) FROM t")) == [
            [1, 1]
        ]  # after a pause in which the first could have ended
        assert time.monotonic() - began < 8
        reader("ROLLBACK")
        assert reader("SELECT count(*), sum(a) FROM t") == behind("SELECT count(*), sum(a) FROM t") == [[4, 10]]
        in_time(lambda: behind("INSERT INTO t VALUES (5, 5)"))
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == "15"


def test_rollback_mode_elsewhere(pair: Pair, name: str) -> None:
    """Somebody leaves WAL mode on one machine while a connection on the other has its log open."""
    create(pair.here / name)
    with Client(pair.here / name) as here:
        here("INSERT INTO t VALUES (1, 1)")
        in_time(lambda: sqlite(pair.elsewhere / name, "PRAGMA journal_mode=DELETE; INSERT INTO t VALUES (2, 2)"))
        assert here("SELECT sum(a) FROM t") == [[3]]
        in_time(lambda: here("INSERT INTO t VALUES (3, 3)"))
        here("PRAGMA wal_checkpoint(TRUNCATE)")  # SQLite takes an empty log for none
        assert sqlite(pair.here / name, "SELECT sum(a) FROM t; PRAGMA journal_mode") == "6\nwal"
        assert sqlite(pair.elsewhere / name, "SELECT sum(a) FROM t") == "6"
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == "6"


def test_a_read_only_mount_shows_rollback_mode(pair: Pair, name: str, tmp_path: Path) -> None:
    create(pair.here / name)
    daemon = mounted(pair.place, tmp_path, "--read-only")
    with daemon as mount, Client(mount / name) as reader, Client(pair.here / name) as writer:
        for number in range(3):
            writer(f"INSERT INTO t VALUES ({number}, randomblob(5000))")
            assert reader("SELECT count(*) FROM t") == [[number + 1]]
            assert reader("PRAGMA journal_mode") == [["delete"]]


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_commit_that_fails(pair: Pair, name: str, exclusive: bool) -> None:
    """It is nowhere, not even after the same statement was run again, and others here never see it."""
    create(pair.here / name, "INSERT INTO t VALUES (0, 0)")
    with Client(pair.here / name) as writer, Client(pair.here / name) as reader:
        if exclusive:
            reader.kill()
            writer("PRAGMA locking_mode=EXCLUSIVE")
        writer("INSERT INTO t VALUES (1, 1)")
        pair.proxy.rule = lambda request: Fault(status=403, code="AccessDenied") if is_commit(request) else None
        for _ in range(2):
            with pytest.raises(SqlError, match="disk I/O error"):
                writer("INSERT INTO t VALUES (2, zeroblob(20000))")
        if not exclusive:
            assert reader("SELECT sum(a) FROM t") == [[1]]
        pair.proxy.rule = None
        assert sqlite(pair.elsewhere / name, "SELECT sum(a) FROM t") == "1"
        if exclusive:
            with pytest.raises(SqlError, match="disk I/O error"):  # until it is closed
                writer("INSERT INTO t VALUES (2, zeroblob(20000))")
        else:
            in_time(lambda: writer("BEGIN IMMEDIATE"), "")
            writer("ROLLBACK")  # gives the write lock back, which is when what stands in the log counts
            assert sqlite(pair.here / name, "PRAGMA wal_checkpoint", "SELECT sum(a) FROM t").endswith("\n1")
            assert sqlite(pair.elsewhere / name, "SELECT sum(a) FROM t") == "1"
            in_time(lambda: writer("INSERT INTO t VALUES (4, zeroblob(20000))"), "")
            assert reader("SELECT sum(a) FROM t") == [[5]]
    total = "1" if exclusive else "5"
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == total
    sqlite(pair.here / name, "INSERT INTO t VALUES (100, 0)")
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == str(int(total) + 100)


def test_an_exclusive_session_keeps_others_out(pair: Pair, name: str) -> None:
    create(pair.here / name)
    with Client(pair.here / name) as one, Client(pair.elsewhere / name) as two:
        one("SELECT count(*) FROM t")  # first, or SQLite stays in that mode until it is closed
        one("PRAGMA locking_mode=EXCLUSIVE", "INSERT INTO t VALUES (1, 1)")
        until = time.monotonic() + 3.5  # longer than an unchanged lease is respected
        while time.monotonic() < until:
            with pytest.raises(SqlError, match="locked"):
                two("INSERT INTO t VALUES (2, 2)")
            assert two("SELECT sum(a) FROM t") == [[1]]
            time.sleep(0.1)
        one("INSERT INTO t VALUES (3, 3)")
        assert two("SELECT sum(a) FROM t") == [[4]]
        one("PRAGMA locking_mode=NORMAL", "SELECT count(*) FROM t")
        in_time(lambda: two("INSERT INTO t VALUES (2, 2)"))
        assert one("SELECT sum(a) FROM t") == [[6]]
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == "6"


def test_the_end_of_a_mount_publishes_what_waits(place: Place, tmp_path: Path) -> None:
    with mounted(place, tmp_path, "--group-commit", "60") as mount:
        create(mount / "a.db")
        with Client(mount / "a.db") as client:
            client("PRAGMA synchronous=NORMAL", "INSERT INTO t VALUES (1, 1)", "INSERT INTO t VALUES (2, 2)")
            mount.signal(signal.SIGTERM)
            assert mount.wait() == 0, mount.log
            shell("fusermount", "-u", "-z", mount.directory)
    with mounted(place, tmp_path) as mount:
        assert sqlite(mount / "a.db", "SELECT sum(a) FROM t; PRAGMA integrity_check") == "3\nok"


def test_a_commit_that_is_lost(pair: Pair, name: str) -> None:
    """Another machine broke the lease and committed first."""
    create(pair.here / name, "INSERT INTO t VALUES (0, 0)")
    with Client(pair.here / name) as writer, Client(pair.here / name) as reader:
        writer("INSERT INTO t VALUES (1, 1)", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (2, zeroblob(20000))")
        done = command(pair.place, "lease", "break", f"{pair.place.target}/{name}", "--endpoint-url", pair.place.url)
        assert done.returncode == 0, done.stderr
        in_time(lambda: sqlite(pair.elsewhere / name, "INSERT INTO t VALUES (10, 10)"))
        with pytest.raises(SqlError, match="disk I/O error"):
            writer("COMMIT")
        with contextlib.suppress(SqlError):
            writer("ROLLBACK")
        assert reader("SELECT sum(a) FROM t") == writer("SELECT sum(a) FROM t") == [[11]]
        in_time(lambda: writer("INSERT INTO t VALUES (100, 100)"))
        assert reader("SELECT sum(a) FROM t") == [[111]]
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == "111"


@pytest.mark.parametrize("applied", [True, False])
def test_a_commit_in_doubt(pair: Pair, name: str, applied: bool) -> None:
    """The answer is lost and the store away: an error, then nothing works, then the truth is shown."""
    create(pair.here / name, "INSERT INTO t VALUES (0, 0)")
    with Client(pair.here / name) as writer, Client(pair.here / name) as reader:
        writer("INSERT INTO t VALUES (1, 1)")
        sent: list[Request] = []

        def rule(request: Request) -> Fault:
            if is_commit(request):
                sent.append(request)
                return Fault(apply=applied and len(sent) == 1, cut=True)
            return Fault(status=503, code="SlowDown")

        pair.proxy.rule = rule
        with pytest.raises(SqlError, match="disk I/O error"):
            writer("INSERT INTO t VALUES (2, zeroblob(20000))")
        with pytest.raises(SqlError):
            reader("SELECT sum(a) FROM t")
        pair.proxy.rule = None
        expected = [[3]] if applied else [[1]]
        assert in_time(lambda: reader("SELECT sum(a) FROM t"), "") == expected
        in_time(lambda: writer("INSERT INTO t VALUES (10, 10)"), "")
        assert reader("SELECT sum(a) FROM t") == [[expected[0][0] + 10]]
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == str(expected[0][0] + 10)


def test_normal_in_an_outage(pair: Pair, name: str) -> None:
    """Commits go on here, and are published when the store is back."""
    create(pair.here / name)
    with Client(pair.here / name) as writer:
        writer("PRAGMA synchronous=NORMAL", "INSERT INTO t VALUES (0, 0)")
        pair.proxy.rule = lambda request: Fault(status=403, code="AccessDenied") if is_commit(request) else None
        for number in range(1, 5):
            writer(f"INSERT INTO t VALUES ({number}, randomblob(3000))")
            time.sleep(0.2)
        assert writer("SELECT count(*) FROM t") == [[5]]
        pair.proxy.rule = None
        deadline = time.monotonic() + PATIENCE_S
        while sqlite(pair.elsewhere / name, "SELECT count(*) FROM t") != "5":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        writer("INSERT INTO t VALUES (9, 9)")
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == "6"


# --- many processes ---------------------------------------------------------------------------------------

#: Writes for some seconds: every row carries a checksum of its commit. Prints [commits, errors] at the end, each commit
#: that was acknowledged before. Reads all of it before each transaction and checks it.
WRITER = """
import hashlib, json, random, sqlite3, sys, time
path, me, seconds, synchronous, seed = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], int(sys.argv[5])
chance = random.Random(seed)
connect = lambda: sqlite3.connect(path, isolation_level=None, timeout=20)
db = connect()
until, last, retries = time.monotonic() + seconds, 0, 0

def check():
    db.execute("BEGIN")
    rows = db.execute("SELECT writer, number, part, parts, sum, data FROM t").fetchall()
    total = db.execute("SELECT writer, number FROM latest").fetchall()
    db.execute("COMMIT")
    commits = {}
    for writer, number, part, parts, digest, data in rows:
        assert hashlib.md5(data + b"%d %d %d %d" % (writer, number, part, parts)).hexdigest() == digest, "torn row"
        commits.setdefault((writer, number), []).append(parts)
    for key, found in commits.items():
        assert len(found) == found[0], ("half a commit", key, found)
    newest = dict(total)
    for writer, number in commits:
        assert number <= newest[writer], ("newer than the newest", writer, number, newest)
    assert newest[me] >= last, ("lost", me, last, newest)
    return newest[me]

number = 0
while time.monotonic() < until:
    try:
        db.execute(f"PRAGMA synchronous={synchronous}")
        number = check() + 1
        if chance.random() < 0.1:
            db.execute("PRAGMA wal_checkpoint(%s)" % chance.choice(["PASSIVE", "FULL", "RESTART", "TRUNCATE"]))
        db.execute("BEGIN IMMEDIATE")
        assert db.execute("SELECT number FROM latest WHERE writer = ?", (me,)).fetchone()[0] == number - 1
        parts = chance.randint(1, 6)
        db.execute("DELETE FROM t WHERE writer = ? AND number < ?", (me, number - 5))
        for part in range(parts):
            data = chance.randbytes(chance.choice([10, 500, 9000]))
            digest = hashlib.md5(data + b"%d %d %d %d" % (me, number, part, parts)).hexdigest()
            db.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?)", (me, number, part, parts, digest, data))
        db.execute("UPDATE latest SET number = ? WHERE writer = ?", (number, me))
        db.execute("COMMIT")
        last = number
        if chance.random() < 0.05:
            db.close()
            db = connect()
    except sqlite3.OperationalError as error:
        assert "locked" in str(error) or "locking protocol" in str(error), error
        retries += 1
        if db.in_transaction:
            db.execute("ROLLBACK")
check()
print(json.dumps([last, retries]))
"""


def soak(paths: list[Path], seconds: float, synchronous: str, seed: int) -> list[list[int]]:
    sqlite(
        paths[0],
        "PRAGMA journal_mode=WAL",
        "CREATE TABLE t(writer, number, part, parts, sum, data)",
        "CREATE TABLE latest(writer PRIMARY KEY, number)",
        *[f"INSERT INTO latest VALUES ({writer}, 0)" for writer in range(len(paths))],
    )
    lines = [
        [sys.executable, "-c", WRITER, str(path), str(me), str(seconds), synchronous, str(seed + me)]
        for me, path in enumerate(paths)
    ]
    processes = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in lines]
    try:
        said = [process.communicate(timeout=seconds + 4 * PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(err for _, err in said), "\n".join(err for _, err in said)
    return [json.loads(out) for out, _ in said]


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
@pytest.mark.parametrize("where", ["one machine", "two machines"])
def test_many_processes(
    pair: Pair, name: str, where: str, synchronous: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No torn row, no half a commit, nothing acknowledged is gone."""
    seed = random.SystemRandom().randrange(1 << 30)
    here, there = pair.here / name, pair.elsewhere / name
    said = soak([here, here, here] if where == "one machine" else [here, there, here, there], 8, synchronous, seed)
    with capsys.disabled():
        print(f"\n{where}, {synchronous}, seed {seed}: [commits, retries] {said}", file=sys.stderr)
    assert all(commits for commits, _ in said)
    expected = "\n".join(f"{writer}|{commits}" for writer, (commits, _) in enumerate(said))
    assert same_everywhere(pair, name, "SELECT * FROM latest ORDER BY writer") == expected


def test_sigkill_of_the_daemon(place: Place, tmp_path: Path, proxy: FaultProxy) -> None:
    """The new mount has an empty log, and everything that was acknowledged with synchronous=FULL."""
    root = None
    for number in range(3):
        with mounted(place.via(proxy.url), tmp_path, "--lease", "1", root=root) as mount:
            root = mount.directory.parent
            if number == 0:
                create(mount / "a.db")
            assert sqlite(mount / "a.db", "SELECT count(*) FROM t; PRAGMA integrity_check") == f"{number * 5}\nok"
            with Client(mount / "a.db") as client, Client(mount / "a.db") as reader:
                reader("BEGIN", "SELECT count(*) FROM t")
                for row in range(5):
                    in_time(partial(client, f"INSERT INTO t VALUES ({number * 5 + row}, randomblob(4000))"))
                client("BEGIN", f"INSERT INTO t VALUES ({number * 5 + 5}, 0)")
                mount.kill()
    with mounted(place, tmp_path, root=root) as mount:
        assert (
            sqlite(mount / "a.db", "PRAGMA journal_mode; SELECT count(*) FROM t; PRAGMA integrity_check")
            == "wal\n15\nok"
        )


def test_sigkill_of_the_daemon_at_random_moments(place: Place, tmp_path: Path) -> None:
    """Of transactions that are large, spill and shrink: nothing acknowledged is lost, nothing is there in part."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    moments, root, last = random.Random(seed), None, 0
    for _ in range(5):
        with mounted(place, tmp_path, "--lease", "1", root=root) as mount:
            root = mount.directory.parent
            if last == 0:
                sqlite(mount / "a.db", "PRAGMA journal_mode=WAL", "CREATE TABLE latest(number)")
                sqlite(
                    mount / "a.db", "CREATE TABLE t(n, row, data, PRIMARY KEY(n, row))", "INSERT INTO latest VALUES (0)"
                )
            assert sqlite(mount / "a.db", "PRAGMA journal_mode") == "wal"
            last = commit_until_killed(mount, check(mount, last) + 1, moments.uniform(0, 0.3))[-1]
    with mounted(place, tmp_path, "--lease", "1", root=root) as mount:
        check(mount, last)


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
@pytest.mark.parametrize("where", ["one machine", "two machines"])
def test_processes_that_die(pair: Pair, name: str, where: str, synchronous: str) -> None:
    """At random moments of reading, writing, committing and checkpointing; the others, and their successors, go on."""
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    chance, path = random.Random(seed), pair.here / name
    paths = [path, path if where == "one machine" else pair.elsewhere / name, path]
    soak(paths, 1, synchronous, seed)

    def start(me: int) -> subprocess.Popen[str]:
        line = [
            sys.executable,
            "-c",
            WRITER,
            str(paths[me]),
            str(me),
            "60",
            synchronous,
            str(chance.randrange(1 << 30)),
        ]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    processes = [start(me) for me in range(3)]
    try:
        for _ in range(15):
            time.sleep(chance.uniform(0.1, 0.9))
            me = chance.randrange(3)
            processes[me].kill()
            assert processes[me].communicate()[1] == ""
            processes[me] = start(me)
        for me, process in enumerate(processes):
            assert process.poll() is None, process.communicate()[1]
            if me:
                process.kill()
                process.communicate()
        assert sqlite(path, ".timeout 20000", "PRAGMA integrity_check") == "ok"
    finally:
        for process in processes:
            process.kill()
            assert process.stderr is not None
            process.stderr.close()
            process.wait()
    in_time(lambda: same_everywhere(pair, name, "SELECT * FROM latest ORDER BY writer"), "")


@pytest.mark.parametrize("seconds", [8, pytest.param(120, marks=pytest.mark.long)])
def test_many_processes_that_look_now_and_then(place: Place, tmp_path: Path, seconds: float) -> None:
    """With the default `--refresh`, and checkpoints, logs and leases as they come."""
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    with two_mounts(place, tmp_path, "--refresh", "1") as pair:
        here, there = pair.here / "a.db", pair.elsewhere / "a.db"
        assert all(commits for commits, _ in soak([here, there, here, there, here], seconds, "FULL", seed))
        time.sleep(1.1)  # until every mount has to look again
        same_everywhere(pair, "a.db", "SELECT * FROM latest ORDER BY writer")
