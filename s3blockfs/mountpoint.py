"""What a mount needs of a machine, unmounting, and clearing what a killed daemon left behind; all without libfuse."""

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from s3blockfs.errors import Busy, EnvironmentProblem, UsageError

log = logging.getLogger(__name__)

SUBTYPE = "s3blockfs"  # makes the kernel call our mounts `fuse.s3blockfs`, so that a dead one is known to be ours
FUSE_DEVICE = "/dev/fuse"
PR_SET_PDEATHSIG, MNT_FORCE = 1, 1  # prctl(2), umount(2)
ANSWER_S = 10.0  # how long a mount may take to say that it is alive


def findings() -> Iterator[str]:
    """What a mount needs of this machine besides libfuse: each line says ok, or FIX and behind a semicolon how to."""
    program = shutil.which("fusermount")
    yield f"ok  fusermount: {program}" if program else "FIX fusermount: not found; apt-get install fuse3"
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
        yield f"ok  {FUSE_DEVICE}: can be opened"
    except OSError as error:
        container = "a container needs `--device /dev/fuse --cap-add SYS_ADMIN`"
        yield f"FIX {FUSE_DEVICE}: {error.strerror}; as root, `modprobe fuse && chmod 666 /dev/fuse`; {container}"


def require() -> None:
    """Raise EnvironmentProblem if something needs fixing."""
    for finding in findings():
        if finding.startswith("FIX"):
            raise EnvironmentProblem(finding.removeprefix("FIX "))


def unmount(mountpoint: str) -> None:
    """Unmount, or raise Busy; the daemon may still be finishing (`destroy`) when this returns."""
    path, kind = _look_up(mountpoint)
    if kind != f"fuse.{SUBTYPE}":
        raise UsageError(f"no s3blockfs is mounted on {path}: `grep {SUBTYPE} /proc/mounts` lists those there are")
    _fusermount("-u", path)


def clear_dead_mount(mountpoint: str) -> bool:
    """Unmount what a killed daemon left behind; True when there was something. A live mount is left alone;
    EnvironmentProblem for a dead one that is not ours, and for one that does not answer."""
    path, kind = _look_up(mountpoint)
    if kind is None or not _is_dead(path):
        return False
    if kind != f"fuse.{SUBTYPE}":
        raise EnvironmentProblem(f"{path} is a dead {kind}, not ours: clear it with fusermount -u -z {path}")
    _fusermount("-u", "-z", path)  # lazily: programs may still sit in it, and they get ENOTCONN either way
    return True


def _is_dead(path: str) -> bool:
    """Whether the mount's daemon is gone. Asked by a child, because a daemon that hangs would hang this process too."""
    ask = "import os, sys\ntry: os.statvfs(sys.argv[1])\nexcept OSError as error: sys.exit(error.errno)"
    child = subprocess.Popen([sys.executable, "-I", "-c", ask, path])
    try:
        return child.wait(ANSWER_S) == errno.ENOTCONN
    except subprocess.TimeoutExpired as error:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a child that the kernel holds is left to init
            child.wait(1)
        text = f"{path} does not answer: if its daemon is gone, root clears it with umount -f -l {path}"
        raise EnvironmentProblem(text) from error


@contextlib.contextmanager
def lifeline(mountpoint: str) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Around the life of a mount, on a thread that waits for its end; to be called back once it is there, and once it
    is gone. If this process is killed between, another that is started here tells the kernel that the mount is dead.

    The kernel would find out when the last thread has ended. One that was waiting for its own mount (for a page of
    `-shm` to be written back, say) never does, and everybody who uses the mount would hang with it."""
    main = (
        "import sys; sys.path[:] = filter(None, sys.path); from s3blockfs.mountpoint import hold; hold(*sys.argv[1:])"
    )
    line, nowhere = [sys.executable, "-c", main, mountpoint, str(os.getpid())], subprocess.DEVNULL
    with subprocess.Popen(line, bufsize=0, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, cwd="/") as child:
        pipe = child.stdin
        assert pipe is not None

        def is_mounted() -> None:
            try:
                pipe.write(b"\n")
            except BrokenPipeError:
                log.warning(
                    "%s: its second process ended: a daemon that is killed may now leave it hanging", mountpoint
                )

        try:
            yield is_mounted, child.kill  # afterwards there may be another mount in its place
        finally:
            child.kill()


def hold(mountpoint: str, daemon: str) -> None:
    """What the other process does for that of this number."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which go to a whole terminal or service
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)  # of the thread, not the process: that may never end
    if not sys.stdin.buffer.readline():
        return  # there never was a mount
    before = _entry(mountpoint)
    try:
        state = Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return  # it ended before it could be asked for that signal
    if state != "Z":  # its first thread has ended, likewise
        signal.sigwait([signal.SIGUSR1])
    path, kind, number = _entry(mountpoint)
    if (path, kind, number) != before or kind != f"fuse.{SUBTYPE}":
        return  # unmounted, perhaps something else by now
    try:  # https://docs.kernel.org/filesystems/fuse.html#aborting-a-filesystem-connection
        Path(f"/sys/fs/fuse/connections/{number.split(':')[1]}/abort").write_text("1")
    except OSError:  # not to be seen, as in containers. With something open on it, it is aborted, but not unmounted
        os.open(path, os.O_PATH)
        ctypes.CDLL(None).umount2(os.fsencode(path), MNT_FORCE)


def _look_up(mountpoint: str) -> tuple[str, str | None]:
    """The path as the kernel's table has it, and the file system type mounted last on it; never asks the mount."""
    path, kind, _ = _entry(mountpoint)
    return path, kind


def _entry(mountpoint: str) -> tuple[str, str | None, str]:
    """The same, with the device number, `major:minor`."""
    text = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    mounts = re.findall(r"^[^ ]+ [^ ]+ ([^ ]+) [^ ]+ ([^ ]+) .*? - ([^ ]+) ", text, re.MULTILINE)
    table = {
        re.sub(r"\\([0-7]{3})", lambda o: chr(int(o[1], 8)), path): (kind, device) for device, path, kind in mounts
    }
    given = Path(mountpoint).absolute()
    path = os.path.join(os.path.realpath(given.parent), given.name)  # noqa: PTH118  plain strings, as in the table
    if path not in table:
        path = os.path.realpath(given)  # the last part may be a symlink
    return path, *table.get(path, (None, ""))


def _fusermount(*arguments: str) -> None:
    """Raises Busy or EnvironmentProblem."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(["fusermount", *arguments], capture_output=True, text=True, env=environment, check=False)
    except FileNotFoundError as error:
        raise EnvironmentProblem("fusermount is missing: apt-get install fuse3") from error
    path, said = arguments[-1], done.stderr.strip().replace("\n", "; ")
    if done.returncode and "busy" in said:
        raise Busy(f"{path} is in use: close what uses it (`fuser -vm {path}` names it) and try again")
    if done.returncode:
        raise EnvironmentProblem(f"fusermount could not unmount {path}: {said}: unmount it as the user who mounted it")
