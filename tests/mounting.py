"""Real mounts for tests: daemons started by the real command line, clients in processes of their own.

A test process never opens a file on a mount itself: a daemon that hangs would take it along.

As a program, `python tests/mounting.py FILE` is such a client: a statement a line in, a JSON line out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

#: Everything a test waits for; the machine may be busy.
PATIENCE_S = 60.0

#: `s3blockfs` with libfuse's own log of what the kernel asks.
TRACED = """
from s3blockfs import fuse_binding
fuse_binding.DEFAULT_OPTIONS = {**fuse_binding.DEFAULT_OPTIONS, "debug": True}
from s3blockfs.cli.main import entry
entry()
"""


@dataclass(frozen=True)
class Place:
    """A key prefix in a bucket of an S3 server, and how to reach it."""

    url: str
    access_key: str
    secret_key: str
    bucket: str
    prefix: str = ""

    @property
    def target(self) -> str:
        return f"{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def environment(self) -> dict[str, str]:
        """What a daemon or command needs, without anything that the machine's own environment says about S3."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "S3BLOCKFS_"))}
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        metadata = {"AWS_EC2_METADATA_DISABLED": "true"}
        return kept | keys | nowhere | metadata | {"AWS_DEFAULT_REGION": "us-east-1"}

    def via(self, url: str) -> Place:
        """The same place through a proxy."""
        return replace(self, url=url)

    def inside(self, prefix: str) -> Place:
        return replace(self, prefix=f"{self.prefix}/{prefix}".strip("/"))

    @cached_property
    def _client(self) -> Any:
        import boto3  # slow, and not needed by the client process

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )

    def create_bucket(self) -> None:
        self._client.create_bucket(Bucket=self.bucket)

    def listing(self) -> list[str]:
        """Every key below the prefix, relative to it."""
        start = f"{self.prefix}/" if self.prefix else ""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
        return [item["Key"][len(start) :] for page in pages for item in page.get("Contents", ())]

    def get(self, key: str) -> bytes:
        body: bytes = self._client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}".strip("/"))["Body"].read()
        return body

    def put(self, key: str, body: bytes) -> None:
        self._client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}".strip("/"), Body=body)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}".strip("/"))


def command(place: Place, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run `s3blockfs ...` to its end; `changes` to the environment, None removes a variable."""
    environment = _changed(place.environment, changes)
    line = [sys.executable, "-m", "s3blockfs", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def shell(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    settings = {"capture_output": True, "text": True, "timeout": PATIENCE_S, "check": False, **options}
    done: subprocess.CompletedProcess[str] = subprocess.run([str(a) for a in arguments], **settings)
    return done


def sqlite(path: Path | str, *statements: str, check: bool = True) -> str:
    """What the real `sqlite3` program prints for these statements; with `check` it must succeed."""
    done = shell("sqlite3", "-batch", "-bail", path, *statements)
    if check and (done.returncode or done.stderr):
        raise AssertionError(f"sqlite3 {path}: exit code {done.returncode}: {done.stderr}")
    return done.stdout.strip() if check else done.stdout + done.stderr


# --- mounts -----------------------------------------------------------------------------------------------


class Mount:
    """One daemon in the foreground. Made by `mounted`."""

    def __init__(self, root: Path, process: subprocess.Popen[bytes]) -> None:
        self.directory = root / "mnt"
        self.process = process
        self.spill = root / "spill"
        self._log = root / "log"

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    @property
    def log(self) -> str:
        return self._log.read_text()

    def kernel_requests(self) -> Counter[str]:
        """What the kernel asked the daemon so far, by opcode; of a `traced` one."""
        return Counter(re.findall(r"^unique: \d+, opcode: (\w+)", self.log, re.MULTILINE))

    def kill(self) -> None:
        """SIGKILL; the dead mount stays."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The daemon's exit code, once it has ended."""
        return self.process.wait(PATIENCE_S)

    def unmount(self) -> None:
        """As `s3blockfs umount` does, without starting a Python."""
        if self.process.poll() is None:
            done = shell("fusermount", "-u", self.directory)
            assert done.returncode == 0, done.stderr
            assert self.wait() == 0, self.log


@dataclass(frozen=True)
class Folder:
    """In a mount that several tests share, what is one test's own."""

    directory: Path

    def __truediv__(self, name: str) -> Path:
        return self.directory / name


#: A key prefix that no other test uses, and how each of two machines shows it.
Shared = tuple[Place, Folder, Folder]


@contextlib.contextmanager
def mounted(
    place: Place, folder: Path, *options: str, refresh: str = "0", root: Path | None = None, traced: bool = False
) -> Iterator[Mount]:
    """`s3blockfs mount -f` with its own directories below `folder` (or those of an earlier mount in `root`). `traced`:
    libfuse logs every request of the kernel, for `Mount.kernel_requests`.

    Yields a Mount that answers. At the end it is unmounted, and no process, mount or temporary file may be left.
    """
    if root is None:
        root = Path(tempfile.mkdtemp(dir=folder, prefix="mount-"))
        for name in ("mnt", "spill", "tmp"):
            (root / name).mkdir()
    program = ["-c", TRACED] if traced else ["-m", "s3blockfs"]
    line = [sys.executable, *program, "mount", "-f", place.target, str(root / "mnt")]
    line += ["--endpoint-url", place.url, "--spill-dir", str(root / "spill"), "--refresh", refresh, *options]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("")  # an abstract address of the kernel's choice
        notify = "@" + channel.getsockname()[1:].decode()
        environment = place.environment | {"TMPDIR": str(root / "tmp"), "NOTIFY_SOCKET": notify}
        with (root / "log").open("ab") as log:
            process = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        mount = Mount(root, process)
        try:
            _wait_until_ready(mount, channel)
            yield mount
            mount.unmount()
        finally:
            _clear(mount)
    assert "nobody foresaw" not in mount.log, mount.log
    left = [str(path) for path in (*(root / "spill").rglob("*"), *(root / "tmp").rglob("*")) if path.is_file()]
    if process.returncode != -signal.SIGKILL:
        assert left == []


def _wait_until_ready(mount: Mount, channel: socket.socket) -> None:
    ended = os.pidfd_open(mount.process.pid)
    try:
        ready, _, _ = select.select([channel, ended], [], [], PATIENCE_S)
    finally:
        os.close(ended)
    assert channel in ready, f"the mount did not come up: {mount.log}"


def _clear(mount: Mount) -> None:
    """Whatever happened: no daemon, no mount."""
    if mount.process.poll() is None:
        mount.kill()
    if is_mounted(mount.directory):
        shell("fusermount", "-u", "-z", mount.directory)
    assert not is_mounted(mount.directory)


def is_mounted(directory: Path) -> bool:
    """By the kernel's table; never asks the mount itself."""
    return f" {directory} " in Path("/proc/self/mountinfo").read_text()


def daemons_of(directory: Path) -> list[int]:
    """The processes that were started as `s3blockfs mount` with this (unique) directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if {os.fsencode(directory), b"mount"} <= set(entry.read_bytes().split(b"\0")):
                found.append(int(entry.parent.name))
    return found


def clean_up(directory: Path) -> None:
    """End what a test with a background daemon may have left on its own directory."""
    for pid in daemons_of(directory):
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            select.select([ended], [], [], PATIENCE_S)
            os.close(ended)
    if is_mounted(directory):
        shell("fusermount", "-u", "-z", directory)
    assert not is_mounted(directory)


def numbers(count: int) -> str:
    """A SELECT of the numbers i from 1."""
    return f"WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<{count}) SELECT i FROM n"


def fresh_name(kind: str = "db") -> str:
    return f"{uuid.uuid4().hex[:12]}.{kind}"


def _changed(environment: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    return {k: v for k, v in (dict(environment) | dict(changes)).items() if v is not None}


# --- what a daemon takes ------------------------------------------------------------------------------------

#: What memory may differ by without a reason: arenas of malloc, threads that come and go.
SLACK_BYTES = 12 << 20
#: Small caches are full soon, and then nothing may grow any more.
SMALL = "--cache-size", "4M", "--memory", "8M"


class Usage(NamedTuple):
    descriptors: int
    memory_bytes: int


def usage(pid: int) -> Usage:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Usage(len(list(Path(f"/proc/{pid}/fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE"))


# --- a connection in another process ------------------------------------------------------------------------


class SqlError(Exception):
    """What SQLite said to the client."""


class Client:
    """A sqlite3 connection that stays open, in a process of its own, in autocommit until BEGIN."""

    def __init__(self, path: Path | str) -> None:
        """`path`: also a URI."""
        line = [sys.executable, __file__, str(path)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def send(self, statement: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(statement) + "\n")
        self.process.stdin.flush()

    def receive(self) -> list[Any]:
        """The rows of the statement sent. Raises SqlError."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 2 * PATIENCE_S)  # a COMMIT in an outage takes 80 s
        assert ready, "the client does not answer"
        answer = json.loads(self.process.stdout.readline() or '{"error": "the client ended"}')
        if "error" in answer:
            raise SqlError(answer["error"])
        rows: list[Any] = answer["rows"]
        return rows

    def __call__(self, *statements: str) -> list[Any]:
        """Run these; the rows of the last."""
        rows: list[Any] = []
        for statement in statements:
            self.send(statement)
            rows = self.receive()
        return rows


def main() -> Iterator[dict[str, Any]]:
    database = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0, uri=sys.argv[1].startswith("file:"))
    for line in sys.stdin:
        try:
            yield {"rows": database.execute(json.loads(line)).fetchall()}
        except sqlite3.Error as error:
            yield {"error": f"{getattr(error, 'sqlite_errorname', '')} {error}"}  # the name since Python 3.11
    database.close()


if __name__ == "__main__":
    for answer in main():
        print(json.dumps(answer), flush=True)
