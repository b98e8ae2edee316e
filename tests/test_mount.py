"""The mount as a person meets it: coming, going, names, files. Real daemons, a real SeaweedFS, real programs."""

from __future__ import annotations

import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from mounting import (
    PATIENCE_S,
    Client,
    Place,
    SqlError,
    clean_up,
    command,
    daemons_of,
    is_mounted,
    mounted,
    shell,
    sqlite,
)
from proxy import Fault, FaultProxy, Request

from s3blockfs.format import head as codec

pytestmark = pytest.mark.mount

TWO_ROWS = "CREATE TABLE t(a); INSERT INTO t VALUES (1), (2)"


def head_puts(proxy: FaultProxy) -> int:
    return proxy.counts()["PUT", "head"]


# --- coming and going --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "s3://{}", "s3://{}/"])
def test_mount_returns_when_the_mount_answers_and_umount_when_the_daemon_has_ended(
    place: Place, tmp_path: Path, form: str
) -> None:
    """`mount TARGET DIR` returns 0 only when files can be used; after `umount DIR` nothing of it is left."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    options = ("--endpoint-url", place.url, "--spill-dir", str(tmp_path))
    try:
        done = command(place, "mount", form.format(place.target), str(directory), *options, TMPDIR=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert is_mounted(directory)
        assert len(daemons_of(directory)) == 1
        assert sqlite(directory / "a.db", TWO_ROWS, "SELECT sum(a) FROM t") == "3"
        done = command(place, "umount", str(directory), TMPDIR=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not is_mounted(directory)
        assert daemons_of(directory) == []
        assert "a.db/head" in place.listing()
    finally:
        clean_up(directory)


def test_whole_bucket(mount_bucket: Place, tmp_path: Path) -> None:
    """Without a prefix the whole bucket is shown, prefixes above databases as folders."""
    bucket = replace(mount_bucket, bucket="whole-bucket")
    bucket.create_bucket()
    with mounted(bucket.inside("deep/er"), tmp_path) as mount:
        sqlite(mount / "a.sqlite", TWO_ROWS)
    with mounted(bucket, tmp_path) as mount:
        sqlite(mount / "top.db", TWO_ROWS)
        assert shell("find", mount.directory, "-printf", "%y %P\n").stdout.splitlines() == [
            "d ",
            "d deep",
            "d deep/er",
            "f deep/er/a.sqlite",
            "f top.db",
        ]
        assert sqlite(mount / "deep/er/a.sqlite", "SELECT count(*) FROM t") == "2"


def test_umount_of_a_mount_in_use_says_so_and_leaves_it(place: Place, tmp_path: Path) -> None:
    """A busy mount goes on working, and umount fails with one line."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", TWO_ROWS)
        with Client(mount / "a.db") as client:
            assert client("SELECT count(*) FROM t") == [[2]]
            done = command(place, "umount", str(mount.directory))
            assert done.returncode == 7
            assert "in use" in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert client("SELECT count(*) FROM t") == [[2]]


def test_umount_of_what_is_no_mount_is_an_error(place: Place, tmp_path: Path) -> None:
    done = command(place, "umount", str(tmp_path))
    assert done.returncode == 2
    assert "no s3blockfs is mounted" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_lets_the_commit_in_flight_finish(
    place: Place, tmp_path: Path, proxy: FaultProxy, number: signal.Signals
) -> None:
    """The commit that is on its way when the signal comes is durable, sqlite3 reports success, the daemon exits 0."""
    in_flight = threading.Event()

    def slow(request: Request) -> Fault | None:
        if (request.method, request.kind) != ("PUT", "head"):
            return None
        in_flight.set()
        return Fault(delay_s=1.5)

    with mounted(place.via(proxy.url), tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(a)")
        proxy.rule = slow
        writer = subprocess.Popen(
            ["sqlite3", "-batch", mount / "a.db", "INSERT INTO t VALUES (7)"], stderr=subprocess.PIPE, text=True
        )
        try:
            assert in_flight.wait(PATIENCE_S)
            mount.signal(number)
            _, said = writer.communicate(timeout=PATIENCE_S)
        finally:
            writer.kill()
            writer.communicate()
        assert mount.wait() == 0
        assert (writer.returncode, said) == (0, "")
    proxy.reset()
    with mounted(place, tmp_path) as mount:
        assert sqlite(mount / "a.db", "SELECT a FROM t") == "7"


def test_a_dead_mount_is_cleared_at_the_next_start(place: Place, tmp_path: Path) -> None:
    """What SIGKILL left behind (ENOTCONN) is no obstacle, and everything acknowledged is there."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", TWO_ROWS)
        mount.kill()
        assert is_mounted(mount.directory)
        assert "not connected" in shell("stat", mount.directory).stderr
        with mounted(place, tmp_path, root=mount.directory.parent) as again:
            assert "cleared a dead mount" in again.log
            assert sqlite(again / "a.db", "SELECT sum(a) FROM t") == "3"


def test_umount_clears_a_dead_mount(place: Place, tmp_path: Path) -> None:
    with mounted(place, tmp_path) as mount:
        mount.kill()
        assert command(place, "umount", str(mount.directory)).returncode == 0
        assert not is_mounted(mount.directory)


# --- names -------------------------------------------------------------------------------------------------


def adopt_without_name(place: Place, source: str, target: str) -> None:
    """Copy a database to another prefix with a head that records no file name, as other tools make it."""
    for key in place.listing():
        if key.startswith(f"{source}/"):
            body = place.get(key)
            if key == f"{source}/head":
                body = codec.encode(replace(codec.decode(body, key), name=None))
            place.put(target + key[len(source) :], body)


def test_names(place: Place, tmp_path: Path) -> None:
    """`b.sqlite` is the file b.sqlite; a nameless `acme` is shown as acme.sqlite and found under both names."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "made.db", TWO_ROWS)
    adopt_without_name(place, "made.db", "a/b.sqlite")
    adopt_without_name(place, "made.db", "tenants/acme")
    with mounted(place, tmp_path) as mount, mounted(place, tmp_path) as other:
        assert shell("ls", mount / "a").stdout == "b.sqlite\n"
        assert shell("ls", mount / "tenants").stdout == "acme.sqlite\n"
        for name in ("tenants/acme", "tenants/acme.sqlite"):
            assert shell("stat", "-c", "%F", mount / name).stdout == "regular file\n"
            sqlite(mount / name, f"INSERT INTO t VALUES ('{name}')")
            assert (
                sqlite(other / "tenants/acme", "SELECT a FROM t WHERE typeof(a)='text' ORDER BY 1 DESC LIMIT 1") == name
            )
        assert sqlite(mount / "tenants/acme.sqlite", "SELECT count(*) FROM t") == "4"
        assert shell("ls", "-1", mount.directory).stdout.split() == ["a", "made.db", "tenants"]


def test_both_names_of_a_database_share_locks_and_journal(place: Place, tmp_path: Path) -> None:
    """A writer that uses the one name keeps out a writer that uses the other."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "made.db", TWO_ROWS)
    adopt_without_name(place, "made.db", "x/acme")
    with mounted(place, tmp_path) as mount, Client(mount / "x/acme") as one, Client(mount / "x/acme.sqlite") as two:
        one("BEGIN IMMEDIATE", "UPDATE t SET a = a + 1")
        with pytest.raises(SqlError, match="locked"):
            two("BEGIN IMMEDIATE")
        one("COMMIT")
        assert two("SELECT sum(a) FROM t") == [[5]]
        two("UPDATE t SET a = a + 1")
        assert one("SELECT sum(a) FROM t") == [[7]]


def test_exact_names_win(place: Place, tmp_path: Path) -> None:
    """With both `acme` (nameless) and `acme.sqlite` there, that name means the second."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "acme.sqlite", "CREATE TABLE t(a); INSERT INTO t VALUES ('exact')")
        sqlite(mount / "made.db", "CREATE TABLE t(a); INSERT INTO t VALUES ('alias')")
    adopt_without_name(place, "made.db", "acme")
    with mounted(place, tmp_path) as mount:
        assert sqlite(mount / "acme.sqlite", "SELECT a FROM t") == "exact"
        assert sqlite(mount / "acme", "SELECT a FROM t") == "alias"
        assert shell("ls", mount.directory).stdout.split().count("acme.sqlite") == 1


@pytest.mark.parametrize(
    "name", ["plain", "two words.db", "ünïcödé 数据.sqlite", "UPPER.DB", "a.b.c", "-dash", "%41+&?#"]
)
def test_created_files_keep_their_exact_name(place: Place, tmp_path: Path, name: str) -> None:
    """Also without a dot, with spaces, outside ASCII, with what URLs escape; here, elsewhere, and after a restart."""
    with mounted(place, tmp_path) as mount, mounted(place, tmp_path) as other:
        sqlite(mount / name, TWO_ROWS)
        for shown in (mount, other):
            assert shell("ls", "-N", shown.directory).stdout == f"{name}\n"
            assert sqlite(shown / name, "SELECT sum(a) FROM t") == "3"
        assert "No such file" in shell("stat", mount / f"{name}.sqlite").stderr
    assert f"{name}/head" in place.listing()


def test_the_hidden_folder_is_hidden(place: Place, tmp_path: Path) -> None:
    """`.s3blockfs`, where marks of deleted databases lie, is neither listed nor can it be opened or made."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", TWO_ROWS)
        assert any(key.startswith(".s3blockfs/") for key in place.listing())
        assert shell("ls", "-A", mount.directory).stdout == "a.db\n"
        for name in (".s3blockfs", ".s3blockfs/store"):
            assert "No such file" in shell("stat", mount / name).stderr
            assert shell("touch", mount / name).returncode != 0
        before = place.listing()
        assert shell("cp", mount / "a.db", mount / ".s3blockfs").returncode != 0
        assert place.listing() == before
