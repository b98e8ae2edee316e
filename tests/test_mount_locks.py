"""Byte-range locks of other programs than SQLite on a real mount, between processes of one machine."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mounting import PATIENCE_S, Place, mounted, sqlite

pytestmark = pytest.mark.mount

#: Evaluates a line, prints its value or its errno; `f` is the file.
LOCKER = """
import fcntl, os, signal, struct, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
f = os.open(sys.argv[1], os.O_RDWR)
def ask(kind, start, length):
    flock = fcntl.fcntl(f, fcntl.F_GETLK, struct.pack("hhqqi4x", kind, 0, start, length, 0))
    return struct.unpack("hhqqi4x", flock)
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except OSError as error:
        print("errno", error.errno, flush=True)
"""


class Locker:
    def __init__(self, path: Path) -> None:
        line = [sys.executable, "-c", LOCKER, str(path)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, expression: str) -> None:
        assert self.process.stdin is not None
        print(expression, file=self.process.stdin, flush=True)

    def __call__(self, expression: str) -> str:
        assert self.process.stdout is not None
        self.send(expression)
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Locker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_locks_of_any_range(place: Place, tmp_path: Path) -> None:
    """fcntl(2): ranges, owners, F_GETLK, waits, and every way of letting go."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(a)")
        lock_and_unlock(mount / "a.db")
        assert sqlite(mount / "a.db", "INSERT INTO t VALUES (1)", "SELECT a FROM t") == "1"


def lock_and_unlock(path: Path) -> None:
    refused = f"errno {errno.EAGAIN}"
    with Locker(path) as one, Locker(path) as two:
        assert one("fcntl.lockf(f, fcntl.LOCK_EX, 10, 100)") == "None"
        assert one("fcntl.lockf(f, fcntl.LOCK_SH, 0, 1000)") == "None"  # to the end of the file, however long
        assert two("fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 109)") == refused
        assert two("fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 2**40)") == "None"
        assert two("fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2**40 + 1)") == refused
        held = eval(two("ask(fcntl.F_RDLCK, 0, 0)"))
        assert held == (fcntl.F_WRLCK, os.SEEK_SET, 100, 10, one.process.pid)
        assert eval(two("ask(fcntl.F_WRLCK, 500, 0)"))[2:] == (1000, 0, one.process.pid)
        assert eval(one("ask(fcntl.F_WRLCK, 0, 500)"))[0] == fcntl.F_UNLCK  # one's own locks are in nobody's way
        assert one("fcntl.lockf(f, fcntl.LOCK_UN, 4, 103)") == "None"
        assert two("fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 4, 103)") == "None"
        assert two("fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 103)") == refused
        two.send("fcntl.lockf(f, fcntl.LOCK_EX, 20, 95)")  # waits, till a descriptor of the holder is closed
        time.sleep(0.3)
        assert one("os.close(os.dup(f))") == "None"
        assert two("1") == "None"
        assert two("2") == "1"
        two("3")
        one.send("fcntl.lockf(f, fcntl.LOCK_EX, 1, 95)")  # waits, till a signal comes
        time.sleep(0.3)
        one.process.send_signal(signal.SIGUSR1)
        assert one.process.wait(PATIENCE_S) == 7
        with Locker(path) as three:
            three.send("fcntl.lockf(f, fcntl.LOCK_EX, 1, 95)")
            time.sleep(0.3)
            three.process.kill()
            assert three.process.wait(PATIENCE_S) == -signal.SIGKILL
        for end in ("raise SystemExit", "os.close(f)", None):
            with Locker(path) as waiting, Locker(path) as ending:
                if end is None:
                    two.process.kill()  # which still had its locks
                else:
                    ending("fcntl.lockf(f, fcntl.LOCK_EX, 1, 5000)")
                    ending.send(end if end.startswith("os") else "sys.exit()")
                assert waiting(f"fcntl.lockf(f, fcntl.LOCK_EX, 1, {95 if end is None else 5000})") == "None"


#: Two SQLite libraries: what APSW closes takes the locks of `sqlite3` along.
TWO_LIBRARIES = """
import apsw, sqlite3, subprocess, sys
path, meanwhile = sys.argv[1:]
one = sqlite3.connect(path, isolation_level=None)
one.execute("BEGIN IMMEDIATE")
one.execute("UPDATE t SET n = n + 1")
two = apsw.Connection(path)
two.execute("SELECT n FROM t").fetchall()
two.close()
if meanwhile:
    subprocess.run(["sqlite3", path, meanwhile], check=True)
try:
    one.execute("COMMIT")
    print("done")
except sqlite3.OperationalError as error:
    print(error)
print(one.in_transaction, one.execute("SELECT n FROM t").fetchall())
"""


@pytest.mark.parametrize("meanwhile, said", [("", "done\nFalse [(1,)]"), ("INSERT INTO t VALUES (7)", "")])
def test_two_sqlite_libraries_in_one_process(place: Place, tmp_path: Path, meanwhile: str, said: str) -> None:
    """What another process has committed meanwhile is not overwritten: the COMMIT fails."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(n)", "INSERT INTO t VALUES (0)")
        line = [sys.executable, "-c", TWO_LIBRARIES, str(mount / "a.db"), meanwhile]
        done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        assert done.stdout.strip() == (said or "disk I/O error\nFalse [(0,), (7,)]")
        assert sqlite(mount / "a.db", "PRAGMA integrity_check") == "ok"
