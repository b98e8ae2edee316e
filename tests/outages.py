"""Helpers for tests of outages: a face of the engine behind a proxy that breaks what goes to S3, and clients of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import apsw
from inprocess import bucket_of, key
from mounting import PATIENCE_S, Client, Mount, Place, SqlError, mounted
from proxy import Fault, FaultProxy, Request

import s3blockfs

#: Scaled down from 10 s, 60 s and 1 s.
REQUEST_S, TRANSACTION_S, REFRESH_S = 1.0, 2.0, 0.3

#: What a busy machine may add to any wait.
STALL_S = 15.0

#: What SQLite says in words, which is all that Python 3.10 gives of its codes.
IOERR, FULL = "disk I/O error", "database or disk is full"
CANTOPEN, READONLY, BUSY = "unable to open database file", "attempt to write a readonly database", "database is locked"
_WORDS = {
    apsw.IOError: IOERR,
    apsw.FullError: FULL,
    apsw.CantOpenError: CANTOPEN,
    apsw.ReadOnlyError: READONLY,
    apsw.BusyError: BUSY,
}

AWAY = Fault(status=503, code="SlowDown")
HANGS = Fault(hang_s=600)


class Connection(Protocol):
    """A `mounting.Client`, or the same in process."""

    def __call__(self, *statements: str) -> list[Any]: ...
    def send(self, statement: str) -> None: ...
    def receive(self) -> list[Any]: ...


class Local:
    """An APSW connection of this process with a thread of its own, so that a test can look on while it waits."""

    def __init__(self, place: Place, name: str, **options: Any) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._answer: Future[list[Any]] = Future()
        try:
            options.setdefault("bucket", bucket_of(place))
            self._database = self._done(lambda: s3blockfs.connect(name=key(place, name), **options))
            self._database.set_busy_timeout(0)
        except BaseException:
            self._thread.shutdown()
            raise

    def __call__(self, *statements: str) -> list[Any]:
        rows: list[Any] = []
        for statement in statements:
            self.send(statement)
            rows = self.receive()
        return rows

    def send(self, statement: str) -> None:
        self._answer = self._thread.submit(lambda: [list(row) for row in self._database.execute(statement)])

    def receive(self) -> list[Any]:
        return self._done(self._answer.result)

    def _done(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except apsw.Error as error:
            raise SqlError(f"{_WORDS.get(type(error))}: {error}") from error

    def close(self) -> None:
        with contextlib.suppress(apsw.Error):  # a transaction that was open
            self._thread.submit(self._database.close).result(PATIENCE_S)
        self._thread.shutdown()


@dataclass
class Stage:
    """One face, on a key prefix that nothing else uses, behind `proxy`."""

    proxy: FaultProxy
    place: Place
    mount: Mount | None
    options: dict[str, Any]
    said: Callable[[], str] = str
    """The log."""
    connections: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def connect(self, name: str) -> Connection:
        """Another connection, which lives as long as the test."""
        if self.mount is not None:
            return self.connections.enter_context(Client(self.mount / name))
        local = Local(self.place.via(self.proxy.url), name, **self.options)
        return self.connections.enter_context(contextlib.closing(local))

    def table(self, name: str) -> Connection:
        """A connection to a new database with the row 1 in the table `t`; nothing of it is on its way any more."""
        connection = self.connect(name)
        connection("CREATE TABLE t(x)", "INSERT INTO t VALUES (1)")
        self.wait_for_leases()
        return connection

    def wait_for_leases(self) -> None:
        """Until none is held: they save looks at the head."""
        quiet, end = 0, time.monotonic() + PATIENCE_S
        while quiet < 5 and time.monotonic() < end:
            before = len(self.proxy.requests)
            time.sleep(0.2)
            quiet = quiet + 1 if len(self.proxy.requests) == before else 0

    def breaks(self, fault: Fault, what: Callable[[Request], bool] = lambda request: True, name: str = "") -> None:
        """From now on, what is sent for the database `name` (for any)."""
        self.proxy.rule = lambda request: fault if f"/{name}" in request.path and what(request) else None

    def heals(self) -> None:
        self.proxy.rule = None

    def truth(self, name: str, statement: str = "SELECT x FROM t ORDER BY x") -> list[Any]:
        """What another machine finds, in a sound database."""
        other = Local(self.place, name, cache_size=1 << 26, refresh_s=0.0)
        try:
            assert other("PRAGMA integrity_check") == [["ok"]]
            return [row[0] for row in other(statement)]
        finally:
            other.close()


@contextlib.contextmanager
def staged(face: str, place: Place, proxy: FaultProxy, folder: Path, **changes: Any) -> Iterator[Stage]:
    """`changes` to the settings."""
    deadlines = {"request_deadline_s": REQUEST_S, "transaction_deadline_s": TRANSACTION_S, "refresh_s": REFRESH_S}
    options = {**deadlines, **changes}
    with contextlib.ExitStack() as stack:
        stack.callback(proxy.reset)
        mount = None
        if face == "mount":
            flags = [f"--{name.removesuffix('_s').replace('_', '-')}={value}" for name, value in options.items()]
            mount = stack.enter_context(mounted(place.via(proxy.url), folder, *flags))
        stage = Stage(proxy, place, mount, options)
        stack.enter_context(stage.connections)
        stack.callback(proxy.reset)
        yield stage


def fails(connection: Connection, statement: str, words: str, within_s: float) -> str:
    """It fails, with these words, in this time. Returns what was said."""
    began = time.monotonic()
    try:
        answer = connection(statement)
    except SqlError as error:
        assert words in str(error), error
        assert time.monotonic() - began < within_s + STALL_S
        return str(error)
    raise AssertionError(f"{statement} gave {answer}")


def eventually(ask: Callable[[], Any], expected: Any) -> None:
    """Errors count as other answers."""
    end, answer = time.monotonic() + PATIENCE_S, None
    while time.monotonic() < end:
        try:
            answer = ask()
        except SqlError as error:
            answer = error
        if answer == expected:
            return
        time.sleep(0.1)
    raise AssertionError(f"{answer!r} instead of {expected!r}")


def is_swap(request: Request) -> bool:
    return request.method == "PUT" and request.kind == "head"
