"""What mounts show of each other's commits, for how long, and what looking for them costs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import PATIENCE_S, Client, Place, SqlError, fresh_name, mounted, numbers, sqlite
from pairs import Pair, same_everywhere, two_mounts

pytestmark = pytest.mark.mount

REFRESH_S = 1.0


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place, folder = mount_bucket.inside(fresh_name("coherence")), tmp_path_factory.mktemp("pair")
    with two_mounts(place, folder, "--refresh", str(REFRESH_S)) as pair:
        yield pair


@pytest.fixture
def pair(mounts: Pair) -> Iterator[Pair]:
    mounts.proxy.reset()
    yield mounts
    mounts.proxy.reset()


#: Eight threads of one process of which none leaves before another has come, for a second at most; from half of the
#: time on a ninth writes now and then. Prints (n, when the last transaction that saw it began), how many there were,
#: [how long each write took] and [errors].
OVERLAPPING = """
import json, random, sqlite3, sys, threading, time
path, seconds, mode = sys.argv[1], float(sys.argv[2]), sys.argv[3]
changed, holding, seen, looks, took, errors = threading.Condition(), 0, {}, 0, [], []
until = time.monotonic() + seconds
def connect():
    db = sqlite3.connect(path, isolation_level=None, timeout=20)
    if db.execute("PRAGMA journal_mode").fetchone() != (mode.lower(),):
        db.execute(f"PRAGMA journal_mode={mode}")
    return db
def read():
    global holding, looks
    db = connect()
    while time.monotonic() < until:
        try:
            began = time.monotonic()
            db.execute("BEGIN")
            [(n,)] = db.execute("SELECT n FROM t WHERE i = 1")
            with changed:
                seen[n] = max(began, seen.get(n, 0))
                looks += 1
                holding += 1
                changed.notify_all()
                changed.wait_for(lambda: holding > 1, 1)
                holding -= 1
            time.sleep(random.random() / 10)
            rows = db.execute("SELECT min(n), max(n), count(*) FROM t").fetchall()
            assert rows == [(n, n, 40)], (n, rows)
            db.execute("COMMIT")
        except Exception as error:
            errors.append(f"reader: {error!r}")
            if db.in_transaction:
                db.execute("ROLLBACK")
def write():
    db = connect()
    time.sleep(seconds / 2)
    while time.monotonic() < until:
        began = time.monotonic()
        while True:
            try:
                db.execute("BEGIN IMMEDIATE")
                db.execute("UPDATE w SET n = n + 1")
                db.execute("COMMIT")
                break
            except sqlite3.OperationalError as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if "locked" not in str(error) or time.monotonic() - began > 60:
                    errors.append(f"writer: {error!r}")
                    break
        took.append(time.monotonic() - began)
        time.sleep(1)
threads = [threading.Thread(target=read) for _ in range(8)] + [threading.Thread(target=write)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps([list(seen.items()), looks, took, errors]))
"""


@pytest.mark.parametrize("mode", ["DELETE", pytest.param("PERSIST", marks=pytest.mark.long), "WAL"])
@pytest.mark.parametrize("seconds", [9, pytest.param(120, marks=pytest.mark.long)])
def test_overlapping_threads(pair: Pair, seconds: float, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one process: they share a lock, so the mount does not see them come and go. They come to what was committed
    elsewhere all the same, without an error, and a writer among them gets through."""
    name = fresh_name()
    sqlite(pair.elsewhere / name, f"PRAGMA journal_mode={mode}", "CREATE TABLE t(i INTEGER PRIMARY KEY, n, filler)")
    rows = "WITH c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<40) SELECT i, 0, zeroblob(900) FROM c"
    sqlite(pair.elsewhere / name, f"INSERT INTO t {rows}", "CREATE TABLE w(n)", "INSERT INTO w VALUES (0)")
    line = [sys.executable, "-c", OVERLAPPING, str(pair.here / name), str(seconds), mode]
    committed = [(time.monotonic(), 0)]
    with Client(pair.elsewhere / name) as writer, subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            writer("PRAGMA busy_timeout=30000")
            while process.poll() is None:
                writer("UPDATE t SET n = n + 1, filler = randomblob(900)")
                committed.append((time.monotonic(), len(committed)))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.4)
            seen, looks, took, errors = json.loads(process.communicate(timeout=PATIENCE_S)[0])
        finally:
            process.kill()
    ages = []
    for n, at in seen:
        newest = [when for when, number in committed if number == n + 1]
        ages.append(max(at - newest[0], 0.0) if newest else 0.0)
    assert ages, (looks, took, errors)
    with capsys.disabled():
        text = f"{looks} transactions saw {len(seen)} of {len(committed)} states, the oldest {max(ages):.1f} s old"
        print(f"\n{text}; {len(took)} writes, the longest {max(took, default=0):.1f} s; {errors[:3]}", file=sys.stderr)
    assert errors == []
    assert max(ages) < REFRESH_S + 7
    assert took and max(took) < 30
    time.sleep(REFRESH_S + 0.1)
    assert same_everywhere(pair, name, "SELECT n FROM w") == str(len(took))


#: A connection of APSW, whose SQLite is built to wait for the write lock before it reads.
WAITING = """
import apsw, sys
assert "ENABLE_SETLK_TIMEOUT" in apsw.compile_options
db = apsw.Connection(sys.argv[1])
db.set_busy_timeout(1000)
for line in sys.stdin:
    try:
        print(list(db.execute(line)), flush=True)
    except apsw.Error as error:
        print(type(error).__name__, error, flush=True)
"""


def test_a_library_that_locks_before_it_reads(pair: Pair) -> None:
    """Its transactions have the lease from their beginning, on the newest state, also after a recovery of the index."""
    name = fresh_name()
    sqlite(pair.elsewhere / name, "PRAGMA journal_mode=WAL", "CREATE TABLE t(a)")
    line, pipe = [sys.executable, "-c", WAITING, str(pair.here / name)], subprocess.PIPE
    with Client(pair.elsewhere / name) as other, subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(statement: str) -> str:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(statement + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        try:
            for number in range(4):
                assert ask("BEGIN IMMEDIATE") == "[]"
                with pytest.raises(SqlError, match="locked"):
                    other("INSERT INTO t VALUES (0)")
                assert ask("SELECT count(*) FROM t") == f"[({2 * number},)]"
                assert ask("INSERT INTO t VALUES (1)") == ask("COMMIT") == "[]"
                other("PRAGMA busy_timeout=20000", "INSERT INTO t VALUES (2)", "PRAGMA busy_timeout=0")
            other("BEGIN IMMEDIATE", "INSERT INTO t VALUES (3)")
            assert ask("BEGIN IMMEDIATE") == "BusyError database is locked"
            other("COMMIT")
            assert ask("INSERT INTO t VALUES (4)") == "[]"
        finally:
            process.kill()
    time.sleep(REFRESH_S + 0.1)
    assert same_everywhere(pair, name, "SELECT group_concat(a, '') FROM t") == "1212121234"


#: Polls 50 times a second, each file in turn: some threads, each with a connection that stays open, or a new one each
#: time. Prints how many looks, and the n that were seen in the order of time.
POLLING = """
import json, sqlite3, sys, threading, time
seconds, threads, anew, paths = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "anew", sys.argv[4:]
looks, seen, until = 0, [], time.monotonic() + seconds
def poll():
    global looks
    kept = {path: sqlite3.connect(path, isolation_level=None, timeout=20) for path in paths}
    while time.monotonic() < until:
        began = time.monotonic()
        for path in paths:
            db = sqlite3.connect(path, isolation_level=None, timeout=20) if anew else kept[path]
            [(n,)] = db.execute("SELECT n FROM t WHERE i = 1")
            looks += 1
            if anew:
                db.close()
            if [path, n] not in seen:
                seen.append([path, n])
        time.sleep(max(began + 0.02 - time.monotonic(), 0))
workers = [threading.Thread(target=poll) for _ in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(json.dumps([looks, [n for _, n in seen]]))
"""


def polled(seconds: float, *paths: Path, threads: int = 1, processes: int = 1, anew: bool = False) -> tuple[int, int]:
    """By so many processes: how often they looked, and how many values of one file a process saw at least."""
    line = [sys.executable, "-c", POLLING, str(seconds), str(threads), "anew" if anew else "", *map(str, paths)]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen(line, stdout=subprocess.PIPE)) for _ in range(processes)]
        for process in running:
            stack.callback(process.kill)
        said = [json.loads(process.communicate(timeout=PATIENCE_S)[0]) for process in running]
    assert all(seen == sorted(seen) for _, seen in said) or len(paths) > 1
    return sum(looks for looks, _ in said), min(len(seen) for _, seen in said)


@pytest.mark.parametrize(
    ("mode", "seconds"), [("WAL", 2), *(pytest.param(mode, 20, marks=pytest.mark.long) for mode in ("DELETE", "WAL"))]
)
def test_following_costs_one_conditional_get_an_interval(
    pair: Pair, tmp_path: Path, seconds: int, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a read-only mount, for each database in use and however many use it; nothing for others."""
    first, second, idle = (fresh_name() for _ in range(3))
    for name in (first, second, idle):
        sqlite(pair.elsewhere / name, f"PRAGMA journal_mode={mode}", "CREATE TABLE t(i INTEGER PRIMARY KEY, n, filler)")
        sqlite(pair.elsewhere / name, f"INSERT INTO t SELECT i, 0, randomblob(900) FROM ({numbers(200)})")
    time.sleep(1)  # until the leases of these are given back
    daemon = mounted(pair.place.via(pair.proxy.url), tmp_path, "--read-only", refresh=str(REFRESH_S))
    with daemon as mount, Client(mount / idle) as kept, Client(pair.elsewhere / first) as writer:
        kept("SELECT count(*) FROM t")
        polled(0.1, mount / first, mount / second)

        def asked(what: str, paths: list[Path], **options: Any) -> tuple[int, int]:
            """The GETs of heads that were not 304, and the values seen."""
            pair.proxy.reset()
            began = time.monotonic()
            looks, values = polled(seconds, *paths, **options)
            spent = time.monotonic() - began
            requests = [each for each in pair.proxy.requests if "/head" in each.path]
            new = sum(each.status != 304 for each in requests)
            others = len(pair.proxy.requests) - len(requests)
            with capsys.disabled():
                text = (
                    f"{looks} looks in {seconds} s: {len(requests)} GETs of heads, {new} of them 200, {others} others"
                )
                print(f"\n{mode}, {what}: {text}")
            assert all(each.method == "GET" and idle not in each.path for each in pair.proxy.requests)
            assert all(each.status == 304 or each.status == 200 for each in requests)
            assert seconds * 0.8 - 1 <= len(requests) / len(paths) <= spent / REFRESH_S + 2  # one when it is opened
            assert others <= 2 * new  # what was read of a commit, and no more
            return new, values

        assert asked("one reader", [mount / first]) == (0, 1)
        assert asked("two databases", [mount / first, mount / second]) == (0, 2)
        assert asked("new connections", [mount / first], anew=True) == (0, 1)
        assert asked("12 readers in three processes", [mount / first], threads=4, processes=3) == (0, 1)
        with contextlib.ExitStack() as stack:
            enough = threading.Event()

            def write() -> None:
                while not enough.wait(0.3):
                    writer("UPDATE t SET n = n + 1 WHERE i <= 3")

            thread = threading.Thread(target=write)
            stack.callback(thread.join)
            stack.callback(enough.set)
            thread.start()
            new, values = asked("with commits elsewhere", [mount / first])
            assert new >= 1 and seconds * 0.6 - 1 <= values <= new + 1


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_an_open_transaction_asks_for_nothing(pair: Pair, mode: str) -> None:
    """Nobody begins to read without a lock, unless a process has two connections, so nobody has to look meanwhile."""
    name = fresh_name()
    sqlite(pair.elsewhere / name, f"PRAGMA journal_mode={mode}", "CREATE TABLE t(n)", "INSERT INTO t VALUES (1)")
    with Client(pair.here / name) as one, Client(pair.here / name) as other:
        for reader in (one, other):
            for statement in ("BEGIN", "SELECT n FROM t"):
                reader(statement)
        pair.proxy.reset()
        time.sleep(3 * REFRESH_S)
        assert [request for request in pair.proxy.requests if name in request.path] == []
        sqlite(pair.elsewhere / name, "UPDATE t SET n = 2")
        assert one("SELECT n FROM t") == [[1]]
        for reader in (one, other):
            reader("COMMIT")
        assert one("SELECT n FROM t") == [[2]]
