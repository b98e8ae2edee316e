"""What goes wrong outside: credentials, machine, store, damage. One line that says what to do, never wrong data."""

from __future__ import annotations

import errno
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from mounting import PATIENCE_S, Folder, Mount, Place, Shared, command, is_mounted, mounted, numbers, shell, sqlite

pytestmark = pytest.mark.mount

ROWS = "CREATE TABLE t(a); INSERT INTO t VALUES (1), (2)"

#: Prints the errno of a read, write or open.
PROBE = """
import errno, os, sys
try:
    fd = os.open(sys.argv[1], {"read": os.O_RDONLY, "write": os.O_RDWR, "create": os.O_RDWR | os.O_CREAT}[sys.argv[2]])
    while os.read(fd, 1 << 20):
        pass
    print("OK")
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def outcome(path: Path, how: str = "read") -> str:
    """`OK`, or the name of the errno with which opening or reading the file fails."""
    return shell(sys.executable, "-c", PROBE, path, how).stdout.strip()


def failing_mount(place: Place, directory: Path | str, target: str | None = None, **changes: str | None) -> str:
    """The one line with which `mount` fails, its exit code in front."""
    options = ["--endpoint-url", place.url, "--request-deadline", "5"]
    done = command(place, "mount", target or place.target, str(directory), *options, **changes)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(r"s3blockfs: [^\n]+\n", done.stderr), done.stderr
    assert not is_mounted(Path(directory))
    return f"{done.returncode} {done.stderr.strip()}"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    directory = tmp_path / "mnt"
    directory.mkdir()
    return directory


# --- the bucket and the keys -----------------------------------------------------------------------------------


def test_missing_bucket(place: Place, empty: Path) -> None:
    said = failing_mount(place, empty, "no-such-bucket-here/x")
    assert said.startswith("3 ")
    assert "no-such-bucket-here" in said


def test_wrong_credentials(place: Place, empty: Path) -> None:
    """Exit code 4; the secret is not shown."""
    secret = "wrong-Secret-that-nobody-may-see"
    for changes in ({"AWS_SECRET_ACCESS_KEY": secret}, {"AWS_ACCESS_KEY_ID": "NOBODY"}):
        said = failing_mount(place, empty, **changes)
        assert said.startswith("4 ")
        assert secret not in said
        assert "credentials" in said or "key" in said.lower()


def test_no_credentials(place: Place, empty: Path) -> None:
    said = failing_mount(place, empty, AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    assert said.startswith("4 ")
    assert "credentials" in said


def test_nothing_listens_there(place: Place, empty: Path) -> None:
    """It ends at the deadline and says what to look at."""
    said = failing_mount(replace(place, url="http://127.0.0.1:9"), empty)
    assert said.startswith("5 ")
    assert "check network and endpoint" in said


# --- this machine ----------------------------------------------------------------------------------------------


def test_no_dev_fuse(place: Place, tmp_path: Path, empty: Path) -> None:
    """In a mount namespace with an empty /dev: exit code 8 and what to do about it."""
    script = 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec "$@"'
    mount = [sys.executable, "-m", "s3blockfs", "mount", place.target, str(empty), "--endpoint-url", place.url]
    done = shell("unshare", "-m", "sh", "-c", script, "sh", *mount, env=place.environment | {"TMPDIR": str(tmp_path)})
    assert (done.returncode, len(done.stderr.splitlines())) == (8, 1), done.stderr
    assert "/dev/fuse" in done.stderr
    assert "modprobe fuse" in done.stderr


def test_no_libfuse(place: Place, tmp_path: Path, empty: Path) -> None:
    """Where ctypes finds no libfuse: exit code 8 and the package to install; `ls` does without it."""
    (tmp_path / "sitecustomize.py").write_text("import ctypes.util\nctypes.util.find_library = lambda name: None\n")
    hidden = {"PYTHONPATH": str(tmp_path)}
    said = failing_mount(place, empty, **hidden)
    assert said.startswith("8 ")
    assert "libfuse2" in said
    assert command(place, "ls", place.bucket, "--endpoint-url", place.url, **hidden).returncode == 0


@pytest.mark.parametrize("kind", ["missing", "not empty", "file"])
def test_unusable_mount_points(place: Place, tmp_path: Path, kind: str) -> None:
    """Named, with what to do; what lies there is untouched."""
    directory = tmp_path / "mnt"
    if kind == "not empty":
        directory.mkdir()
        (directory / "precious").write_text("kept")
    elif kind == "file":
        directory.write_text("kept")
    said = failing_mount(place, directory)
    assert said[0] in "28"
    assert str(directory) in said
    assert kind != "missing" or "mkdir" in said
    assert kind != "not empty" or (directory / "precious").read_text() == "kept"
    assert kind != "file" or directory.read_text() == "kept"


def test_mounting_twice(place: Place, tmp_path: Path) -> None:
    """The second mount on a directory is refused and the first goes on."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", ROWS)
        done = command(place, "mount", place.target, str(mount.directory), "--endpoint-url", place.url)
        assert done.returncode == 2
        assert "mounted there already" in done.stderr
        assert sqlite(mount / "a.db", "SELECT sum(a) FROM t") == "3"


def test_the_target_is_a_database(machines: tuple[Place, Mount, Mount], empty: Path) -> None:
    place, mount, _ = machines
    sqlite(mount / "a.db", ROWS)
    said = failing_mount(place.inside("a.db"), empty)
    assert said.startswith("2 ")
    assert "mount its parent" in said


# --- a store without conditional PUTs ----------------------------------------------------------------------------


class _Careless(BaseHTTPRequestHandler):
    """Passes everything on as it is, but PUTs without their conditions, as older S3 servers take them."""

    protocol_version = "HTTP/1.1"
    place: Place

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT" and ("If-Match" in self.headers or "If-None-Match" in self.headers):
            key = unquote(self.path.partition("?")[0]).removeprefix(f"/{self.place.bucket}/")
            self.place.put(key, body)  # signed anew, because the conditions were signed too
            return self._answer(200, [("ETag", f'"{hashlib.md5(body).hexdigest()}"')], b"")
        store = HTTPConnection(urlsplit(self.place.url).netloc, timeout=PATIENCE_S)
        try:
            store.request(self.command, self.path, body, dict(self.headers.items()))
            answer = store.getresponse()
            return self._answer(answer.status, answer.getheaders(), answer.read())
        finally:
            store.close()

    do_GET = do_PUT = do_POST = do_DELETE = _pass_on

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def careless(place: Place) -> Iterator[Place]:
    """The place behind a store that ignores conditions."""
    handler = type("Handler", (_Careless,), {"place": replace(place, prefix="")})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True  # they wait for the next request of a client that is gone
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield place.via(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()


def test_a_store_without_conditional_puts_is_read_only(place: Place, careless: Place, tmp_path: Path) -> None:
    """Reading works; whoever wants to write gets EROFS, and the log says why and what to do. Nothing changes there."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", ROWS)
    for key in place.listing():
        if key.startswith(".s3blockfs/"):
            place.delete(key)  # what a good store once told is not what is tested
    before = {key: place.get(key) for key in place.listing()}
    with mounted(careless, tmp_path) as mount:
        assert sqlite(mount / "a.db", "SELECT sum(a) FROM t") == "3"
        assert outcome(mount / "a.db", "read") == "OK"
        assert outcome(mount / "a.db", "write") == outcome(mount / "new.db", "create") == "EROFS"
        assert "readonly" in sqlite(mount / "a.db", "INSERT INTO t VALUES (3)", check=False)
        assert "Read-only file system" in shell("rm", mount / "a.db").stderr
        assert sqlite(mount / "a.db", "SELECT sum(a) FROM t") == "3"
        assert re.search(r"ignores If-(None-)?Match.*--only-writer", mount.log)
    after = {key: place.get(key) for key in place.listing() if not key.startswith(".s3blockfs/")}
    assert after == before


def test_only_writer_lifts_the_refusal(careless: Place, tmp_path: Path) -> None:
    with mounted(careless, tmp_path, "--only-writer") as mount:
        sqlite(mount / "a.db", ROWS)
        assert sqlite(mount / "a.db", "SELECT sum(a) FROM t") == "3"


def test_a_read_only_mount(place: Place, tmp_path: Path) -> None:
    """`--read-only`: reading works, writers get EROFS, and not one PUT is made (nothing new is in the bucket)."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", ROWS)
    before = place.listing()
    with mounted(place, tmp_path, "--read-only") as mount:
        assert sqlite(mount / "a.db", "SELECT sum(a) FROM t") == "3"
        assert outcome(mount / "a.db", "write") == outcome(mount / "new.db", "create") == "EROFS"
        assert "readonly" in sqlite(mount / "a.db", "INSERT INTO t VALUES (3)", check=False)
        assert shell("rm", mount / "a.db").returncode != 0
    assert place.listing() == before


# --- damaged objects -----------------------------------------------------------------------------------------------


def flipped(body: bytes, at: float = 0.5) -> bytes:
    middle = int(len(body) * at)
    return body[:middle] + bytes([body[middle] ^ 4]) + body[middle + 1 :]


def newer(body: bytes) -> bytes:
    changed = body.replace(b'"format":1,', b'"format":9,', 1)
    assert changed != body
    return changed


@dataclass(frozen=True)
class Damage:
    """What happens to the bytes of an object (None: it is deleted), the errno of a reader, a word of the message."""

    change: Callable[[bytes], bytes | None]
    code: int
    says: str


HEADS = {
    "truncated": Damage(lambda body: body[:-100], errno.EIO, "truncated|checksum"),
    "cut in its first line": Damage(lambda body: body[:40], errno.EIO, "not the head"),
    "flipped in front": Damage(lambda body: flipped(body, 0.1), errno.EIO, "checksum|head"),
    "flipped behind": Damage(lambda body: flipped(body, 0.9), errno.EIO, "checksum|head"),
    "empty": Damage(lambda _: b"", errno.EIO, "not the head"),
    "rubbish": Damage(lambda _: b"\0\xff" * 500, errno.EIO, "not the head"),
    "newer": Damage(newer, errno.EPROTONOSUPPORT, "this s3blockfs reads up to"),
}
DATA = {
    "truncated": Damage(lambda body: body[: len(body) // 2], errno.EIO, "data/"),
    "flipped": Damage(flipped, errno.EIO, "data/"),
    "empty": Damage(lambda _: b"", errno.EIO, "data/"),
    "deleted": Damage(lambda _: None, errno.EIO, "data/.*missing"),
}


@pytest.fixture
def log(machines: tuple[Place, Mount, Mount]) -> Callable[[], str]:
    """What the first of the machines has logged."""
    return lambda: machines[1].log


@pytest.fixture(scope="module")
def stock(machines: tuple[Place, Mount, Mount], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bad.db` and `good.db`, 1 MB each: as files in this folder, and in data objects."""
    folder = tmp_path_factory.mktemp("stock")
    for name in ("bad.db", "good.db"):
        sqlite(folder / name, "CREATE TABLE t(a)", f"INSERT INTO t SELECT randomblob(1000) FROM ({numbers(1000)})")
        assert shell("cp", folder / name, machines[1] / name).returncode == 0
    return folder


@pytest.fixture
def stocked(machines: tuple[Place, Mount, Mount], stock: Path, shared: Shared) -> Shared:
    """Copies of them that no machine has seen yet."""
    for key in machines[0].listing():
        if key.startswith(("bad.db/", "good.db/")):
            shared[0].put(key, machines[0].get(key))
    return shared


def damage(place: Place, key: str, kind: Damage) -> bytes:
    """Do it, and return what was there."""
    body = place.get(key)
    changed = kind.change(body)
    if changed is None:
        place.delete(key)
    else:
        place.put(key, changed)
    return body


def check_damage(stocked: Shared, stock: Path, log: Callable[[], str], key: str, kind: Damage) -> None:
    """Readers get the errno and the log the reason; all else works; when the object is put back nothing is lost."""
    place, mount, other = stocked
    whole = damage(place, key, kind)
    assert outcome(mount / "bad.db") == errno.errorcode[kind.code]
    assert shell("cmp", stock / "bad.db", mount / "bad.db").returncode != 0
    assert "rror" in sqlite(mount / "bad.db", "SELECT total(length(a)) FROM t", check=False)
    sqlite(mount / "bad.db", "INSERT INTO t VALUES (1)", check=False)
    assert_the_rest_works(mount, stock)
    assert re.search(f"{place.prefix}/bad.db/.*({kind.says}).*; (put|upgrade)", log()), log()
    place.put(key, whole)
    assert_whole(mount, stock)
    assert_whole(other, stock)


def assert_the_rest_works(mount: Folder, stock: Path) -> None:
    assert shell("cmp", stock / "good.db", mount / "good.db").stdout == ""
    sqlite(mount / "fresh.db", ROWS)
    assert {"bad.db", "fresh.db", "good.db"} <= set(shell("ls", mount.directory).stdout.split())


def assert_whole(mount: Folder, stock: Path) -> None:
    assert sqlite(mount / "bad.db", "PRAGMA integrity_check") == "ok"
    expected = sqlite(stock / "bad.db", "SELECT hex(max(a)), hex(min(a)) FROM t WHERE typeof(a) = 'blob'")
    assert sqlite(mount / "bad.db", "SELECT hex(max(a)), hex(min(a)) FROM t WHERE typeof(a) = 'blob'") == expected


@pytest.mark.parametrize("kind", HEADS)
def test_unreadable_head(stocked: Shared, stock: Path, log: Callable[[], str], kind: str) -> None:
    check_damage(stocked, stock, log, "bad.db/head", HEADS[kind])


@pytest.mark.parametrize("kind", DATA)
def test_unreadable_data_object(stocked: Shared, stock: Path, log: Callable[[], str], kind: str) -> None:
    (key,) = [key for key in stocked[0].listing() if key.startswith("bad.db/data/")]
    check_damage(stocked, stock, log, key, DATA[kind])


def test_swapped_data_objects(stocked: Shared, stock: Path) -> None:
    """An object under another one's name does not verify, though it is sound in itself: I/O errors, no mixture."""
    place, mount, other = stocked
    keys = [key for key in place.listing() if "/data/" in key]
    bodies = [place.get(key) for key in keys]
    for key, body in zip(keys, reversed(bodies), strict=True):
        place.put(key, body)
    for name in ("bad.db", "good.db"):
        assert outcome(mount / name) == "EIO"
    for key, body in zip(keys, bodies, strict=True):
        place.put(key, body)
    for shown in (mount, other):
        assert_whole(shown, stock)
    assert_the_rest_works(other, stock)


@pytest.mark.parametrize("kind", ["rubbish", "newer"])
def test_commands_say_what_is_wrong(stocked: Shared, empty: Path, kind: str) -> None:
    """Mounting what is unreadable: exit code 6, one line, the object's name. The folder above still lists."""
    place = stocked[0]
    damage(place, "bad.db/head", HEADS[kind])
    said = failing_mount(place.inside("bad.db"), empty)
    assert said.startswith("6 ")
    assert "bad.db/head" in said
    assert re.search(HEADS[kind].says, said)
    done = command(place, "ls", place.target, "--endpoint-url", place.url)
    assert (done.returncode, done.stdout.split()) == (0, ["bad.db", "good.db"])


def test_a_head_that_breaks_under_an_open_connection(stocked: Shared) -> None:
    """The connection gets an error, not old or wrong rows, and goes on when the head is whole again."""
    script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1])\nfor line in sys.stdin:\n  try: print(db.execute("
    script += "'SELECT count(*) FROM t').fetchall(), flush=True)\n  except sqlite3.Error as e: print(e, flush=True)"
    place, mount, _ = stocked
    reader = subprocess.Popen(
        [sys.executable, "-c", script, mount / "bad.db"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None
    assert reader.stdout is not None

    def ask() -> str:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
        return reader.stdout.readline().strip()

    try:
        assert ask() == "[(1000,)]"
        whole = damage(place, "bad.db/head", HEADS["rubbish"])
        assert ask() == "disk I/O error"
        place.put("bad.db/head", whole)
        assert ask() == "[(1000,)]"
    finally:
        reader.kill()
        reader.communicate()
