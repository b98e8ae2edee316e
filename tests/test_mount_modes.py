"""Every way in which SQLite commits without WAL, and what another machine sees after each step.

What is expected is computed from the rule of docs/SEMANTICS.md ("Commit points, mode by mode"), never from a run.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
from mounting import PATIENCE_S, Client, Place, SqlError, fresh_name, numbers, sqlite
from pairs import Pair, same_everywhere, size_of, statements, two_mounts
from proxy import Fault, Request

pytestmark = pytest.mark.mount

ROWS = 200
STATE = "SELECT count(*), sum(n), sum(length(a)), max(hex(a)) FROM t"

UNJOURNALLED = ("MEMORY", "OFF")  # no journal that the file system could see
LEVELS = ("OFF", "NORMAL", "FULL", "EXTRA")
MODES = [*product(("DELETE", "TRUNCATE", "PERSIST", *UNJOURNALLED), LEVELS, ("NORMAL", "EXCLUSIVE"))]


@pytest.fixture(scope="module", params=["shared", pytest.param("exclusive", marks=pytest.mark.long)])
def mounts(
    mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Pair]:
    place, exclusive = mount_bucket.inside(fresh_name("modes")), request.param == "exclusive"
    with two_mounts(place, tmp_path_factory.mktemp("pair"), exclusive=exclusive) as pair:
        yield pair


@pytest.fixture
def pair(mounts: Pair) -> Iterator[Pair]:
    mounts.proxy.reset()
    yield mounts
    mounts.proxy.reset()


@pytest.fixture
def name() -> str:
    return fresh_name()


@dataclass
class Row:
    """One row of the table: a writer of this mode, and readers here and elsewhere that stay connected."""

    pair: Pair
    name: str
    mode: str
    synchronous: str
    locking: str
    writer: Client
    neighbour: Client
    reader: Client
    public: list[object] = field(default_factory=list)
    commits: int = 0

    @property
    def publishes_at_commit(self) -> bool:
        """The rule: the journal's end, or the fsync or the release of the lock in its place. With synchronous=OFF and
        without both the others MEMORY and OFF have none."""
        releases = self.locking == "NORMAL" and not self.pair.exclusive
        return self.mode not in UNJOURNALLED or self.synchronous != "OFF" or releases

    def sees(self, expected: list[object], commits: int) -> None:
        """Elsewhere shows `expected`, which took so many commits more; here the writer's lock decides who may look."""
        self.public, self.commits = expected, self.commits + commits
        assert self.reader(STATE) == expected
        assert self.pair.commits(self.name) == self.commits
        [[pages]], [[page]] = self.reader("PRAGMA page_count"), self.reader("PRAGMA page_size")
        assert size_of(self.pair.elsewhere / self.name) == pages * page

    def transaction(self, *steps: str) -> None:
        """COMMIT is the first that anybody elsewhere sees of it, if the mode has a commit point."""
        self.writer("BEGIN", *steps)
        new = self.writer(STATE)
        assert new != self.public
        self.sees(self.public, 0)
        self.writer("COMMIT")
        self.sees(new if self.publishes_at_commit else self.public, int(self.publishes_at_commit))
        assert self.writer(STATE) == new
        self.local_readers_see(new)

    def rollback(self, *steps: str, compensates: bool = False) -> None:
        """ROLLBACK: the old state, here and elsewhere; `compensates`: put back by one more commit."""
        old = self.writer(STATE)
        self.writer("BEGIN", *steps)
        self.sees(self.public, 0)
        self.writer("ROLLBACK")
        assert self.writer(STATE) == old
        self.sees(self.public, int(compensates))
        self.local_readers_see(old)

    def local_readers_see(self, expected: list[object]) -> None:
        if self.locking == "EXCLUSIVE":
            with pytest.raises(SqlError, match="locked"):
                self.neighbour(STATE)
        else:
            assert self.neighbour(STATE) == expected


@pytest.mark.parametrize("mode, synchronous, locking", MODES)
def test_what_elsewhere_sees(pair: Pair, name: str, mode: str, synchronous: str, locking: str) -> None:
    """Every step of a session in every mode, with a reader elsewhere that stays connected all the time."""
    auto_vacuum = "FULL" if synchronous in ("OFF", "FULL") else "INCREMENTAL"
    with Client(pair.here / name) as first:
        first(f"PRAGMA auto_vacuum={auto_vacuum}", "CREATE TABLE t(id INTEGER PRIMARY KEY, n, a)")
        first(f"INSERT INTO t SELECT i, 0, randomblob(700) FROM ({numbers(ROWS)})")
    with Client(pair.elsewhere / name) as reader, Client(pair.here / name) as neighbour:
        with Client(pair.here / name) as writer:
            now = (reader(STATE), pair.commits(name))
            row = Row(pair, name, mode, synchronous, locking, writer, neighbour, reader, *now)
            writer(f"PRAGMA locking_mode={locking}", f"PRAGMA journal_mode={mode}", f"PRAGMA synchronous={synchronous}")
            assert writer("PRAGMA journal_mode") == [[mode.lower()]]
            row.transaction("INSERT INTO t(n, a) VALUES (1, 'one')")
            if mode != "OFF":  # where ROLLBACK "behaves in an undefined way": https://sqlite.org/pragma.html
                row.rollback("UPDATE t SET n = 2", "DELETE FROM t WHERE id > 100")
                row.transaction(
                    *("INSERT INTO t(n, a) VALUES (3, 'kept')", "SAVEPOINT one", "DELETE FROM t WHERE id % 2"),
                    *("ROLLBACK TO one", "RELEASE one", "SAVEPOINT two", "UPDATE t SET n = 3", "RELEASE two"),
                )
            writer("PRAGMA cache_size=2")  # from here on pages spill into the file in mid-transaction
            row.transaction("UPDATE t SET n = 4, a = randomblob(800)")
            if mode != "OFF":
                # No journal tells the file system that these bytes are the old ones again.
                published = mode == "MEMORY" and row.publishes_at_commit
                row.rollback("UPDATE t SET n = 5, a = randomblob(700)", compensates=published)
                row.transaction(
                    *("SAVEPOINT one", "UPDATE t SET a = randomblob(900)", "ROLLBACK TO one", "UPDATE t SET n = 6")
                )
            before = reader("PRAGMA page_count")
            row.transaction("DELETE FROM t WHERE id > 40")
            assert (reader("PRAGMA page_count") < before) == (auto_vacuum == "FULL" and row.publishes_at_commit)
            writer("PRAGMA page_size=1024", "VACUUM")
            row.sees(writer(STATE) if row.publishes_at_commit else row.public, int(row.publishes_at_commit))
            assert reader("PRAGMA page_size") == [[1024 if row.publishes_at_commit else 4096]]
            last = writer(STATE)
        row.sees(last, 0 if row.publishes_at_commit else 1)  # at the latest the last close publishes
        with Client(pair.here / name) as killed:
            killed(*statements(f"PRAGMA locking_mode={locking}; PRAGMA journal_mode={mode}; PRAGMA cache_size=2"))
            killed(f"PRAGMA synchronous={synchronous}", "BEGIN", "UPDATE t SET n = 7, a = randomblob(3000)")
            killed.kill()
        row.locking = "NORMAL"
        row.local_readers_see(last)
        row.sees(last, 0)
        neighbour("INSERT INTO t(n, a) VALUES (8, 'after')")
        row.sees(neighbour(STATE), 1)
        assert reader("PRAGMA integrity_check") == [["ok"]]
    same_everywhere(pair, name)


# --- commits that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spill", [False, True], ids=["small", "spilled"])
@pytest.mark.parametrize("mode, locking", sorted({(mode, locking) for mode, _, locking in MODES}))
def test_a_failed_commit(pair: Pair, name: str, mode: str, locking: str, spill: bool) -> None:
    """COMMIT is an error, nothing of it is anywhere, and no later COMMIT of this connection says OK for nothing."""
    # Else nothing would ever end discard mode but a close.
    goes_on = mode not in UNJOURNALLED or (locking == "NORMAL" and not pair.exclusive)
    with Client(pair.here / name) as writer, Client(pair.elsewhere / name) as reader:
        old, commits = prepare(pair, name, writer, mode, locking, 2 if spill else 2000)
        writer("BEGIN", "UPDATE t SET n = 2, a = randomblob(800)")
        pair.proxy.rule = refuse(name)
        with pytest.raises(SqlError, match="I/O"):
            writer("COMMIT")
        pair.proxy.rule = None
        assert (reader(STATE), pair.commits(name)) == (old, commits)
        with pytest.raises(SqlError, match="no transaction is active"):
            writer("ROLLBACK")
        if goes_on:
            assert writer(STATE) == old
        for row in range(2):
            if not goes_on:
                with pytest.raises(SqlError, match="I/O"):
                    writer(f"INSERT INTO t(n, a) VALUES ({row}, 'later')")
                assert (reader(STATE), pair.commits(name)) == (old, commits)
                continue
            writer("BEGIN", f"INSERT INTO t(n, a) VALUES ({row}, 'later')", "COMMIT")
            assert reader(STATE) == writer(STATE) != old
            assert pair.commits(name) == commits + row + 1
    with Client(pair.here / name) as writer:
        writer("INSERT INTO t(n, a) VALUES (4, 'last')")
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == str(ROWS + 1 + 2 * goes_on)


@pytest.mark.parametrize("mode", UNJOURNALLED)
def test_a_failed_commit_by_the_release_of_the_lock(pair: Pair, name: str, mode: str) -> None:
    """The connection has the lost transaction in its cache, with the change counter that the next one gets: it may say
    nothing any more, until it is closed."""
    if pair.exclusive:
        pytest.skip("locks are not seen there")
    with Client(pair.here / name) as writer, Client(pair.here / name) as neighbour:
        old, commits = prepare(pair, name, writer, mode, "NORMAL", 2000)
        writer("PRAGMA synchronous=OFF", "BEGIN", "UPDATE t SET n = 2")
        pair.proxy.rule = refuse(name)
        with pytest.raises(SqlError, match="I/O"):
            writer("COMMIT")
        pair.proxy.rule = None
        assert (neighbour(STATE), pair.commits(name)) == (old, commits)
        neighbour("UPDATE t SET n = 3")
        for statement in (STATE, "INSERT INTO t(n, a) VALUES (4, 'later')"):
            with pytest.raises(SqlError, match="I/O"):
                writer(statement)
        new = neighbour(STATE)
    with Client(pair.here / name) as writer:
        assert writer(STATE) == new
    same_everywhere(pair, name)


@pytest.mark.parametrize("mode", UNJOURNALLED)
def test_what_only_the_close_publishes_can_be_lost(pair: Pair, name: str, mode: str) -> None:
    """synchronous=OFF without a journal, and with the lock kept: all of it is lost, the state before is whole."""
    locking = "EXCLUSIVE"
    with Client(pair.elsewhere / name) as reader:
        with Client(pair.here / name) as writer:
            old, commits = prepare(pair, name, writer, mode, locking, 2)
            writer("PRAGMA synchronous=OFF", "UPDATE t SET a = randomblob(800)", "DELETE FROM t WHERE id > 100")
            assert reader(STATE) == old
            pair.proxy.rule = refuse(name)
        pair.proxy.rule = None
        assert (reader(STATE), pair.commits(name)) == (old, commits)
    assert same_everywhere(pair, name, "SELECT count(*) FROM t") == str(ROWS)


def prepare(pair: Pair, name: str, writer: Client, mode: str, locking: str, cache: int) -> tuple[list[object], int]:
    """A filled table, and the writer in its mode with one transaction behind it; the state and how many commits."""
    writer("CREATE TABLE t(id INTEGER PRIMARY KEY, n, a)")
    writer(f"INSERT INTO t SELECT i, 0, randomblob(700) FROM ({numbers(ROWS)})", f"PRAGMA cache_size={cache}")
    writer(f"PRAGMA locking_mode={locking}", f"PRAGMA journal_mode={mode}", "UPDATE t SET n = 1 WHERE id = 1")
    return writer(STATE), pair.commits(name)


def refuse(name: str) -> Callable[[Request], Fault | None]:
    """The store takes no head of this database."""

    def rule(request: Request) -> Fault | None:
        refused = (request.method, request.kind) == ("PUT", "head") and name in request.path
        return Fault(status=403, code="AccessDenied") if refused else None

    return rule


# --- other ways to write and to read -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST"])
@pytest.mark.parametrize("mount", ["both", "main", "attached"])
def test_attached(pair: Pair, name: str, tmp_path: Path, mount: str, mode: str) -> None:
    """A super-journal, also one that lies on another file system: nothing before COMMIT, everything after it."""
    main = tmp_path / name if mount == "attached" else pair.here / name
    second = tmp_path / f"z{name}" if mount == "main" else pair.here / f"z{name}"
    mounted = [path.name for path in (main, second) if path.parent == pair.here.directory]
    with contextlib.ExitStack() as stack, Client(main) as writer:
        writer(f"ATTACH '{second}' AS b", "CREATE TABLE main.t(n)", "CREATE TABLE b.t(n)")
        writer(f"PRAGMA main.journal_mode={mode}", f"PRAGMA b.journal_mode={mode}", "PRAGMA synchronous=FULL")
        readers = [stack.enter_context(Client(pair.elsewhere / each)) for each in mounted]
        both = ["INSERT INTO main.t VALUES (1)", "INSERT INTO b.t VALUES (1)"]
        for turn in range(3):
            writer("BEGIN", *both)
            assert [reader("SELECT count(*) FROM t") for reader in readers] == [[[turn]]] * len(mounted)
            writer("COMMIT")
            assert [reader("SELECT count(*) FROM t") for reader in readers] == [[[turn + 1]]] * len(mounted)
            writer("BEGIN", *both, "ROLLBACK")
            assert [reader("SELECT count(*) FROM t") for reader in readers] == [[[turn + 1]]] * len(mounted)
        writer("BEGIN", *both)
        writer.kill()
        assert [reader("SELECT count(*) FROM t") for reader in readers] == [[[3]]] * len(mounted)
    for each in mounted:
        assert same_everywhere(pair, each, "SELECT count(*) FROM t") == "3"


COPY = """
import sqlite3, sys
source, target = (sqlite3.connect(path) for path in sys.argv[1:3])
def step(_, remaining, total):
    print(remaining, flush=True)
    sys.stdin.readline()
source.backup(target, pages=40, progress=step)
target.close()
"""


@pytest.mark.parametrize("wal", [False, True], ids=["rollback", "wal"])
def test_the_backup_api_onto_a_mount(pair: Pair, name: str, tmp_path: Path, wal: bool) -> None:
    """Page by page over a database that others read: they see the old one until the backup is finished."""
    source = tmp_path / "source.db"
    with Client(source) as client:
        client(f"PRAGMA journal_mode={'WAL' if wal else 'DELETE'}", "CREATE TABLE t(n, a)")
        client(f"INSERT INTO t SELECT i, randomblob(900) FROM ({numbers(500)})")
    sqlite(pair.here / name, "CREATE TABLE t(n, a)", "INSERT INTO t VALUES (-1, 'old')")
    commits = pair.commits(name)
    with Client(pair.elsewhere / name) as reader:
        line = [sys.executable, "-c", COPY, source, pair.here / name]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as copy:
            assert copy.stdin is not None
            assert copy.stdout is not None
            while int(copy.stdout.readline()):
                assert reader("SELECT count(*), min(n) FROM t") == [[1, -1]]
                print("go on", file=copy.stdin, flush=True)
            copy.stdin.close()
            assert copy.wait(PATIENCE_S) == 0
        assert reader("SELECT count(*), min(n) FROM t") == [[500, 1]]
        assert reader("PRAGMA journal_mode") == [["wal" if wal else "delete"]]
    assert pair.commits(name) == commits + 1
    if not (wal and pair.exclusive):  # which does not show it in that mode
        same_everywhere(pair, name)


def test_restore_and_backup_in_the_shell(pair: Pair, name: str, tmp_path: Path) -> None:
    """`.restore` over a database on the mount is one commit; `.backup` of one that others write to is one state."""
    kept = tmp_path / "kept.db"
    with Client(pair.here / name) as writer, Client(pair.elsewhere / name) as reader:
        old, _ = prepare(pair, name, writer, "DELETE", "NORMAL", 2000)
        sqlite(pair.elsewhere / name, f".backup {kept}")
        writer("DELETE FROM t WHERE id > 10", "PRAGMA user_version=7", "VACUUM")
        assert reader("SELECT count(*) FROM t") == [[10]]
        commits = pair.commits(name)
        sqlite(pair.here / name, f".restore {kept}")
        assert (reader(STATE), writer(STATE), pair.commits(name)) == (old, old, commits + 1)
    same_everywhere(pair, name)


def test_a_file_of_no_bytes(pair: Pair, name: str) -> None:
    """It is an empty database for both, until one of them writes; a read-only user changes nothing."""
    with Client(pair.here / name) as one, Client(pair.elsewhere / name) as two:
        assert one("PRAGMA schema_version") == two("PRAGMA schema_version") == [[0]]
        assert size_of(pair.here / name) == size_of(pair.elsewhere / name) == 0
        created = pair.commits(name)
        one("BEGIN IMMEDIATE", "ROLLBACK")
        assert (two("SELECT count(*) FROM sqlite_schema"), pair.commits(name)) == ([[0]], created)
        one("BEGIN", "CREATE TABLE t(a)", "ROLLBACK")
        assert size_of(pair.elsewhere / name) == 0
        one("CREATE TABLE t(a)")
        assert two("SELECT count(*) FROM t") == [[0]]
    same_everywhere(pair, name)


@pytest.mark.parametrize("uri", ["mode=ro", "mode=ro&nolock=1", "immutable=1"])
def test_read_only_opens(pair: Pair, name: str, uri: str) -> None:
    """They see what is committed, also right after a writer was killed with its journal hot and pages spilled."""
    with Client(pair.here / name) as writer:
        old, commits = prepare(pair, name, writer, "DELETE", "NORMAL", 2)
        for mount in (pair.here, pair.elsewhere):
            with Client(f"file:{mount / name}?{uri}") as reader:
                assert reader(STATE) == old
                with pytest.raises(SqlError, match="readonly"):
                    reader("DELETE FROM t")
        writer("BEGIN", "UPDATE t SET n = 7, a = randomblob(3000)")
        writer.kill()
    for mount in (pair.here, pair.elsewhere):
        with Client(f"file:{mount / name}?{uri}") as reader:
            assert reader(STATE) == old
            assert reader("PRAGMA integrity_check") == [["ok"]]
    assert pair.commits(name) == commits
    same_everywhere(pair, name)
