"""W17: many small commits on the engine itself, over a store in memory and a clock that only we move.

One connection of the in-process face: a row of 100 bytes is replaced, at random in a table of 20,000 rows, five times
a second by that clock. Folds, collections and leases happen as they would, with a retention of an hour, the shortest
there is, so that a run lasts several of them.
"""

from __future__ import annotations

import random
import time
from typing import Any

import apsw
from engine import InlineRuntime
from memorystore import MemoryStore

from s3blockfs.catalog import Catalog
from s3blockfs.config import Config
from s3blockfs.vfs import S3VFS

ROWS, DATA_BYTES = 20_000, 100
COMMIT_EVERY_S = 0.2
RETAIN_S = 3600.0


class Counting(MemoryStore):
    """Counts what is paid for: parts of an upload, too."""

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime)
        self.puts = self.sent = 0

    def put(self, key: str, body: bytes, **options: Any) -> str:
        self.puts += 1
        self.sent += len(body)
        return super().put(key, body, **options)

    def begin_upload(self, key: str, **options: Any) -> str:
        self.puts += 1
        return super().begin_upload(key, **options)

    def put_part(self, key: str, upload: str, number: int, body: bytes, **options: Any) -> str:
        self.puts += 1
        self.sent += len(body)
        return super().put_part(key, upload, number, body, **options)

    def copy(self, source: str, target: str, **options: Any) -> None:
        """Inside the store; nothing is sent."""
        sent = self.sent
        super().copy(source, target, **options)
        self.sent = sent

    @property
    def bytes(self) -> int:
        return sum(len(found.body) for found in self._objects.values())

    @property
    def count(self) -> int:
        return len(self._objects)

    def longest(self, end: str) -> int:
        return max(len(found.body) for key, found in self._objects.items() if key.endswith(end))


def churn(commits: int, seed: int) -> dict[str, float]:
    """The figures of so many commits."""
    draw, runtime = random.Random(seed), InlineRuntime(seed)
    store = Counting(runtime)
    catalog = Catalog(store, runtime, Config(retain_s=RETAIN_S), "")  # type: ignore[arg-type]
    vfs = S3VFS.over(catalog)
    database = apsw.Connection("churn.sqlite", vfs=vfs.name)
    database.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, data BLOB)")
    model = {row: draw.randbytes(DATA_BYTES) for row in range(ROWS)}
    with database:
        database.executemany("INSERT INTO t VALUES (?, ?)", model.items())
    store.puts = store.sent = 0
    most_bytes = most_head = most_objects = 0
    began = time.monotonic()
    for commit in range(commits):
        row, data = draw.randrange(ROWS), draw.randbytes(DATA_BYTES)
        database.execute("UPDATE t SET data = ? WHERE id = ?", (data, row))
        model[row] = data
        runtime.sleep(COMMIT_EVERY_S)
        runtime.tick()
        if commit % 100 == 0:
            most_bytes, most_objects = max(most_bytes, store.bytes), max(most_objects, store.count)
            most_head = max(most_head, store.longest("/head"))
    seconds = time.monotonic() - began
    puts, sent = store.puts, store.sent
    for _ in range(4):  # all that was replaced is older than the retention then, and has been looked for
        runtime.sleep(RETAIN_S + 1)
        runtime.tick()
    if dict(database.execute("SELECT id, data FROM t")) != model:
        raise AssertionError(f"seed {seed}: the database does not hold what was committed")
    size = database.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchall()[0][0]
    assert isinstance(size, int)
    database.close()
    catalog.close()
    runtime.close()
    return {
        "commits": commits,
        "commits a second": commits / seconds,
        "PUTs a commit": puts / commits,
        "KiB a commit": sent / commits / 1024,
        "times live": store.bytes / size,
        "most times live": most_bytes / size,
        "most objects": most_objects,
        "KiB of head": most_head / 1024,
    }
