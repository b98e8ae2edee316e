"""What a process runs out of: credentials, disk, memory, time; and what a database that hangs does to others.

Lines of the table "Outages" of docs/SEMANTICS.md, too: see test_outages.py."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from mounting import PATIENCE_S, Place, SqlError, fresh_name, is_mounted, numbers, shell, sqlite
from outages import AWAY, FULL, HANGS, IOERR, READONLY, REQUEST_S, TRANSACTION_S, Stage, eventually, fails, staged
from proxy import Fault, FaultProxy
from test_outages import COMMIT_S, FACES, FACES_BY_TURNS, INSERT, LOCK_S, ROWS, begin, goes_on_reading

from s3blockfs.fuse_ops import QUIESCE_S

pytestmark = pytest.mark.mount

MIB = 1 << 20


@pytest.fixture
def name() -> str:
    return fresh_name()


def load(mebibytes: int) -> str:
    return f"INSERT INTO t SELECT randomblob({MIB // 16}) FROM ({numbers(16 * mebibytes)})"


# --- credentials --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renewable(Place):
    """A place whose keys are not in the environment, but where AWS's configuration files say."""

    folder: Path = Path()

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in super().environment.items() if k not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        files = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
        return kept | {variable: str(self.folder / name) for variable, name in files.items()}

    def issue(self, source: str, number: int) -> None:
        """The server knows one key; what tells new credentials from old ones here is the account."""
        if source == "file":
            keys = f"aws_access_key_id={self.access_key}\naws_secret_access_key={self.secret_key}\n"
            (self.folder / "credentials").write_text(f"[default]\n{keys}aws_account_id={number}\n")
            return
        keys = {"AccessKeyId": self.access_key, "SecretAccessKey": self.secret_key, "AccountId": str(number)}
        (self.folder / "issued").write_text(json.dumps({"Version": 1, "Expiration": "2099-01-01T00:00:00Z"} | keys))
        (self.folder / "config").write_text(f"[default]\ncredential_process = /bin/cat {self.folder / 'issued'}\n")


@pytest.mark.parametrize("source", ["file", "process"])
@pytest.mark.parametrize("face", FACES)
def test_credentials_expire_and_are_renewed(
    face: str, source: str, place: Place, name: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier than they said, or said nothing. Nobody remounts or connects anew."""
    renewable = Renewable(**vars(place), folder=tmp_path)
    renewable.issue(source, 1)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in renewable.environment.items():
        monkeypatch.setenv(variable, value)
    more = {} if face == "mount" else {"bucket": place.bucket, "endpoint_url": proxy.url}
    with staged(face, renewable, proxy, tmp_path, **more) as stage:
        writer, reader = begin(stage, name)
        stage.breaks(Fault(status=400, code="ExpiredToken"))
        fails(writer, "COMMIT", IOERR, LOCK_S)
        goes_on_reading(stage, name, reader)
        time.sleep(1)  # a lease is perhaps still held
        fails(writer, "BEGIN IMMEDIATE", IOERR if stage.mount else READONLY, LOCK_S)
        before = len(proxy.requests)
        renewable.issue(source, 2)
        # The old ones stay expired; the proxy cannot tell them apart, so the first request that comes now is one more.
        proxy.rule = lambda request: (
            Fault(status=400, code="ExpiredToken") if len(proxy.requests) <= before + 1 else None
        )
        eventually(lambda: writer("INSERT INTO t VALUES (3)"), [])
        assert stage.truth(name) == [1, 3]


def test_a_commit_does_not_notice_that_credentials_were_renewed(
    place: Place, name: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    renewable = Renewable(**vars(place), folder=tmp_path)
    renewable.issue("file", 1)
    with staged("mount", renewable, proxy, tmp_path) as stage:
        writer, _ = begin(stage, name)
        renewable.issue("file", 2)
        refused: list[str] = []

        def rule(request: object) -> Fault | None:
            refused.append("once")
            return Fault(status=400, code="ExpiredToken") if len(refused) == 1 else None

        proxy.rule = rule
        writer("COMMIT")
        assert stage.truth(name) == [1, 2]


# --- disk and memory ----------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    folder.mkdir()
    done = shell("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", folder)
    assert done.returncode == 0, done.stderr
    try:
        yield folder
    finally:
        shell("umount", "-l", folder)
        assert not is_mounted(folder)


@pytest.mark.parametrize("face", FACES_BY_TURNS)
def test_the_spill_folder_is_full(face: str, place: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    """By the pages of a transaction, and by its journal."""
    with small_disk(tmp_path / "disk", 4) as disk, staged(face, place, proxy, tmp_path, spill_dir=str(disk)) as stage:
        pages, journal, other = fresh_name(), fresh_name(), fresh_name()
        writer, neighbour = stage.table(pages), stage.table(other)
        fails(writer, load(8), FULL, COMMIT_S)
        assert writer(ROWS) == [[1]]
        neighbour(INSERT)
        writer(INSERT)
        assert stage.truth(pages) == stage.truth(other) == [1, 2]
        writer = stage.table(journal)
        for _ in range(4):
            writer(load(2))
        before = stage.truth(journal, "SELECT count(*), sum(length(x)) FROM t")
        writer("PRAGMA cache_size=-32000", "BEGIN")
        fails(writer, "UPDATE t SET x = zeroblob(length(x))", FULL, COMMIT_S)
        assert writer("SELECT count(*) FROM t WHERE x = zeroblob(length(x))") == [[0]]
        fails(neighbour, "INSERT INTO t VALUES (3)", FULL, COMMIT_S)
        writer("ROLLBACK")
        gc.collect()  # exceptions of this process still know the journal
        neighbour("INSERT INTO t VALUES (3)")
        assert stage.truth(journal, "SELECT count(*), sum(length(x)) FROM t") == before
        assert stage.truth(other) == [1, 2, 3]


def peak_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.long
@pytest.mark.parametrize("face", FACES)
def test_the_memory_limit(face: str, place: Place, name: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """A transaction that is larger goes on, on disk: it waits for uploads instead of holding more."""
    limits = {"memory": 4 * MIB, "cache_size": 4 * MIB, "transaction_deadline_s": 60.0, "request_deadline_s": 10.0}
    with staged(face, place, proxy, tmp_path, **limits) as stage:
        writer = stage.table(name)
        process = stage.mount.process.pid if stage.mount else os.getpid()
        before = peak_bytes(process)
        writer(load(48))
        assert stage.truth(name, "SELECT sum(length(x)) FROM t WHERE x != 1") == [48 * MIB]
        if stage.mount is not None:
            assert peak_bytes(process) - before < 40 * MIB


# --- others -------------------------------------------------------------------------------------------------------


def lives(stage: Stage, name: str, number: int) -> None:
    """Everything that one does with a database, in a process of its own on a mount."""
    if stage.mount is not None:
        path = stage.mount / name
        assert sqlite(path, f"INSERT INTO t VALUES ({number})", "SELECT max(x) FROM t") == str(number)
        assert name in shell("ls", stage.mount.directory).stdout
        assert sqlite(stage.mount / f"new-{number}-{name}", "CREATE TABLE t(x)", "SELECT count(*) FROM t") == "0"
    else:
        stage.connect(name)(f"INSERT INTO t VALUES ({number})")


@pytest.mark.parametrize("face", FACES_BY_TURNS)
def test_other_databases(face: str, place: Place, name: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """One hangs at its commit, at its reads and in mid-load: the commit waits until S3 answers, all others go on."""
    patient = {"transaction_deadline_s": 120.0}
    with staged(face, place, proxy, tmp_path, **patient) as stage:
        hanging, other_name, third = stage.table(name), fresh_name(), fresh_name()
        for each in (other_name, third):
            stage.table(each)
        hanging("BEGIN IMMEDIATE", INSERT)
        stage.breaks(HANGS, name=name)
        hanging.send("COMMIT")
        lives(stage, other_name, 2)
        if stage.mount is not None:  # a super-journal is everybody's
            attach = f"ATTACH '{stage.mount / third}' AS c"
            both = "BEGIN; INSERT INTO t VALUES (3); INSERT INTO c.t VALUES (3); COMMIT"
            sqlite(stage.mount / other_name, attach, both)
        else:
            stage.connect(other_name)("INSERT INTO t VALUES (3)")
        assert stage.truth(other_name) == [1, 2, 3]
        assert stage.truth(name) == [1], "it is waiting"
        stage.heals()
        hanging.receive()
        assert stage.truth(name) == [1, 2]

        stage.breaks(Fault(hang_s=5, apply=True), lambda request: request.kind == "data", name)
        hanging.send(load(20))
        lives(stage, other_name, 4)
        connection = stage.connect(other_name)
        connection(load(8))
        assert connection("SELECT count(*) FROM t WHERE typeof(x) = 'blob'") == [[128]]
        stage.heals()
        hanging.receive()
        assert stage.truth(name, "SELECT count(*) FROM t") == [2 + 20 * 16]


# --- the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_the_end_in_an_outage(how: str, place: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    """S3 never comes back: while a commit waits for it, or right after one."""
    with staged("mount", place, proxy, tmp_path) as stage:
        assert stage.mount is not None
        names = [fresh_name() for _ in range(4)]
        for each in names:  # all have their leases still
            sqlite(stage.mount / each, "CREATE TABLE t(x)", "INSERT INTO t VALUES (1)")
        writer = stage.connect(names[0]) if how == "SIGTERM" else None
        if writer is not None:
            writer("BEGIN IMMEDIATE", INSERT)
        stage.breaks(HANGS)
        began = time.monotonic()
        if writer is None:
            assert shell("fusermount", "-u", stage.mount.directory).returncode == 0
        else:
            writer.send("COMMIT")
            time.sleep(0.2)
            stage.mount.signal(signal.SIGTERM)
            with pytest.raises(SqlError, match=IOERR):
                writer.receive()
        assert stage.mount.wait() == 0
        assert time.monotonic() - began < QUIESCE_S + COMMIT_S + 2 * LOCK_S + 15
    assert [place.get(f"{each}/head")[:1] != b"" for each in names] == [True] * 4


def test_the_end_of_a_process(place: Place, proxy: FaultProxy, name: str, tmp_path: Path) -> None:
    """S3 never comes back; connections are closed as Python ends."""
    program = f"""
import s3blockfs
c = s3blockfs.connect(bucket={place.bucket!r}, name={f"{place.prefix}/{name}"!r}, endpoint_url={proxy.url!r},
                      request_deadline_s={REQUEST_S}, transaction_deadline_s={TRANSACTION_S})
c.execute("CREATE TABLE t(x)")
print("ready", flush=True); input()
c.execute("BEGIN; INSERT INTO t VALUES (1)")
"""
    with ExitStack() as stack:
        process = Popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE, text=True, env=place.environment)
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        proxy.rule = lambda request: AWAY
        process.communicate("\n", timeout=PATIENCE_S)
        assert process.returncode == 0
