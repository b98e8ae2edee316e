"""`s3blockfs mount BUCKET[/PREFIX] DIR`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s3blockfs import notify
from s3blockfs.cli.options import config_from, open_store, parse_target, store_options
from s3blockfs.errors import EnvironmentProblem, UsageError
from s3blockfs.runtime import SystemRuntime

#: The background daemon's end of a pipe: it writes one line there when the mount answers.
READY_VARIABLE = "S3BLOCKFS_READY_FD"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "mount",
        parents=[store_options()],
        help="show the databases of a bucket as files",
        description="Show every database under BUCKET/PREFIX as a file in DIR. Returns when the mount answers.",
    )
    parser.add_argument("target", metavar="BUCKET[/PREFIX]", help="what to mount; s3://BUCKET/PREFIX works too")
    parser.add_argument("directory", metavar="DIR", help="an existing, empty directory")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground until unmounted")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    parse_target(namespace.target)
    if READY_VARIABLE in os.environ or namespace.foreground:
        return _serve(namespace)
    return _in_background()


def _in_background() -> int:
    """Start the same command as a daemon; 0 when the mount answers, its exit code and message when it does not.

    A new process instead of a fork: nothing of this one's threads and connections gets into the daemon.
    """
    readable, writable = os.pipe()
    environment = {**os.environ, READY_VARIABLE: str(writable)}
    command = [sys.executable, "-m", "s3blockfs", *sys.argv[1:]]
    daemon = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
        pass_fds=[writable],
        start_new_session=True,
    )
    os.close(writable)
    with os.fdopen(readable) as pipe:
        answered = pipe.readline()
    if answered:
        daemon.returncode = 0  # it goes on; do not warn that it is still running
        return 0
    return daemon.wait() or EnvironmentProblem.exit_code


def _serve(namespace: argparse.Namespace) -> int:
    from s3blockfs import fuse_binding, mountpoint  # needs libfuse
    from s3blockfs.catalog import Catalog
    from s3blockfs.fuse_ops import FileSystem

    target, config = parse_target(namespace.target), config_from(namespace)
    pipe = os.environ.pop(READY_VARIABLE, None)
    mountpoint.require()
    if mountpoint.clear_dead_mount(namespace.directory):
        print(f"s3blockfs: cleared a dead mount on {namespace.directory}", file=sys.stderr)
    directory = Path(namespace.directory).resolve()
    if not directory.is_dir():
        raise UsageError(f"{namespace.directory}: no such directory; create it with mkdir")
    if os.path.ismount(directory):
        raise UsageError(f"{namespace.directory}: something is mounted there already; s3blockfs umount it first")
    runtime = SystemRuntime()
    with open_store(namespace, target, runtime) as store:
        store.check_bucket(target.prefix)
        catalog = Catalog(store, runtime, config, target.prefix)
        entry = Catalog(store, runtime, config, "").lookup(target.prefix) if target.prefix else None
        if entry is not None and not entry.is_folder:
            raise UsageError(f"{target}: is a database, not a folder of databases; mount its parent")

        def ready() -> None:
            notify.ready(f"{target} on {directory}")
            if pipe is not None:
                _detach(int(pipe))

        try:
            with alive_lock(directory):
                operations = FileSystem(catalog, config, str(directory), ready)
                fuse_binding.mount(operations, str(directory), options={"fsname": str(target)})
        finally:
            runtime.close()
    return 0


def _detach(pipe: int) -> None:
    """Tell the parent that the mount answers, and let go of its terminal."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    os.write(pipe, b"ready\n")
    os.close(pipe)


def alive_path(directory: Path) -> Path:
    """The file that the daemon of this mount keeps locked for as long as it lives."""
    folder = Path(tempfile.gettempdir()) / f"s3blockfs-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EnvironmentProblem(f"{folder}: belongs to somebody else; remove it")
    return folder / hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]


@contextlib.contextmanager
def alive_lock(directory: Path) -> Iterator[None]:
    """Held by the daemon until its process has ended, which is what `umount` waits for."""
    path = alive_path(directory)
    fcntl.flock(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), fcntl.LOCK_EX)  # never closed here
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
