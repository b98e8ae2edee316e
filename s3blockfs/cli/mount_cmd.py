"""`s3blockfs mount BUCKET[/PREFIX] DIR`."""

import argparse
import contextlib
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from s3blockfs import notify
from s3blockfs.cli.options import add_command, config_from, open_store, parse_target
from s3blockfs.errors import EnvironmentProblem, UsageError
from s3blockfs.runtime import Runtime

#: Set for the daemon in the background: it says on stdout when the mount answers, then lets go of its terminal.
DAEMON_VARIABLE = "S3BLOCKFS_DAEMON"
READY = b"ready\n"


def add_parser(subparsers: Any) -> None:
    text = "Show every database under BUCKET/PREFIX as a file in DIR. Returns when the mount answers."
    parser = add_command(subparsers, "mount", run, "show the databases of a bucket as files", text)
    parser.add_argument("target", metavar="BUCKET[/PREFIX]", help="what to mount; s3://BUCKET/PREFIX works too")
    parser.add_argument("directory", metavar="DIR", help="an existing, empty directory")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground until unmounted")


def run(namespace: argparse.Namespace) -> int:
    parse_target(namespace.target)
    if DAEMON_VARIABLE in os.environ or namespace.foreground:
        return _serve(namespace)
    return _in_background()


def _in_background() -> int:
    """Start the same command as a daemon; 0 when the mount answers, its exit code and message when it does not.
    A new process instead of a fork: nothing of this one's threads and connections gets into the daemon."""
    daemon = subprocess.Popen(
        [sys.executable, "-m", "s3blockfs", *sys.argv[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, DAEMON_VARIABLE: "1"},
        start_new_session=True,
    )
    assert daemon.stdout is not None
    with daemon.stdout as pipe:
        answered = pipe.readline()
    if answered == READY:
        daemon.returncode = 0  # it goes on; do not warn that it is still running
        return 0
    return daemon.wait() or EnvironmentProblem.exit_code


def _serve(namespace: argparse.Namespace) -> int:
    from s3blockfs import fuse_binding, mountpoint  # needs libfuse
    from s3blockfs.catalog import Catalog
    from s3blockfs.fuse_ops import FileSystem

    target, config = parse_target(namespace.target), config_from(namespace)
    in_background = os.environ.pop(DAEMON_VARIABLE, None)
    mountpoint.require()
    if mountpoint.clear_dead_mount(namespace.directory):
        print(f"s3blockfs: cleared a dead mount on {namespace.directory}", file=sys.stderr)
    directory = Path(namespace.directory).resolve()
    if not directory.is_dir():
        raise UsageError(f"{namespace.directory}: no such directory; create it with mkdir")
    if os.path.ismount(directory):
        raise UsageError(f"{namespace.directory}: something is mounted there already; s3blockfs umount it first")
    runtime = Runtime()
    with open_store(namespace, target, runtime) as store:
        store.check_bucket(target.prefix)
        catalog = Catalog(store, runtime, config, target.prefix)
        entry = Catalog(store, runtime, config, "").lookup(target.prefix) if target.prefix else None
        if entry is not None and not entry.is_folder:
            raise UsageError(f"{target}: is a database, not a folder of databases; mount its parent")

        def ready() -> None:
            notify.ready(f"{target} on {directory}")
            if in_background:
                _detach()

        try:
            # A lock on the directory itself, below the mount, that ends with this process: `umount` waits for it.
            with contextlib.suppress(OSError):  # see `is_served`
                fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_SH)
            operations = FileSystem(catalog, config, runtime, str(directory), ready)
            fuse_binding.mount(operations, str(directory), options={"fsname": str(target)})
        finally:
            runtime.close()
    return 0


def _detach() -> None:
    """Tell the parent that the mount answers, and let go of its terminal."""
    os.write(sys.stdout.fileno(), READY)
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())
        os.dup2(null.fileno(), sys.stderr.fileno())


def is_served(directory: Path) -> bool:
    """Whether a daemon is still at work for this directory, on which nothing is mounted any more."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without such locks, so nobody can tell
        return False
    finally:
        os.close(descriptor)
    return False
