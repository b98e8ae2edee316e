"""The rows of every database here: what they hold follows from their numbers, so every answer can be checked.

100,000 rows are 103 MB of SQLite: 1,000 bytes that no compression makes smaller, and a number `k`, indexed, that says
nothing of where its row is.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SCHEMA = ("CREATE TABLE t(id INTEGER PRIMARY KEY, k INTEGER, data BLOB)", "CREATE INDEX t_k ON t(k)")
INSERT = "INSERT INTO t VALUES (?, ?, ?)"
DATA_BYTES = 1000
SEED = 20261122

Row = tuple[int, int, bytes]


class WrongAnswer(Exception):
    """A contestant said something that is not true; no figure of it counts."""


def data_of(row: int, version: int = 0) -> bytes:
    return hashlib.shake_128(b"%d/%d/%d" % (SEED, row, version)).digest(DATA_BYTES)


def keys_of(rows: int) -> list[int]:
    """`k` by id; the ids begin at 1."""
    keys = list(range(rows))
    random.Random(SEED).shuffle(keys)
    return [-1, *keys]


def all_rows(rows: int) -> Iterator[Row]:
    keys = keys_of(rows)
    return ((row, keys[row], data_of(row)) for row in range(1, rows + 1))


def some_ids(rows: int, count: int, salt: str) -> list[int]:
    draw = random.Random(f"{SEED}-{salt}")
    return [draw.randint(1, rows) for _ in range(count)]


def different_ids(rows: int, count: int, salt: str) -> list[int]:
    return random.Random(f"{SEED}-{salt}").sample(range(1, rows + 1), count)


def checked(found: Iterable[Any], rows: int, ids: Iterable[int], versions: dict[int, int] | None = None) -> int:
    """That these are the rows with these ids, in this order; how many."""
    keys, versions, count = keys_of(rows), versions or {}, 0
    wanted = iter(ids)
    for count, (row, key, data) in enumerate(found, 1):  # noqa: B007  counted on
        if row != next(wanted, None) or key != keys[row] or bytes(data) != data_of(row, versions.get(row, 0)):
            raise WrongAnswer(f"row {row} is not what was asked for, or not what was stored")
    if (missing := next(wanted, None)) is not None:
        raise WrongAnswer(f"row {missing} is missing")
    return count


def sums(rows: int) -> list[Any]:
    """What SCAN answers."""
    return [rows, rows * (rows - 1) // 2, rows * DATA_BYTES, max(data_of(row) for row in range(1, rows + 1)).hex()]


#: Reads every page of the table: max() looks at each `data`.
SCAN = "SELECT count(*), sum(k), sum(length(data)), hex(max(data)) FROM t NOT INDEXED"


def make(path: Path, rows: int, page_size: int = 4096) -> None:
    """The database as a local file."""
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA page_size = {page_size}")
    with database:
        for statement in SCHEMA[:1]:
            database.execute(statement)
        database.executemany(INSERT, all_rows(rows))
        database.execute(SCHEMA[1])
    database.close()
