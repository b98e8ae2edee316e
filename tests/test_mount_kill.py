"""SIGKILL of the daemon at random moments of a commit loop: what was acknowledged is there, the rest whole or not."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import pytest
from mounting import PATIENCE_S, Mount, Place, mounted, sqlite

pytestmark = pytest.mark.mount

ROWS = 3
"""Rows of one transaction; each carries the number of its transaction and a block of bytes."""

#: Commits until an error; prints each number when COMMIT returned. Every third one is large (and makes an old one
#: small), every fifth spills.
CLIENT = f"""
import sqlite3, sys
number = int(sys.argv[2])
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
try:
    while True:
        db.execute("PRAGMA cache_size=%d" % (2 if number % 5 == 0 else 2000))
        db.execute("BEGIN IMMEDIATE")
        for row in range({ROWS}):
            size = 150_000 if number % 3 == 0 else 700
            db.execute("INSERT INTO t VALUES (?, ?, ?)", (number, row, bytes([number % 256]) * size))
        db.execute("UPDATE t SET data = substr(data, 1, 700) WHERE n = ?", (number - 9,))
        db.execute("UPDATE latest SET number = ?", (number,))
        db.execute("COMMIT")
        print(number, flush=True)
        number += 1
except sqlite3.Error as error:
    print("ended", error, flush=True)
"""


def acknowledged(pipe: IO[str], numbers: list[int], begun: threading.Event) -> None:
    """Collect what the client prints until it ends."""
    for line in pipe:
        if line.startswith("ended"):
            return
        numbers.append(int(line))
        if len(numbers) == 3:
            begun.set()


def commit_until_killed(mount: Mount, start: int, delay_s: float) -> list[int]:
    """Run the client, kill the daemon `delay_s` after its third commit; the transactions that were acknowledged."""
    numbers: list[int] = []
    begun = threading.Event()
    line = [sys.executable, "-c", CLIENT, str(mount / "a.db"), str(start)]
    client = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    reader = threading.Thread(target=acknowledged, args=(client.stdout, numbers, begun))
    reader.start()
    try:
        assert begun.wait(PATIENCE_S), "the client never committed"
        time.sleep(delay_s)  # the random moment is what is tested
        mount.kill()
        client.wait(PATIENCE_S)
    finally:
        client.kill()
        client.wait()
        reader.join()
        client.stdout.close()
    return numbers


def check(mount: Mount, last: int) -> int:
    """Sound, nothing acknowledged is missing, nothing is there in part; the number of the last transaction."""
    found = sqlite(
        mount / "a.db",
        "PRAGMA integrity_check",
        "SELECT number FROM latest",
        "SELECT count(DISTINCT n), max(n) FROM t",
        f"SELECT count(*) FROM (SELECT n FROM t GROUP BY n HAVING count(*) != {ROWS} OR count(DISTINCT hex(substr(data,"
        " 1, 1)) || length(data)) != 1 OR min(CAST(hex(substr(data, -1)) = printf('%02X', n % 256) AS INTEGER)) != 1)",
    ).splitlines()
    latest = int(found[1])
    assert found == ["ok", str(latest), f"{latest}|{latest}" if latest else "0|", "0"]
    assert last <= latest <= last + 1
    return latest


@pytest.mark.timeout(400)
@pytest.mark.parametrize("rounds", [12, pytest.param(50, marks=pytest.mark.long)])
def test_nothing_acknowledged_is_lost(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], rounds: int
) -> None:
    """After each kill the next mount comes up by itself on the same directory, and all of this holds."""
    seed = random.SystemRandom().randrange(1 << 32)
    moments = random.Random(seed)
    began = time.monotonic()
    last = kept = 0
    root = None
    for _ in range(rounds):
        with mounted(place, tmp_path, "--lease", "1", root=root) as mount:
            root = mount.directory.parent
            if last == 0:
                sqlite(
                    mount / "a.db", "CREATE TABLE t(n, row, data, PRIMARY KEY(n, row))", "CREATE TABLE latest(number)"
                )
                sqlite(mount / "a.db", "INSERT INTO latest VALUES (0)")
            latest = check(mount, last)
            kept += latest - last
            last = commit_until_killed(mount, latest + 1, moments.uniform(0, 0.3))[-1]
    with mounted(place, tmp_path, "--lease", "1", root=root) as mount:
        latest = check(mount, last)
        kept += latest - last
    assert latest > 2 * rounds
    with capsys.disabled():
        spent = time.monotonic() - began
        print(
            f"\n{rounds} kills in {spent:.0f} s, seed {seed}: {latest} commits, {kept} of them not acknowledged",
            file=sys.stderr,
        )
