"""What reading costs, counted by a proxy outside of the engine: requests, round trips and bytes of cold readers, on a
mount and in process, of a database of 100,000 rows of one kilobyte."""

from __future__ import annotations

import random
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from inprocess import connect
from mounting import Client, Place, command, mounted
from proxy import Fault, FaultProxy, Request

pytestmark = pytest.mark.mount

ROWS = 100_000
MB = 1_000_000
Ask = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def stored(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An indexed column holds the numbers in an order of their own, so that a range of it is scattered rows."""
    path, place = tmp_path_factory.mktemp("rows") / "a.db", mount_bucket.inside("read-requests")
    rng = random.Random(1)
    keys = rng.sample(range(ROWS), ROWS)
    local = sqlite3.connect(path)
    local.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, k INTEGER, data BLOB)")
    local.executemany("INSERT INTO t VALUES (?, ?, ?)", ((n, k, rng.randbytes(1000)) for n, k in enumerate(keys, 1)))
    local.execute("CREATE INDEX i ON t(k)")
    local.commit()
    local.close()
    done = command(place, "import", str(path), f"{place.target}/a.db", "--endpoint-url", place.url)
    assert done.returncode == 0, done.stderr
    return place


class Wire(FaultProxy):
    """Knows how many requests came one after the other."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._answered = True
        self.rounds = 0

    def began(self, request: Request) -> None:
        super().began(request)
        with self._lock:
            self.rounds += self._answered
            self._answered = False

    def ended(self, request: Request) -> None:
        super().ended(request)
        with self._lock:
            self._answered = True

    def reset(self) -> None:
        super().reset()
        self.rounds = 0


@pytest.fixture(params=["mount", "process"])
def cold(request: pytest.FixtureRequest, stored: Place, tmp_path: Path) -> Iterator[tuple[Ask, Wire]]:
    """A machine that has read nothing of the database yet, and what it asks."""
    with Wire(stored.url) as wire, _machine(request.param, stored.via(wire.url), tmp_path) as ask:
        wire.reset()
        yield ask, wire


@contextmanager
def _machine(kind: str, place: Place, folder: Path) -> Iterator[Ask]:
    if kind == "process":
        connection = None

        def ask(statement: str) -> list[Any]:
            nonlocal connection
            connection = connection or connect(place, "a.db")
            return list(connection.execute(statement))

        yield ask
        if connection is not None:
            connection.close()
    else:
        with mounted(place, folder, refresh="1") as mount, Client(f"file:{mount / 'a.db'}") as client:
            yield lambda statement: [tuple(row) for row in client(statement)]


def gets(wire: Wire) -> int:
    counts = wire.counts()
    assert {method for method, _ in counts} <= {"GET"}
    assert counts["GET", "list"] == 0
    return counts.total()


def twice(wire: Wire) -> set[tuple[str, int]]:
    """What was fetched more than once, in steps of 4 KiB."""
    seen: set[tuple[str, int]] = set()
    again: set[tuple[str, int]] = set()
    for request in wire.requests:
        if request.kind == "data":
            low, high = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
            cells = {(request.path, cell) for cell in range(-(-low // 4096), high // 4096)}
            again |= seen & cells
            seen |= cells
    return again


def test_one_row_by_key(cold: tuple[Ask, Wire], capsys: pytest.CaptureFixture[str]) -> None:
    ask, wire = cold
    wire.rule = lambda request: Fault(delay_s=0.3)  # longer than a busy machine takes to begin two requests at once
    assert ask("SELECT length(data) FROM t WHERE id = 4711") == [(1000,)]
    with capsys.disabled():
        print(
            f"\none row: {gets(wire)} requests, {wire.rounds} one after the other, {wire.received / MB:.2f} MB",
            file=sys.stderr,
        )
    assert gets(wire) <= 5
    assert wire.rounds <= 4
    assert wire.received <= MB


def test_a_hundred_random_rows(cold: tuple[Ask, Wire], capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other. It is noticed that they are dense: far fewer requests than rows, not one by one."""
    ask, wire = cold
    seed = random.randrange(10**6)
    print("seed", seed)
    for row in random.Random(seed).sample(range(1, ROWS + 1), 100):
        assert ask(f"SELECT id, length(data) FROM t WHERE id = {row}") == [(row, 1000)]
    with capsys.disabled():
        print(f"\n100 rows: {gets(wire)} requests, {wire.rounds} rounds, {wire.received / MB:.2f} MB", file=sys.stderr)
    assert gets(wire) <= 60
    assert wire.received <= 105 * MB
    assert not twice(wire)


@pytest.mark.parametrize(
    ("source", "rows", "most_gets"),
    [
        pytest.param("INDEXED BY i WHERE k BETWEEN 5000 AND 5999", 1000, 60, id="one row in a hundred, scattered"),
        pytest.param("NOT INDEXED", ROWS, 34, id="all"),
    ],
)
def test_many_rows(
    cold: tuple[Ask, Wire], source: str, rows: int, most_gets: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once from S3, then from memory."""
    ask, wire = cold
    question = f"SELECT count(*), sum(length(data)) FROM t {source}"
    assert ask(question) == [(rows, rows * 1000)]
    with capsys.disabled():
        print(
            f"\n{rows} rows: {gets(wire)} requests, {wire.rounds} rounds, {wire.received / MB:.2f} MB", file=sys.stderr
        )
    assert gets(wire) <= most_gets
    assert wire.received <= 105 * MB
    assert not twice(wire)
    wire.reset()
    assert ask(question) == [(rows, rows * 1000)]
    assert {kind for _, kind in wire.counts()} <= {"head"}  # the look for news, if a second has passed
