"""DuckDB, which brings an SQLite of its own with its extension `sqlite`."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import duckdb_extension_sqlite_scanner as packaged
from calling import main

REFRESH_S = 0.5  # of the mounts


def connected() -> duckdb.DuckDBPyConnection:
    """The extension comes from its Python package: nothing is downloaded."""
    db = duckdb.connect(config={"autoinstall_known_extensions": False})
    (extension,) = Path(packaged.__file__).parent.rglob("sqlite_scanner.duckdb_extension")
    db.load_extension(str(extension))
    return db


def attached(path: str) -> Any:
    """Tables made, filled, joined and changed through ATTACH; a transaction rolled back; what sqlite_scan says."""
    with connected() as db:
        db.execute(f"ATTACH '{path}' AS lake (TYPE sqlite)")
        db.execute("CREATE TABLE lake.event(id BIGINT, kind VARCHAR, price DOUBLE, begins TIMESTAMP, data BLOB)")
        db.execute("""
            INSERT INTO lake.event SELECT i, 'kind ' || i % 3, i / 4, TIMESTAMP '2024-01-01' + INTERVAL (i) HOUR,
            'bytes'::BLOB FROM range(5000) t(i)
        """)
        db.execute("CREATE TABLE kinds AS SELECT 'kind ' || i AS kind, i AS number FROM range(3) t(i)")
        db.execute("BEGIN; DELETE FROM lake.event WHERE id >= 10; UPDATE lake.event SET price = 0; ROLLBACK")
        db.execute("BEGIN; UPDATE lake.event SET price = -1 WHERE id = 7; DELETE FROM lake.event WHERE id = 8; COMMIT")
        joined = "SELECT number, count(*), sum(price) FROM lake.event JOIN kinds USING (kind) GROUP BY 1 ORDER BY 1"
        rows = db.execute(joined).fetchall()
        db.execute("DETACH lake")
        return [rows, db.execute(f"SELECT count(*), max(price) FROM sqlite_scan('{path}', 'event')").fetchone()]


def queried(path: str, *queries: str) -> Any:
    """Over a database that another client wrote."""
    with connected() as db:
        db.execute(f"ATTACH '{path}' AS lake (TYPE sqlite, READ_ONLY)")
        db.execute("USE lake")
        return [db.execute(query).fetchall() for query in queries]


def beside(path: str, other: str) -> Any:
    """Read in the process in which sqlite3 writes the same database, over another mount: errors, and what it read of
    two numbers that are always equal."""
    stop, errors = threading.Event(), []
    with contextlib.closing(sqlite3.connect(path)) as first, first:
        first.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, n INTEGER, filler)")
        first.executemany("INSERT INTO t VALUES (?, 0, ?)", [(i, "x" * 100) for i in range(20_000)])

    def write() -> None:
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=30)) as db:
                while not stop.is_set():
                    with db:
                        db.execute("UPDATE t SET n = n + 1 WHERE id IN (0, 19999)")
        except sqlite3.Error as error:
            errors.append(repr(error))

    writer = threading.Thread(target=write)
    seen = []
    with connected() as db:
        time.sleep(REFRESH_S)
        db.execute(f"ATTACH '{other}' AS lake (TYPE sqlite, READ_ONLY)")
        writer.start()
        for _ in range(30):
            pair = "SELECT sum(CASE id WHEN 0 THEN n END), sum(CASE id WHEN 19999 THEN n END), count(*) FROM lake.t"
            seen.append(db.execute(pair).fetchone())
            time.sleep(REFRESH_S / 10)
        stop.set()
        writer.join()
    return [errors, seen]


def wal(path: str) -> Any:
    """ATTACH with JOURNAL_MODE 'WAL'; what another process reads beside an open transaction."""
    with connected() as db:
        db.execute(f"ATTACH '{path}' AS lake (TYPE sqlite, JOURNAL_MODE 'WAL')")
        db.execute("CREATE TABLE lake.t(a INTEGER)")
        db.execute("INSERT INTO lake.t VALUES (1)")
        db.execute("BEGIN; INSERT INTO lake.t VALUES (2)")
        beside = ["sqlite3", path, "PRAGMA journal_mode; SELECT a FROM t"]
        said = subprocess.run(beside, capture_output=True, text=True, check=True).stdout.split()
        db.execute("COMMIT")
        return [said, db.execute("SELECT a FROM lake.t").fetchall()]


if __name__ == "__main__":
    main(globals())
