"""Where a script finds its databases: in a folder (a mount, or for the reference an ordinary one), or in process.

A script does the same in all of them. `done` says that what came before was acknowledged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import apsw

import s3blockfs
from s3blockfs.errors import DatabaseNotFound
from s3blockfs.vfs import S3VFS

#: What a connection waits for a lock. A writer that was killed leaves its lease.
BUSY_S = 30.0


@dataclass(frozen=True)
class State:
    """What scripts are run with. All that is written follows from it, so two runs write the same."""

    block_size: int
    page_size: int
    journal_mode: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.block_size}/{self.page_size}/{self.journal_mode}/{self.seed}"

    def rng(self, salt: object = "") -> random.Random:
        return random.Random(f"{self.seed} {salt}")


class Folder:
    """The databases of one script. Names end in `.db`."""

    def __init__(self, state: State, source: str = "", done: Callable[[], None] = lambda: None) -> None:
        """`source`: a SQLite file on this machine, to be imported or copied from. `done`: see the module."""
        self.state, self.source, self.done = state, source, done
        self.pause: Callable[[float], object] = lambda seconds: None
        """Give what runs in the background time; over at once when there is nothing to wait for any more."""

    def path(self, name: str) -> str:
        """What SQLite is to open."""
        raise NotImplementedError

    def connect(self, name: str, create: bool) -> Any:
        """A connection in autocommit mode. Without `create` it raises LookupError when there is no database."""
        raise NotImplementedError

    @contextlib.contextmanager
    def open(self, name: str, create: bool = True) -> Iterator[Callable[..., list[Any]]]:
        """A function that runs a statement and returns its rows."""
        with contextlib.closing(self.connect(name, create)) as connection:

            def run(statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
                return list(connection.execute(statement, values))

            if create:
                run(f"PRAGMA page_size={self.state.page_size}")
                _in_time(lambda: run(f"PRAGMA journal_mode={self.state.journal_mode}"))
            yield run

    def content(self, name: str) -> str | None:
        """A hash of all that SQLite can tell of a database, or what is wrong with it; None: there is none."""
        try:
            with self.open(name, create=False) as run:
                return content(run)
        except LookupError:
            return None
        except (sqlite3.Error, apsw.Error) as error:
            return f"{type(error).__name__}: {error}"

    def copy(self, old: str, new: str) -> None:
        raise NotImplementedError

    def rename(self, old: str, new: str) -> None:
        raise NotImplementedError

    def remove(self, name: str) -> None:
        raise NotImplementedError

    def overwrite(self, name: str) -> None:
        """With the bytes of the source."""
        raise NotImplementedError

    def command(self, *words: str) -> None:
        """Run `s3blockfs` with these; what ends in `.db` is a database here, `.` all of them."""
        raise NotImplementedError


class Files(Folder):
    """In a folder; without a mount it is the reference."""

    def __init__(self, directory: Path, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.directory = directory

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def connect(self, name: str, create: bool) -> sqlite3.Connection:
        if not create and not (self.directory / name).exists():
            raise LookupError(name)
        return sqlite3.connect(self.path(name), BUSY_S, isolation_level=None)

    def copy(self, old: str, new: str) -> None:
        subprocess.run(["cp", self.path(old), self.path(new)], check=True)

    def rename(self, old: str, new: str) -> None:
        Path(self.path(old)).rename(self.path(new))

    def remove(self, name: str) -> None:
        Path(self.path(name)).unlink()

    def overwrite(self, name: str) -> None:
        shutil.copyfile(self.source, self.path(name))

    def command(self, *words: str) -> None:
        """What the command means for files."""
        word, *names = (word for word in words if not word.startswith("--"))
        if word in ("import", "cp", "export"):
            shutil.copyfile(names[0] if word == "import" else self.path(names[0]), self.path(names[1]))
        elif word == "mv":
            self.rename(*names)
        elif word == "rm":
            self.remove(*names)
        elif word == "snapshot" and names[0] == "create":
            shutil.copyfile(self.path(names[1]), self.path(".".join(names[1:])))
        elif word == "restore":
            shutil.copyfile(self.path(".".join(names[:2])), self.path(names[-1] if "--as" in words else names[0]))
        else:
            assert word in ("gc", "adopt", "snapshot"), word


class InProcess(Folder):
    """By `s3blockfs.connect`, and by commands that run in this process."""

    def __init__(self, url: str, bucket: str, prefix: str, options: dict[str, Any], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.url, self.bucket, self.prefix, self.options = url, bucket, prefix, options
        self.vfs = S3VFS(bucket, self.state.block_size, endpoint_url=url, **options)

    def path(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def connect(self, name: str, create: bool) -> apsw.Connection:
        if create:
            connection = s3blockfs.connect(
                bucket=self.bucket,
                name=self.path(name),
                block_size=self.state.block_size,
                endpoint_url=self.url,
                **self.options,
            )
        else:
            try:
                connection = apsw.Connection(self.path(name), apsw.SQLITE_OPEN_READWRITE, self.vfs.name)
            except apsw.CantOpenError as error:
                if isinstance(error.__cause__, DatabaseNotFound):
                    raise LookupError(name) from error
                raise
        connection.set_busy_timeout(int(BUSY_S * 1000))
        return connection

    def remove(self, name: str) -> None:
        self.vfs.xDelete(self.path(name), True)

    def overwrite(self, name: str) -> None:
        self.vfs.deserialize_iter(self.path(name), pieces(self.source))

    def command(self, *words: str) -> None:
        from s3blockfs.cli import main

        target = f"{self.bucket}/{self.prefix}"
        names = [target if word == "." else f"{target}/{word}" if word.endswith(".db") else word for word in words]
        more = ["--endpoint-url", self.url]
        if words[0] in ("import", "export"):
            more += ["--block-size", str(self.state.block_size)]
        if (code := main.main([*names, *more])) != 0:
            raise RuntimeError(f"s3blockfs {' '.join(words)}: exit code {code}")


def _in_time(do: Callable[[], object]) -> None:
    """SQLite leaves WAL mode at once or not at all, and who was killed has left its lease."""
    until = time.monotonic() + BUSY_S
    while True:
        try:
            do()
            return
        except (sqlite3.OperationalError, apsw.BusyError) as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(0.1)


def pieces(file: str) -> Iterator[bytes]:
    with Path(file).open("rb") as stream:
        yield from iter(lambda: stream.read(1 << 16), b"")


def content(run: Callable[..., list[Any]]) -> str:
    """Of one database: tables, rows and the settings that it keeps; or what `PRAGMA integrity_check` finds."""
    found = [row[0] for row in run("PRAGMA integrity_check")]
    if found != ["ok"]:
        return f"integrity_check: {found}"
    total = hashlib.blake2b(digest_size=8)
    for name in ("page_size", "page_count", "freelist_count", "auto_vacuum", "user_version"):
        total.update(f"{name}={run(f'PRAGMA {name}')}".encode())
    for kind, name, sql in run("SELECT type, name, sql FROM sqlite_master ORDER BY type, name"):
        total.update(json.dumps([kind, name, sql]).encode())
        if kind == "table":
            for value in chain.from_iterable(run(f"SELECT * FROM {name} ORDER BY rowid")):
                total.update(value if isinstance(value, bytes) else repr(value).encode())
                total.update(b",")
    return total.hexdigest()
