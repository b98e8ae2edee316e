"""Writers and readers at once, each a process of its own, and what they must have left behind.

Every transaction of a writer counts up or moves money, and leaves a row with its own number. What a writer believes of
it goes into its *ledger*, a file with a line for each thing it came to know, and when. At the end `Outcome` holds the
ledgers against the database: what was acknowledged is there, what was refused is not, the rest is whole or absent.

As a program, `python tests/writing.py JSON` is such a writer or reader; it ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mounting import PATIENCE_S, numbers

ACCOUNTS = 40
BALANCE = 100
MONEY = ACCOUNTS * BALANCE

#: What a writer waits for the others, in milliseconds.
BUSY_TIMEOUT_MS = 30_000

#: A reader runs `integrity_check` in one of so many of its transactions.
CHECK_EVERY = 10


def tables(writers: list[str]) -> list[str]:
    """Statements that make the database: accounts, a counter for each writer and one for all, a row a transaction."""
    return [
        "CREATE TABLE accounts(id INTEGER PRIMARY KEY, balance INTEGER, filler)",
        f"INSERT INTO accounts SELECT i - 1, {BALANCE}, zeroblob(300) FROM ({numbers(ACCOUNTS)})",
        "CREATE TABLE counters(writer TEXT PRIMARY KEY, n INTEGER)",
        *(f"INSERT INTO counters VALUES ('{name}', 0)" for name in ("all", *writers)),
        "CREATE TABLE done(writer, number, source, target, amount, PRIMARY KEY (writer, number))",
    ]


@dataclass(frozen=True)
class Job:
    """What a process is to do: `path` on a mount, or `key` in a bucket, in process."""

    name: str
    ledger: str
    seed: int
    path: str = ""
    url: str = ""
    bucket: str = ""
    key: str = ""
    lease_s: float = 10.0
    watches: dict[str, str] = field(default_factory=dict)
    """A reader: the ledgers of the writers, by name."""


# --- in the process of a writer or reader ---------------------------------------------------------------------------


class SqlFailure(Exception):
    """What SQLite said, the same for both libraries."""

    def __init__(self, kind: str, text: str, lost: bool) -> None:
        super().__init__(f"{kind} {text}")
        self.kind = kind
        self.lost = lost
        """Whether it says that the transaction is not there and never will be."""


class Database:
    """A connection on a mount by `sqlite3`, or in process."""

    def __init__(self, job: Job) -> None:
        self._errors: Any
        self._connection: Any
        if job.path:
            self._connection = sqlite3.connect(job.path, isolation_level=None, timeout=0)
            self._errors = sqlite3.Error
        else:
            import apsw

            import s3blockfs

            where = {"bucket": job.bucket, "name": job.key, "endpoint_url": job.url}
            self._connection = s3blockfs.connect(**where, refresh_s=0.0, lease_s=job.lease_s)
            self._errors = apsw.Error
        self(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")

    def __call__(self, statement: str, *values: object) -> list[Any]:
        try:
            return list(self._connection.execute(statement, values))
        except self._errors as error:
            raise self._failure(error) from error

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.in_transaction)

    def close(self) -> None:
        self._connection.close()

    @staticmethod
    def _failure(error: Exception) -> SqlFailure:
        cause = type(error.__cause__).__name__
        text = str(error)
        kinds = {"BusyError": "BUSY", "IOError": "IOERR", "database is locked": "BUSY", "disk I/O error": "IOERR"}
        kind = kinds.get(type(error).__name__) or kinds.get(text) or f"{type(error).__name__}: {text}"
        return SqlFailure(kind, f"{cause}: {text}", kind == "IOERR" and cause == "CommitLost")


class Ledger:
    """A line `WHAT NUMBER TIME REMARK` for each event, written at once."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(self, what: str, number: int, remark: str = "") -> None:
        os.write(self._file, f"{what} {number} {time.monotonic():.3f} {remark}".rstrip().encode() + b"\n")


def is_over() -> bool:
    """Whether whoever started us wants us to end, or is no more."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def write(job: Job) -> None:
    database, ledger, rng = Database(job), Ledger(job.ledger), random.Random(job.seed)
    database(f"PRAGMA journal_mode={rng.choice(['DELETE', 'TRUNCATE', 'PERSIST'])}")
    database(f"PRAGMA cache_size={rng.choice([5, 2000])}")
    ledger.say("ready", 0)
    number = 0
    while not is_over():
        number += 1
        transact(database, ledger, rng, job.name, number)
    database.close()
    ledger.say("ended", number)


def transact(database: Database, ledger: Ledger, rng: random.Random, name: str, number: int) -> None:
    """One transaction, whatever becomes of it, and what is known of it in the ledger."""
    step = "BEGIN IMMEDIATE"
    try:
        database(step)
        step = "change"
        change(database, rng, name, number)
        step = "COMMIT"
        ledger.say("asked", number)
        try:
            database(step)
        except SqlFailure as failure:
            # EXCLUSIVE was refused, so the transaction is as it was, and may be asked for again.
            if failure.kind != "BUSY" or not database.in_transaction or rng.random() < 0.5:
                raise
            ledger.say("again", number, failure.kind)
            database(step)
        ledger.say("acknowledged", number)
    except SqlFailure as failure:
        unknown = step == "COMMIT" and failure.kind != "BUSY" and not failure.lost
        if failure.kind == "BUSY" and step == "COMMIT" and not database.in_transaction:
            raise AssertionError("BUSY at the commit point, and no transaction any more") from failure
        ledger.say("unknown" if unknown else "refused", number, f"{step}: {failure}")
        if database.in_transaction:
            with contextlib.suppress(SqlFailure):  # what it would put back is not there
                database("ROLLBACK")
        time.sleep(0.05)


def change(database: Database, rng: random.Random, name: str, number: int) -> None:
    source, target, amount = 0, 0, 0
    if rng.random() < 0.6:
        source, target, amount = rng.randrange(ACCOUNTS), rng.randrange(ACCOUNTS), rng.randrange(1, 9)
        for account, difference in ((source, -amount), (target, amount)):
            [(balance,)] = database("SELECT balance FROM accounts WHERE id = ?", account)
            database("UPDATE accounts SET balance = ? WHERE id = ?", balance + difference, account)
    for counter in ("all", name):
        [(n,)] = database("SELECT n FROM counters WHERE writer = ?", counter)
        database("UPDATE counters SET n = ? WHERE writer = ?", n + 1, counter)
    database("INSERT INTO done VALUES (?, ?, ?, ?, ?)", name, number, source, target, amount)


def read(job: Job) -> None:
    """Look all the while. A line `wrong` is what must never be; the look must see what was acknowledged before it."""
    database, ledger = Database(job), Ledger(job.ledger)
    followed = {name: Followed(Path(path)) for name, path in job.watches.items()}
    before: dict[str, int] = {}
    ledger.say("ready", 0)
    number = 0
    while not is_over():
        number += 1
        acknowledged = {name: ledger.acknowledged() for name, ledger in followed.items()}
        try:
            database("BEGIN")
            counters = dict(database("SELECT writer, n FROM counters"))
            [(money,)] = database("SELECT sum(balance) FROM accounts")
            found = database("PRAGMA integrity_check") if number % CHECK_EVERY == 0 else [("ok",)]
            database("COMMIT")
        except SqlFailure as failure:
            ledger.say("failed" if failure.kind in ("BUSY", "IOERR") else "wrong", number, str(failure))
            if database.in_transaction:
                database("ROLLBACK")
            time.sleep(0.05)
            continue
        total = counters.pop("all")
        for complaint, is_wrong in {
            f"money {money}": money != MONEY,
            f"integrity {found}": found != [("ok",)],
            f"total {total}, counters {counters}": total != sum(counters.values()),
            f"counters {counters} after {before}": any(counters[name] < n for name, n in before.items()),
            f"counters {counters}, acknowledged {acknowledged}": any(counters[k] < n for k, n in acknowledged.items()),
        }.items():
            if is_wrong:
                ledger.say("wrong", number, complaint)
        ledger.say("saw", number, str(total))
        before = counters
        time.sleep(0.1)
    database.close()


class Followed:
    """The ledger of a writer, read on as it grows."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""
        self._count = 0

    def acknowledged(self) -> int:
        """How many transactions it holds that were."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        self._count += sum(line.startswith(b"acknowledged ") for line in lines)
        return self._count


# --- in the test ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A line of a ledger."""

    what: str
    number: int
    at_s: float
    remark: str


class Worker:
    """A writer or reader under way."""

    def __init__(self, job: Job, environment: dict[str, str]) -> None:
        self.job = job
        self.name = job.name
        line = [sys.executable, __file__, json.dumps(asdict(job))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stderr=pipe, text=True, env=environment)

    def events(self) -> list[Event]:
        rows = [line.split(" ", 3) for line in Path(self.job.ledger).read_text().splitlines()]
        return [Event(row[0], int(row[1]), float(row[2]), "".join(row[3:])) for row in rows]

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not Path(self.job.ledger).stat().st_size:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, f"{self.name} does not begin"
            time.sleep(0.02)

    def tell_to_end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None

    def end(self) -> None:
        """It ends when it has finished what it does, without a word of complaint."""
        said = self.process.communicate(timeout=2 * PATIENCE_S)[1]
        assert self.process.returncode == 0, f"{self.name}: {said}"


@contextlib.contextmanager
def at_work(jobs: list[tuple[Job, dict[str, str]]]) -> Iterator[list[Worker]]:
    """All of them at work, each with its environment; at the end all have finished what they did, and none is left."""
    workers: list[Worker] = []
    for job, _ in jobs:
        Path(job.ledger).touch()
    try:
        for job, environment in jobs:
            workers.append(Worker(job, environment))
        for worker in workers:
            worker.wait_until_ready()
        yield workers
        for worker in workers:
            worker.tell_to_end()
        for worker in workers:
            worker.end()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            for pipe in (worker.process.stdin, worker.process.stderr):
                if pipe is not None:
                    pipe.close()


def judge(ledgers: dict[str, list[Event]], done: list[tuple[str, int, int, int, int]], counters: dict[str, int]) -> str:
    """Hold what the writers were told against the rows in `done` and the counters. Returns the figures."""
    present = {(name, number) for name, number, *_ in done}
    assert len(present) == len(done)
    told: dict[str, set[tuple[str, int]]] = {what: set() for what in ("asked", "acknowledged", "refused", "unknown")}
    errors: Counter[str] = Counter()
    for name, events in ledgers.items():
        for event in events:
            if event.what in told:
                told[event.what].add((name, event.number))
            if event.remark:
                errors[" ".join(event.remark.split()[: 3 if event.remark.startswith("BEGIN") else 2])] += 1
    assert not told["acknowledged"] - present, "acknowledged, and not there"
    assert not told["refused"] & present, "refused, and there"
    assert present <= told["asked"]
    assert present - told["acknowledged"] <= told["unknown"]
    of_each = Counter(name for name, _ in present)
    assert counters == {"all": len(present)} | {name: of_each[name] for name in ledgers}
    whole = len(present & told["unknown"])
    unknown = f"{len(told['unknown'])} unknown, {whole} of them whole"
    return f"{len(told['acknowledged'])} acknowledged, {len(told['refused'])} refused, {unknown}; {dict(errors)}"


def balances(done: list[tuple[str, int, int, int, int]]) -> list[int]:
    """What the transfers in `done` make of the accounts."""
    money = [BALANCE] * ACCOUNTS
    for _, _, source, target, amount in done:
        money[source] -= amount
        money[target] += amount
    return money


Spans = list[tuple[float, float]]


def longest_gap(events: list[Event], excused: Spans) -> float:
    """The longest time without a commit, of which what lies in `excused` does not count."""
    times = [event.at_s for event in events if event.what in ("ready", "acknowledged", "ended")]
    return max(end - start - _covered(start, end, excused) for start, end in pairwise(times))


def _covered(start: float, end: float, spans: Spans) -> float:
    """How much of the time from `start` to `end` lies in any of these."""
    covered, reached = 0.0, start
    for first, last in sorted(spans):
        first, last = max(first, reached), min(last, end)
        covered += max(last - first, 0.0)
        reached = max(reached, last)
    return covered


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    (read if job.watches else write)(job)


if __name__ == "__main__":
    main()
