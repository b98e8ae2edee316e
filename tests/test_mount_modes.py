"""Every way in which SQLite commits without WAL, and what another machine sees after each step.

What is expected is computed from the rule of docs/SEMANTICS.md ("Commit points, mode by mode"), never from a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import pytest
from mounting import Client, Place, SqlError, fresh_name, numbers
from pairs import Pair, same_everywhere, size_of, statements, two_mounts

pytestmark = pytest.mark.mount

ROWS = 200
STATE = "SELECT count(*), sum(n), sum(length(a)), max(hex(a)) FROM t"

UNJOURNALLED = ("MEMORY", "OFF")  # no journal that the file system could see
LEVELS = ("OFF", "NORMAL", "FULL", "EXTRA")
MODES = [*product(("DELETE", "TRUNCATE", "PERSIST", *UNJOURNALLED), LEVELS, ("NORMAL", "EXCLUSIVE"))]


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_mounts(mount_bucket.inside(fresh_name("modes")), tmp_path_factory.mktemp("pair")) as pair:
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
        """The rule: the journal's end, or the fsync in its place; synchronous=OFF leaves neither to MEMORY and OFF."""
        return self.mode not in UNJOURNALLED or self.synchronous != "OFF"

    def sees(self, expected: list[object], commits: int) -> None:
        """Elsewhere shows `expected`, which took so many commits more; here the writer's lock decides who may look."""
        self.public, self.commits = expected, self.commits + commits
        assert self.reader(STATE) == expected
        assert self.pair.commits(self.name) == self.commits
        [[pages]], [[page]] = self.reader("PRAGMA page_count"), self.reader("PRAGMA page_size")
        if self.mode not in UNJOURNALLED:  # those cut the file after the fsync
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
