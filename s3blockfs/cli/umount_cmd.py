"""`s3blockfs umount DIR`."""

import os
from pathlib import Path

import click

from s3blockfs import mountpoint
from s3blockfs.cli import options
from s3blockfs.cli.mount_cmd import is_served
from s3blockfs.errors import Busy
from s3blockfs.runtime import Runtime

#: A daemon finishes its commit (60 s by default) before it goes.
PATIENCE_S = 90.0


@options.command("umount", store=False, short_help="unmount, and wait until the daemon has finished")
@click.argument("directory", metavar="DIR")
def run(directory: str) -> None:
    """Unmount DIR and wait until its daemon has published everything and ended."""
    path, runtime = Path(os.path.realpath(directory)), Runtime()
    if mountpoint.clear_dead_mount(str(path)):
        return
    mountpoint.unmount(str(path))
    deadline = runtime.monotonic() + PATIENCE_S
    while is_served(path):
        if runtime.monotonic() > deadline:
            raise Busy("unmounted, but the daemon is still at work; look at its log")
        runtime.sleep(0.02)
