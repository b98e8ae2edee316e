"""Readers that overlap, and the journal that is pretended to hold new ones back. With threads: test_coherence.py."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import InlineRuntime, Process, World
from mounting import PATIENCE_S, Client, Place, SqlError, fresh_name, mounted, shell, sqlite
from scenes import Scene, same, state

from s3blockfs.errors import Busy, CommitLost
from s3blockfs.holdback import HELD_BACK_S, PAUSE_S
from s3blockfs.overlap import LONG_BEHIND_S, LOOK_EVERY_S, MountedDatabase

STEP_S = 0.25


class Overlap(Scene):
    """A database of a mount, and process 1 of which some connection reads all the time."""

    def __init__(self, world: World, **changes: object) -> None:
        super().__init__(world, MountedDatabase, **changes)
        assert isinstance(self.database, MountedDatabase)
        self.mounted = self.database
        for _ in range(2):
            self.mounted.opened(1, only_reads=False)
        self.crowd = self.process(1)
        self.crowd.shared()

    @property
    def is_pretended(self) -> bool:
        """As who looks for the journal finds it."""
        return self.mounted.pretended_journal is not None

    def until(self, pretended: bool, longest_s: float = 2 * PAUSE_S) -> float:
        """How long it took."""
        took_s = 0.0
        while self.is_pretended is not pretended:
            took_s += self.wait(STEP_S)
            assert took_s <= longest_s, f"pretended: {self.is_pretended}"
        return took_s

    def wait(self, seconds: float) -> float:
        for _ in range(int(seconds / STEP_S)):
            self.world.runtime.sleep(STEP_S)
            self.machine.tick()
        return seconds


@pytest.fixture
def scene() -> Iterator[Overlap]:
    with World(InlineRuntime()) as world:
        yield Overlap(world)


def is_refused(take: object) -> bool:
    try:
        take()  # type: ignore[operator]
    except Busy:
        return True
    return False


def test_a_newer_state_holds_new_readers_back(scene: Overlap) -> None:
    """Nobody gets a write lock meanwhile, and the journal is no file that anything could play back or remove."""
    scene.wait(10)
    assert not scene.is_pretended
    scene.commit_elsewhere(2)
    assert LONG_BEHIND_S <= scene.until(True) <= LONG_BEHIND_S + LOOK_EVERY_S + 2 * STEP_S
    assert is_refused(scene.crowd.reserved) and is_refused(scene.crowd.exclusive)
    assert is_refused(scene.process(2).shared)  # of another process, which has to ask
    journal = scene.mounted.pretended_journal
    assert journal is not None and journal.read(0, 100) == b"?" and not journal.linked
    assert not scene.crowd.journal_exists and scene.machine.side_files.names_under("") == []
    assert same(scene.shown(), state(1))
    scene.crowd.unlock()
    scene.crowd.shared()
    assert same(scene.shown(), state(2)) and not scene.is_pretended
    scene.wait(2 * HELD_BACK_S)
    scene.commit_elsewhere(3)
    assert scene.until(True) <= LONG_BEHIND_S + LOOK_EVERY_S + 2 * STEP_S  # that was not in vain
    scene.crowd.unlock()
    scene.crowd.shared()
    scene.crowd.reserved()
    scene.crowd.write_journal()
    scene.crowd.exclusive()
    scene.database.write(0, state(4))
    scene.crowd.commit()
    assert scene.published(4)


def test_a_long_reader_holds_back_others_for_a_while(scene: Overlap) -> None:
    """It was in vain, so they go on with the old state; each pause is twice as long as the one before."""
    scene.commit_elsewhere(2)
    scene.until(True)
    for pause_s in (PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S):
        assert HELD_BACK_S - STEP_S <= scene.until(False) <= HELD_BACK_S + STEP_S
        requests = len(scene.world.store.calls)
        assert pause_s - STEP_S <= scene.until(True, pause_s + 1) <= pause_s + STEP_S
        assert len(scene.world.store.calls) == requests
        assert same(scene.shown(), state(1))


@pytest.mark.parametrize("only_read", [0, 1])
def test_a_long_reader_does_not_keep_other_processes_out(only_read: int) -> None:
    """They wait for 3 s, go on with the old state, and try again later; also where no journal can be pretended."""

    def until(refused: bool) -> float:
        took_s = 0.0
        while is_refused(other.shared) is not refused:
            other.unlock()
            took_s += scene.wait(STEP_S)
            assert took_s <= 5 * PAUSE_S
        return took_s

    with World(InlineRuntime()) as world:
        scene = Overlap(world, refresh_s=1)
        scene.mounted.only_read = Counter([1] * only_read)
        other = scene.process(2)
        scene.commit_elsewhere(2)
        assert until(True) <= 5
        for pause_s in (PAUSE_S, 2 * PAUSE_S):
            assert HELD_BACK_S - STEP_S <= until(False) <= HELD_BACK_S + STEP_S
            assert same(scene.shown(), state(1))
            assert pause_s - 2 * STEP_S <= until(True) <= pause_s + 2 * STEP_S
        scene.crowd.unlock()
        other.shared()
        assert same(scene.shown(), state(2))


def test_the_time_counts_from_the_first_who_meets_it(scene: Overlap) -> None:
    """The kernel may remember for a while that there is no journal."""
    scene.commit_elsewhere(2)
    scene.wait(60)
    assert scene.is_pretended
    assert HELD_BACK_S - STEP_S <= scene.until(False) <= HELD_BACK_S + STEP_S


def test_never_while_only_those_read_that_cannot_write(scene: Overlap) -> None:
    """SQLite would tell them that the database has to be written to. A writer of the same process gets there in the
    end, by SQLite's own PENDING, and loses that transaction."""
    scene.mounted.only_read = Counter([1])
    scene.commit_elsewhere(2)
    with pytest.raises(AssertionError, match="pretended: False"):
        scene.until(True)
    assert is_refused(scene.crowd.reserved)
    scene.wait(LONG_BEHIND_S)
    scene.crowd.reserved()
    assert is_refused(scene.crowd.exclusive)
    scene.mounted.only_read = Counter()
    assert not scene.is_pretended  # in the way of a journal that is going to be written
    scene.wait(LONG_BEHIND_S)
    assert not scene.is_pretended
    with pytest.raises(CommitLost):
        scene.crowd.exclusive()
    scene.crowd.unlock()
    scene.crowd.shared()
    assert same(scene.shown(), state(2))


@pytest.mark.parametrize("another", [False, True])
def test_a_writer_waits_for_the_readers_of_its_process(scene: Overlap, another: bool) -> None:
    """Busy, never an error, however long; the refusal brings the journal; also if another process only reads."""
    scene.mounted.only_read = Counter([2] * another)
    only_reader = scene.process(2)
    if another:
        only_reader.shared()
    scene.commit_elsewhere(2)
    assert is_refused(scene.crowd.reserved)
    assert scene.until(True) <= STEP_S
    for _ in range(50):
        scene.wait(STEP_S)
        assert is_refused(scene.crowd.reserved)
    only_reader.unlock()
    scene.crowd.unlock()
    scene.crowd.shared()
    scene.crowd.reserved()
    scene.crowd.unlock()


@pytest.mark.parametrize("what", ["a hot journal", "a writer", "an empty file"])
def test_never_instead_of(what: str) -> None:
    """A real journal is shown; none is invented under a writer; beside an empty file SQLite would delete it."""
    with World(InlineRuntime()) as world:
        scene = Overlap(world)
        if what == "an empty file":
            scene.crowd.unlock()
            scene.database.truncate(0)
            scene.database.close_handle(0)
            scene.crowd.shared()
        elif what == "a writer":
            scene.process(2).shared()
            writer = scene.process(3)
            writer.shared()
            writer.reserved()
        scene.commit_elsewhere(2)
        if what == "a hot journal":
            scene.until(True)
            Process.write_journal(scene.crowd)
        for _ in range(100):
            assert not scene.is_pretended
            scene.wait(STEP_S)


@contextlib.contextmanager
def two_machines(place: Place, folder: Path) -> Iterator[tuple[Path, Path]]:
    with mounted(place, folder, refresh="0.5") as here, mounted(place, folder) as elsewhere:
        name = fresh_name()
        sqlite(elsewhere / name, "CREATE TABLE t(a)", "INSERT INTO t VALUES (1)")
        yield here / name, elsewhere / name


def wait_for(path: Path, there: bool, longest_s: float) -> None:
    until = time.monotonic() + longest_s
    while (shell("test", "-s", path).returncode == 0) is not there:
        assert time.monotonic() < until, f"there: {not there}"
        time.sleep(0.1)


ONLY_READER = """
import os, sqlite3, sys
path, journal = sys.argv[1:]
db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
print(*db.execute("SELECT a FROM t").fetchone(), flush=True)
input()
print(os.path.exists(journal))
"""


@pytest.mark.mount
def test_what_a_mount_shows(mount_bucket: Place, tmp_path: Path) -> None:
    """A long read: none to a process with a read-only descriptor; to others one that cannot be changed, for which
    SQLite waits; and none again before the time is over that SQLite's clients wait by default."""
    place = mount_bucket.inside(fresh_name("overlap"))
    with two_machines(place, tmp_path) as (here, elsewhere), Client(here) as reader:
        journal = here.with_name(here.name + "-journal")
        reader(f"ATTACH '{here}' AS again")  # so its process has two connections
        assert reader("BEGIN", "SELECT a FROM main.t") == [[1]]
        asks, pipe = [sys.executable, "-c", ONLY_READER, here, journal], subprocess.PIPE
        with subprocess.Popen(asks, stdin=pipe, stdout=pipe, text=True) as only_reader:
            assert only_reader.stdout is not None and only_reader.stdout.readline() == "1\n"
            sqlite(elsewhere, "UPDATE t SET a = 2")
            wait_for(journal, True, 10)
            assert only_reader.communicate("\n", PATIENCE_S)[0] == "False\n"
            wait_for(journal, True, HELD_BACK_S + PAUSE_S + 2)  # the kernel remembers for a while that there was none
        appears = "import os, sys; os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)"
        assert "busy" in shell(sys.executable, "-c", appears, journal).stderr
        assert "busy" in shell("rm", journal).stderr and "busy" in shell("truncate", "-s", "0", journal).stderr
        assert shell("ls", journal.parent).stdout == f"{here.name}\n"
        with pytest.raises(AssertionError, match="locked"):
            sqlite(here, "SELECT a FROM t")
        wait_for(journal, False, HELD_BACK_S + 2)
        assert reader("SELECT a FROM t") == [[1]]
        reader("COMMIT")
        assert reader("SELECT a FROM t") == [[2]]
        with Client(here) as other, contextlib.suppress(SqlError):
            other("INSERT INTO t VALUES (3)")
        assert sqlite(here, "PRAGMA integrity_check", "SELECT group_concat(a) FROM t") == "ok\n2,3"
