"""A client in a process of its own: told what to do by lines of JSON, it does it, times it and checks what it got.

Only what a user of the contestant would wait for is timed: what is imported, which rows are asked for and what they
should hold is known before, what came back is checked after. Opening counts, where it is cold; the client of boto3
that the in-process faces make there (0.1 s of CPU) is theirs. `Worker` is the handle of it, for the benchmark.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import select
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import raw, rows

TESTS = Path(__file__).resolve().parent.parent


class TooSlow(Exception):
    """It did not answer within the limit."""


class Failed(Exception):
    """What the client said."""


class Worker:
    """The process. Everything that it says is waited for, at most `limit_s`."""

    def __init__(self, environment: dict[str, str], limit_s: float, **how: Any) -> None:
        self.limit_s = limit_s
        line = [sys.executable, "-m", "bench.worker"]
        environment = environment | {"PYTHONPATH": str(TESTS)}
        self.process = subprocess.Popen(
            line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )
        try:
            self("prepare", **how)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self("close")
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def __call__(self, what: str, patience: float = 1.0, **arguments: Any) -> dict[str, Any]:
        """Do it, within so many times the limit."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([what, arguments]) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], self.limit_s * patience)[0]:
            raise TooSlow(f"{what}: > {self.limit_s * patience:.0f} s")
        answer: dict[str, Any] = json.loads(self.process.stdout.readline() or '{"error": "the client ended"}')
        if "error" in answer:
            raise Failed(f"{what}: {answer['error']}")
        return answer


# --- in the process -------------------------------------------------------------------------------------------


class Client:
    """One connection to one database, made by the first step that needs it: opening is a part of what is cold."""

    def prepare(self, kind: str, rows: int, page_size: int, **how: Any) -> None:
        """Import what `kind` needs."""
        self.connect: Callable[[], Any] = getattr(self, f"_{kind}")(**how)
        self.page_size = page_size
        self.rows = rows
        self.database: Any = None
        self.timed: dict[str, Any] = {}

    def _file(self, path: str) -> Callable[[], Any]:
        return lambda: sqlite3.connect(path, isolation_level=None, timeout=30)

    def _s3blockfs(self, url: str, bucket: str, name: str) -> Callable[[], Any]:
        from s3blockfs import connect

        return lambda: connect(bucket=bucket, name=name, endpoint_url=url)

    def _s3vfs(self, url: str, bucket: str, name: str, block_size: int) -> Callable[[], Any]:
        import apsw
        import boto3
        import sqlite_s3vfs

        def connect() -> Any:
            self.vfs = sqlite_s3vfs.S3VFS(boto3.resource("s3", endpoint_url=url).Bucket(bucket), block_size=block_size)
            return apsw.Connection(name, vfs=self.vfs.name)

        return connect

    def _engine(self) -> Callable[[], Any]:
        return io.BytesIO  # no connection: the step makes its own

    def _raw(self, **where: Any) -> Callable[[], Any]:
        """Of a floor nothing but the requests is timed: a client is there already, as it is in a daemon."""
        made = raw.Raw(**where)
        return lambda: made

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """What is timed; a step may have several such parts."""
        began, cpu = time.monotonic(), time.process_time()
        if self.database is None:
            self.database = self.connect()
        yield
        ended, so_far = time.monotonic(), self.timed
        self.timed = {
            "began": so_far.get("began", began),
            "seconds": so_far.get("seconds", 0.0) + ended - began,
            "cpu": so_far.get("cpu", 0.0) + time.process_time() - cpu,
        }

    def close(self) -> None:
        if self.database is not None:
            self.database.close()

    # --- steps ---------------------------------------------------------------------------------------------

    def points(self, count: int, salt: str, transaction: bool = False) -> None:
        ids = rows.some_ids(self.rows, count, salt)
        found = []
        with self.timing():
            execute = self.database.execute
            if transaction:
                execute("BEGIN")
            for row in ids:
                found += execute("SELECT id, k, data FROM t WHERE id = ?", (row,)).fetchall()
            if transaction:
                execute("COMMIT")
        rows.checked(found, self.rows, ids)

    def scan(self) -> None:
        with self.timing():
            found = list(self.database.execute(rows.SCAN).fetchall()[0])
        wanted = rows.sums(self.rows)
        if found != [*wanted[:3], wanted[3].upper()]:
            raise rows.WrongAnswer("the sums over all rows are wrong")

    def range(self, count: int, salt: str) -> None:
        first = rows.some_ids(self.rows - count, 1, salt)[0]
        with self.timing():
            query = "SELECT id, k, data FROM t WHERE k >= ? AND k < ? ORDER BY id"
            found = self.database.execute(query, (first, first + count)).fetchall()
        keys = rows.keys_of(self.rows)
        rows.checked(found, self.rows, [row for row, k in enumerate(keys) if first <= k < first + count])

    def load(self) -> None:
        todo = list(rows.all_rows(self.rows))
        with self.timing():
            execute = self.database.execute
            execute(f"PRAGMA page_size = {self.page_size}")
            execute("BEGIN")
            for statement in rows.SCHEMA:
                execute(statement)
            self._many(rows.INSERT, todo)
            commit = time.monotonic()
            execute("COMMIT")
        self.timed["commit"] = commit

    def _many(self, statement: str, todo: list[Any]) -> None:
        self.database.executemany(statement, todo)

    def table(self) -> None:
        """An empty one, not timed."""
        with self.timing():
            self.database.execute(f"PRAGMA page_size = {self.page_size}")
            self.database.execute(rows.SCHEMA[0])

    def commits(self, count: int) -> None:
        todo = [(row, row, rows.data_of(row)[:100]) for row in range(1, count + 1)]
        with self.timing():
            for row in todo:
                self.database.execute(rows.INSERT, row)
        found = self.database.execute("SELECT id, k, data FROM t ORDER BY id").fetchall()
        if [tuple(row) for row in found] != todo:
            raise rows.WrongAnswer("what was committed is not there")

    def update(self, count: int) -> None:
        todo = [(rows.data_of(row, 1), row) for row in rows.different_ids(self.rows, count, "update")]
        with self.timing():
            self.database.execute("BEGIN")
            self._many("UPDATE t SET data = ? WHERE id = ?", todo)
            self.database.execute("COMMIT")

    def vacuum(self) -> None:
        with self.timing():
            self.database.execute("VACUUM")

    def verify(self, updated: int = 0) -> None:
        """Every byte of every row."""
        versions = dict.fromkeys(rows.different_ids(self.rows, updated, "update"), 1) if updated else {}
        with self.timing():
            found = self.database.execute("SELECT id, k, data FROM t ORDER BY id")
            rows.checked(found, self.rows, range(1, self.rows + 1), versions)
            if [tuple(row) for row in self.database.execute("PRAGMA quick_check")] != [("ok",)]:
                raise rows.WrongAnswer("the database is not whole")

    def sparse(self, size: int, pages: int) -> None:
        """A small database; then one commit gives its file that size, or the least, with some pages of bytes behind
        what SQLite uses."""
        with self.timing():
            self.database.execute(rows.SCHEMA[0])
            self.database.execute("BEGIN")
            self._many(rows.INSERT, [(row, row, rows.data_of(row)) for row in range(1, 401)])
            self.database.execute("COMMIT")
            path = self.database.execute("PRAGMA database_list").fetchall()[0][2]
        self.database.close()
        with open(path, "r+b", buffering=0) as file:  # noqa: PTH123
            used = file.seek(0, os.SEEK_END)
            size = max(size, used + (pages + 1) * 4096)
            file.truncate(size)
            for page in range(1, pages + 1):
                file.seek(used + (size - used) // (pages + 1) * page // 4096 * 4096)
                file.write(random.Random(page).randbytes(4096))
            file.seek(28)
            file.write((size // 4096).to_bytes(4, "big"))  # the pages that SQLite thinks there are
            os.fsync(file.fileno())
        self.database = self.connect()

    def row_of_sparse(self) -> None:
        with self.timing():
            found = self.database.execute("SELECT id, k, data FROM t WHERE id = 377").fetchall()
        if [tuple(row) for row in found] != [(377, 377, rows.data_of(377))]:
            raise rows.WrongAnswer("a row of a sparse database")

    def threads(self, count: int) -> None:
        """All rows by so many threads, a part each, and 50 random ones of all; each has its own connection."""

        def read(number: int) -> list[Any]:
            database = self.connect()
            first, last = self.rows * number // count, self.rows * (number + 1) // count
            query = "SELECT count(*), sum(length(data)), hex(max(data)) FROM t NOT INDEXED WHERE id > ? AND id <= ?"
            found = [tuple(database.execute(query, (first, last)).fetchall()[0])]
            for row in rows.some_ids(self.rows, 50, f"W16 {number}"):
                found += database.execute("SELECT id, k, data FROM t WHERE id = ?", (row,)).fetchall()
            database.close()
            return found

        with self.timing(), ThreadPoolExecutor(count) as pool:
            found = list(pool.map(read, range(count)))
        for number, (part, *some) in enumerate(found):
            first, last = self.rows * number // count, self.rows * (number + 1) // count
            most = max(rows.data_of(row) for row in range(first + 1, last + 1)).hex().upper()
            if part != (last - first, (last - first) * rows.DATA_BYTES, most):
                raise rows.WrongAnswer("the sums over a part of the rows are wrong")
            rows.checked(some, self.rows, rows.some_ids(self.rows, 50, f"W16 {number}"))

    def look(self, folder: str, names: list[str], some: int) -> None:
        """At all names and attributes; then into some, which stay open."""
        found = {entry.path: entry.stat().st_size for entry in os.scandir(folder)}
        if sorted(found) != sorted(names) or not all(found.values()):
            raise rows.WrongAnswer("a folder does not show what is there")
        self.open = [sqlite3.connect(name) for name in names[:some]]
        for database in self.open:
            if database.execute("SELECT count(*) FROM t").fetchall() != [(0,)]:
                raise rows.WrongAnswer("a table that is empty has rows")

    def churn(self, commits: int) -> None:
        from bench.churn import churn

        seed = random.SystemRandom().randrange(1 << 32)
        print(f"W17: seed {seed}", file=sys.stderr)
        with self.timing(), ThreadPoolExecutor(1) as pool:  # in the main thread each commit would start one
            answer = pool.submit(churn, commits, seed).result()
        self.timed["answer"] = answer

    def raw(self, call: str, **arguments: Any) -> None:
        """A step of `Raw`."""
        with self.timing():
            answer = getattr(self.database, call)(**arguments)
        self.timed["answer"] = answer

    def whole(
        self, key: str, path: str, then: str, download: bool = True, upload: bool = False, **arguments: Any
    ) -> None:
        """Download it, do the step `then` on the copy, and upload it if that changed it."""
        with self.timing():
            if download:
                self.database.download(key, path)
            copy = sqlite3.connect(path, isolation_level=None)
        through, self.database = self.database, copy
        try:
            getattr(self, then)(**arguments)
        finally:
            self.database = through
        with self.timing():
            copy.close()
            if upload:
                self.database.upload(key, path)
        Path(path).unlink()


def main() -> None:
    client = Client()
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            client.timed = {}
            getattr(client, what)(**arguments)
            answer = client.timed
        except Exception as error:  # noqa: BLE001  told to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
        if what == "close":
            break
    os._exit(0)  # nothing of what a library does at exit is measured


if __name__ == "__main__":
    main()
