"""Secrets are shown nowhere, and other users get in nowhere. Hostile buckets: `test_hostile_bucket.py`; permissions and
encryption: `test_permissions.py`; ports and files of the embedded server: also `test_embedded.py`."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import apsw
import pytest
from commanding import run
from mounting import PATIENCE_S, Place, clean_up, daemons_of, shell, sqlite
from servers import seaweed, without_aws

import s3blockfs
from s3blockfs import errors, telemetry
from s3blockfs.embedded import EmbeddedServer
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store

pytestmark = pytest.mark.mount

#: Every secret has this in it, in some spelling.
MARK = re.compile("nobody-?may-?see", re.IGNORECASE)
KEY, SECRET = "AKIANOBODYMAYSEE0001", "secretNobodyMaySee/0123456789+abcdefghij"
TOKEN, PASSWORD = "tokenNobodyMaySee==", "passwordNobodyMaySee"


def assert_silent(*shown: object) -> None:
    for text in shown:
        found = MARK.search(str(text))
        assert found is None, f"a secret is shown: {str(text)[max(0, found.start() - 300) : found.end()]}"


# --- whatever fails ----------------------------------------------------------------------------------------


class _Echo(BaseHTTPRequestHandler):
    """A store that says no, and repeats in its answer everything that it was sent."""

    protocol_version = "HTTP/1.1"
    status, code = 403, "SignatureDoesNotMatch"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        said = f"{self.path} {self.headers}".replace("&", "&amp;").replace("<", "&lt;")
        names = ("Message", "StringToSign", "AWSAccessKeyId", "Resource", "RequestId")
        inside = "".join(f"<{name}>{said}</{name}>" for name in names)
        body = f"<Error><Code>{self.code}</Code>{inside}</Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        for name in ("Location", "x-amz-request-id"):
            self.send_header(name, self.headers.get("Authorization", "none"))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@contextmanager
def echo(status: int, code: str) -> Iterator[str]:
    handler = type("Handler", (_Echo,), {"status": status, "code": code})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def nobody_listens() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@dataclass(frozen=True)
class Failure:
    """What is wrong with the store (a status and a code) or the settings."""

    status: int = 0
    code: str = ""
    token: str = TOKEN
    user: str = ""
    region: str = "us-east-1"
    profile: str = ""


FAILURES = {
    "refused": Failure(403, "SignatureDoesNotMatch"),
    "its code is the secret": Failure(400, f"<![CDATA[\n{'x' * 100} {SECRET}]]>"),
    "expired": Failure(400, "ExpiredToken"),
    "broken": Failure(500, "InternalError"),
    "no S3": Failure(200, "OK"),
    "nobody listens": Failure(),
    "a token with a line feed": Failure(403, "x", token=f"{TOKEN}\nX-Evil: {TOKEN}"),
    "a token that is no ASCII": Failure(403, "x", token=f"{TOKEN}ü"),
    "a URL with a password": Failure(403, "x", user=f"user:{PASSWORD}@"),
    "a URL with a password, and no port": Failure(403, "x", user=f"user:{PASSWORD}@host:no-port/"),
    "no such profile": Failure(403, "x", profile="none"),
}


@pytest.fixture
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings in the environment."""
    failure: Failure = request.param
    patch = without_aws(monkeypatch)
    with echo(failure.status, failure.code) as url:
        url = url if failure.status else nobody_listens()
        values = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": failure.token}
        values |= {"S3BLOCKFS_ENDPOINT_URL": url.replace("//", f"//{failure.user}"), "S3BLOCKFS_REGION": failure.region}
        values |= {"S3BLOCKFS_PROFILE": failure.profile} if failure.profile else {}
        for name, value in values.items():
            patch.setenv(name, value)
        yield


everything = pytest.mark.parametrize("failing", FAILURES.values(), ids=FAILURES, indirect=True)


@everything
def test_commands_that_fail_show_no_secret(failing: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With --debug: their tracebacks, and the log at its lowest level."""
    file, empty = tmp_path / "a.db", tmp_path / "mnt"
    sqlite(file, "CREATE TABLE t(x)")
    empty.mkdir()
    log = tmp_path / "log"
    try:
        for line in (
            "ls bucket",
            "doctor bucket",
            "info bucket/a.db",
            f"import {file} bucket/a.db",
            f"mount -f bucket {empty}",
        ):
            code, said = run(capsys, *line.split(), "--debug", "--request-deadline", "0.2", "--log-file", log)
            assert code, line
            assert_silent(said, log.read_text())
    finally:
        telemetry.setup_logging()


@everything
def test_applications_see_no_secret(failing: None, caplog: pytest.LogCaptureFixture) -> None:
    """In their exceptions, the whole chain that a traceback shows, nor in a log at its lowest level."""
    caplog.set_level(logging.DEBUG, "s3blockfs")
    options: dict[str, Any] = {"request_deadline_s": 0.2, "endpoint_url": os.environ["S3BLOCKFS_ENDPOINT_URL"]}
    with pytest.raises((apsw.Error, errors.S3BlockFSError)) as caught:
        s3blockfs.connect(bucket="bucket", name="a.db", profile=os.environ.get("S3BLOCKFS_PROFILE"), **options)
    assert_silent(*traceback.format_exception(caught.value), repr(caught.value), caplog.text)


def test_a_password_in_the_sdks_own_setting_is_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    without_aws(monkeypatch).setenv("AWS_ENDPOINT_URL_S3", f"https://user:{PASSWORD}@s3.example")
    with pytest.raises(errors.UsageError, match="check endpoint URL") as caught:
        S3Store("bucket", runtime=Runtime(), access_key=KEY, secret_key=SECRET)
    assert_silent(*traceback.format_exception(caught.value))


# --- a daemon ----------------------------------------------------------------------------------------------

NOBODY = 65534


def as_nobody(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program as another user."""
    return shell("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--", *arguments)


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """One that everybody may enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="s3blockfs-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Daemon:
    """A mount in the background, made with no umask at all, in a folder with hostile modules."""

    mount: Path
    log: Path
    trap: Path
    metrics: str
    pids: list[int]
    secrets: list[str]
    said: str


@pytest.fixture(scope="module")
def daemon(mount_bucket: Place, open_folder: Path) -> Iterator[Daemon]:
    place = mount_bucket.inside("security")
    trap, mount, log, spill = (open_folder / name for name in ("cwd", "mnt", "log", "spill"))
    for folder in (trap, mount, spill):
        folder.mkdir()
    modules = ("s3blockfs", "click", "json", "boto3", "botocore", "fuse", "sitecustomize", "usercustomize", "encodings")
    for name in modules:
        (trap / f"{name}.py").write_text(f"open({str(trap / 'sprung')!r}, 'a').write({name!r})")
    address = nobody_listens().removeprefix("http://")
    command: list[str | Path] = [Path(sys.executable).parent / "s3blockfs", "mount", place.target, mount]
    command += ["--endpoint-url", place.url, "--debug", "--log-file", log, "--metrics", address, "--spill-dir", spill]
    environment = place.environment | {"AWS_SESSION_TOKEN": ""}
    try:
        done = shell(*command, env=environment, cwd=trap, umask=0)
        assert done.returncode == 0, done.stderr
        sqlite(mount / "a.db", "CREATE TABLE t(x)", "INSERT INTO t VALUES (1)")
        pids = daemons_of(mount)
        secrets = [place.access_key, place.secret_key]
        yield Daemon(mount, log, trap, address, pids, secrets, done.stdout + done.stderr)
        assert shell("fusermount", "-u", mount).returncode == 0
    finally:
        clean_up(mount)


def test_a_daemon_shows_its_keys_nowhere(daemon: Daemon) -> None:
    """Arguments, log, figures, mount table, and every file of the mount; its environment is its user's alone."""
    assert len(daemon.pids) == 1
    process = Path(f"/proc/{daemon.pids[0]}")
    with urllib.request.urlopen(f"http://{daemon.metrics}", timeout=PATIENCE_S) as answer:
        figures = answer.read().decode()
    assert "s3blockfs_commits_total" in figures and "a.db" not in figures
    shown = [daemon.said, daemon.log.read_text(), figures, shell("ps", "-eww", "-o", "args").stdout]
    shown += [(process / name).read_bytes().decode(errors="replace") for name in ("cmdline", "mountinfo", "comm")]
    shown += [shell("grep", "-a", "-r", "", daemon.mount, errors="replace").stdout]
    for secret in daemon.secrets:
        assert not any(secret in text for text in shown)
        assert secret.encode() in (process / "environ").read_bytes()  # so it would be found
    assert as_nobody("cat", process / "environ").returncode != 0


def test_a_daemon_takes_no_modules_from_the_current_folder(daemon: Daemon) -> None:
    assert not (daemon.trap / "sprung").exists()


def test_other_users_get_in_nowhere(daemon: Daemon, open_folder: Path) -> None:
    assert as_nobody("ls", open_folder).returncode == 0
    for line in (
        ["ls", daemon.mount],
        ["stat", daemon.mount / "a.db"],
        ["cat", daemon.mount / "a.db"],
        ["touch", daemon.mount / "b.db"],
        ["cat", daemon.log],
        ["ls", Path(f"/proc/{daemon.pids[0]}/fd/")],
    ):
        done = as_nobody(*line)
        assert done.returncode != 0 and "ermission denied" in done.stderr, (line, done)


def test_modes_do_not_depend_on_the_umask(daemon: Daemon) -> None:
    def mode(path: Path) -> str:
        return shell("stat", "-L", "-c", "%a", path).stdout.strip()

    (daemon.mount / "folder").mkdir()
    assert [mode(daemon.mount / name) for name in ("", "a.db", "folder")] == ["700", "600", "700"]
    assert [mode(daemon.mount / ".snapshots" / name) for name in ("", "a.db", "a.db/1.sqlite")] == ["500", "500", "400"]
    assert mode(daemon.log) == "600"
    with open(daemon.mount / "a.db-journal", "wb") as side:  # noqa: PTH123  a side file that is open
        side.write(b"x" * 100)
        files = [path for path in Path(f"/proc/{daemon.pids[0]}/fd").iterdir() if "spill" in str(path.readlink())]
        assert files
        assert {mode(path) for path in files} == {"600"}
    (daemon.mount / "a.db-journal").unlink()


def test_figures_are_for_this_machine(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    port = int(daemon.metrics.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), PATIENCE_S)
    for address in ("0.0.0.0:1", ":1", "[::]:1", "10.0.0.1:1", "host:1", "127.0.0.1:1@host:1"):
        assert run(capsys, "mount", "bucket", "dir", "--metrics", address)[0] == 2


def test_allow_other_lets_others_in_and_modes_keep_them_out(mount_bucket: Place, open_folder: Path) -> None:
    mount = open_folder / "shared"
    mount.mkdir()
    place = mount_bucket.inside("security")
    line = [
        sys.executable,
        "-m",
        "s3blockfs",
        "mount",
        place.target,
        mount,
        "--endpoint-url",
        place.url,
        "--allow-other",
    ]
    try:
        assert shell(*line, env=place.environment).returncode == 0
        assert "ermission denied" in as_nobody("ls", mount).stderr
        assert shell("fusermount", "-u", mount).returncode == 0
    finally:
        clean_up(mount)


# --- files of this machine ---------------------------------------------------------------------------------


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_the_log_file_is_private(no_umask: None, tmp_path: Path) -> None:
    try:
        telemetry.setup_logging("debug", str(tmp_path / "log"))
    finally:
        telemetry.setup_logging()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_the_embedded_server_keeps_its_files_private(no_umask: None, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    with seaweed(directory):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert [path for path in directory.rglob("*") if path.lstat().st_mode & 0o077] == []


@pytest.mark.parametrize("name", ["lock", "users", "server", "s3.json.new", "server.json.new"])
def test_the_embedded_server_follows_no_symlink(tmp_path: Path, name: str) -> None:
    """Somebody was in that folder before: what he points at stays as it is."""
    directory, precious = tmp_path / "store", tmp_path / "precious"
    directory.mkdir()
    precious.write_text("keep")
    (directory / name).symlink_to(precious)
    with pytest.raises(errors.EnvironmentProblem):
        EmbeddedServer.join(directory, Runtime())
    assert precious.read_text() == "keep"


def test_the_embedded_server_is_not_run_in_the_folder_of_another_user(tmp_path: Path) -> None:
    """Whose `server.json` would send us, and what we write, to a server of his."""
    directory = tmp_path / "store"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    with pytest.raises(errors.EnvironmentProblem, match="belongs to somebody else"):
        EmbeddedServer.join(directory, Runtime())
    assert list(directory.iterdir()) == []
