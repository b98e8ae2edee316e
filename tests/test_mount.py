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
    Shared,
    SqlError,
    clean_up,
    command,
    daemons_of,
    is_mounted,
    mounted,
    numbers,
    shell,
    sqlite,
)
from proxy import Fault, FaultProxy, Request

from s3blockfs.format import head as codec

pytestmark = pytest.mark.mount

TWO_ROWS = "CREATE TABLE t(a); INSERT INTO t VALUES (1), (2)"


@pytest.fixture
def shared(shared: Shared) -> Shared:
    shell("mkdir", shared[1].directory, check=True)
    return shared


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
                body = codec.encode(replace(codec.decode(body, key), name=None, lease=None))
            place.put(target + key[len(source) :], body)


def test_names(shared: Shared) -> None:
    """`b.sqlite` is the file b.sqlite; a nameless `acme` is shown as acme.sqlite and found under both names."""
    place, mount, other = shared
    sqlite(mount / "made.db", TWO_ROWS)
    adopt_without_name(place, "made.db", "a/b.sqlite")
    adopt_without_name(place, "made.db", "tenants/acme")
    assert shell("ls", mount / "a").stdout == "b.sqlite\n"
    assert shell("ls", mount / "tenants").stdout == "acme.sqlite\n"
    assert shell("readlink", mount / "tenants/acme").stdout == "acme.sqlite\n"  # one inode: SQLite sees one file
    for name in ("tenants/acme", "tenants/acme.sqlite"):
        assert shell("stat", "-L", "-c", "%F", mount / name).stdout == "regular file\n"
        sqlite(mount / name, f"INSERT INTO t VALUES ('{name}')")
        assert sqlite(other / "tenants/acme", "SELECT a FROM t WHERE typeof(a)='text' ORDER BY 1 DESC LIMIT 1") == name
    assert sqlite(mount / "tenants/acme.sqlite", "SELECT count(*) FROM t") == "4"
    assert shell("ls", "-1", mount.directory).stdout.split() == ["a", "made.db", "tenants"]


def test_both_names_of_a_database_share_locks_and_journal(shared: Shared) -> None:
    """A writer that uses the one name keeps out a writer that uses the other."""
    place, mount, _ = shared
    sqlite(mount / "made.db", TWO_ROWS)
    adopt_without_name(place, "made.db", "x/acme")
    with Client(mount / "x/acme") as one, Client(mount / "x/acme.sqlite") as two:
        one("BEGIN IMMEDIATE", "UPDATE t SET a = a + 1")
        with pytest.raises(SqlError, match="locked"):
            two("BEGIN IMMEDIATE")
        one("COMMIT")
        assert two("SELECT sum(a) FROM t") == [[5]]
        two("UPDATE t SET a = a + 1")
        assert one("SELECT sum(a) FROM t") == [[7]]


def test_exact_names_win(shared: Shared) -> None:
    """With both `acme` (nameless) and `acme.sqlite` there, that name means the second."""
    place, mount, _ = shared
    sqlite(mount / "acme.sqlite", "CREATE TABLE t(a); INSERT INTO t VALUES ('exact')")
    sqlite(mount / "made.db", "CREATE TABLE t(a); INSERT INTO t VALUES ('alias')")
    adopt_without_name(place, "made.db", "acme")
    assert sqlite(mount / "acme.sqlite", "SELECT a FROM t") == "exact"
    assert sqlite(mount / "acme", "SELECT a FROM t") == "alias"
    assert shell("ls", mount.directory).stdout.split().count("acme.sqlite") == 1


@pytest.mark.parametrize(
    "name", ["plain", "two words.db", "ünïcödé 数据.sqlite", "UPPER.DB", "a.b.c", "-dash", "%41+&?#"]
)
def test_created_files_keep_their_exact_name(shared: Shared, name: str) -> None:
    """Also without a dot, with spaces, outside ASCII, with what URLs escape; here and elsewhere."""
    place, mount, other = shared
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


# --- files -------------------------------------------------------------------------------------------------


def local_database(path: Path, megabytes: int = 2, journal_mode: str = "DELETE") -> Path:
    sqlite(
        path,
        f"PRAGMA journal_mode={journal_mode}",
        "CREATE TABLE t(id INTEGER PRIMARY KEY, blob)",
        f"INSERT INTO t SELECT i, randomblob(4000) FROM ({numbers(megabytes * 256)})",
    )
    return path


def same(one: Path, two: Path) -> bool:
    return shell("cmp", one, two).returncode == 0


def test_cp_is_byte_identical(shared: Shared, tmp_path: Path) -> None:
    """A database copied in under a fresh name comes out as it was: here, on another mount, and after a restart."""
    source = local_database(tmp_path / "file.db")
    place, mount, other = shared
    assert shell("cp", "-p", source, str(mount.directory) + "/").stderr == ""
    for shown in (mount, other):
        assert same(source, shown / "file.db")
        assert sqlite(shown / "file.db", "PRAGMA integrity_check") == "ok"
    with mounted(place, tmp_path) as mount:
        assert same(source, mount / "file.db")


def test_cp_over_a_database_replaces_it(shared: Shared, tmp_path: Path) -> None:
    """All of it but the change counter, which goes on, so that readers notice; of a longer one nothing is left."""
    old, new = local_database(tmp_path / "old.db", 3), local_database(tmp_path / "new.db", 1)
    _, mount, other = shared
    with Client(other / "a.db") as reader:
        shell("cp", old, mount / "a.db", check=True)
        assert reader("SELECT count(*) FROM t") == [[768]]
        shell("cp", new, mount / "a.db", check=True)
        assert reader("SELECT count(*) FROM t") == [[256]]
        for shown in (mount, other):
            assert sqlite(shown / "a.db", "PRAGMA integrity_check") == "ok"
            differing = shell("cmp", "-l", new, shown / "a.db").stdout.splitlines()
            assert all(int(line.split()[0]) - 1 in {*range(24, 28), *range(92, 96)} for line in differing)


@pytest.mark.parametrize("first", ["create", "commit"])
def test_cp_reports_failure_when_the_store_refuses(place: Place, tmp_path: Path, proxy: FaultProxy, first: str) -> None:
    """`cp` exits non-zero whether the file could not be created or its content not be published; no half is visible."""
    source = local_database(tmp_path / "file.db", 1)
    with mounted(place.via(proxy.url), tmp_path) as mount, mounted(place, tmp_path) as other:
        sqlite(mount / "warm-up.db", TWO_ROWS)
        proxy.reset()
        passed = 0 if first == "create" else 1

        def refuse(request: Request) -> Fault | None:
            if (request.method, request.kind) == ("PUT", "head") and head_puts(proxy) > passed:
                return Fault(status=403, code="AccessDenied")
            return None

        proxy.rule = refuse
        done = shell("cp", source, mount / "a.db")
        assert done.returncode != 0
        assert "a.db" in done.stderr
        assert shell("cat", other / "a.db", text=False).stdout == b""
        proxy.rule = None
        assert shell("cp", source, mount / "a.db").returncode == 0
        assert sqlite(other / "a.db", "SELECT count(*) FROM t") == "256"


def test_unlink(shared: Shared) -> None:
    """A deleted database is gone here, elsewhere and for good; the name can be used again."""
    _, mount, other = shared
    for name in ("a.db", "b.db"):
        sqlite(mount / name, TWO_ROWS)
    assert shell("ls", other.directory).stdout.split() == ["a.db", "b.db"]
    assert shell("rm", mount / "a.db").returncode == 0
    for shown in (mount, other):
        assert shell("ls", shown.directory).stdout.split() == ["b.db"]
        assert "No such file" in shell("cat", shown / "a.db").stderr
    assert shell("rm", mount / "a.db").returncode != 0
    sqlite(other / "a.db", "CREATE TABLE fresh(x)")
    assert sqlite(mount / "a.db", ".tables") == "fresh"


def test_unlinked_while_open(shared: Shared) -> None:
    """Who has it open reads what he had, or gets an error, and cannot write; there and on the mount that deleted it."""
    script = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); print(os.pread(fd, 9, 0), flush=True)"
    script += "; sys.stdin.readline(); print(os.pread(fd, 99, 0))"
    _, mount, other = shared
    sqlite(mount / "a.db", TWO_ROWS)
    shell("sh", "-c", 'printf something > "$1"', "sh", mount / "f", check=True)
    plain = subprocess.Popen(
        ["python3", "-c", script, mount / "f"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert plain.stdout is not None
        assert plain.stdout.readline() == "b'something'\n"
        with Client(mount / "a.db") as here, Client(other / "a.db") as elsewhere:
            assert here("SELECT sum(a) FROM t") == elsewhere("SELECT sum(a) FROM t") == [[3]]
            assert shell("rm", mount / "a.db", mount / "f").returncode == 0
            for client in (here, elsewhere):
                with pytest.raises(SqlError, match="disk I/O error"):
                    client("INSERT INTO t VALUES (3)")
        assert plain.communicate("\n", timeout=PATIENCE_S)[0] == "b'something'\n"
    finally:
        plain.kill()
        plain.communicate()
    assert shell("ls", mount.directory).stdout == shell("ls", other.directory).stdout == ""


def test_side_files_never_go_to_s3(shared: Shared) -> None:
    """In mid-transaction, with spilled pages, the bucket holds nothing of it and the other mount shows nothing."""
    place, mount, other = shared
    with Client(mount / "a.db") as writer:
        writer("CREATE TABLE t(a)", "PRAGMA cache_size=2", "BEGIN")
        writer(f"INSERT INTO t SELECT randomblob(900) FROM ({numbers(300)})")
        assert "a.db-journal" in shell("ls", mount.directory).stdout.split()
        assert shell("ls", other.directory).stdout.split() == ["a.db"]
        keys = place.listing()
        assert [key for key in keys if "journal" in key or key.startswith("a.db/data/")] == []
        assert sqlite(other / "a.db", "SELECT count(*) FROM t") == "0"
        writer("COMMIT")
        assert sqlite(other / "a.db", "SELECT count(*) FROM t") == "300"
        assert [key for key in place.listing() if "journal" in key] == []


def test_a_wal_database_that_was_copied_in_is_in_wal_mode(shared: Shared, tmp_path: Path) -> None:
    source = local_database(tmp_path / "wal.db", 1, "WAL")
    assert sqlite(source, "PRAGMA journal_mode") == "wal"
    _, mount, other = shared
    assert shell("cp", source, mount / "a.db").returncode == 0
    for left, shown in ((256, mount), (255, other)):
        assert sqlite(shown / "a.db", "PRAGMA journal_mode; SELECT count(*) FROM t") == f"wal\n{left}"
        sqlite(shown / "a.db", ".timeout 60000", "DELETE FROM t WHERE id = (SELECT max(id) FROM t)")
    assert sqlite(mount / "a.db", "SELECT count(*) FROM t; PRAGMA integrity_check") == "254\nok"


def test_plain_files(shared: Shared) -> None:
    """What is no database is a file of bytes: written, appended to, cut, extended, overwritten in the middle."""
    _, mount, other = shared

    def do(script: str) -> None:
        done = shell("sh", "-ec", script, "sh", mount / "notes.txt")
        assert (done.returncode, done.stderr) == (0, "")

    def shows(content: bytes) -> None:
        for shown in (mount, other):
            assert shell("cat", shown / "notes.txt", text=False).stdout == content
            assert int(shell("stat", "-c", "%s", shown / "notes.txt").stdout) == len(content)

    do('echo hello > "$1"')
    shows(b"hello\n")
    do('echo more >> "$1"')
    shows(b"hello\nmore\n")
    do('truncate -s 8 "$1"')
    shows(b"hello\nmo")
    do('truncate -s 12 "$1"')
    shows(b"hello\nmo\0\0\0\0")
    do('printf XYZ | dd of="$1" bs=1 seek=2 conv=notrunc,fsync status=none')
    shows(b"heXYZ\nmo\0\0\0\0")
    do(': > "$1"')
    shows(b"")


def test_fsync_publishes_while_the_file_is_open(shared: Shared) -> None:
    """After fsync(2) returns another machine reads the bytes; before, it reads nothing of them."""
    script = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR); os.write(fd, b'first'); os.fsync(fd);"
        "os.write(fd, b' second'); print('synced', flush=True); sys.stdin.readline(); os.close(fd)"
    )
    _, mount, other = shared
    writer = subprocess.Popen(
        ["python3", "-c", script, mount / "f"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "synced\n"
        assert shell("cat", other / "f").stdout == "first"
        assert shell("cat", mount / "f").stdout == "first second"
        writer.communicate("\n", timeout=PATIENCE_S)
    finally:
        writer.kill()
        writer.communicate()
    assert shell("cat", other / "f").stdout == "first second"


def test_sparse_files(shared: Shared) -> None:
    """A hole costs nothing and reads as zeros, however large."""
    place, mount, other = shared
    shell("truncate", "-s", "5G", mount / "sparse", check=True)
    shell(
        "sh", "-c", 'printf middle | dd of="$1" bs=1 seek=3000000000 conv=notrunc', "sh", mount / "sparse", check=True
    )
    for shown in (mount, other):
        assert int(shell("stat", "-c", "%s", shown / "sparse").stdout) == 5 << 30
        piece = shell("dd", f"if={shown / 'sparse'}", "bs=1000", "skip=2999999", "count=3", text=False).stdout
        assert piece == bytes(1000) + b"middle" + bytes(1994)
        assert shell("tail", "-c", "100", shown / "sparse", text=False).stdout == bytes(100)
    assert sum(len(place.get(key)) for key in place.listing()) < 1 << 20
