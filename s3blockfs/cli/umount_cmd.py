"""`s3blockfs umount DIR`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO, Any

from s3blockfs import mountpoint
from s3blockfs.cli.mount_cmd import alive_path
from s3blockfs.errors import Busy
from s3blockfs.runtime import SystemRuntime

#: A daemon finishes its commit (60 s by default) before it goes.
PATIENCE_S = 90.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "umount",
        help="unmount, and wait until the daemon has finished",
        description="Unmount DIR and wait until its daemon has published everything and ended.",
    )
    parser.add_argument("directory", metavar="DIR")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    directory = Path(os.path.realpath(namespace.directory))
    if mountpoint.clear_dead_mount(str(directory)):
        return 0
    path = alive_path(directory)
    with contextlib.ExitStack() as stack:
        # Before unmounting: the daemon removes the name when it is about to end.
        alive = stack.enter_context(path.open()) if path.exists() else None
        mountpoint.unmount(str(directory))
        if alive is not None:
            _wait_for_end(alive)
            path.unlink(missing_ok=True)
    return 0


def _wait_for_end(file: IO[str]) -> None:
    runtime = SystemRuntime()
    deadline = runtime.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if runtime.monotonic() > deadline:
                raise Busy("unmounted, but the daemon is still at work; look at its log") from None
            runtime.sleep(0.02)
