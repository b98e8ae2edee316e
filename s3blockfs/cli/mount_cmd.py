"""`s3blockfs mount BUCKET[/PREFIX] DIR` and `s3blockfs umount DIR`."""

import contextlib
import fcntl
import os
import re
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import click

from s3blockfs import mountpoint, notify
from s3blockfs.cli import options
from s3blockfs.errors import Busy, EnvironmentProblem, UsageError
from s3blockfs.runtime import Runtime, all_of

#: Set for the daemon in the background: it says on stdout when the mount answers, then lets go of its terminal.
DAEMON_VARIABLE = "S3BLOCKFS_DAEMON"
READY = b"ready\n"
PATIENCE_S = 90.0  # of `umount`: a daemon finishes its commit (60 s by default) before it goes

#: Options of mount(8) and fstab(5) that say nothing to a file system in user space.
_GENERIC = re.compile(
    "(no)?(auto|user|users|owner|group|fail|dev|suid|exec|atime|diratime|relatime|strictatime|lazytime|mand|iversion)"
    "|defaults|rw|_netdev|a?sync|dirsync|silent|loud|sloppy|(comment|user)=.*|[xX]-.*"
)


class _Mount(options.Command):
    """Reads `-o` as the flags it stands for; flags on the command line come behind them and win."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        items = [item for text in given.get("fstab", ()) for item in text.split(",") if item]
        flags = (self._flag(item, ctx, "sloppy" in items) for item in items)
        return super().parse_args(ctx, [*filter(None, flags), *args])

    def _flag(self, item: str, ctx: click.Context, sloppy: bool) -> str | None:
        name, equals, value = item.partition("=")
        flag = "--read-only" if name == "ro" else "--" + name.replace("_", "-")
        for option in self.params:
            if flag in option.opts and isinstance(option, click.Option):
                if option.is_flag == bool(equals):
                    needs = "takes no" if equals else "needs a"
                    raise click.UsageError(f"mount option {item!r}: {name} {needs} value", ctx)
                return flag + equals + value
        if not sloppy and not _GENERIC.fullmatch(item):
            raise click.UsageError(f"mount option {item!r} is unknown", ctx)
        return None


@click.command("mount", cls=_Mount, mount=True, short_help="show the databases of a bucket as files")
@click.argument("target", type=options.target, metavar="BUCKET[/PREFIX]")
@click.argument("directory", metavar="DIR")
@click.option("-f", "--foreground", is_flag=True, help="stay in the foreground until unmounted")
@click.option("-o", "fstab", multiple=True, expose_value=False, metavar="OPTION[=VALUE],...", help="as in /etc/fstab")
def mount(target: options.Target, directory: str, foreground: bool) -> int:
    """Show every database under BUCKET/PREFIX as a file in DIR, an existing, empty directory.
    Returns when the mount answers."""
    if DAEMON_VARIABLE in os.environ or foreground:
        return _serve(target, directory)
    return _in_background()


def _in_background() -> int:
    """Start the same command as a daemon; 0 when the mount answers, its exit code and message when it does not.
    A new process instead of a fork: nothing of this one's threads and connections gets into the daemon. Nor do modules
    from the current folder, which may be anybody's; `-m` would look there first."""
    main = "import sys; sys.path[:] = filter(None, sys.path); from s3blockfs.cli.main import entry; entry()"
    line = [sys.executable, "-c", main, *options.settings().arguments]
    environment = {**os.environ, DAEMON_VARIABLE: "1"}
    daemon = Popen(line, stdin=DEVNULL, stdout=PIPE, env=environment, start_new_session=True)
    assert daemon.stdout is not None
    with daemon.stdout as pipe:
        answered = pipe.readline()
    if answered == READY:
        daemon.returncode = 0  # it goes on; do not warn that it is still running
        return 0
    return daemon.wait() or EnvironmentProblem.exit_code


def _serve(target: options.Target, given: str) -> int:
    from s3blockfs import fuse_binding, metrics  # needs libfuse
    from s3blockfs.fuse_ops import FileSystem
    from s3blockfs.names import undotted

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a database in WAL mode takes two, and 1024 is usual
    config, in_background = options.settings().config, os.environ.pop(DAEMON_VARIABLE, None)
    if config.exclusive and (config.read_only or not config.lease_s):
        raise UsageError("--exclusive means to hold leases: leave out --read-only and --lease 0")
    if config.direct_io and not config.read_only:
        raise UsageError("--direct-io is for mounts that only read: add --read-only")
    mountpoint.require()
    if mountpoint.clear_dead_mount(given):
        options.complain(f"cleared a dead mount on {given}")
    directory = Path(given).resolve()
    if not directory.is_dir():
        raise UsageError(f"{given}: no such directory; create it with mkdir")
    if os.path.ismount(directory):
        raise UsageError(f"{given}: something is mounted there already; s3blockfs umount it first")

    def ready() -> None:
        is_mounted()
        notify.ready(f"{target} on {directory}")
        if in_background:
            _detach()

    with options.opened(target) as (catalog, store, runtime):
        above = [catalog.at(each)[1].read for each in (target.prefix, undotted(target.prefix)) if each]
        looks: list[Callable[[], Any]] = [partial(store.check_bucket, target.prefix), catalog.learn_if_safe, *above]
        for version in all_of(runtime, looks)[2:]:
            if version is not None and not version.head.deleted:
                raise UsageError(f"{target}: is a database, not a folder of databases; mount its parent")
        if config.metrics:
            metrics.serve(config.metrics)
        # A lock on the directory itself, below the mount, that ends with this process: `umount` waits for it.
        with contextlib.suppress(OSError):  # see `is_served`
            fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_SH)
        operations = FileSystem(catalog, config, runtime, str(directory), ready)
        fuse_options: dict[str, str | bool] = {"fsname": str(target), "allow_other": config.allow_other}
        with mountpoint.lifeline(str(directory)) as (is_mounted, operations.on_end):
            fuse_binding.mount(operations, str(directory), options={**fuse_options, **operations.timeouts})
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
    except OSError as error:  # but for a daemon: a file system without such locks, so nobody can tell
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


@options.command("umount", store=False, short_help="unmount, and wait until the daemon has finished")
@click.argument("directory", metavar="DIR")
def umount(directory: str) -> None:
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
