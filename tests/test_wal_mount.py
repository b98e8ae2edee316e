"""WAL mode on a mount: real SQLite in processes of their own, what S3 holds, and what another machine sees."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import PATIENCE_S, Client, Place, SqlError, fresh_name, mounted, numbers, shell, sqlite
from pairs import Pair, same_everywhere, two_mounts
from proxy import Fault, FaultProxy, Request

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place, folder = mount_bucket.inside(fresh_name("wal")), tmp_path_factory.mktemp("pair")
    with two_mounts(place, folder) as pair:
        yield pair


@pytest.fixture
def pair(mounts: Pair) -> Iterator[Pair]:
    mounts.proxy.reset()
    yield mounts
    mounts.proxy.reset()


@pytest.fixture
def name() -> str:
    return fresh_name()


def files_of(path: Path) -> list[str]:
    return sorted(each for each in shell("ls", path.parent).stdout.split() if each.startswith(path.name))


def create(path: Path, *statements: str) -> None:
    assert sqlite(path, "PRAGMA journal_mode=WAL", "CREATE TABLE t(a PRIMARY KEY, b)", *statements) == "wal"


def test_one_process_after_the_other(pair: Pair, name: str) -> None:
    """The last one that closes leaves no `-wal` and no `-shm`; the mode stays."""
    create(pair.here / name)
    for number in range(5):
        sqlite(pair.here / name, f"INSERT INTO t VALUES ({number}, randomblob(3000))")
        assert sqlite(pair.here / name, "PRAGMA journal_mode; SELECT count(*) FROM t") == f"wal\n{number + 1}"
        assert sqlite(pair.elsewhere / name, "SELECT count(*) FROM t; PRAGMA integrity_check") == f"{number + 1}\nok"
    assert files_of(pair.here / name) == [name]


def test_readers_beside_the_writer(pair: Pair, name: str) -> None:
    """A reader in a transaction keeps its state and does not hold the writer up; elsewhere each commit is seen."""
    create(pair.here / name)
    with (
        Client(pair.here / name) as writer,
        Client(pair.here / name) as reader,
        Client(pair.elsewhere / name) as remote,
    ):
        writer("INSERT INTO t VALUES (0, 'zero')")
        reader("BEGIN")
        assert reader("SELECT count(*) FROM t") == [[1]]
        for number in range(1, 6):
            writer(f"INSERT INTO t VALUES ({number}, randomblob(9000))")
            assert reader("SELECT count(*) FROM t") == [[1]]
            assert remote("SELECT count(*) FROM t") == [[number + 1]]
        reader("COMMIT")
        assert reader("SELECT count(*) FROM t") == [[6]]
        assert remote("PRAGMA integrity_check") == [["ok"]]


def eventually(ask: Callable[[], Any], expected: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (answer := ask()) != expected:
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def test_a_commit_is_one_put_and_a_checkpoint_none(pair: Pair, name: str) -> None:
    """Whatever the checkpoint; `wal_autocheckpoint=0`; the log restarts and is truncated."""
    create(pair.here / name)
    with Client(pair.here / name) as client:
        client("PRAGMA wal_autocheckpoint=0", "INSERT INTO t VALUES (-1, 0)")
        number = 0
        for mode in ("PASSIVE", "FULL", "RESTART", "TRUNCATE", "PASSIVE", "TRUNCATE"):
            client("BEGIN IMMEDIATE", "COMMIT")  # the lease is held
            pair.proxy.reset()
            began = time.monotonic()
            for _ in range(5):
                client(f"INSERT INTO t VALUES ({number}, randomblob(1500))")  # too little for a roll
                number += 1
            puts = [each for each in pair.proxy.requests if each.method != "GET" and name in each.path]
            if time.monotonic() - began < 1.5:  # tenures and the like are other tests' matter
                assert len(puts) == 5, [(each.method, each.path) for each in puts]
            commits = pair.commits(name)
            [[busy, frames, done]] = client(f"PRAGMA wal_checkpoint({mode})")
            assert busy == 0 and frames == done
            size = int(shell("stat", "-c", "%s", f"{pair.here / name}-wal").stdout)
            assert (size == 0) == (mode == "TRUNCATE")
            assert pair.commits(name) == commits
            assert (
                sqlite(pair.elsewhere / name, "SELECT count(*) FROM t; PRAGMA integrity_check") == f"{number + 1}\nok"
            )
            assert client("SELECT count(*) FROM t") == [[number + 1]]
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == "31"


def test_large_transactions_spill_and_vacuum_shrinks(pair: Pair, name: str) -> None:
    create(pair.here / name)
    with Client(pair.here / name) as client:
        client("PRAGMA cache_size=10", "BEGIN")
        client(f"INSERT INTO t SELECT i, randomblob(2000) FROM ({numbers(3000)})")
        client("UPDATE t SET b = randomblob(1500) WHERE a % 2")
        assert sqlite(pair.elsewhere / name, "SELECT count(*) FROM t") == "0"
        client("COMMIT")
        assert sqlite(pair.elsewhere / name, "SELECT count(*) FROM t") == "3000"
        commits = pair.commits(name)
        client("BEGIN", "UPDATE t SET b = randomblob(1800)", "ROLLBACK")
        assert pair.commits(name) == commits
        client(
            "SAVEPOINT s",
            "UPDATE t SET b = randomblob(1800)",
            "ROLLBACK TO s",
            "DELETE FROM t WHERE a > 5",
            "RELEASE s",
        )
        assert sqlite(pair.elsewhere / name, "SELECT count(*), sum(a) FROM t; PRAGMA integrity_check") == "5|15\nok"
        client("VACUUM")
        assert sqlite(pair.elsewhere / name, "PRAGMA page_count") == str(client("PRAGMA page_count")[0][0])
        client("INSERT INTO t VALUES (0, randomblob(20000))")
        assert sqlite(pair.elsewhere / name, "SELECT count(*) FROM t; PRAGMA integrity_check") == "6\nok"
    assert same_everywhere(pair, name, "SELECT count(*), sum(a) FROM t") == "6|15"


@pytest.mark.parametrize("first", [True, False], ids=["from the start", "later"])
@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL", "OFF"])
def test_exclusive_locking_mode(pair: Pair, name: str, first: bool, synchronous: str) -> None:
    """With an index in memory when it is exclusive from the start; otherwise SQLite stops taking its locks."""
    create(pair.here / name)
    exclusive = "PRAGMA locking_mode=EXCLUSIVE"
    with Client(pair.here / name) as client:
        client(exclusive if first else "SELECT count(*) FROM t", f"PRAGMA synchronous={synchronous}", exclusive)
        for number in range(4):
            client(f"INSERT INTO t VALUES ({number}, randomblob(5000))")
            seen = lambda: sqlite(pair.elsewhere / name, "SELECT count(*) FROM t; PRAGMA integrity_check")  # noqa: E731
            if synchronous == "FULL":
                assert seen() == f"{number + 1}\nok"
        eventually(seen, "4\nok")
        assert "-shm" not in "".join(files_of(pair.here / name)) or not first
        assert "locked" in sqlite(pair.here / name, "SELECT count(*) FROM t", check=False)
        client("PRAGMA wal_checkpoint(TRUNCATE)", "INSERT INTO t VALUES (9, 9)")
        if not first:  # else SQLite stays in that mode until it is closed
            client("PRAGMA locking_mode=NORMAL", "SELECT count(*) FROM t")
            assert sqlite(pair.here / name, "SELECT count(*) FROM t") == "5"
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == "5"


def test_switching_back_and_forth(pair: Pair, name: str) -> None:
    sqlite(pair.here / name, "CREATE TABLE t(a)")
    with Client(pair.here / name) as client:
        for number in range(3):
            for mode in ("wal", "delete", "truncate"):
                assert client(f"PRAGMA journal_mode={mode}") == [[mode]]
                client(f"INSERT INTO t VALUES ({number})")
                assert sqlite(pair.elsewhere / name, "SELECT count(*) FROM t").strip() == str(
                    client("SELECT count(*) FROM t")[0][0]
                )
    assert same_everywhere(pair, name, "SELECT count(*) FROM t; PRAGMA journal_mode") == "9\ndelete"
    assert not [each for each in files_of(pair.here / name) if each.endswith(("-wal", "-shm"))]


def test_with_normal_commits_are_grouped(place: Place, tmp_path: Path) -> None:
    """They come within `--group-commit`, a few at a time; checkpoint, last close and unmount wait for them."""
    with (
        FaultProxy(place.url) as proxy,
        mounted(place, tmp_path) as other,
        mounted(place.via(proxy.url), tmp_path, "--group-commit", "0.5") as mount,
    ):
        create(mount / "a.db")

        def seen(_: object = None) -> int:
            return int(sqlite(other / "a.db", "SELECT count(*) FROM t"))

        with Client(mount / "a.db") as client:
            client("PRAGMA synchronous=NORMAL", "INSERT INTO t VALUES (-1, 0)")
            proxy.reset()
            for number in range(200):
                client(f"INSERT INTO t VALUES ({number}, randomblob(500))")
            assert sqlite(mount / "a.db", "SELECT count(*) FROM t") == "201"
            eventually(seen, 201)
            puts = [each for each in proxy.requests if each.method == "PUT" and each.kind == "head"]
            assert len(puts) < 50
            client("INSERT INTO t VALUES (1000, 0)", "PRAGMA wal_checkpoint(PASSIVE)")
            assert seen() == 202
            client("INSERT INTO t VALUES (1001, 0)")
        assert seen() == 203
        with Client(mount / "a.db") as client:
            client("PRAGMA synchronous=OFF", "PRAGMA wal_autocheckpoint=3")
            for number in range(2000, 2050):
                client(f"INSERT INTO t VALUES ({number}, randomblob(500))")
        assert seen() == 253
        assert sqlite(other / "a.db", "PRAGMA integrity_check") == "ok"
        with Client(mount / "a.db") as client:
            client("PRAGMA synchronous=NORMAL", "INSERT INTO t VALUES (3000, 0)")
            client.kill()  # its log stays, and goes with the mount
        mount.unmount()
        assert seen() == 254


def test_a_killed_writer(pair: Pair, name: str) -> None:
    """Its transaction is gone, spilled or not; readers and other writers go on, with those that were committed."""
    create(pair.here / name)
    with Client(pair.here / name) as other:
        for number in range(4):
            with Client(pair.here / name) as client:
                client(f"INSERT INTO t VALUES ({number}, 'kept')", "PRAGMA cache_size=10", "BEGIN IMMEDIATE")
                client(f"INSERT INTO t SELECT 100 + i, randomblob(1000) FROM ({numbers(200)})")
                if number % 2:
                    assert other("SELECT count(*) FROM t") == [[2 * number + 1]]
                client.kill()
            other(f"INSERT INTO t VALUES ({50 + number}, 'other')")
            assert other("SELECT count(*) FROM t") == [[2 * number + 2]]
            assert (
                sqlite(pair.elsewhere / name, "SELECT count(*) FROM t; PRAGMA integrity_check")
                == f"{2 * number + 2}\nok"
            )
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == "8"


def test_a_writer_that_is_killed_in_its_commit(pair: Pair, name: str) -> None:
    """Published, and nobody here was told: neither overwritten nor forgotten. Readers do not wait for any of it."""
    create(pair.here / name, "INSERT INTO t VALUES (0, 0)")
    with Client(pair.here / name) as other, Client(pair.here / name) as writer:
        assert other("SELECT count(*) FROM t") == [[1]]
        writer("INSERT INTO t VALUES (1, 1)")
        arrived = threading.Event()

        def rule(request: Request) -> Fault | None:
            if request.method == "PUT" and request.kind == "head":
                arrived.set()
                return Fault(delay_s=6)
            return None

        pair.proxy.rule = rule
        writer.send("INSERT INTO t VALUES (2, zeroblob(9000))")
        assert arrived.wait(PATIENCE_S)
        began = time.monotonic()
        assert other("SELECT count(*) FROM t") == [[2]]
        assert time.monotonic() - began < 5
        writer.process.kill()
        pair.proxy.rule = None
        eventually(lambda: sqlite(pair.elsewhere / name, "SELECT count(*) FROM t"), "3")
        eventually(lambda: other("SELECT count(*) FROM t"), [[3]])
        other("INSERT INTO t VALUES (3, 3)")
        assert other("SELECT sum(a) FROM t") == [[6]]
        assert sqlite(pair.elsewhere / name, "SELECT sum(a) FROM t; PRAGMA integrity_check") == "6\nok"
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == "6"


def test_everybody_is_killed(pair: Pair, name: str) -> None:
    """What they had committed is published, and the log is forgotten."""
    create(pair.here / name)
    for number in range(4):
        with Client(pair.here / name) as client:
            client("PRAGMA busy_timeout=20000", f"PRAGMA synchronous={'NORMAL' if number % 2 else 'FULL'}")
            client(f"INSERT INTO t VALUES ({number}, randomblob(5000))", f"INSERT INTO t VALUES ({number + 10}, 0)")
            client.kill()
        eventually(lambda: files_of(pair.here / name), [name])  # tidied up, without anybody coming
        if number == 2:
            change = "DELETE FROM t WHERE a = 11; INSERT INTO t VALUES (11, 'elsewhere')"
            sqlite(pair.elsewhere / name, ".timeout 5000", change)
        eventually(lambda: sqlite(pair.elsewhere / name, "SELECT count(*) FROM t"), str(2 * number + 2))
        assert sqlite(pair.here / name, "SELECT count(*) FROM t; PRAGMA integrity_check") == f"{2 * number + 2}\nok"
    assert files_of(pair.here / name) == [name]


def test_what_no_sqlite_writes_is_refused(pair: Pair, name: str, tmp_path: Path) -> None:
    """`cp` over a database whose log is in use would mix states."""
    create(pair.here / name)
    with Client(pair.here / name) as client:
        client("INSERT INTO t VALUES (1, 1)")
        done = shell("cp", "/bin/true", pair.here / name)
        assert done.returncode and "busy" in done.stderr
        assert client("SELECT count(*) FROM t") == [[1]]
    with pytest.raises(AssertionError):
        sqlite(pair.here / name, "SELECT nothing")
    assert shell("touch", f"{pair.here / 'none.db'}-wal").returncode


def test_errors_of_sql_are_none_of_ours(pair: Pair, name: str) -> None:
    create(pair.here / name, "INSERT INTO t VALUES (1, 1)")
    with Client(pair.here / name) as one, Client(pair.here / name) as two:
        one("BEGIN IMMEDIATE")
        with pytest.raises(SqlError, match="locked"):
            two("BEGIN IMMEDIATE")
        two("BEGIN", "SELECT * FROM t")
        one("INSERT INTO t VALUES (2, 2)", "COMMIT")
        with pytest.raises(SqlError, match="locked"):  # SQLITE_BUSY_SNAPSHOT
            two("INSERT INTO t VALUES (3, 3)")
        two("ROLLBACK", "INSERT INTO t VALUES (3, 3)")
    assert same_everywhere(pair, name, "SELECT sum(a) FROM t") == "6"


@pytest.mark.parametrize("modes", [("WAL", "WAL"), ("WAL", "DELETE"), ("DELETE", "WAL")])
@pytest.mark.parametrize("failing", [0, 1])
def test_attached_databases_are_atomic_each(pair: Pair, modes: tuple[str, str], failing: int) -> None:
    """One transaction over two of them is two commits. When one fails, that one is as it was, the other one as it was
    or whole; and both go on."""
    names = fresh_name(), fresh_name()
    for name, mode in zip(names, modes, strict=True):
        sqlite(pair.here / name, f"PRAGMA journal_mode={mode}", "CREATE TABLE t(n, b)", "INSERT INTO t VALUES (0, 0)")

    def values(client: Client | None = None) -> list[int]:
        if client is not None:
            return client("SELECT main.t.n, b.t.n FROM main.t, b.t")[0]  # type: ignore[no-any-return]
        return [int(sqlite(pair.elsewhere / name, "SELECT n FROM t")) for name in names]

    with Client(pair.here / names[0]) as client:
        client(f"ATTACH '{pair.here / names[1]}' AS b", "PRAGMA main.synchronous=FULL", "PRAGMA b.synchronous=FULL")

        def change(number: int) -> None:
            client("BEGIN")
            for database in ("main", "b"):
                client(f"UPDATE {database}.t SET n = {number}, b = randomblob(9000)")
            client("COMMIT")

        for number in (1, 2, 3):
            change(number)
            assert values() == values(client) == [number, number]
        broken = f"/{names[failing]}/"
        pair.proxy.rule = lambda request: (
            Fault(status=403, code="AccessDenied") if is_put(request) and broken in request.path else None
        )
        with pytest.raises(SqlError, match="disk I/O error"):
            change(100)
        pair.proxy.rule = None
        with contextlib.suppress(SqlError):  # SQLite has done so by itself, or not
            client("ROLLBACK")
        found = values()
        assert found[failing] == 3 and found[1 - failing] in (3, 100)
        eventually(lambda: values(client), found)
        change(200)
        assert values() == values(client) == [200, 200]
    for name, mode in zip(names, modes, strict=True):
        assert same_everywhere(pair, name, "PRAGMA journal_mode", "SELECT n FROM t") == f"{mode.lower()}\n200"


def test_renamed_right_after_its_last_user_died(pair: Pair, name: str) -> None:
    """What it had committed with NORMAL goes along; nobody has to wait for the log to be tidied up."""
    for number in range(3):
        old, new = f"{number}{name}", f"{number}new{name}"
        create(pair.here / old)
        with Client(pair.here / old) as client:
            client("PRAGMA synchronous=NORMAL", "INSERT INTO t VALUES (1, randomblob(5000))")
            client.kill()
        moved = shell("mv", pair.here / old, pair.here / new)
        assert (moved.returncode, moved.stderr) == (0, "")
        assert files_of(pair.here / old) == [] and files_of(pair.here / new) == [new]
        assert same_everywhere(pair, new, "SELECT a, length(b) FROM t") == "1|5000"


def is_put(request: Request) -> bool:
    return request.method == "PUT" and request.kind == "head"
