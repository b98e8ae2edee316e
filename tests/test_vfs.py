"""SQLite in process: every journal mode, transactions, snapshots, several databases, and what the store sees of it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from inprocess import ELSEWHERE, PATIENCE_MS, bucket_of, connect, elsewhere, key, rows
from mounting import Place, mounted, numbers, sqlite
from proxy import FaultProxy

from s3blockfs import vfs as module
from s3blockfs.errors import NotSupported
from s3blockfs.vfs import S3VFS

pytestmark = pytest.mark.s3

#: For the `sqlite3` program.
WAIT = f".timeout {PATIENCE_MS}"


@pytest.fixture
def db(place: Place) -> Iterator[apsw.Connection]:
    """A connection to a database with a table `t`."""
    connection = connect(place)
    connection.execute("CREATE TABLE t(x)")
    yield connection
    connection.close()


@pytest.mark.parametrize("locking", ["NORMAL", "EXCLUSIVE"])
@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST", "MEMORY", "OFF"])
def test_every_journal_mode_commits_and_rolls_back(place: Place, mode: str, locking: str) -> None:
    db = connect(place)
    db.pragma("locking_mode", locking)
    assert db.pragma("journal_mode", mode) == mode.lower()
    db.execute("CREATE TABLE t(x)")
    for number in range(3):
        db.execute("INSERT INTO t VALUES (?)", (number,))
    assert elsewhere(place) == [(0,), (1,), (2,)]
    if mode != "OFF":  # which cannot roll back
        db.execute("BEGIN; INSERT INTO t VALUES (9); SAVEPOINT s; UPDATE t SET x = 8; ROLLBACK TO s; ROLLBACK")
        assert rows(db) == [(0,), (1,), (2,)]
        db.execute("BEGIN; INSERT INTO t VALUES (3); SAVEPOINT s; DELETE FROM t; ROLLBACK TO s; COMMIT")
        assert elsewhere(place) == [(0,), (1,), (2,), (3,)]
    db.close()
    assert all("journal" not in name for name in place.listing())


@pytest.mark.parametrize("level", ["OFF", "NORMAL", "EXTRA"])
def test_synchronous_does_not_matter_with_a_journal(place: Place, db: apsw.Connection, level: str) -> None:
    db.pragma("synchronous", level)
    db.execute("INSERT INTO t VALUES (1)")
    assert elsewhere(place) == [(1,)]


@pytest.mark.parametrize("locking", ["NORMAL", "EXCLUSIVE"])
def test_without_journal_and_fsync_the_release_of_the_lock_publishes(
    place: Place, db: apsw.Connection, locking: str
) -> None:
    rows(db, f"PRAGMA locking_mode={locking}; PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF")  # to the last one
    db.execute("INSERT INTO t VALUES (1)")
    assert elsewhere(place) == ([(1,)] if locking == "NORMAL" else [])
    db.close()
    assert elsewhere(place) == [(1,)]


def test_a_small_cache_spills_uncommitted_pages(place: Place, db: apsw.Connection) -> None:
    db.execute("PRAGMA cache_size=10")
    db.execute(f"BEGIN; INSERT INTO t SELECT randomblob(3000) FROM ({numbers(300)})")
    assert elsewhere(place) == []
    db.execute("ROLLBACK")
    assert rows(db) == []
    db.execute(f"INSERT INTO t SELECT randomblob(3000) FROM ({numbers(300)})")
    assert elsewhere(place, "SELECT count(*) FROM t") == [(300,)]


def test_random_statements_end_like_on_a_local_file(place: Place, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    both = [connect(place), apsw.Connection(str(tmp_path / "local.db"))]
    statements = [
        "INSERT INTO t VALUES ({0}, zeroblob({1}))",
        "UPDATE t SET b = zeroblob({1}) WHERE a % 3 = {0} % 3",
        "DELETE FROM t WHERE a = {0}",
        "BEGIN; INSERT INTO t VALUES ({0}, NULL); DELETE FROM t WHERE a < {0}; ROLLBACK",
        "PRAGMA journal_mode=TRUNCATE",
        "PRAGMA journal_mode=PERSIST",
        "PRAGMA journal_mode=DELETE",
        "PRAGMA page_size=1024; VACUUM",
        "PRAGMA page_size=8192; VACUUM",
    ]
    for connection in both:
        connection.execute("PRAGMA auto_vacuum=FULL; CREATE TABLE t(a, b); CREATE INDEX i ON t(a)")
    for _ in range(60):
        statement = chance.choice(statements).format(chance.randrange(20), chance.randrange(20000))
        for connection in both:
            rows(connection, statement)
    question = "SELECT a, length(b) FROM t ORDER BY rowid"
    assert elsewhere(place, question) == rows(both[0], question) == rows(both[1], question)
    size = rows(both[0], "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
    for connection in both:
        connection.close()
    assert (Path(tmp_path / "local.db").stat().st_size,) == size[0]
    assert len(b"".join(S3VFS(bucket_of(place)).serialize_iter(key(place)))) == size[0][0]


def test_a_transaction_reads_one_state_and_the_next_one_the_newest(place: Place, db: apsw.Connection) -> None:
    """Within one process at once, whatever `refresh_s` says, and without a request."""
    reader = connect(place)
    reader.execute("BEGIN")
    assert rows(reader) == []
    db.execute("INSERT INTO t VALUES (1)")
    assert rows(reader) == []
    reader.execute("COMMIT")
    assert rows(reader) == [(1,)]
    reader.close()
    db.execute("INSERT INTO t VALUES (2)")
    later = connect(place)
    assert rows(later) == [(1,), (2,)]
    later.close()


def test_a_change_of_another_machine_is_seen_and_makes_a_writer_start_again(place: Place, db: apsw.Connection) -> None:
    with closing(connect(place, refresh_s=60)) as patient, closing(connect(place, **ELSEWHERE)) as other:
        other.execute("INSERT INTO t VALUES (1)")
        patient.execute("BEGIN")
        assert rows(patient) == []  # looked at less than a minute ago
        with pytest.raises(apsw.BusyError):
            patient.execute("INSERT INTO t VALUES (2)")  # at once: waiting would not help
        patient.execute("ROLLBACK")
        assert rows(patient) == [(1,)]
        other.execute("INSERT INTO t VALUES (3)")
        patient.execute("INSERT INTO t VALUES (4)")  # no statement before it: SQLite itself can start again
        assert elsewhere(place) == rows(other) == [(1,), (3,), (4,)]


def test_a_second_writer_of_this_process_waits(place: Place, db: apsw.Connection) -> None:
    other = connect(place)
    other.set_busy_timeout(0)
    db.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1)")
    try:
        with pytest.raises(apsw.BusyError):
            other.execute("BEGIN IMMEDIATE")
        other.set_busy_timeout(PATIENCE_MS)
        timer = threading.Timer(0.5, db.execute, ["COMMIT"])
        timer.start()
        other.execute("INSERT INTO t VALUES (2)")
        timer.join()
        assert elsewhere(place) == [(1,), (2,)]
    finally:
        other.close()


def test_threads_wait_for_each_other(place: Place, db: apsw.Connection) -> None:
    def add(worker: int) -> None:
        connection = connect(place)
        for number in range(5):
            connection.execute("INSERT INTO t VALUES (?)", (worker * 100 + number,))
        connection.close()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(add, worker) for worker in range(4)]:
            done.result()
    expected = [(worker * 100 + number,) for worker in range(4) for number in range(5)]
    assert elsewhere(place, "SELECT x FROM t ORDER BY x") == rows(db, "SELECT x FROM t ORDER BY x") == expected


def test_who_waits_for_a_lock_lets_other_threads_run() -> None:
    asleep, turns = threading.Event(), 0
    sleeper = threading.Thread(target=lambda: (S3VFS("no-bucket").xSleep(500_000), asleep.set()))
    sleeper.start()
    while not asleep.wait(0.005):
        turns += 1
    sleeper.join()
    assert turns > 5  # with the GIL kept: none


def test_attached_databases_commit_together(place: Place, db: apsw.Connection) -> None:
    db.execute("ATTACH ? AS b", (key(place, "b.sqlite"),))
    db.execute("CREATE TABLE b.u(x)")
    db.execute("BEGIN; INSERT INTO t VALUES (1); INSERT INTO u VALUES (1); COMMIT")
    db.execute("BEGIN; INSERT INTO t VALUES (2); INSERT INTO u VALUES (2); ROLLBACK")
    assert elsewhere(place) == elsewhere(place, "SELECT * FROM u", "b.sqlite") == [(1,)]
    assert sorted(name.partition("/")[0] for name in place.listing()) == ["a.sqlite", "b.sqlite"]


@pytest.mark.parametrize("ours_is_main", [True, False])
def test_attached_to_or_by_a_local_database(
    place: Place, db: apsw.Connection, tmp_path: Path, ours_is_main: bool
) -> None:
    vfs = S3VFS(bucket_of(place))
    names = [(f"{tmp_path}/local.db", "unix"), (key(place), vfs.name)]
    main, attached = reversed(names) if ours_is_main else names
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
    both = apsw.Connection(main[0], flags=flags, vfs=main[1])
    both.set_busy_timeout(PATIENCE_MS)
    both.execute("ATTACH ? AS other", (f"file:{attached[0]}?vfs={attached[1]}",))
    both.execute(f"CREATE TABLE {'other' if ours_is_main else 'main'}.v(x)")
    both.execute("BEGIN; INSERT INTO v VALUES (1); INSERT INTO t VALUES (1); COMMIT")
    both.execute("BEGIN; INSERT INTO v VALUES (2); INSERT INTO t VALUES (2); ROLLBACK")
    assert elsewhere(place) == [(1,)]
    both.close()
    assert sqlite(tmp_path / "local.db", "SELECT * FROM v") == "1"


def test_backup_in_both_directions(place: Place, db: apsw.Connection) -> None:
    db.execute(f"INSERT INTO t SELECT randomblob(2000) FROM ({numbers(200)})")
    memory = apsw.Connection(":memory:")
    with memory.backup("main", db, "main") as backup:
        backup.step()
    assert rows(memory) == rows(db)
    memory.execute("DELETE FROM t WHERE rowid > 7")
    with db.backup("main", memory, "main") as backup:
        backup.step()
    assert elsewhere(place) == rows(memory)
    memory.close()


def test_vacuum_into_and_temporary_tables(place: Place, db: apsw.Connection) -> None:
    rows(db, "PRAGMA temp_store=FILE; CREATE TEMP TABLE s(x)")
    db.execute(f"INSERT INTO s SELECT i FROM ({numbers(50000)}); INSERT INTO t SELECT max(x) FROM s")
    db.execute("VACUUM INTO ?", (key(place, "copy.sqlite"),))
    assert elsewhere(place, name="copy.sqlite") == elsewhere(place) == [(50000,)]
    with pytest.raises(apsw.SQLError, match="already exists"):
        db.execute("VACUUM INTO ?", (key(place, "copy.sqlite"),))


def test_wal_is_refused(place: Place, db: apsw.Connection) -> None:
    assert db.pragma("journal_mode", "WAL") == "delete"
    db.pragma("locking_mode", "EXCLUSIVE")
    with pytest.raises(apsw.IOError, match="journal_mode=WAL") as caught:
        db.pragma("journal_mode", "WAL")
    assert isinstance(caught.value.__cause__, NotSupported)
    db.execute("INSERT INTO t VALUES (1)")
    assert elsewhere(place) == [(1,)]


def test_writing_without_locks_is_refused(place: Place, db: apsw.Connection) -> None:
    vfs = S3VFS(bucket_of(place))
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_URI
    with pytest.raises(apsw.CantOpenError, match="nolock"):
        apsw.Connection(f"file:{key(place)}?nolock=1", flags=flags, vfs=vfs.name)


def test_a_commit_is_one_put_and_reading_it_costs_nothing(place: Place, proxy: FaultProxy) -> None:
    db = connect(place.via(proxy.url), refresh_s=60.0)
    db.execute("CREATE TABLE t(x)")
    proxy.reset()
    for number in range(50):
        db.execute("INSERT INTO t VALUES (?)", (number,))
        rows(db)
    reader = connect(place.via(proxy.url), refresh_s=60.0)
    assert len(rows(reader)) == 50
    counts = proxy.counts()
    print(f"50 one-row commits: {dict(counts)}, {proxy.sent / 50:.0f} bytes sent for each")
    leases = 2 * (1 + 50 // 5)  # taken and given back, on a machine so slow that each lasts for 5 commits only
    assert 50 <= counts["PUT", "head"] <= 50 + leases
    assert sum(counts.values()) <= 50 + 2 * leases
    reader.close()
    db.close()


def test_a_warm_select_stays_on_the_short_way(db: apsw.Connection) -> None:
    """Also right after a commit, when the header is in the log. Calls of Python functions; 131 on the long one."""
    db.execute("INSERT INTO t VALUES (7)")
    assert rows(db) == [(7,)]
    counts = []
    for _ in range(3):  # one of these may be due to look for a newer state
        calls: list[object] = []
        sys.setprofile(lambda _, event, __, calls=calls: calls.append(event) if event == "call" else None)
        assert db.execute("SELECT x FROM t").fetchall() == [(7,)]
        sys.setprofile(None)
        counts.append(len(calls))
    assert min(counts) <= 45, counts


@pytest.mark.mount
def test_a_mount_shows_it_and_it_shows_what_the_mount_wrote(place: Place, tmp_path: Path) -> None:
    db, undotted = connect(place, refresh_s=0.0), connect(place, "acme")
    undotted.execute("CREATE TABLE t(x); INSERT INTO t VALUES (7)")
    db.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    with mounted(place, tmp_path) as mount:
        assert sqlite(mount / "a.sqlite", WAIT, "SELECT x FROM t", "INSERT INTO t VALUES (2)") == "1"
        assert sqlite(mount / "acme.sqlite", "SELECT x FROM t") == sqlite(mount / "acme", "SELECT x FROM t") == "7"
        assert rows(db) == [(1,), (2,)]
        db.execute("INSERT INTO t VALUES (3)")
        assert sqlite(mount / "a.sqlite", "SELECT max(x) FROM t") == "3"
        sqlite(mount / "b.sqlite", WAIT, "CREATE TABLE t(x)", "INSERT INTO t VALUES (4)")
        assert elsewhere(place, name="b.sqlite") == [(4,)]
    db.close()
    undotted.close()


def test_engines_that_nobody_uses_are_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENGINES_KEPT", 2)
    open_one = connect(place, readahead_size=1)
    for size in range(2, 8):
        connect(place, readahead_size=size).close()
    kept = [config.readahead_size for pid, _, config in module._engines if pid == os.getpid()]
    assert kept[-3:] == [5, 6, 7] and not {2, 3, 4} & set(kept)
    open_one.execute("CREATE TABLE t(x)")
    again = S3VFS(bucket_of(place), 65536, readahead_size=1)
    assert again.catalog.opened() != []
    open_one.close()


def test_importing_the_package_is_cheap_and_connecting_needs_no_libfuse() -> None:
    program = (
        "import sys, s3blockfs; assert not {'boto3', 'apsw', 'fuse'} & set(sys.modules); "
        "s3blockfs.connect; assert 'fuse' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
