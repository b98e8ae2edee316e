"""APSW, on a file of the mount like any other; its own VFS stays out of it."""

from __future__ import annotations

import contextlib
from typing import Any

import apsw
import apsw.bestpractice
import apsw.ext
from calling import main


def connected(path: str) -> contextlib.closing[apsw.Connection]:
    db = apsw.Connection(path)
    db.set_busy_timeout(30_000)
    return contextlib.closing(db)


def transactions(path: str) -> Any:
    """`with` is a transaction, and within one a savepoint."""
    with connected(path) as db:
        db.execute("CREATE TABLE note(id INTEGER PRIMARY KEY, text)")
        with db:
            db.executemany("INSERT INTO note(text) VALUES (?)", [("one",), ("two",)])
            with contextlib.suppress(KeyError), db:
                db.execute("DELETE FROM note")
                raise KeyError
        with contextlib.suppress(KeyError), db:
            db.execute("INSERT INTO note(text) VALUES ('three')")
            raise KeyError
        return list(db.execute("SELECT * FROM note ORDER BY id"))


def backup_and_blobs(path: str, copy: str) -> Any:
    with connected(path) as db, connected(copy) as other:
        db.execute(
            "CREATE TABLE file(id INTEGER PRIMARY KEY, data BLOB); INSERT INTO file VALUES (7, zeroblob(300000))"
        )
        with db.blob_open("main", "file", "data", 7, True) as blob:
            blob.seek(200_000)
            blob.write(b"here")
        steps = 0
        with other.backup("main", db, "main") as backup:
            while not backup.done:
                backup.step(20)
                steps += 1
        data = other.execute("SELECT substr(data, 200001, 4) FROM file").get
        return [steps, data.decode(), other.pragma("integrity_check")]


def full_text(path: str) -> Any:
    """FTS5, and a Python sequence as a virtual table joined with what is on the mount."""
    with connected(path) as db:
        db.execute("CREATE VIRTUAL TABLE page USING fts5(title, body, tokenize='porter')")
        with db:
            db.executemany("INSERT INTO page VALUES (?, ?)", [("a", "the running horses"), ("b", "a sleeping cat")])
            db.executemany("INSERT INTO page VALUES ('filler', ?)", [(f"line {i}",) for i in range(500)])
        apsw.ext.make_virtual_module(db, "wanted", words)
        found = list(db.execute("SELECT title FROM page('run') ORDER BY rank"))
        joined = list(db.execute("SELECT title, weight FROM wanted JOIN page USING (title)"))
        return [found, joined]


def words() -> Any:
    yield from [{"title": "a", "weight": 1}, {"title": "c", "weight": 3}]


words.columns = ("title", "weight")
words.column_access = apsw.ext.VTColumnAccess.By_Name


def best_practice(path: str) -> Any:
    """What APSW recommends includes WAL and foreign keys; what a reader sees beside a transaction, and after it."""
    apsw.bestpractice.apply(apsw.bestpractice.recommended)
    with connected(path) as db, connected(path) as reader:
        db.execute("CREATE TABLE t(a); INSERT INTO t VALUES (1)")
        with db:
            db.execute("INSERT INTO t VALUES (2)")
            before = list(reader.execute("SELECT a FROM t"))
        after = list(reader.execute("SELECT a FROM t"))
        return [db.pragma("journal_mode"), db.pragma("foreign_keys"), before, after]


if __name__ == "__main__":
    main(globals())
