"""How mounts end: a daemon that is killed while it waits for its own mount, and requests at the unmount."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from memory_fs import mount_line, until
from mounting import PATIENCE_S, Client, Place, mounted, shell
from proxy import Fault, FaultProxy

from s3blockfs.errors import EnvironmentProblem
from s3blockfs.fuse_binding import Mounted, Operations
from s3blockfs.mountpoint import clear_dead_mount

pytestmark = pytest.mark.mount

#: A getattr on `/ever` is never answered; one of the daemon's own threads waits for it.
DAEMON = """
import stat, sys, threading, time
from s3blockfs.fuse_binding import Operations, mount
from s3blockfs.mountpoint import lifeline

class Hanging(Operations):
    def init(self):
        threading.Thread(target=lambda: self.mounted.inode("/ever")).start()
    def getattr(self, path, info=None):
        if path == "/ever":
            is_mounted()
            print("waits", flush=True)
            time.sleep(1000)
        return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}

with lifeline(sys.argv[1]) as (is_mounted, _):
    mount(Hanging(), sys.argv[1], options={"subtype": "s3blockfs"})
"""


def child_of(pid: int) -> int:
    """Once it is ready, which is when it ignores signals."""
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    until(lambda: int(Path(f"/proc/{child}/status").read_text().split("SigIgn:")[1].split()[0], 16) & 1)
    return int(child)


def arguments_of(pid: int) -> bytes:
    """Empty once it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_it_ends_and_leaves_a_dead_mount(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DAEMON, str(tmp_path)], stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None and daemon.stdout.readline() == "waits\n"
            other = child_of(daemon.pid)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # what a service or terminal sends to all
                os.kill(other, number)
            with pytest.raises(subprocess.TimeoutExpired):
                daemon.wait(0.5)
            daemon.kill()
            assert daemon.wait(PATIENCE_S) == -signal.SIGKILL
            assert mount_line(tmp_path), "programs would write into the folder below"
            asked = shell(sys.executable, "-c", "import os, sys; os.stat(sys.argv[1])", tmp_path)
            assert f"[Errno {errno.ENOTCONN}]" in asked.stderr
            assert clear_dead_mount(str(tmp_path))
            until(lambda: not arguments_of(other))
        finally:
            shell("umount", "-f", "-l", tmp_path)
            daemon.kill()


def test_it_goes_with_the_unmount(place: Place, tmp_path: Path, proxy: FaultProxy) -> None:
    """Not only with the daemon, which may have much to publish: the next mount may have the same place and number."""
    published = threading.Event()
    with mounted(place.via(proxy.url), tmp_path, "--group-commit", "60") as mount:
        other = child_of(mount.process.pid)
        assert b"hold" in arguments_of(other)
        with Client(mount / "a.db") as client:
            client("PRAGMA journal_mode=WAL", "PRAGMA synchronous=OFF", "CREATE TABLE t(a)")
            proxy.rule = lambda request: Fault(then=lambda: published.wait(9))
            client.kill()
        assert shell("fusermount", "-u", mount.directory).returncode == 0
        until(lambda: not arguments_of(other), 7)
        assert mount.process.poll() is None
        published.set()
        assert mount.wait() == 0


@pytest.mark.parametrize("was_up", [True, False])
def test_an_abort_by_the_unmount_is_no_failure(monkeypatch: pytest.MonkeyPatch, was_up: bool) -> None:
    """The kernel answers ECONNABORTED to a thread that is just reading a request; libfuse then exits with 1. One of 25
    unmounts right after a program with 60 open files was killed."""

    def main(mounted: Mounted, *_: object, **__: object) -> None:
        if was_up:
            mounted._up_or_ended.set()
        raise RuntimeError(1)

    monkeypatch.setattr(Mounted.__mro__[1], "__init__", main)
    with contextlib.nullcontext() if was_up else pytest.raises(EnvironmentProblem, match="cannot be mounted"):
        Mounted().run(Operations(), "/mnt", {})


def test_it_goes_with_a_daemon_that_dies_at_once(tmp_path: Path) -> None:
    """Before the second process could ask to be told."""
    code = """
import os, subprocess, sys
from s3blockfs.mountpoint import lifeline
with lifeline(sys.argv[1]) as (is_mounted, _):
    is_mounted()
    print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
    os.kill(os.getpid(), 9)
"""
    other = int(shell(sys.executable, "-c", code, tmp_path).stdout)
    try:
        until(lambda: not arguments_of(other))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
