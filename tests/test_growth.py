"""What a daemon takes: a million operations leave it no larger, a thousand databases open at once fit in.

GROWTH_OPERATIONS makes the first one longer or shorter; GROWTH_SEED repeats a run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import PATIENCE_S, SLACK_BYTES, SMALL, Place, Usage, mounted, numbers, shell, sqlite, usage

from s3blockfs.catalog import IDLE_KEPT
from s3blockfs.fuse_ops import TRIM_EVERY_S

pytestmark = pytest.mark.mount

MIB = 1 << 20
LOOKS = 10
SMALL_BYTES = 30 << 10
MANY = int(os.environ.get("GROWTH_OPERATIONS", "1000000"))


@contextlib.contextmanager
def few_descriptors() -> Iterator[None]:
    """What processes that are started meanwhile may open is what a shell or systemd usually gives them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def arenas(pid: int) -> int:
    """The heaps that glibc made for threads; it puts them at multiples of 64 MiB, to find them by what is in them."""
    maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    anonymous = [line for line in maps if line[1] == "rw-p" and len(line) == 5]
    return sum(int(line[0].partition("-")[0], 16) % (64 * MIB) == 0 for line in anonymous)


def descriptors(pid: int) -> tuple[int, int]:
    """Of files; and of sockets, which come and go while it is looked: the pool keeps a connection to S3 for as many
    requests as there ever were at a time, more on a busy machine."""
    found = [0, 0]
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found[str(link.readlink()).startswith("socket:")] += 1
    return found[0], found[1]


# With the machine to itself it does a thousand operations a second.
@pytest.mark.parametrize(
    "operations", [10_000, pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(600 + MANY // 100)])]
)
def test_many_operations(place: Place, tmp_path: Path, operations: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon is looked at ten times, with every connection of the program closed. The first half is for warming up:
    caches, and the newest commits that heads carry, take what they may. `-wal` and `-shm` go, too."""
    seed = os.environ.get("GROWTH_SEED") or str(random.SystemRandom().randrange(1 << 32))
    with contextlib.ExitStack() as stack:
        with few_descriptors():
            mount = stack.enter_context(mounted(place, tmp_path, *SMALL))
        soft, hard = resource.prlimit(mount.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard
        line = [sys.executable, __file__, "operate", str(mount.directory), str(operations // LOOKS), seed]
        looks: list[Usage] = []
        opened: list[tuple[int, int]] = []
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdin is not None and program.stdout is not None
            try:
                for _ in range(LOOKS):
                    program.stdin.write("go\n")
                    program.stdin.flush()
                    done = json.loads(program.stdout.readline() or '{"operations": 0}')
                    assert done["operations"] >= operations // LOOKS
                    looks.append(usage(mount.process.pid))
                    opened.append(descriptors(mount.process.pid))
                heaps = arenas(mount.process.pid)
                program.stdin.close()
                assert program.wait(PATIENCE_S) == 0
            finally:
                program.kill()
        with capsys.disabled():
            said = ", ".join(f"{look.memory_bytes / MIB:.1f} MiB" for look in looks)
            print(f"\nGROWTH_SEED={seed}, {done['kinds']}, after each tenth of {operations}: {said}; {opened=}")
        left = shell("ls", "-A", mount.directory).stdout.split()
        assert not [name for name in left if name.endswith(("-wal", "-shm"))]
        assert heaps <= 4  # some threads began before the mount did; else there would be a dozen
        warm, last = looks[LOOKS // 2 - 1], looks[-1]
        (warm_files, _), (files, connections) = opened[LOOKS // 2 - 1], opened[-1]
        assert files <= warm_files + 1 and connections <= 70  # 64 of them to S3
        assert last.memory_bytes <= warm.memory_bytes + SLACK_BYTES


@pytest.mark.parametrize("databases", [100, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(1200)])])
def test_a_thousand_databases_open_at_once(
    place: Place, tmp_path: Path, databases: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most of them in WAL mode, each with a log; by one program that keeps a connection to each, all of them in a read
    transaction. They cost what their heads take, 100 KiB here: as they are stored, and each page once. The second time
    costs nothing more, and at the end the system gets back what is not remembered of those that were closed last."""
    with mounted(place, tmp_path) as mount:
        rows = f"INSERT INTO t SELECT i, randomblob(1000) FROM ({numbers(50)})"
        changes = [f"UPDATE t SET b = randomblob(1000) WHERE a = {row}" for row in range(1, 46)]
        for mode in ("DELETE", "WAL"):
            create = f"PRAGMA journal_mode={mode}", "CREATE TABLE t(a INTEGER PRIMARY KEY, b)", rows
            sqlite(mount / f"{mode}.db", *create, *changes)
    heads = {mode: place.get(f"{mode}.db/head") for mode in ("DELETE", "WAL")}
    assert len(place.listing()) == 3 and all(100_000 < len(head) < 120_000 for head in heads.values())
    for number in range(databases):
        place.put(f"many/{number}.db/head", heads["WAL" if number % 4 else "DELETE"])
    with contextlib.ExitStack() as stack:
        with few_descriptors():
            mount = stack.enter_context(mounted(place.inside("many"), tmp_path))
        looks = [usage(mount.process.pid)]
        for rows_each in (51, 51):
            line = [sys.executable, __file__, "keep", str(mount.directory)]
            with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
                assert program.stdin is not None and program.stdout is not None
                said = json.loads(program.stdout.readline() or "{}")
                assert said == {"databases": databases, "rows": rows_each * databases}
                looks.append(usage(mount.process.pid))
                program.stdin.close()
                assert program.wait(PATIENCE_S) == 0
        each = 4 * len(heads["WAL"])
        # Of its small objects, 30 KiB of a database, Python gives back what makes an arena of 1 MiB empty.
        kept_bytes = looks[0].memory_bytes + min(databases, IDLE_KEPT) * each + SLACK_BYTES + databases * SMALL_BYTES
        looks.append(closed := usage(mount.process.pid))
        until = time.monotonic() + 2 * TRIM_EVERY_S
        while looks[-1].memory_bytes > kept_bytes and time.monotonic() < until:
            time.sleep(1)
            looks[-1] = usage(mount.process.pid)
    before, first, second, after = looks
    with capsys.disabled():
        print("\nbefore, with all open, with all open again, closed, later:", *looks[:3], closed, after, sep="\n")
    assert first.descriptors > before.descriptors + databases  # a log and an index each
    assert first.memory_bytes - before.memory_bytes < databases * each + SLACK_BYTES
    # malloc fills the gaps first: what is kept by mistake would cost as much again.
    assert second.memory_bytes - first.memory_bytes < (first.memory_bytes - before.memory_bytes) / 4 + SLACK_BYTES / 4
    assert after.descriptors < before.descriptors + 70  # at most 64 connections to S3
    assert after.memory_bytes <= kept_bytes


HOLES = """
import ctypes, os
from s3blockfs.malloc import trim
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(100_000) for _ in range(400)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[::2]:
    libc.free(ctypes.c_void_p(block))
pages = lambda: int(open("/proc/self/statm").read().split()[1])
before = pages()
trim()
print((before - pages()) * os.sysconf("SC_PAGE_SIZE"))
"""


def test_holes_are_given_back() -> None:
    """20 MB between blocks that are in use, less the pages at the edges."""
    assert int(shell(sys.executable, "-c", HOLES).stdout) > 18_000_000


# --- the program --------------------------------------------------------------------------------------------

MODES = "DELETE", "TRUNCATE", "PERSIST", "MEMORY", "OFF", "WAL"


class Operations:
    """Counts calls of the file system and statements of SQL."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.kinds = dict.fromkeys(("file", "SELECT", "change", "name"), 0)

    def step(self) -> None:
        number = self.rng.randrange(2 * len(MODES))
        kind = self.rng.random()
        path, mode = self.folder / f"{number}.db", MODES[number % len(MODES)]
        if kind < 0.75 and path.exists():
            self.files(path)
        elif kind < 0.98:
            self.sql(path, mode)
        else:
            self.names()

    def files(self, path: Path) -> None:
        opened = os.open(path, os.O_RDONLY)
        size = os.fstat(opened).st_size
        for _ in range(95):
            os.pread(opened, 4096, self.rng.randrange(size + 1))
        os.close(opened)
        list(self.folder.iterdir())
        path.stat()
        self.kinds["file"] += 100

    def sql(self, path: Path, mode: str) -> None:
        with contextlib.closing(sqlite3.connect(path, 60, isolation_level=None)) as run:
            run.execute(f"PRAGMA journal_mode={mode}")
            run.execute("CREATE TABLE IF NOT EXISTS t(a INTEGER PRIMARY KEY, b)")
            for _ in range(100):
                run.execute("SELECT sum(length(b)) FROM t WHERE a % 7 = ?", (self.rng.randrange(7),)).fetchall()
            row = self.rng.randrange(200), self.rng.randbytes(self.rng.randrange(3000))
            run.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", row)
            run.execute("BEGIN")
            run.execute("DELETE FROM t WHERE a = ?", (self.rng.randrange(200),))
            run.execute(self.rng.choice(["COMMIT", "ROLLBACK"]))
        self.kinds["SELECT"] += 100
        self.kinds["change"] += 6

    def names(self) -> None:
        first, second = self.folder / "first.db", self.folder / "second.db"
        with first.open("wb") as file:
            file.write(self.rng.randbytes(10_000))
        first.rename(second)
        with second.open("r+b") as file:
            file.truncate(self.rng.randrange(20_000))
        second.unlink()
        self.kinds["name"] += 9


def operate(folder: str, each: str, seed: str) -> None:
    todo = Operations(Path(folder), seed)
    before = 0
    for _ in sys.stdin:
        while (done := sum(todo.kinds.values()) - before) < int(each):
            todo.step()
        before += done
        print(json.dumps({"operations": done, "kinds": todo.kinds}), flush=True)


def keep(folder: str) -> None:
    """A connection to each database, in which a row was written; all of them in a transaction."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        rows, paths = 0, sorted(Path(folder).iterdir())
        for path in paths:
            run = stack.enter_context(contextlib.closing(sqlite3.connect(path, 60, isolation_level=None)))
            run.execute("INSERT OR REPLACE INTO t VALUES (1000, 'mine')")
            run.execute("BEGIN")
            rows += run.execute("SELECT count(*) FROM t").fetchone()[0]
        print(json.dumps({"databases": len(paths), "rows": rows}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
