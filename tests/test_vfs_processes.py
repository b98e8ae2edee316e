"""SQLite in process, in several processes: two writers, forks, one that is frozen and thawed, one that just ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import apsw
import pytest
from inprocess import PATIENCE_MS, OtherProcess, bucket_of, connect, elsewhere, key, rows
from mounting import PATIENCE_S, Place, SqlError

from s3blockfs.vfs import S3VFS

pytestmark = pytest.mark.s3


def in_a_fork(check: Callable[[], None]) -> None:
    """Run `check` in a forked child, which must not fail."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException:  # noqa: BLE001  the child must never return into pytest
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_processes_wait_for_each_other(place: Place) -> None:
    with OtherProcess(place) as one, OtherProcess(place) as two:
        one("CREATE TABLE t(x)")

        def add(process: OtherProcess, start: int) -> None:
            process(f"PRAGMA busy_timeout={PATIENCE_MS}")
            for number in range(start, start + 10):
                process(f"INSERT INTO t VALUES ({number})")

        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(add, one, 0), threads.submit(add, two, 100)]:
                done.result()
        expected = [[number] for number in (*range(10), *range(100, 110))]
        assert one("SELECT x FROM t ORDER BY x") == two("SELECT x FROM t ORDER BY x") == expected


def test_a_second_process_is_told_that_the_first_one_writes(place: Place) -> None:
    with OtherProcess(place) as one, OtherProcess(place) as two:
        one("CREATE TABLE t(x)")
        one("BEGIN IMMEDIATE", "INSERT INTO t VALUES (1)")
        with pytest.raises(SqlError, match="BusyError"):
            two("BEGIN IMMEDIATE")
        two(f"PRAGMA busy_timeout={PATIENCE_MS}")
        two.send("INSERT INTO t VALUES (2)")
        one("COMMIT")
        two.receive()
        assert elsewhere(place) == [(1,), (2,)]


@pytest.mark.parametrize("somebody_else_writes", [False, True])
def test_frozen_and_thawed_in_a_transaction(place: Place, somebody_else_writes: bool) -> None:
    with OtherProcess(place) as frozen:
        frozen("CREATE TABLE t(x)", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (1)")
        os.kill(frozen.process.pid, signal.SIGSTOP)
        try:
            if somebody_else_writes:
                other = connect(place)
                other.execute("INSERT INTO t VALUES (2)")
                other.close()
        finally:
            os.kill(frozen.process.pid, signal.SIGCONT)
        if somebody_else_writes:
            with pytest.raises(SqlError, match="IOError CommitLost"):
                frozen("COMMIT")
            assert frozen("SELECT * FROM t") == [[2]]
            frozen(f"PRAGMA busy_timeout={PATIENCE_MS}", "INSERT INTO t VALUES (3)")
            assert elsewhere(place) == [(2,), (3,)]
        else:
            frozen("COMMIT")
            assert elsewhere(place) == [(1,)]


def test_a_process_that_is_killed_loses_its_open_transaction_only(place: Place) -> None:
    with OtherProcess(place) as killed:
        killed("CREATE TABLE t(x)", "INSERT INTO t VALUES (1)", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (2)")
        killed.kill()
    assert elsewhere(place) == [(1,)]


def test_a_connection_cannot_be_used_in_a_forked_child_and_its_parent_goes_on(place: Place) -> None:
    vfs = S3VFS(bucket_of(place))
    db = apsw.Connection(key(place), vfs=vfs.name)
    db.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    idle = connect(place, refresh_s=0.0)  # an engine of its own: other options than those of `vfs`
    db.execute("BEGIN; INSERT INTO t VALUES (2)")

    def child() -> None:
        for connection, statement in ((db, "COMMIT"), (idle, "SELECT * FROM t"), (idle, "DELETE FROM t")):
            with pytest.raises(apsw.IOError, match="forked child"):
                rows(connection, statement)
        new = apsw.Connection(key(place), vfs=vfs.name)  # the VFS goes on: it has an engine in each process
        assert rows(new) == [(1,)]
        new.close()
        other = connect(place, "b.sqlite")
        other.execute("CREATE TABLE t(x); INSERT INTO t VALUES (3)")
        other.close()

    in_a_fork(child)
    assert elsewhere(place, name="b.sqlite") == [(3,)]
    db.execute("INSERT INTO t VALUES (4); COMMIT")
    assert elsewhere(place) == rows(idle) == [(1,), (2,), (4,)]
    db.close()
    idle.close()


def test_a_child_that_closes_what_it_inherited_harms_nobody(place: Place) -> None:
    db = connect(place)
    db.execute("CREATE TABLE t(x)")
    in_a_fork(db.close)
    db.execute("INSERT INTO t VALUES (1)")
    assert elsewhere(place) == [(1,)]
    db.close()


def test_forks_while_other_threads_open_connections(place: Place) -> None:
    """No lock of ours stays locked in the child."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            connect(place).close()

    def child() -> None:
        signal.alarm(int(PATIENCE_S))  # ends it if it hangs
        connect(place, refresh_s=0.5).close()

    connect(place).execute("CREATE TABLE t(x)").connection.close()
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(3):
            in_a_fork(child)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("statement", ["SELECT * FROM t", "BEGIN IMMEDIATE; INSERT INTO t VALUES (2)"])
def test_a_program_may_end_without_closing(place: Place, statement: str) -> None:
    connect(place).execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)").connection.close()
    program = f"""
import s3blockfs
class Held:
    db = s3blockfs.connect(bucket={place.bucket!r}, name={key(place)!r}, endpoint_url={place.url!r})
    def method(self): return globals()
db = Held.db
cursor = db.execute({statement!r})
"""
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=place.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert elsewhere(place) == [(1,)]
