"""A process of the soak: threads, each with a connection that stays open, which write and look.

Every row carries a checksum over its content and its commit, every commit one over its rows, every writer a chain of
those; a counter counts all commits of all, and one table is named after a counter. So a reader who looks at all of it
in one transaction knows whether that is one state. What a writer was told stands in its *ledger*, a file, from which it
goes on after it was killed; readers hold what they see against all ledgers. `python -m soak.worker JSON`; ends with its
standard input, and prints its figures.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import random
import sqlite3
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUSY_TIMEOUT_S = 20
KEPT = 6  # commits of each writer, of which the rows are in the database

#: What was acknowledged longer ago than this must be seen by every transaction that begins.
STALE_S = 30.0

TABLES = [
    "CREATE TABLE rows(id INTEGER PRIMARY KEY, writer, number, part, sum, data)",
    "CREATE INDEX rows_of ON rows(writer, number)",
    "CREATE TABLE commits(writer, number, parts, digest, PRIMARY KEY(writer, number))",
    "CREATE TABLE latest(writer PRIMARY KEY, number, chain)",
    "CREATE TABLE total(n, shape)",
    "INSERT INTO total VALUES (0, 0)",
    "CREATE TABLE shape_0(x)",
]


class Wrong(Exception):
    """What must never be."""


class Refused(Exception):
    """BUSY, IOERR and the like."""


@dataclass(frozen=True)
class Job:
    """Threads on each of `databases` (name: path, or key in the bucket), with one library."""

    name: str
    library: str
    """sqlite3, apsw; or s3blockfs: in process."""
    databases: dict[str, str]
    ledgers: str
    seed: int
    journal_mode: str
    """Of writers to databases that are not in WAL mode."""
    readers: int = 0
    """So many threads that read, of each database; 0: one, beside one that writes."""
    bucket: str = ""
    url: str = ""
    chores: list[str] = field(default_factory=lambda: ["VACUUM", "shape", "checkpoint"])


def md5(*parts: object) -> str:
    return hashlib.md5(b"|".join(p if isinstance(p, bytes) else str(p).encode() for p in parts)).hexdigest()


class Connection:
    """One of three libraries, with the same errors."""

    def __init__(self, job: Job, database: str, rng: random.Random) -> None:
        self._errors: Any = sqlite3.Error
        where = job.databases[database]
        if job.library == "sqlite3":
            self._it: Any = sqlite3.connect(where, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        else:
            import apsw

            self._errors = apsw.Error
            if job.library == "apsw":
                self._it = apsw.Connection(where)
            else:
                import s3blockfs

                self._it = s3blockfs.connect(bucket=job.bucket, name=where, endpoint_url=job.url, refresh_s=1.0)
            self._it.set_busy_timeout(BUSY_TIMEOUT_S * 1000)
        self(f"PRAGMA cache_size={rng.choice([5, 2000])}")
        self(f"PRAGMA mmap_size={rng.choice([0, 1 << 26])}")

    def __call__(self, statement: str, *values: object) -> list[Any]:
        try:
            return list(self._it.execute(statement, values))
        except self._errors as error:
            text = str(error)
            kinds = ("locked", "locking protocol", "I/O error", "disk I/O", "busy")
            if any(kind in text for kind in kinds) or type(error).__name__ in ("BusyError", "IOError", "LockedError"):
                raise Refused(f"{statement.split(' ')[0]}: {type(error).__name__}: {text}") from error
            raise

    @property
    def in_transaction(self) -> bool:
        return bool(self._it.in_transaction)

    def roll_back(self) -> None:
        if self.in_transaction:
            with contextlib.suppress(Refused):
                self("ROLLBACK")

    def close(self) -> None:
        self._it.close()


class Ledger:
    """Of one writer to one database: lines `WHAT NUMBER CHAIN TIME`. What was asked for, and acknowledged; `lost`: its
    machine was killed, so what synchronous=NORMAL had acknowledged may be gone, from the end on."""

    def __init__(self, path: Path) -> None:
        self.chains: dict[int, str] = {0: ""}
        self.acknowledged, self.may_lose = 0, False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        for line in path.read_text().splitlines():
            what, number, chain, _ = line.split(",")
            self._learn(what, int(number), chain)

    def say(self, what: str, number: int, chain: str = "") -> None:
        os.write(self._file, f"{what},{number},{chain},{time.monotonic():.3f}\n".encode())
        self._learn(what, number, chain)

    def _learn(self, what: str, number: int, chain: str) -> None:
        if what == "asked":
            self.chains[number] = chain
        elif what in ("acknowledged", "found"):
            self.acknowledged, self.may_lose = number, False
        elif what == "lost":
            self.may_lose = True

    def check(self, number: int, chain: str) -> None:
        """Against what the database says of this writer."""
        if self.chains.get(number) != chain:
            raise Wrong(f"commit {number} is {chain}, never asked for: {sorted(self.chains.items())[-3:]}")
        if number < self.acknowledged and not self.may_lose:
            raise Wrong(f"acknowledged {self.acknowledged}, and there is only {number}")


class Followed:
    """The ledgers of all writers to a database, read on as they grow."""

    def __init__(self, folder: Path, database: str) -> None:
        self._folder, self._database = folder, database
        self._files: dict[str, Any] = {}
        self._acknowledged: dict[str, list[tuple[float, int]]] = {}

    def age_s(self, latest: dict[str, int], began_s: float) -> float:
        """How long ago the first commit was acknowledged that this state lacks."""
        for path in self._folder.glob(f"{self._database}--*"):
            if (writer := path.name.partition("--")[2]) not in self._files:
                self._files[writer] = [path.open("rb"), b""]
        oldest = began_s
        for writer, entry in self._files.items():
            *lines, entry[1] = (entry[1] + entry[0].read()).split(b"\n")
            known = self._acknowledged.setdefault(writer, [])
            for line in lines:
                what, number, _, at = line.decode().split(",")
                if what == "acknowledged":
                    known.append((float(at), int(number)))
            seen = latest.get(writer, 0)
            while known and known[0][1] <= seen:
                known.pop(0)
            if known:
                oldest = min(oldest, known[0][0])
        return began_s - oldest


def look(run: Any, thorough: bool, pause_s: float = 0.0) -> dict[str, tuple[int, str]]:
    """All of the database, in the transaction of the caller. Raises Wrong. The newest commit of each writer."""
    rows = run("SELECT writer, number, part, sum, data FROM rows ORDER BY writer, number, part")
    commits = {(w, n): (parts, digest) for w, n, parts, digest in run("SELECT * FROM commits")}
    latest = {writer: (number, chain) for writer, number, chain in run("SELECT * FROM latest")}
    [(total, shape)] = run("SELECT * FROM total")
    sums: dict[tuple[str, int], list[str]] = {}
    for writer, number, part, digest, data in rows:
        if digest != md5(writer, number, part, data):
            raise Wrong(f"torn row {writer} {number} {part}")
        sums.setdefault((writer, number), []).append(digest)
    for key, (parts, digest) in commits.items():
        if len(sums.get(key, ())) != parts or md5(*sums[key]) != digest:
            raise Wrong(f"half a commit: {key}")
    if sums.keys() - commits.keys():
        raise Wrong(f"rows of no commit: {sums.keys() - commits.keys()}")
    for writer, (number, _) in latest.items():
        own = sorted(n for w, n in commits if w == writer)
        if own != list(range(max(number - KEPT + 1, 1), number + 1)):
            raise Wrong(f"{writer} is at {number} and has the commits {own}")
    if total != sum(number for number, _ in latest.values()):
        raise Wrong(f"{total} commits, but {latest}")
    shapes = run("SELECT name FROM sqlite_master WHERE name LIKE 'shape%'")
    if shapes != [(f"shape_{shape}",)] or run(f"SELECT count(*) FROM shape_{shape}") != [(shape,)]:
        raise Wrong(f"shape {shape}, but {shapes}")
    time.sleep(pause_s)
    if run("SELECT n, shape FROM total") != [(total, shape)]:
        raise Wrong("the state changed within a transaction")
    if thorough and (found := run("PRAGMA integrity_check")) != [("ok",)]:
        raise Wrong(f"integrity_check: {found[:3]}")
    return latest


class Worker:
    """One process."""

    def __init__(self, job: Job) -> None:
        self.job, self.over = job, threading.Event()
        self.figures: Counter[str] = Counter()
        self.oldest_s: dict[str, float] = {}
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def run(self) -> None:
        threads = []
        for index, database in enumerate(self.job.databases):
            for kind, work in enumerate([self._read] * self.job.readers or [self._write, self._read]):
                rng = random.Random(self.job.seed * 100 + index * 10 + kind)
                threads.append(threading.Thread(target=self._guarded, args=[work, database, rng]))
        for thread in threads:
            thread.start()
        threading.Thread(target=lambda: (sys.stdin.read(), self.over.set()), daemon=True).start()
        for thread in threads:
            thread.join()
        print(json.dumps([dict(self.figures), self.oldest_s]), flush=True)
        if self.problems:
            sys.exit("\n".join(self.problems))

    def _guarded(self, work: Any, database: str, rng: random.Random) -> None:
        try:
            work(database, rng)
        except BaseException as error:  # noqa: BLE001  shown by the runner
            self.problems.append(f"{self.job.name} {database} {work.__name__}: {error!r}\n{traceback.format_exc()}")
            self.over.set()

    def _count(self, what: str) -> None:
        with self._lock:
            self.figures[what] += 1

    def _refused(self, connection: Connection, error: Refused) -> None:
        self._count(str(error))
        connection.roll_back()
        self.over.wait(0.05)

    def _read(self, database: str, rng: random.Random) -> None:
        connection, followed = Connection(self.job, database, rng), Followed(Path(self.job.ledgers), database)
        before: dict[str, tuple[int, str]] = {}
        while not self.over.is_set():
            try:
                connection("BEGIN")
                began_s = time.monotonic()
                latest = look(connection, rng.random() < 0.05, rng.choice([0, 0, rng.random(), 3 * rng.random()]))
                connection("COMMIT")
            except Refused as error:
                self._refused(connection, error)
                continue
            self._count(f"{database} looks")
            numbers = {writer: number for writer, (number, _) in latest.items()}
            if "normal" not in database:  # what was lost with its machine is missing for ever
                if back := [writer for writer, (number, _) in before.items() if numbers[writer] < number]:
                    raise Wrong(f"went back: {back} from {before} to {latest}")
                age_s = followed.age_s(numbers, began_s)
                self.oldest_s[database] = max(self.oldest_s.get(database, 0.0), age_s)
                if age_s > STALE_S:
                    raise Wrong(f"{age_s:.1f} s old: {latest}")
            before = latest
            self.over.wait(rng.random() / 2)
        connection.close()

    def _write(self, database: str, rng: random.Random) -> None:
        me, ledger = self.job.name, Ledger(Path(self.job.ledgers) / f"{database}--{self.job.name}")
        connection = Connection(self.job, database, rng)
        while not self.over.is_set():
            try:
                if database.startswith("wal"):
                    connection(f"PRAGMA synchronous={'NORMAL' if 'normal' in database else 'FULL'}")
                else:
                    connection(f"PRAGMA journal_mode={self.job.journal_mode}")
                self._chore(connection, database, rng)
                connection("BEGIN IMMEDIATE")
                number = self._change(connection, ledger, me, rng)
                connection("COMMIT")
                ledger.say("acknowledged", number, ledger.chains[number])
                self._count(f"{database} commits")
            except Refused as error:
                self._refused(connection, error)
            self.over.wait(rng.random() / 2)
        connection.close()

    def _change(self, run: Connection, ledger: Ledger, me: str, rng: random.Random) -> int:
        [(number, chain)] = run("SELECT number, chain FROM latest WHERE writer = ?", me) or [(0, "")]
        ledger.check(number, chain)
        if number != ledger.acknowledged:  # one whose COMMIT failed, and happened; or they were lost
            ledger.say("found", number, chain)
        number += 1
        sums = []
        for part in range(rng.randint(1, 4)):
            data = rng.randbytes(rng.choice([10, 500, 500, 6000]))
            sums.append(md5(me, number, part, data))
            run("INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?)", me, number, part, sums[-1], data)
        run("INSERT INTO commits VALUES (?, ?, ?, ?)", me, number, len(sums), md5(*sums))
        for table in ("rows", "commits"):
            run(f"DELETE FROM {table} WHERE writer = ? AND number <= ?", me, number - KEPT)
        chain = md5(chain, *sums)
        run("INSERT OR REPLACE INTO latest VALUES (?, ?, ?)", me, number, chain)
        run("UPDATE total SET n = n + 1")
        if "shape" in self.job.chores and rng.random() < 0.03:
            [(shape,)] = run("SELECT shape FROM total")
            run(f"DROP TABLE shape_{shape}")
            shape = (shape + 1) % 50
            run(f"CREATE TABLE shape_{shape}(x)")
            for x in range(shape):
                run(f"INSERT INTO shape_{shape} VALUES (?)", x)
            run("UPDATE total SET shape = ?", shape)
            self._count("schema changes")
        ledger.say("asked", number, chain)
        return number

    def _chore(self, connection: Connection, database: str, rng: random.Random) -> None:
        if "VACUUM" in self.job.chores and rng.random() < 0.01:
            connection("VACUUM")
            self._count("VACUUM")
        if database.startswith("wal") and self.job.library != "s3blockfs" and rng.random() < 0.05:
            connection(f"PRAGMA wal_checkpoint({rng.choice(['PASSIVE', 'FULL', 'RESTART', 'TRUNCATE'])})")
            self._count("checkpoints")


if __name__ == "__main__":
    faulthandler.enable()  # a mapped page that cannot be read is a signal
    Worker(Job(**json.loads(sys.argv[1]))).run()
