"""Random SQL on a mount and in process, and the same on a local file: the same rows, the same errors, and after each
transaction the same content, also for a second machine. MODEL_SEED=7 repeats a run, MODEL_STEPS makes it longer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import apsw
import inprocess
import pytest
from mounting import Client, Place, SqlError, mounted

STEPS = int(os.environ.get("MODEL_STEPS", "70"))
PATIENCE = "PRAGMA busy_timeout=60000"

#: Runs a statement; the answer is its rows, or the error.
Run = Callable[[str], Any]


COLUMNS = "(id INTEGER PRIMARY KEY, a, b UNIQUE)"


class Author:
    """Writes SQL; what makes no sense at the moment ends in the same error everywhere."""

    def __init__(self, seed: object) -> None:
        self.rng = Random(seed)
        self.first = [f"CREATE TABLE t{number}{COLUMNS}" for number in range(3)]

    def table(self) -> str:
        return self.rng.choice(["", "", "", "aux."]) + f"t{self.rng.randrange(3)}"

    def value(self) -> str:
        size = self.rng.choice([0, 1, 100, 3000, 9000, 70_000])
        return f"CAST(replace(hex(zeroblob({size})), '0', '{self.rng.choice('abcxyz')}') AS BLOB)"

    def numbers(self) -> str:
        count = self.rng.choice([1, 10, 200])
        return f"WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<{count}) "

    def statement(self) -> str:
        if self.first:
            return self.first.pop()
        rng, table, some = self.rng, self.table(), self.rng.randrange(300)
        kinds: dict[str, int] = {
            f"CREATE TABLE {table}{COLUMNS}": 8,
            f"{self.numbers()}INSERT INTO {table}(a, b) SELECT i * {some}, i || '-{some}' FROM n": 10,
            f"INSERT INTO {table}(a, b) VALUES ({self.value()}, {some})": 10,
            f"INSERT OR REPLACE INTO {table}(id, a) VALUES ({some}, {self.value()})": 6,
            f"UPDATE {table} SET a = {self.value()} WHERE id % 7 = {some % 7}": 6,
            f"UPDATE OR IGNORE {table} SET b = id % 5": 3,
            f"DELETE FROM {table} WHERE id % 3 = {some % 3}": 5,
            f"INSERT INTO {table}(a, b) SELECT a, b || 'x' FROM {self.table()} LIMIT 50": 5,
            f"CREATE INDEX IF NOT EXISTS i{some % 3} ON t{some % 3}(a)": 3,
            f"ALTER TABLE {table} ADD COLUMN c{some % 4} DEFAULT {some}": 2,
            f"DROP TABLE {table}": 2,
            f"SELECT count(*), total(id), max(length(a)), min(b) FROM {table}": 6,
            "BEGIN": 6,
            "BEGIN IMMEDIATE": 4,
            "COMMIT": 9,
            "ROLLBACK": 3,
            f"SAVEPOINT s{some % 3}": 4,
            f"RELEASE s{some % 3}": 4,
            f"ROLLBACK TO s{some % 3}": 3,
            "VACUUM": 2,
            f"PRAGMA page_size={rng.choice([512, 1024, 4096, 65536])}": 2,
            f"PRAGMA auto_vacuum={some % 3}": 2,
            "PRAGMA incremental_vacuum(3)": 1,
            f"PRAGMA journal_mode={rng.choice(['DELETE', 'TRUNCATE', 'PERSIST', 'MEMORY'])}": 3,
            f"PRAGMA synchronous={rng.choice(['OFF', 'NORMAL', 'FULL'])}": 2,
            f"PRAGMA cache_size={rng.choice([2, 10, 2000])}": 2,
            "PRAGMA page_size": 1,
            "PRAGMA freelist_count": 1,
            f"PRAGMA user_version={some}": 2,
            "ATTACH '{other}' AS aux": 4,
            "DETACH aux": 1,
        }
        return rng.choices(list(kinds), list(kinds.values()))[0]


def content(run: Run) -> list[Any]:
    """Everything in the main database, which must be sound."""
    assert run("PRAGMA integrity_check") == [["ok"]]
    schema = run("SELECT type, name, sql FROM main.sqlite_schema ORDER BY name")
    tables = [row[1] for row in schema if row[0] == "table"]
    return [
        schema,
        *(run(f"SELECT id, b, hex(a) FROM main.{name} ORDER BY id") for name in tables),
        run("PRAGMA user_version"),
    ]


def compare(seed: str, real: Run, local: Run, in_transaction: Callable[[], bool], *elsewhere: Run) -> None:
    """`elsewhere` are connections of other machines."""
    print(f"MODEL_SEED={seed} MODEL_STEPS={STEPS}")
    author, errors = Author(seed), 0
    for run in (real, local, *elsewhere):
        run(PATIENCE)
    for step in range(STEPS):
        statement = author.statement()
        expected = local(statement)
        assert real(statement) == expected, f"step {step}: {statement}"
        errors += isinstance(expected, str)
        if not in_transaction() and not statement.startswith(("SELECT", "PRAGMA", "ATTACH", "DETACH")):
            expected = content(local)
            for run in (real, *elsewhere):
                assert content(run) == expected, f"after step {step}: {statement}"
    assert errors < STEPS * 2 // 3, "hardly anything worked"


def seeds(count: int) -> list[str]:
    return [os.environ.get("MODEL_SEED") or str(n) for n in range(count)]


CASES = [*seeds(2), *(pytest.param(f"long {n}", marks=pytest.mark.long) for n in range(20))]


@pytest.mark.mount
@pytest.mark.parametrize("seed", CASES)
def test_on_a_mount(place: Place, tmp_path: Path, seed: str) -> None:
    def runner(client: Client, other: str) -> Run:
        def run(statement: str) -> Any:
            try:
                return client(statement.replace("{other}", other))
            except SqlError as error:
                return str(error).replace(other, "other")

        return run

    with mounted(place, tmp_path) as here, mounted(place, tmp_path) as there, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(Client(folder / "a.db")) for folder in (here.directory, tmp_path, there.directory)
        ]
        others = [str(folder / "b.db") for folder in (here.directory, tmp_path, there.directory)]
        real, local, elsewhere = map(runner, clients, others)
        compare(seed, real, local, lambda: _begins(local), elsewhere)


def _begins(run: Run) -> bool:
    """Whether a transaction is open, as BEGIN says."""
    answer = run("BEGIN")
    if isinstance(answer, str):
        assert "within a transaction" in answer
        return True
    run("ROLLBACK")
    return False


@pytest.mark.parametrize("seed", CASES)
def test_in_process(place: Place, tmp_path: Path, seed: str) -> None:
    def runner(connection: apsw.Connection, other: str) -> Run:
        def run(statement: str) -> Any:
            try:
                return [
                    [cell.hex() if isinstance(cell, bytes) else cell for cell in row]
                    for row in connection.execute(statement.replace("{other}", other))
                ]
            except apsw.Error as error:
                return f"{type(error).__name__} {error}".replace(other, "other")

        return run

    with _closing(
        inprocess.connect(place, "a.db"),
        apsw.Connection(str(tmp_path / "a.db")),
        inprocess.connect(place, "a.db", **inprocess.ELSEWHERE),
    ) as connections:
        others = [inprocess.key(place, "b.db"), str(tmp_path / "b.db"), inprocess.key(place, "b.db")]
        real, local, elsewhere = map(runner, connections, others)
        compare(seed, real, local, lambda: connections[1].in_transaction, elsewhere)


@contextlib.contextmanager
def _closing(*connections: apsw.Connection) -> Iterator[tuple[apsw.Connection, ...]]:
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()
