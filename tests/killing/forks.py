"""Processes at the price of a fork: a server that has imported what is slow, runs no thread, and forks at every order.

As a program it is that server. It ends with the process that started it, and takes along what it forked.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

#: Everything that is waited for; the machine may be busy.
PATIENCE_S = 120.0
MESSAGE_BYTES = 1 << 16


class Hung(Exception):
    """A process did not end."""


class Process:
    """A forked process. `report` is what it says: see `Reporter`."""

    def __init__(self, server: ForkServer, pid: int, report: socket.socket) -> None:
        self.pid, self.report = pid, report
        self._server = server
        self._ended = os.pidfd_open(pid)  # it cannot be another one's: nobody but `wait` takes its exit code
        self._lock = threading.RLock()  # a request may kill it at the moment when it is released
        self._code: int | None = None

    def fileno(self) -> int:
        """Readable when it has ended."""
        return self._ended

    def ends(self, seconds: float = PATIENCE_S) -> bool:
        """Whether it has ended, or does so in time."""
        return self._code is not None or bool(select.select([self._ended], [], [], seconds)[0])

    def signal(self, number: int = signal.SIGKILL) -> bool:
        """Whether there still was a process."""
        with self._lock:
            if self.ends(0):
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._ended, number)
            return True

    def kill(self) -> None:
        """Returns when it is dead: all its threads, its files and sockets closed."""
        with self._lock:
            self.signal()
            if not self.ends():
                raise Hung(f"process {self.pid} survived SIGKILL")

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit code; negative: the signal."""
        if not self.ends(seconds):
            raise Hung(f"process {self.pid} did not end in {seconds:g} s")
        if self._code is None:
            self._code = self._server.order({"reap": self.pid})["code"]
        return self._code

    def dismiss(self) -> None:
        """See `Reporter.dismissed`."""
        self.report.shutdown(socket.SHUT_WR)

    def said(self) -> list[Any]:
        """What it reported until now."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while message := self.report.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT):
                found.append(json.loads(message))
        return found

    def release(self) -> None:
        """Whatever happened: no process, no file."""
        self.kill()
        self.wait()
        with self._lock:
            self.report.close()
            os.close(self._ended)


class Reporter:
    """How a forked process speaks to the one that ordered it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def say(self, what: Any) -> None:
        self._channel.send(json.dumps(what).encode())

    def dismissed(self, seconds: float) -> bool:
        """Whether nobody needs this process any more, waiting so long for it."""
        return bool(select.select([self._channel], [], [], seconds)[0])


class ForkServer:
    """A context manager. Not for several threads at once; each may have its own."""

    def __init__(self, *modules: str) -> None:
        """`modules` are imported before the first fork, and the `prepare` of each is called."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line = [sys.executable, __file__, *modules]
        path = os.pathsep.join(map(str, sys.path))
        environment = os.environ | {"PYTHONPATH": path}
        # A session of its own: Ctrl-C is for who started it, who then ends it.
        self._process = subprocess.Popen(line, stdin=theirs, env=environment, start_new_session=True)
        theirs.close()
        self._lock = threading.Lock()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait(PATIENCE_S)

    def start(self, call: str, *arguments: Any, environment: Mapping[str, str], log: Path) -> Process:
        """Fork a process that calls `MODULE:FUNCTION` with a Reporter and these, and exits with what it returns."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            order = {"call": call, "arguments": arguments, "environment": dict(environment), "log": str(log)}
            return Process(self, self.order(order, theirs)["pid"], ours)

    def order(self, order: Mapping[str, Any], *files: socket.socket) -> dict[str, Any]:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(order).encode()], [file.fileno() for file in files])
            answer: dict[str, Any] = json.loads(self._socket.recv(MESSAGE_BYTES) or '{"error": "the fork server died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


# --- the server -------------------------------------------------------------------------------------------


def serve(orders: socket.socket) -> int:
    """Until the other side is gone. In a forked process it returns that one's exit code."""
    children: set[int] = set()
    while True:
        message, files, _, _ = socket.recv_fds(orders, MESSAGE_BYTES, 1)
        if not message:
            break
        order = json.loads(message)
        if "reap" in order:
            children.remove(order["reap"])
            _, status = os.waitpid(order["reap"], 0)
            orders.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
            continue
        assert threading.active_count() == 1, "a fork would take none of these threads along, but their locks"
        if (pid := os.fork()) == 0:
            orders.close()
            return _run(order, socket.socket(fileno=files[0]))
        os.close(files[0])
        children.add(pid)
        orders.send(json.dumps({"pid": pid}).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


def _run(order: Mapping[str, Any], channel: socket.socket) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for new, old in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(new, old)
    os.close(log)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(order["environment"])
    module, _, function = order["call"].partition(":")
    code: int | None = getattr(import_module(module), function)(Reporter(channel), *order["arguments"])
    return code or 0


def main() -> int:
    for name in sys.argv[1:]:
        import_module(name).prepare()
    gc.freeze()  # what is never collected stays shared between the processes
    return serve(socket.socket(fileno=os.dup(0)))


if __name__ == "__main__":
    sys.exit(main())
