"""The daemon of `test_fuse_binding.py`: a small file system in memory, run as a script in its own process (`Daemon`).

Arguments: a directory and the parameters of `serve` as JSON. It serves `mnt` in that directory, appends what its
callbacks see to `events`, and does what the files in `control` say: one named like an operation names an exception.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fcntl import F_GETLK, F_RDLCK, F_SETLKW, F_UNLCK, F_WRLCK
from pathlib import Path
from typing import Any

from s3blockfs.errors import Busy, S3BlockFSError
from s3blockfs.fuse_binding import Attributes, FileInfo, Flock, Operations, context_pid, mount
from s3blockfs.locks import TO_END, Kind, RangeLocks

EXCEPTIONS: dict[str, tuple[Callable[[], BaseException], int]] = {
    "no errno": (lambda: TimeoutError("timed out"), errno.EIO),
    "no errno either": (lambda: ConnectionError(), errno.EIO),
    "zero": (lambda: OSError(0, "zero"), errno.EIO),
    "negative": (lambda: OSError(-5, "negative"), errno.EIO),
    "beyond the kernel": (lambda: OSError(523, "the kernel would leave the caller hanging"), errno.EIO),
    "bug": (lambda: ZeroDivisionError("a bug"), errno.EIO),
    "exit": (lambda: SystemExit(3), errno.EIO),
    "full": (lambda: OSError(errno.ENOSPC, "full"), errno.ENOSPC),
    "busy": (lambda: Busy("somebody else writes"), errno.EAGAIN),
    "ours": (lambda: S3BlockFSError("something"), errno.EIO),
}


def thread_states() -> int:
    """How many thread states this interpreter has."""
    api, states = ctypes.PyDLL(None), 0
    for function in (api.PyInterpreterState_Get, api.PyInterpreterState_ThreadHead, api.PyThreadState_Next):
        function.restype = ctypes.c_void_p
    state = api.PyInterpreterState_ThreadHead(ctypes.c_void_p(api.PyInterpreterState_Get()))
    while state:
        state, states = api.PyThreadState_Next(ctypes.c_void_p(state)), states + 1
    return states


class Node:
    def __init__(self) -> None:
        self.data = bytearray()
        self.locks = RangeLocks()


class MemoryFS(Operations):
    """Files in one directory, in memory; everything that a callback sees goes to the event file."""

    def __init__(self, base: Path, keep_cache: bool) -> None:
        self.base, self.keep_cache = base, keep_cache
        self.events = os.open(base / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.files: dict[str, Node] = {}
        self.handles: dict[int, Node] = {}
        self.calls = threading.local()

    def control(self, name: str) -> str:
        path = self.base / "control" / name
        return path.read_text() if path.exists() else ""

    def saw(self, operation: str, **details: object) -> None:
        self.calls.count = getattr(self.calls, "count", 0) + 1
        event = {"op": operation, "thread": threading.get_native_id(), "nth": self.calls.count, **details}
        os.write(self.events, json.dumps(event).encode() + b"\n")
        time.sleep(float(self.control(f"slow-{operation}") or 0))
        if name := self.control(operation):
            raise EXCEPTIONS[name][0]()

    def node(self, path: str | None, info: FileInfo | None = None) -> Node:
        if info is not None:
            return self.handles[info.fh]
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return self.files[path]

    def init(self) -> None:
        self.saw("init")
        if self.control("invalidate"):
            threading.Thread(target=self.invalidate, daemon=True).start()

    def invalidate(self) -> None:
        with contextlib.suppress(ConnectionError, OSError):  # until the mount is ending
            while True:
                self.mounted.invalidate_inode(2)

    def quiesce(self) -> None:
        self.saw("quiesce")

    def destroy(self) -> None:
        self.saw("destroy")
        self.saw("destroyed")

    def getattr(self, path: str | None, info: FileInfo | None = None) -> Attributes:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 1}
        size = len(self.node(path, info).data)
        return {"st_mode": stat.S_IFREG | 0o644, "st_nlink": 1, "st_size": size, "st_mtime": 1_000_000_001}

    def readdir(self, path: str) -> list[tuple[str, Attributes | None]]:
        self.saw("readdir", path=path, states=thread_states())
        return [(name[1:], self.getattr(name)) for name in self.files]

    def create(self, path: str, mode: int, info: FileInfo) -> None:
        self.files[path] = Node()
        self.open(path, info)

    def open(self, path: str, info: FileInfo) -> None:
        self.saw("open", path=path, truncates=bool(info.flags & os.O_TRUNC), pid=context_pid())
        node = self.node(path)
        if info.flags & os.O_TRUNC:
            node.data.clear()
        info.keep_cache = self.keep_cache
        info.fh = len(self.handles) + 1
        self.handles[info.fh] = node

    def read(self, path: str | None, size: int, offset: int, info: FileInfo) -> bytes:
        self.saw("read", path=path)
        answers: dict[str, Any] = {"too much": bytes(size + 1), "none": None, "bytearray": bytearray(1)}
        if wrong := self.control("read-answer"):
            return answers[wrong]  # type: ignore[no-any-return]
        return bytes(self.node(path, info).data[offset : offset + size])

    def write(self, path: str | None, data: bytes, offset: int, info: FileInfo) -> int:
        self.saw("write", path=path, size=len(data))
        buffer = self.node(path, info).data
        buffer.extend(bytes(max(0, offset - len(buffer))))
        buffer[offset : offset + len(data)] = data
        return len(data)

    def truncate(self, path: str | None, length: int, info: FileInfo | None = None) -> None:
        self.saw("truncate")
        buffer = self.node(path, info).data
        buffer[:] = buffer[:length].ljust(length, b"\0")

    def flush(self, path: str | None, info: FileInfo) -> None:
        self.saw("flush", owner=info.lock_owner)

    def fsync(self, path: str | None, datasync: int, info: FileInfo) -> None:
        self.saw("fsync")
        self.saw("fsync-done")

    def unlink(self, path: str) -> None:
        self.saw("unlink", path=path)
        del self.files[path]

    def rename(self, old: str, new: str) -> None:
        self.saw("rename", old=old, new=new)
        self.files[new] = self.files.pop(old)

    def lock(self, path: str | None, info: FileInfo, command: int, lock: Flock) -> None:
        end = lock.l_start + lock.l_len - 1 if lock.l_len else TO_END
        details = {
            "start": lock.l_start,
            "end": end,
            "kind": lock.l_type,
            "pid": lock.l_pid,
            "waits": command == F_SETLKW,
        }
        self.saw("lock", owner=info.lock_owner, **details)
        node = self.handles[info.fh]
        if remote := self.control("remote"):
            node.data[:] = remote.encode()
            self.mounted.invalidate_inode(int(self.control("inode") or self.mounted.inode("/file")))
        if lock.l_type == F_UNLCK:
            node.locks.unlock(info.lock_owner, lock.l_start, end)
            return
        kind = Kind.READ if lock.l_type == F_RDLCK else Kind.WRITE
        wish = (info.lock_owner, kind, lock.l_start, end)
        if command == F_SETLKW:
            node.locks.wait_lock(*wish, lock.l_pid, self.mounted.interrupted)
        elif command != F_GETLK:
            if node.locks.try_lock(*wish, lock.l_pid):
                raise BlockingIOError(errno.EAGAIN, "locked")
        elif conflict := node.locks.test(*wish):
            lock.l_type = F_RDLCK if conflict.kind is Kind.READ else F_WRLCK
            lock.l_start, lock.l_pid = conflict.start, conflict.pid
            lock.l_len = 0 if conflict.end == TO_END else conflict.end - conflict.start + 1
        else:
            lock.l_type = F_UNLCK


def serve(base: Path, arguments: dict[str, Any]) -> None:
    logging.basicConfig()
    operations = MemoryFS(base, arguments.get("keep_cache", False))
    if not arguments.get("locks", True):
        operations.lock = None  # type: ignore[assignment,method-assign]
    if arguments.get("handler"):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(99))
    mount(operations, str(base / "mnt"), options=arguments.get("options"))


# --- the tests' side ----------------------------------------------------------------------------------------------


def until(condition: Callable[[], Any], timeout_s: float = 10) -> Any:
    """Poll until `condition` is true and return its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


def mount_line(path: Path) -> str:
    shown = "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in str(path))
    lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")
    return next((line for line in lines if f" {shown} " in line), "")


class Daemon:
    """One mount and the process that serves it."""

    def __init__(self, base: Path, **arguments: Any) -> None:
        self.base, self.mnt = base, base / "mnt"
        self.mnt.mkdir()
        (base / "control").mkdir()
        with (base / "stderr").open("wb") as stderr:
            command = [sys.executable, __file__, str(base), json.dumps(arguments)]
            self.process = subprocess.Popen(command, stderr=stderr)

    def wait_mounted(self) -> Daemon:
        until(lambda: self.seen("init") or self.process.poll() is not None)
        assert self.process.poll() is None, self.stderr()
        return self

    def set(self, **control: str) -> None:
        for name, value in control.items():
            path = self.base / "control" / name.replace("_", "-")
            path.with_name("new").write_text(value)
            path.with_name("new").rename(path)

    def seen(self, *operations: str) -> list[dict[str, Any]]:
        path = self.base / "events"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in events if event["op"] in operations]

    def stderr(self) -> str:
        return (self.base / "stderr").read_text()

    def stop(self) -> None:
        """Leave neither process nor mount, whatever the test did."""
        self.process.kill()
        if mount_line(self.mnt):  # -f: whoever waits for an answer gets an error, which also lets the process end
            subprocess.run(["umount", "-f", "-l", self.mnt], check=True)
        self.process.wait(30)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
