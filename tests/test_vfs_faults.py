"""SQLite in process when something fails: no failure is ever reported as success, and none says more than is true."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import apsw
import pytest
from inprocess import ELSEWHERE, bucket_of, connect, elsewhere, key, rows
from mounting import Place
from proxy import Fault, FaultProxy, Request

from s3blockfs import errors
from s3blockfs.dirty import Dirty
from s3blockfs.vfs import S3VFS

pytestmark = pytest.mark.s3

MODES = ["DELETE", "TRUNCATE", "PERSIST", "MEMORY"]
IMPATIENT: dict[str, Any] = {"request_deadline_s": 1.0, "transaction_deadline_s": 2.0, "refresh_s": 0.0}


def chain(error: BaseException | None) -> list[BaseException]:
    """An exception and whatever led to it. With journal_mode=MEMORY the failure of the play-back comes on top."""
    return [] if error is None else [error, *chain(error.__cause__), *chain(error.__context__)]


def caused_by(error: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(each, kind) for each in chain(error))


def wait_for_the_lease() -> None:
    """Until `db` has given its lease back, it need not ask whether its state is the newest."""
    threading.Event().wait(2)


def is_swap(request: Request) -> bool:
    return request.method == "PUT" and request.kind == "head"


@pytest.fixture
def db(place: Place, proxy: FaultProxy) -> Iterator[apsw.Connection]:
    """A connection through the proxy, to a database whose table `t` holds 1."""
    connection = connect(place.via(proxy.url), **IMPATIENT)
    connection.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    yield connection
    proxy.rule = None
    connection.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_that_is_refused_is_rolled_back(
    place: Place, proxy: FaultProxy, db: apsw.Connection, mode: str
) -> None:
    db.pragma("journal_mode", mode)
    db.execute("BEGIN; UPDATE t SET x = 2")
    proxy.rule = lambda request: Fault(status=400) if is_swap(request) else None
    with pytest.raises(apsw.IOError) as caught:
        db.execute("COMMIT")
    assert caused_by(caught.value, errors.StoreRefused)
    assert not db.in_transaction
    assert rows(db) == [(1,)]
    proxy.rule = None
    assert rows(db) == elsewhere(place) == [(1,)]
    db.execute("UPDATE t SET x = 3")
    assert rows(db) == elsewhere(place) == [(3,)]


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_whose_answer_is_lost_has_happened(
    place: Place, proxy: FaultProxy, db: apsw.Connection, mode: str
) -> None:
    db.pragma("journal_mode", mode)
    proxy.rule = lambda request: Fault(apply=True, cut=True) if is_swap(request) else None
    db.execute("UPDATE t SET x = 2")
    assert rows(db) == elsewhere(place) == [(2,)]


@pytest.mark.parametrize("applied", [True, False])
def test_an_unknown_outcome_is_said_and_settled(
    place: Place, proxy: FaultProxy, db: apsw.Connection, applied: bool
) -> None:
    def rule(request: Request) -> Fault | None:
        return Fault(apply=applied, cut=True) if is_swap(request) else Fault(status=503)

    db.execute("BEGIN; UPDATE t SET x = 2")
    proxy.rule = rule
    with pytest.raises(apsw.IOError, match="unknown") as caught:
        db.execute("COMMIT")
    assert isinstance(caught.value.__cause__, errors.OutcomeUnknown)
    with pytest.raises(apsw.IOError, match="unknown"):
        rows(db)
    proxy.rule = None
    seen = None
    for _ in range(100):
        try:
            seen = rows(db)
            break
        except apsw.IOError:
            threading.Event().wait(0.1)
    assert seen == elsewhere(place) == [(2,) if applied else (1,)]


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_that_somebody_else_was_faster_than_is_lost(place: Place, mode: str) -> None:
    """A writer without a lease, or whose lease was taken over."""
    db = connect(place, **IMPATIENT | {"lease_s": 0})
    db.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    db.pragma("journal_mode", mode)
    db.execute("BEGIN IMMEDIATE; UPDATE t SET x = 2")
    other = connect(place, **ELSEWHERE)
    other.execute("UPDATE t SET x = 3")
    with pytest.raises(apsw.IOError) as caught:
        db.execute("COMMIT")
    assert caused_by(caught.value, errors.CommitLost)
    assert rows(db) == rows(other) == [(3,)]
    db.execute("UPDATE t SET x = x + 1")
    assert rows(db) == elsewhere(place) == [(4,)]
    other.close()
    db.close()


@pytest.mark.parametrize("at", [1, 2])
def test_of_attached_databases_none_commits_when_one_fails(
    place: Place, proxy: FaultProxy, db: apsw.Connection, at: int
) -> None:
    db.execute("ATTACH ? AS b", (key(place, "b.sqlite"),))
    db.execute("CREATE TABLE b.u(x); INSERT INTO u VALUES (1)")
    db.execute("BEGIN; UPDATE t SET x = 2; UPDATE u SET x = 2")
    swaps = []

    def rule(request: Request) -> Fault | None:
        swaps.extend([request] if is_swap(request) else [])
        return Fault(status=400) if is_swap(request) and len(swaps) == at else None

    proxy.rule = rule
    with pytest.raises(apsw.IOError):
        db.execute("COMMIT")
    assert rows(db) + rows(db, "SELECT * FROM u") == [(1,), (1,)]
    assert elsewhere(place) + elsewhere(place, "SELECT * FROM u", "b.sqlite") == [(1,), (1,)]
    db.execute("BEGIN; UPDATE t SET x = 3; UPDATE u SET x = 3; COMMIT")
    assert elsewhere(place) + elsewhere(place, "SELECT * FROM u", "b.sqlite") == [(3,), (3,)]


def test_credentials_that_may_not_write(place: Place, proxy: FaultProxy, db: apsw.Connection) -> None:
    vfs = S3VFS(bucket_of(place.via(proxy.url)), 65536, **IMPATIENT)

    def may(what: int) -> bool:
        return vfs.xAccess(key(place), what)

    assert may(apsw.SQLITE_ACCESS_EXISTS) and may(apsw.SQLITE_ACCESS_READ) and may(apsw.SQLITE_ACCESS_READWRITE)
    proxy.rule = lambda request: Fault(status=403) if request.method == "PUT" else None
    with pytest.raises((apsw.ReadOnlyError, apsw.IOError), match="access denied"):  # at RESERVED; or, if the lease
        db.execute("UPDATE t SET x = 2")  # is still held, at the commit
    assert may(apsw.SQLITE_ACCESS_EXISTS) and may(apsw.SQLITE_ACCESS_READ)
    assert not may(apsw.SQLITE_ACCESS_READWRITE)
    assert rows(db) == [(1,)]
    with pytest.raises(apsw.CantOpenError, match="access denied"):
        connect(place.via(proxy.url), "new.sqlite", **IMPATIENT)
    proxy.rule = None
    db.execute("UPDATE t SET x = 3")
    assert may(apsw.SQLITE_ACCESS_READWRITE)
    assert not vfs.xAccess(key(place, "none.sqlite"), apsw.SQLITE_ACCESS_EXISTS)


def test_a_store_that_may_not_be_probed_is_read_only(seaweed_endpoint: Any, place: Place, proxy: FaultProxy) -> None:
    connect(place).execute("CREATE TABLE t(x)").connection.close()
    db = connect(place.via(proxy.url), **IMPATIENT)
    proxy.rule = lambda request: Fault(status=403) if request.path.endswith(".s3blockfs/store") else None
    assert rows(db) == []
    with pytest.raises(apsw.ReadOnlyError, match="access denied"):
        db.execute("INSERT INTO t VALUES (1)")
    proxy.rule = None
    db.execute("INSERT INTO t VALUES (1)")
    assert elsewhere(place) == [(1,)]
    db.close()


def test_read_only_on_purpose(place: Place, db: apsw.Connection) -> None:
    reader = connect(place, read_only=True)
    assert rows(reader) == [(1,)]
    with pytest.raises(apsw.ReadOnlyError):
        reader.execute("UPDATE t SET x = 2")
    with pytest.raises(apsw.CantOpenError, match="read-only"):
        connect(place, "new.sqlite", read_only=True)
    vfs = S3VFS(bucket_of(place), read_only=True)
    assert not vfs.xAccess(key(place), apsw.SQLITE_ACCESS_READWRITE)
    reader.close()


def test_what_cannot_be_opened(place: Place) -> None:
    vfs = S3VFS(bucket_of(place))
    with pytest.raises(apsw.CantOpenError, match="no such database") as caught:
        apsw.Connection(key(place), flags=apsw.SQLITE_OPEN_READWRITE, vfs=vfs.name)
    assert isinstance(caught.value.__cause__, errors.DatabaseNotFound)
    for name in ("/slash", "a//b", "a/../b", ".s3blockfs/x", "x" * 1020):
        with pytest.raises(apsw.CantOpenError):
            apsw.Connection(name, vfs=vfs.name)
    with pytest.raises(TypeError):
        connect(place, colour="red")


def test_a_database_that_was_deleted(place: Place, db: apsw.Connection) -> None:
    vfs = S3VFS(bucket_of(place))
    wait_for_the_lease()
    vfs.xDelete(key(place), False)
    assert not vfs.xAccess(key(place), apsw.SQLITE_ACCESS_EXISTS)
    with pytest.raises(apsw.IOError, match="deleted"):
        rows(db)
    again = connect(place, **ELSEWHERE)
    assert rows(again, "SELECT * FROM sqlite_schema") == []
    again.close()


def test_a_full_spill_folder(place: Place, db: apsw.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Dirty, offset: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Dirty, "write", full)
        with pytest.raises(apsw.FullError):
            db.execute("UPDATE t SET x = 2")
    assert rows(db) == [(1,)]
    db.execute("UPDATE t SET x = 3")
    assert elsewhere(place) == [(3,)]


def test_an_outage(place: Place, proxy: FaultProxy, db: apsw.Connection) -> None:
    patient = connect(place.via(proxy.url), **IMPATIENT | {"refresh_s": 0.1})
    wait_for_the_lease()
    assert rows(patient) == [(1,)]
    proxy.rule = lambda request: Fault(status=503)
    threading.Event().wait(0.2)
    assert rows(patient) == [(1,)]  # the last known state
    with pytest.raises(apsw.IOError) as caught:  # `refresh_s` 0 promises the newest
        rows(db)
    assert isinstance(caught.value.__cause__, errors.StoreUnavailable)
    with pytest.raises(apsw.IOError):
        patient.execute("UPDATE t SET x = 2")
    with pytest.raises(apsw.IOError):
        connect(place.via(proxy.url), "b.sqlite", **IMPATIENT)
    proxy.rule = None
    patient.execute("UPDATE t SET x = 3")
    assert rows(db) == elsewhere(place) == [(3,)]
    patient.close()


class Stop(Exception):
    """What a program's signal handler raises."""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_signal_cannot_tear_a_commit(
    place: Place, proxy: FaultProxy, db: apsw.Connection, mode: str, fails: bool
) -> None:
    """Ctrl-C during the PUT: it is raised, but only once the commit's fate is known."""

    def stop(number: int, frame: object) -> None:
        raise Stop

    def rule(request: Request) -> Fault | None:
        if is_swap(request):
            os.kill(os.getpid(), signal.SIGUSR1)
            return Fault(delay_s=0.3, status=400 if fails else 0)
        return None

    db.pragma("journal_mode", mode)
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        proxy.rule = rule
        with pytest.raises((Stop, apsw.IOError)) as caught:
            db.execute("UPDATE t SET x = 2")
        proxy.rule = None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caused_by(caught.value, Stop)
    assert caused_by(caught.value, errors.StoreRefused) == fails
    assert rows(db) == elsewhere(place) == [(1,) if fails else (2,)]
    db.execute("UPDATE t SET x = 3")
    assert elsewhere(place) == [(3,)]
