"""S3 fails in every way that it can, behind both faces: the table "Outages" of docs/SEMANTICS.md, a test for each line.

A test with a parameter `stage` or `patient` runs on a real mount and in process. Deadlines are scaled down.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import outages
import pytest
from mounting import Place, SqlError, fresh_name, numbers, sqlite
from outages import (
    AWAY,
    CANTOPEN,
    HANGS,
    IOERR,
    READONLY,
    REQUEST_S,
    TRANSACTION_S,
    Stage,
    eventually,
    fails,
    is_swap,
    staged,
)
from proxy import Fault, FaultProxy

from s3blockfs.embedded import Endpoint

pytestmark = pytest.mark.mount

FACES = ["mount", "in process"]
#: Where both faces prove nearly the same, and each costs seconds.
FACES_BY_TURNS = ["mount", pytest.param("in process", marks=pytest.mark.long)]
ROWS = "SELECT x FROM t ORDER BY x"
INSERT = "INSERT INTO t VALUES (2)"

#: A request that was made and, where it may have been applied, the look whether it was.
LOCK_S = 2 * REQUEST_S
COMMIT_S = TRANSACTION_S + LOCK_S


def shared(face: str, bucket: Place, endpoint: Endpoint, folder: Path, **changes: Any) -> Iterator[Stage]:
    with (
        FaultProxy(endpoint.url) as proxy,
        staged(face, bucket.inside(fresh_name("")), proxy, folder, **changes) as made,
    ):
        yield made


@pytest.fixture(scope="module", params=FACES)
def _stage(
    request: Any, mount_bucket: Place, seaweed_endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    yield from shared(request.param, mount_bucket, seaweed_endpoint, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module", params=FACES)
def _patient(
    request: Any, mount_bucket: Place, seaweed_endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("patient")
    yield from shared(request.param, mount_bucket, seaweed_endpoint, folder, transaction_deadline_s=60.0)


def for_one_test(stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    caplog.set_level(logging.WARNING)
    with ExitStack() as connections:
        connections.callback(stage.heals)
        said = (lambda: stage.mount.log) if stage.mount else (lambda: caplog.text)
        yield replace(stage, connections=connections, said=said)


@pytest.fixture
def stage(_stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    yield from for_one_test(_stage, caplog)


@pytest.fixture
def patient(_patient: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    """The deadline of a commit is 60 s: time to look around while it waits."""
    yield from for_one_test(_patient, caplog)


@pytest.fixture
def name() -> str:
    return fresh_name()


def begin(stage: Stage, name: str) -> tuple[outages.Connection, outages.Connection]:
    """A writer that is going to commit the row 2, and a reader that has seen the row 1."""
    writer, reader = stage.table(name), stage.connect(name)
    assert reader(ROWS) == [[1]]
    writer("BEGIN IMMEDIATE", INSERT)
    return writer, reader


def is_lost_in_doubt(stage: Stage, name: str, fault: Fault) -> None:
    """S3 fails like this during a commit and for a while: the commit fails, nothing is shown until S3 is back, then
    the database recovers by itself."""
    writer, reader = begin(stage, name)
    stage.breaks(fault)
    assert reader(ROWS) == [[1]]
    fails(writer, "COMMIT", IOERR, COMMIT_S)
    shows_nothing_in_doubt(stage, writer, reader)
    stage.heals()
    eventually(lambda: f"{name}: settled: the commit did not apply" in stage.said(), True)
    assert reader(ROWS) == [[1]]
    writer("INSERT INTO t VALUES (3)")
    assert stage.truth(name) == [1, 3]


def shows_nothing_in_doubt(stage: Stage, writer: outages.Connection, reader: outages.Connection) -> None:
    """In process another connection has a snapshot of its own."""
    fails(writer, "BEGIN IMMEDIATE", IOERR, 0)
    if stage.mount is None:
        assert reader(ROWS) == [[1]]
    else:
        fails(reader, ROWS, IOERR, 0)


def goes_on_reading(stage: Stage, name: str, reader: outages.Connection) -> None:
    """From what is cached: only the first look that fails takes its time."""
    for _ in range(2):
        time.sleep(1.1 * outages.REFRESH_S)
        assert reader(ROWS) == [[1]]
    before = len(stage.proxy.requests)
    for _ in range(20):
        assert reader(ROWS) == [[1]]
    assert stage.connect(name)(ROWS) == [[1]]
    assert len(stage.proxy.requests) - before < 20  # those in the background


# --- S3 is away ---------------------------------------------------------------------------------------------------


def test_away_for_a_moment(patient: Stage, name: str) -> None:
    writer, reader = begin(patient, name)
    patient.breaks(AWAY)
    writer.send("COMMIT")
    time.sleep(1)
    if patient.mount is None:  # on a mount SQLite's lock keeps readers out until the commit has ended
        assert reader(ROWS) == [[1]]
    patient.heals()
    writer.receive()
    assert patient.truth(name) == [1, 2]


@pytest.mark.parametrize("face", FACES_BY_TURNS)
def test_connection_refused(face: str, place: Place, name: str, seaweed_endpoint: Endpoint, tmp_path: Path) -> None:
    with ExitStack() as doors, ExitStack() as stages:
        with FaultProxy(seaweed_endpoint.url) as door:
            stage = stages.enter_context(staged(face, place, door, tmp_path))
            writer, reader = begin(stage, name)
            port = int(door.url.rpartition(":")[2])
        fails(writer, "COMMIT", IOERR, COMMIT_S)
        goes_on_reading(stage, name, reader)
        fails(writer, "BEGIN IMMEDIATE", IOERR, LOCK_S)
        doors.enter_context(FaultProxy(seaweed_endpoint.url, port=port))
        eventually(lambda: writer("INSERT INTO t VALUES (3)"), [])
        assert stage.truth(name) == [1, 3]


def test_service_unavailable(stage: Stage, name: str) -> None:
    is_lost_in_doubt(stage, name, AWAY)


@pytest.mark.long
def test_internal_error(stage: Stage, name: str) -> None:
    is_lost_in_doubt(stage, name, Fault(status=500))


@pytest.mark.long
def test_black_hole(stage: Stage, name: str) -> None:
    is_lost_in_doubt(stage, name, HANGS)


@pytest.mark.long
@pytest.mark.parametrize("face", FACES)
def test_away_for_a_minute(face: str, place: Place, name: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """With the deadlines as they are."""
    real = {"request_deadline_s": 10.0, "transaction_deadline_s": 60.0, "refresh_s": 1.0}
    with staged(face, place, proxy, tmp_path, **real) as stage:
        for fault in (AWAY, HANGS):
            writer, reader = begin(stage, name)
            stage.breaks(fault)
            writer.send("COMMIT")
            end = time.monotonic() + 58
            while time.monotonic() < end:
                if face == "mount":  # SQLite's lock keeps readers out until the commit has ended
                    time.sleep(1)
                else:
                    assert reader(ROWS) == [[1]]
            stage.heals()
            writer.receive()
            writer("DELETE FROM t WHERE x = 2")
            writer("BEGIN IMMEDIATE", INSERT)
            stage.breaks(fault)
            began = time.monotonic()
            fails(writer, "COMMIT", IOERR, 80)
            assert time.monotonic() - began > 55
            stage.heals()
            eventually(lambda reader=reader: reader(ROWS), [[1]])
            name = fresh_name()


def test_reads_of_cached_data(stage: Stage) -> None:
    """By connections that are open and by new ones, also below folders."""
    name = f"{fresh_name('folder')}/{fresh_name('folder')}/{fresh_name()}"
    if stage.mount is not None:
        (stage.mount / name).parent.mkdir(parents=True)
    reader = stage.table(name)
    stage.breaks(AWAY)
    goes_on_reading(stage, name, reader)
    if stage.mount is not None:
        reader.__exit__()
        for _ in range(2):
            assert sqlite(stage.mount / name, ROWS) == "1"
    stage.heals()
    stage.connect(name)(INSERT)
    assert stage.truth(name) == [1, 2]


# --- in the middle of a commit ------------------------------------------------------------------------------------


def test_the_reply_is_lost(patient: Stage, name: str) -> None:
    writer, reader = begin(patient, name)
    patient.breaks(Fault(apply=True, cut=True), is_swap)
    writer("COMMIT")
    assert reader(ROWS) == patient.connect(name)(ROWS) == [[1], [2]]
    patient.heals()
    assert patient.truth(name) == [1, 2]


@pytest.mark.parametrize("applied", [True, False], ids=["applied", "not applied"])
def test_away_since_the_commit_was_sent(stage: Stage, name: str, applied: bool) -> None:
    writer, reader = begin(stage, name)
    stage.proxy.rule = lambda request: Fault(apply=applied, cut=True) if is_swap(request) else AWAY
    said = fails(writer, "COMMIT", IOERR, COMMIT_S)
    assert stage.mount is not None or "outcome of the last write is unknown" in said
    shows_nothing_in_doubt(stage, writer, reader)
    stage.heals()
    outcome = "applied" if applied else "did not apply"
    eventually(lambda: f"{name}: settled: the commit {outcome}" in stage.said(), True)
    expected = [1, 2] if applied else [1]
    assert [row[0] for row in writer(ROWS)] == stage.truth(name) == expected
    eventually(lambda: [row[0] for row in reader(ROWS)], expected)


def test_a_slow_trickle(stage: Stage, name: str) -> None:
    connection = stage.table(name)
    other = outages.Local(stage.place, name, cache_size=1 << 26)
    other("CREATE TABLE big(b)", f"INSERT INTO big SELECT randomblob(20000) FROM ({numbers(50)})")
    other.close()
    time.sleep(outages.REFRESH_S)
    stage.breaks(Fault(bytes_per_s=1000), lambda request: request.kind == "data")
    fails(connection, "SELECT sum(length(b)) FROM big", IOERR, LOCK_S)
    assert connection(ROWS) == [[1]]
    stage.heals()
    assert connection("SELECT sum(length(b)) FROM big") == [[1_000_000]]


# --- S3 refuses ---------------------------------------------------------------------------------------------------


def is_refused(stage: Stage, name: str, fault: Fault, reads: bool = True) -> None:
    """S3 says no to everything: nothing is in doubt, and nothing is lost."""
    writer, reader = begin(stage, name)
    stage.breaks(fault)
    said = fails(writer, "COMMIT", IOERR, COMMIT_S)
    assert stage.mount is not None or fault.code in said
    if reads:
        goes_on_reading(stage, name, reader)
    time.sleep(2)  # a lease is perhaps still held: who has it learns of the outage at the commit
    if not reads:
        fails(reader, ROWS, IOERR, LOCK_S)
    fails(writer, "BEGIN IMMEDIATE", IOERR if stage.mount or not reads else READONLY, LOCK_S)
    cannot_create(stage, CANTOPEN if reads else IOERR)
    assert fault.code in stage.said()
    stage.heals()
    eventually(lambda: writer("INSERT INTO t VALUES (3)"), [])
    assert stage.truth(name) == [1, 3]


def cannot_create(stage: Stage, in_process: str = CANTOPEN) -> None:
    if stage.mount is not None:
        assert CANTOPEN in sqlite(stage.mount / fresh_name(), "CREATE TABLE t(x)", check=False).replace(
            'database "', ""
        )
        return
    with pytest.raises(SqlError, match=in_process):
        stage.connect(fresh_name())


def test_the_clock_is_wrong(stage: Stage, name: str) -> None:
    is_refused(stage, name, Fault(status=403, code="RequestTimeTooSkewed"))
    assert "set the clock of this machine" in stage.said()


def test_the_bucket_is_deleted(stage: Stage, name: str) -> None:
    is_refused(stage, name, Fault(status=404, code="NoSuchBucket"), reads=False)


def test_the_bucket_turns_read_only(stage: Stage, name: str) -> None:
    writer, reader = begin(stage, name)
    stage.breaks(Fault(status=403, code="AccessDenied"), lambda request: request.method in ("PUT", "POST", "DELETE"))
    fails(writer, "COMMIT", IOERR, 0)
    assert reader(ROWS) == [[1]]
    time.sleep(1)  # as above
    fails(writer, INSERT, IOERR if stage.mount else READONLY, 0)
    cannot_create(stage)
    assert reader(ROWS) == stage.connect(name)(ROWS) == [[1]]
    stage.heals()
    writer("INSERT INTO t VALUES (3)")
    assert stage.truth(name) == [1, 3]
