"""What mounts show of each other's commits, for how long, and what looking for them costs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from mounting import PATIENCE_S, Client, Place, fresh_name, sqlite
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
#: time on a ninth writes now and then. Prints [[when a reader's transaction began, its n]], [how long each write took]
#: and [errors].
OVERLAPPING = """
import json, random, sqlite3, sys, threading, time
path, seconds = sys.argv[1], float(sys.argv[2])
changed, holding, seen, took, errors = threading.Condition(), 0, [], [], []
until = time.monotonic() + seconds
connect = lambda: sqlite3.connect(path, isolation_level=None, timeout=20)
def read():
    global holding
    db = connect()
    while time.monotonic() < until:
        try:
            db.execute("BEGIN")
            [(n,)] = db.execute("SELECT n FROM t WHERE i = 1")
            with changed:
                seen.append((time.monotonic(), n))
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
print(json.dumps([seen, took, errors]))
"""


@pytest.mark.parametrize("seconds", [12, pytest.param(120, marks=pytest.mark.long)])
def test_overlapping_threads(pair: Pair, seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one process, in WAL mode: they share a lock, so the mount does not see them come and go. They come to what was
    committed elsewhere all the same, without an error, and a writer among them gets through."""
    name = fresh_name()
    sqlite(pair.elsewhere / name, "PRAGMA journal_mode=WAL", "CREATE TABLE t(i INTEGER PRIMARY KEY, n, filler)")
    rows = "WITH c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<40) SELECT i, 0, zeroblob(900) FROM c"
    sqlite(pair.elsewhere / name, f"INSERT INTO t {rows}", "CREATE TABLE w(n)", "INSERT INTO w VALUES (0)")
    line = [sys.executable, "-c", OVERLAPPING, str(pair.here / name), str(seconds)]
    committed = [(time.monotonic(), 0)]
    with Client(pair.elsewhere / name) as writer, subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            writer("PRAGMA busy_timeout=30000")
            while process.poll() is None:
                writer("UPDATE t SET n = n + 1, filler = randomblob(900)")
                committed.append((time.monotonic(), len(committed)))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.4)
            seen, took, errors = json.loads(process.communicate(timeout=PATIENCE_S)[0])
        finally:
            process.kill()
    ages = []
    for at, n in seen:
        newest = [when for when, number in committed if number == n + 1]
        ages.append(max(at - newest[0], 0.0) if newest else 0.0)
    states = len({n for _, n in seen})
    with capsys.disabled():
        text = f"{len(seen)} transactions saw {states} of {len(committed)} states, the oldest {max(ages):.1f} s old"
        print(f"\n{text}; {len(took)} writes, the longest {max(took, default=0):.1f} s; {errors[:3]}", file=sys.stderr)
    assert errors == []
    assert max(ages) < REFRESH_S + 7
    assert took and max(took) < 30
    time.sleep(REFRESH_S + 0.1)
    assert same_everywhere(pair, name, "SELECT n FROM w") == str(len(took))
