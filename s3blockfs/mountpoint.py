"""The care of mount points: what a machine must have, unmounting, and clearing what a killed daemon left behind.

Works without libfuse, on the kernel's mount table and `fusermount` (libfuse 3 brings it as `fusermount3`; it serves
mounts of libfuse 2 as well). Does not belong here: serving a mount (`fuse_binding.py`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from s3blockfs.errors import Busy, EnvironmentProblem, UsageError

#: The subtype makes the kernel call our mounts `fuse.s3blockfs`: that is how a dead one is known to be ours.
SUBTYPE = "s3blockfs"

#: How long a mount may take to say that it is alive, in seconds.
ANSWER_S = 10.0


def require() -> None:
    """Raise EnvironmentProblem, saying how to get it, when this machine lacks what a mount needs besides libfuse."""
    if os.geteuid() and not shutil.which("fusermount"):
        raise EnvironmentProblem(
            "fusermount is missing, which libfuse needs for users other than root: apt-get install fuse3"
        )
    _fusermount_path()
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EACCES:
            fix = "chmod 666 /dev/fuse, or run as root"
        elif error.errno == errno.EPERM:
            fix = "start the container with --device /dev/fuse --cap-add SYS_ADMIN"
        else:
            fix = "modprobe fuse; a container needs --device /dev/fuse --cap-add SYS_ADMIN"
        raise EnvironmentProblem(f"/dev/fuse cannot be opened ({error.strerror}): {fix}") from error


def unmount(mountpoint: str) -> None:
    """Unmount. UsageError when no s3blockfs is mounted there, Busy when something still uses it.

    The daemon may still be finishing (`destroy`) when this returns.
    """
    path = _absolute(mountpoint)
    if _mounted_type(path) != f"fuse.{SUBTYPE}":
        raise UsageError(f"no s3blockfs is mounted on {path}: `grep {SUBTYPE} /proc/mounts` lists those there are")
    _fusermount("-u", path)


def clear_dead_mount(mountpoint: str) -> bool:
    """Unmount what a killed daemon left behind on `mountpoint`; True when there was something to clear.

    A live mount, of whatever kind, is left alone. EnvironmentProblem for a dead mount that is not ours, and for one
    that gives no answer within ANSWER_S.
    """
    path = _absolute(mountpoint)
    kind = _mounted_type(path)
    if kind is None or not _is_dead(path):
        return False
    if kind != f"fuse.{SUBTYPE}":
        raise EnvironmentProblem(
            f"{path} is a dead mount of type {kind}, not ours: clear it with fusermount -u -z {path}"
        )
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


def _absolute(mountpoint: str) -> str:
    """The path as the mount table has it; symlinks are followed, and a mount is not asked about itself."""
    given = Path(mountpoint).absolute()
    path = os.path.join(os.path.realpath(given.parent), given.name)  # noqa: PTH118  plain strings, as in the table
    return path if _mounted_type(path) else os.path.realpath(given)


def _mounted_type(path: str) -> str | None:
    """The file system type mounted last on exactly this path; asks the kernel's table and never the mount itself."""
    kind = None
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4]) == path:
            kind = fields[fields.index("-") + 1]
    return kind


def _fusermount_path() -> str:
    found = shutil.which("fusermount") or shutil.which("fusermount3")
    if not found:
        raise EnvironmentProblem("fusermount is missing: apt-get install fuse3")
    return found


def _fusermount(*arguments: str) -> None:
    """Raises Busy or EnvironmentProblem."""
    command = [_fusermount_path(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
    path, said = arguments[-1], done.stderr.strip().replace("\n", "; ")
    if done.returncode and "busy" in said:
        raise Busy(f"{path} is in use: close what uses it (`fuser -vm {path}` names it) and try again")
    if done.returncode:
        raise EnvironmentProblem(f"fusermount could not unmount {path}: {said}: unmount it as the user who mounted it")
