"""SQLite files that are plain objects, on a real S3 and real mounts; requests counted outside of the program."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import pytest
from inprocess import bucket_of, key, rows
from mounting import Client, Place, SqlError, command, mounted, numbers, shell, sqlite
from proxy import FaultProxy
from test_mount_files import client

import s3blockfs

ROWS = 6000
POINT = "SELECT id, length(data) FROM t WHERE key = 'key 4711'"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of 26 MB, in WAL mode."""
    path = tmp_path_factory.mktemp("large") / "large.db"
    sqlite(path, "PRAGMA journal_mode=WAL", "CREATE TABLE t(id INTEGER PRIMARY KEY, key TEXT UNIQUE, data)")
    sqlite(path, f"INSERT INTO t SELECT i, 'key ' || (i * 7919 % {ROWS}), randomblob(4100) FROM ({numbers(ROWS)})")
    assert path.stat().st_size > 26_000_000
    return path


def small(folder: Path, value: int, extra: int = 0) -> bytes:
    path = folder / f"small-{value}.db"
    sqlite(path, "CREATE TABLE t(x)", f"INSERT INTO t VALUES ({value})", "CREATE TABLE big(b)")
    sqlite(path, f"INSERT INTO big VALUES (zeroblob({extra}))")
    return path.read_bytes()


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", file=sys.stderr)


@pytest.mark.mount
def test_requests_of_a_mount(
    place: Place, tmp_path: Path, proxy: FaultProxy, large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row by key from a fresh mount, then everything."""
    place.put("x.sqlite", large.read_bytes())
    with mounted(place.via(proxy.url), tmp_path, refresh="1") as mount:
        proxy.reset()
        assert sqlite(mount / "x.sqlite", POINT).endswith("|4100")
        asked = [request for request in proxy.requests if request.path.endswith("x.sqlite")]
        say(capsys, f"one row of an object, cold: {len(proxy.requests)} requests, {proxy.received >> 10} KiB")
        assert len(asked) <= 6 and len(proxy.requests) <= 10 and proxy.received < 1 << 20
        assert {request.method for request in proxy.requests} == {"GET"}
        assert all("if-match" in request.headers for request in asked[1:])
        proxy.reset()
        assert sqlite(mount / "x.sqlite", "SELECT count(*), sum(data > x'') FROM t") == f"{ROWS}|{ROWS}"
        assert shell("cp", mount / "x.sqlite", tmp_path / "copy").returncode == 0
        say(capsys, f"all of it: {len(proxy.requests)} requests")
        assert len(proxy.requests) < 40 and proxy.received < 1.2 * large.stat().st_size
    copy, original = bytearray((tmp_path / "copy").read_bytes()), large.read_bytes()
    assert copy[18:20] == b"\1\1" and original[18:20] == b"\2\2"
    copy[18:20] = b"\2\2"
    assert copy == original


@pytest.mark.mount
def test_a_listing_asks_for_no_object(place: Place, tmp_path: Path, proxy: FaultProxy) -> None:
    body = small(tmp_path, 1)
    for number in range(30):
        place.put(f"f/{number}.db", body)
    with mounted(place.via(proxy.url), tmp_path, "--umask", "022", refresh="60") as mount:
        proxy.reset()
        done = shell("ls", "-l", mount / "f")
        assert len(done.stdout.splitlines()) == 31 and f" {len(body)} " in done.stdout
        assert done.stdout.count("-r--r--r--") == 30
        assert [request.path for request in proxy.requests if ".db" in request.path] == []


@pytest.mark.mount
def test_a_file_that_cannot_be_changed(place: Place, tmp_path: Path) -> None:
    place.put("f/a.db", small(tmp_path, 1))
    place.put("f/note.txt", b"not shown")
    with mounted(place, tmp_path) as mount:
        file = mount / "f" / "a.db"
        assert sqlite(file, "SELECT x FROM t", "PRAGMA integrity_check") == "1\nok"
        assert sqlite(f"file:{file}?mode=ro", "SELECT x FROM t") == "1"
        assert "readonly database" in sqlite(file, "INSERT INTO t VALUES (1)", check=False)
        assert mount.log == "", "SQLite opens what it only reads for writing, too"
        sqlite(mount / "f" / "own.db", "CREATE TABLE t(x)", "INSERT INTO t VALUES (2)")
        script = """
os.chdir("f")
for name, act, *arguments in (
    ("write", os.open, "a.db", os.O_RDWR), ("truncate", os.open, "a.db", os.O_RDONLY | os.O_TRUNC),
    ("truncate(2)", os.truncate, "a.db", 0), ("unlink", os.unlink, "a.db"), ("rename", os.rename, "a.db", "x.db"),
    ("rename over", os.rename, "own.db", "a.db"), ("rename folder", os.rename, "../f", "../g"),
    ("create", os.open, "a.db", os.O_RDWR | os.O_CREAT | os.O_EXCL), ("mkdir", os.mkdir, "a.db"),
):
    result[name] = errno_of(act, *arguments)
result["listed"] = sorted(os.listdir("."))
with open("a.db", "rb") as file:
    result["stat"] = os.fstat(file.fileno()) == os.stat("a.db") and os.stat("a.db").st_size == len(file.read())
"""
        refused = dict.fromkeys(("write", "truncate", "truncate(2)", "unlink", "rename"), "EROFS")
        refused |= {"rename over": "EROFS", "rename folder": "EROFS", "create": "EEXIST", "mkdir": "EEXIST"}
        assert client(mount.directory, script) == refused | {"listed": ["a.db", "own.db"], "stat": True}
        assert "a plain object, read-only; `s3blockfs import" in mount.log
        both = sqlite(file, f"ATTACH '{mount / 'f' / 'own.db'}' AS own", "SELECT a.x, b.x FROM main.t a, own.t b")
        assert both == "1|2"
    assert place.get("f/a.db") == (tmp_path / "small-1.db").read_bytes()


@pytest.mark.mount
def test_replaced_while_it_is_open(place: Place, tmp_path: Path) -> None:
    """Who has it open gets errors for what was not read before; who opens it again sees the new one, whole."""
    place.put("a.db", small(tmp_path, 1, 9 << 20))
    with mounted(place, tmp_path, "--readahead-size", "0") as mount:
        with Client(mount / "a.db") as old:
            assert old("BEGIN", "SELECT x FROM t") == [[1]]
            place.put("a.db", small(tmp_path, 2))
            with Client(mount / "a.db") as new:
                assert new("SELECT x FROM t") == [[2]] and new("SELECT length(b) FROM big") == [[0]]
                with pytest.raises(SqlError, match="disk I/O error"):
                    old("SELECT sum(length(hex(b))) FROM big")
                assert new("SELECT x FROM t") == [[2]]
        assert "ObjectReplaced" in mount.log and "replaced or deleted since it was opened; open it again" in mount.log
        place.delete("a.db")
        assert "unable to open" in sqlite(f"file:{mount / 'a.db'}?mode=ro", "SELECT x FROM t", check=False)


@pytest.mark.mount
def test_import_and_then_write(place: Place, tmp_path: Path) -> None:
    place.put("a.db", small(tmp_path, 1))
    done = command(place, "import", f"s3://{place.target}/a.db", f"{place.target}/a.db", "--endpoint-url", place.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", "INSERT INTO t VALUES (2)")
        assert sqlite(mount / "a.db", "SELECT sum(x) FROM t") == "3"
    assert place.get("a.db") == (tmp_path / "small-1.db").read_bytes()


@pytest.mark.s3
def test_requests_in_process(
    place: Place, proxy: FaultProxy, large: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place.put("x.sqlite", large.read_bytes())
    bucket = bucket_of(place.via(proxy.url))
    proxy.reset()
    with closing(s3blockfs.connect(bucket=bucket, object=key(place, "x.sqlite"))) as db:
        assert rows(db, POINT)[0][1] == 4100
        say(
            capsys, f"one row of an object in process, cold: {len(proxy.requests)} requests, {proxy.received >> 10} KiB"
        )
        assert len(proxy.requests) <= 7 and proxy.received < 1 << 20
        assert rows(db, "PRAGMA integrity_check") == [("ok",)]
        place.put("x.sqlite", small(tmp_path, 2))
    with closing(s3blockfs.connect(bucket=bucket, object=key(place, "x.sqlite"), refresh_s=0.0)) as db:
        assert rows(db) == [(2,)]


@pytest.mark.s3
def test_import_streams(place: Place, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """26 MB through a process with a cache of 4 MiB takes hardly more memory than a small file."""
    place.put("large", large.read_bytes())
    place.put("small", small(tmp_path, 1))
    script = "import resource, sys; from s3blockfs.cli.main import main; code = main(sys.argv[1:]);"
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    peaks = []
    for name in ("small", "large"):
        line = ["import", f"s3://{place.target}/{name}", f"{place.target}/{name}.db", "--endpoint-url", place.url]
        line += ["--cache-size", "4M", "--memory", "4M", "--readahead-size", "4M"]
        done = shell(sys.executable, "-c", script, *line, env=place.environment)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    say(capsys, f"import of an object of 26 MB: {(peaks[1] - peaks[0]) >> 10} MiB more than of a small one")
    assert peaks[1] - peaks[0] < 24 << 10
