"""`s3blockfs umount DIR`."""

import argparse
import os
from pathlib import Path
from typing import Any

from s3blockfs import mountpoint
from s3blockfs.cli.mount_cmd import is_served
from s3blockfs.cli.options import add_command
from s3blockfs.errors import Busy
from s3blockfs.runtime import Runtime

#: A daemon finishes its commit (60 s by default) before it goes.
PATIENCE_S = 90.0


def add_parser(subparsers: Any) -> None:
    text = "Unmount DIR and wait until its daemon has published everything and ended."
    summary = "unmount, and wait until the daemon has finished"
    add_command(subparsers, "umount", run, summary, text, store=False).add_argument("directory", metavar="DIR")


def run(namespace: argparse.Namespace) -> int:
    directory = Path(os.path.realpath(namespace.directory))
    if mountpoint.clear_dead_mount(str(directory)):
        return 0
    mountpoint.unmount(str(directory))
    runtime = Runtime()
    deadline = runtime.monotonic() + PATIENCE_S
    while is_served(directory):
        if runtime.monotonic() > deadline:
            raise Busy("unmounted, but the daemon is still at work; look at its log")
        runtime.sleep(0.02)
    return 0
