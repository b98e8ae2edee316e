"""The standard library's sqlite3."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from typing import Any

from calling import main

REFRESH_S = 0.5  # of the mounts


@contextlib.contextmanager
def closing(path: str, **options: Any):
    with contextlib.closing(sqlite3.connect(path, timeout=30, **options)) as db:
        yield db


def context_manager(path: str) -> Any:
    """A block that ends well is committed, one that raises is rolled back; so is what is never committed."""
    with closing(path) as db:
        db.execute("CREATE TABLE note(id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)")
        with db:
            db.executemany("INSERT INTO note(text) VALUES (?)", [("one",), ("two",)])
        with contextlib.suppress(sqlite3.IntegrityError), db:
            db.execute("INSERT INTO note(text) VALUES ('three')")
            db.execute("INSERT INTO note(text) VALUES ('one')")
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute("SELECT * FROM note ORDER BY id")]
        db.execute("INSERT INTO note(text) VALUES ('never committed')")
        return rows


def backup(path: str, copy: str, second: str) -> Any:
    """From the mount to a local file, a few pages at a time, while somebody commits; and from there to a new name."""
    steps: list[int] = []
    with closing(path) as db, closing(path) as writer, closing(copy) as local, closing(second) as remote:
        db.execute("CREATE TABLE t(a, b)")
        with db:
            db.executemany("INSERT INTO t VALUES (?, ?)", [(i, bytes([i]) * 900) for i in range(200)])

        def progress(status: int, remaining: int, total: int) -> None:
            steps.append(remaining)
            if len(steps) == 3:
                writer.execute("INSERT INTO t VALUES (200, x'c8')")
                writer.commit()

        db.backup(local, pages=10, progress=progress)
        local.backup(remote)
        (rows,) = remote.execute("SELECT count(*) FROM t").fetchone()
        return {"rows": rows, "steps": len(steps), "went back": steps != sorted(steps, reverse=True)}


def iterdump(path: str, second: str) -> Any:
    """A script of the whole database, run under a second name; the scripts of both."""
    with closing(path) as db, closing(second) as copy:
        db.executescript("""
            CREATE TABLE person(id INTEGER PRIMARY KEY, name TEXT, photo BLOB, height REAL);
            CREATE TABLE log(what);
            CREATE INDEX by_name ON person(name COLLATE NOCASE);
            CREATE VIEW tall AS SELECT name FROM person WHERE height > 1.9;
            CREATE TRIGGER noted AFTER INSERT ON person BEGIN INSERT INTO log VALUES (new.name); END;
            INSERT INTO person VALUES (1, 'Zoë', x'00ff10', 1.91), (2, 'it''s', NULL, 1.5), (3, NULL, x'', NULL);
        """)
        copy.executescript("\n".join(db.iterdump()))
        return [list(db.iterdump()), list(copy.iterdump()), copy.execute("SELECT * FROM tall").fetchall()]


def blobs(path: str) -> Any:
    """Parts of a large value read and written in place."""
    with closing(path) as db:
        db.execute("CREATE TABLE file(id INTEGER PRIMARY KEY, data BLOB)")
        with db:
            db.execute("INSERT INTO file VALUES (1, zeroblob(3000000))")
        with db, db.blobopen("file", "data", 1) as blob:
            blob.seek(2_000_000)
            blob.write(b"in the middle")
            blob[-3:] = b"end"
        with db.blobopen("file", "data", 1, readonly=True) as blob:
            blob.seek(1_999_999)
            return [len(blob), blob.read(14).decode("latin-1"), blob[-4:].decode("latin-1")]


class Longest:
    def __init__(self) -> None:
        self.text = ""

    def step(self, text: str) -> None:
        self.text = max(self.text, text, key=len)

    def finalize(self) -> str:
        return self.text


def functions(path: str) -> Any:
    """Functions of the program in queries, in an index and in a generated column; an aggregate; a collation."""
    with closing(path) as db:
        db.create_function("turned", 1, lambda text: text[::-1], deterministic=True)
        db.create_aggregate("longest", 1, Longest)
        db.create_collation("by_end", lambda a, b: (a[::-1] > b[::-1]) - (a[::-1] < b[::-1]))
        with db:
            db.execute("CREATE TABLE word(text, back AS (turned(text)))")
            db.execute("CREATE INDEX ends ON word(turned(text))")
            db.executemany("INSERT INTO word VALUES (?)", [("ab",), ("ba",), ("caa",)])
        plan = db.execute("EXPLAIN QUERY PLAN SELECT * FROM word WHERE turned(text) = 'aac'").fetchone()[3]
        return {
            "found": db.execute("SELECT text, back FROM word WHERE turned(text) = 'aac'").fetchall(),
            "by the index": "ends" in plan,
            "longest": db.execute("SELECT longest(text) FROM word").fetchone()[0],
            "sorted": [text for (text,) in db.execute("SELECT text FROM word ORDER BY text COLLATE by_end")],
        }


def threads(path: str, workers: str, times: str) -> Any:
    """Each thread counts up over a connection of its own, and all of them over one that they share."""
    guard, errors = threading.Lock(), []
    with closing(path, check_same_thread=False, isolation_level=None) as common:
        common.execute("CREATE TABLE counter(name PRIMARY KEY, n)")
        common.execute("INSERT INTO counter VALUES ('own', 0), ('common', 0)")

        def count() -> None:
            try:
                with closing(path, isolation_level=None) as own:
                    for _ in range(int(times)):
                        own.execute("BEGIN IMMEDIATE")
                        (n,) = own.execute("SELECT n FROM counter WHERE name = 'own'").fetchone()
                        own.execute("UPDATE counter SET n = ? WHERE name = 'own'", (n + 1,))
                        own.execute("COMMIT")
                        with guard:
                            common.execute("UPDATE counter SET n = n + 1 WHERE name = 'common'")
            except sqlite3.Error as error:
                errors.append(repr(error))

        running = [threading.Thread(target=count) for _ in range(int(workers))]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return [errors, common.execute("SELECT name, n FROM counter ORDER BY name").fetchall()]


def read_only(path: str) -> Any:
    """A URI with mode=ro reads, and cannot write."""
    with closing(path) as db, db:
        db.execute("CREATE TABLE t(a)")
        db.execute("INSERT INTO t VALUES (1)")
    with closing(f"file:{path}?mode=ro", uri=True) as db:
        rows = db.execute("SELECT * FROM t").fetchall()
        try:
            db.execute("INSERT INTO t VALUES (2)")
        except sqlite3.OperationalError as error:
            return [rows, str(error)]
    return [rows, "written"]


def wal(path: str, other: str) -> Any:
    """The mode; what a reader sees beside an open write transaction, and after it; what another mount then shows."""
    with closing(path) as db, closing(path) as reader:
        mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        with db:
            db.execute("CREATE TABLE t(a)")
            db.execute("INSERT INTO t VALUES (1)")
        with db:
            db.execute("INSERT INTO t VALUES (2)")
            before = [a for (a,) in reader.execute("SELECT a FROM t")]
        after = [a for (a,) in reader.execute("SELECT a FROM t")]
        time.sleep(REFRESH_S)
        with closing(other) as remote:
            return [mode, before, after, [a for (a,) in remote.execute("SELECT a FROM t")]]


if __name__ == "__main__":
    main(globals())
