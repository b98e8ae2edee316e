"""The way to S3: a proxy in a process of its own that holds each request back for a while, and counts what crosses it.

As a program it is the proxy, otherwise `Wire` is its handle. Bodies never enter Python: after the head of a message,
the kernel moves the rest from socket to socket (splice), so 32 parallel GETs of 4 MiB get through at 90 % of the speed
that they have without it; tests/proxy.py, which reads every message whole, lets 60 % through, by five times the CPU.

It is told what to do on stdin, a line each, and answers with a line of JSON: `take` gives the requests since the last
time, `delay MS` sets the delay. It ends with its stdin.

Without a limit it is as fast as the machine. With one, all connections together get so many MB a second, each way, in
pieces that take turns, as on a link that they share.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

PIPE_BYTES = 1 << 20
HEAD_BYTES = 1 << 16
#: What one connection sends before it is another one's turn, where the link has a limit.
TURN_BYTES = 1 << 17

#: AWS, S3 Standard, us-east-1: dollars for a request (https://aws.amazon.com/s3/pricing/, July 2025). LIST and POST
#: cost what a PUT costs, HEAD what a GET costs; deleting is free.
PRICES = {"PUT": 5e-6, "POST": 5e-6, "COPY": 5e-6, "LIST": 5e-6, "GET": 4e-7, "HEAD": 4e-7, "DELETE": 0.0}


@dataclass
class Asked:
    """One request. Times by the clock of time.monotonic(), which is one for all processes."""

    method: str
    """COPY is a PUT that names its source, LIST a GET of a bucket, DELETE also many with one POST."""
    path: str
    range: str
    began: float
    up: int = 0
    down: int = 0
    status: int = 0
    ended: float = 0.0
    """0: it is under way."""
    last: float = 0.0
    """When the last piece of the answer so far went out."""
    rest: bool = False
    """Not a request, but what else was moved for one that was under way when somebody asked before."""

    @property
    def key(self) -> str:
        return self.path.partition("?")[0]

    @property
    def span(self) -> tuple[int, int]:
        """The bytes that were asked for, the last one excluded."""
        first, _, last = self.range.removeprefix("bytes=").partition("-")
        return int(first), int(last) + 1


def kind_of(method: str, path: str, head: bytes) -> str:
    """What S3 charges for."""
    where, _, query = path.partition("?")
    if method == "GET" and (not where.strip("/").partition("/")[2]):
        return "LIST"
    if method == "POST" and re.search(r"(^|&)delete(=|&|$)", query):
        return "DELETE"
    if method == "PUT" and b"\r\nx-amz-copy-source:" in head.lower():
        return "COPY"
    return method


# --- the handle ---------------------------------------------------------------------------------------------


class Figures:
    """What the requests of one measurement come to."""

    def __init__(self, asked: list[Asked]) -> None:
        self.asked = [one for one in asked if not one.rest]
        self._rests = [one for one in asked if one.rest]

    def __add__(self, other: Figures) -> Figures:
        return Figures(self.asked + self._rests + other.asked + other._rests)

    def count(self, *methods: str) -> int:
        return sum(one.method in methods for one in self.asked)

    @property
    def puts(self) -> int:
        """All that costs what a PUT costs, but for LIST."""
        return self.count("PUT", "POST", "COPY")

    @property
    def gets(self) -> int:
        return self.count("GET", "HEAD")

    @property
    def lists(self) -> int:
        return self.count("LIST")

    @property
    def up(self) -> int:
        return sum(one.up for one in self.asked + self._rests)

    @property
    def down(self) -> int:
        return sum(one.down for one in self.asked + self._rests)

    @property
    def dollars(self) -> float:
        return sum(PRICES.get(one.method, 0.0) for one in self.asked)

    @property
    def trips(self) -> int:
        """The longest chain of requests of which each began after the one before had ended."""
        chain, free = 0, 0.0
        for one in sorted(self.asked, key=lambda one: one.ended or float("inf")):
            if one.began >= free:
                chain, free = chain + 1, one.ended or float("inf")
        return chain


class Wire:
    """The proxy in front of a store, as long as the `with` block lasts."""

    def __init__(self, upstream_url: str, delay_ms: float, link_mb_s: float = 0.0) -> None:
        line = [sys.executable, __file__, upstream_url, str(delay_ms), str(link_mb_s)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def _say(self, what: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def take(self) -> Figures:
        """The requests since the last time, with those that are under way."""
        return Figures([Asked(**one) for one in self._say("take")])

    def delay(self, milliseconds: float) -> None:
        self._say(f"delay {milliseconds}")


# --- the proxy ----------------------------------------------------------------------------------------------


class _Link:
    """One direction of a link that all connections share; `mb_s` is 0 if it has no limit."""

    def __init__(self, mb_s: float) -> None:
        self.seconds_a_byte = 1e-6 / mb_s if mb_s else 0.0
        self.free = 0.0
        self.lock = threading.Lock()

    def carry(self, size: int) -> None:
        """Returns when the last of these bytes has arrived: what others gave to the link before goes first."""
        if not self.seconds_a_byte:
            return
        with self.lock:
            self.free = arrives = max(self.free, time.monotonic()) + size * self.seconds_a_byte
        time.sleep(max(arrives - time.monotonic(), 0.0))


class _Stream:
    """A socket whose messages have heads that are read, and bodies that are moved on."""

    def __init__(self, connection: socket.socket, piece_bytes: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.piece_bytes = connection, piece_bytes
        self.rest = b""

    def head(self) -> bytes:
        """Up to the empty line; nothing at the end of the connection."""
        while (end := self.rest.find(b"\r\n\r\n")) < 0:
            piece = self.socket.recv(HEAD_BYTES)
            if not piece:
                return b""
            self.rest += piece
        head, self.rest = self.rest[: end + 4], self.rest[end + 4 :]
        return head

    def line(self) -> bytes:
        while (end := self.rest.find(b"\r\n")) < 0:
            self.rest += self._some()
        line, self.rest = self.rest[: end + 2], self.rest[end + 2 :]
        return line

    def _some(self) -> bytes:
        piece = self.socket.recv(HEAD_BYTES)
        if not piece:
            raise ConnectionError("the connection ended within a message")
        return piece

    def move(self, size: int, to: _Stream, pipe: tuple[int, int], moved: Callable[[int], None]) -> None:
        """The next bytes of a body; `moved` is told of each piece, just before it goes out, and may wait."""
        first, self.rest = self.rest[:size], self.rest[size:]
        if first:
            moved(len(first))
            to.socket.sendall(first)
        size -= len(first)
        source, target = self.socket.fileno(), to.socket.fileno()
        while size:
            here = os.splice(source, pipe[1], min(size, self.piece_bytes))
            if not here:
                raise ConnectionError("the connection ended within a message")
            size -= here
            moved(here)
            while here:
                here -= os.splice(pipe[0], target, here)

    def move_chunks(self, to: _Stream, pipe: tuple[int, int], moved: Callable[[int], None]) -> None:
        """A chunked body."""
        size = -1
        while size:
            line = self.line()
            size = int(line.split(b";")[0], 16)
            moved(len(line))
            to.socket.sendall(line)
            self.move(size + 2, to, pipe, moved)


def _field(head: bytes, name: bytes) -> str:
    found = re.search(rb"\r\n" + name + rb":[ \t]*([^\r]*)", head, re.IGNORECASE)
    return found[1].decode("latin-1").strip() if found else ""


class _Proxy:
    def __init__(self, upstream_url: str, delay_s: float, link_mb_s: float) -> None:
        parts = urlsplit(upstream_url)
        self.upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.delay_s = delay_s
        self.to_store, self.to_client = _Link(link_mb_s), _Link(link_mb_s)
        self.piece_bytes = TURN_BYTES if link_mb_s else PIPE_BYTES
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def _connection(self, connection: socket.socket) -> None:
        pipe = os.pipe()
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        store = None
        client = _Stream(connection, self.piece_bytes)
        try:
            while head := client.head():
                if store is None:
                    store = _Stream(socket.create_connection(self.upstream), self.piece_bytes)
                if not self._one(client, store, head, pipe):
                    return
        except OSError:
            return  # either side hung up, and the other one hears of it
        finally:
            for end in pipe:
                os.close(end)
            connection.close()
            if store is not None:
                store.socket.close()

    def _one(self, client: _Stream, store: _Stream, head: bytes, pipe: tuple[int, int]) -> bool:
        """Whether the connections can be used again."""
        method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        began = time.monotonic()
        asked = Asked(kind_of(method, path, head), path, _field(head, b"range"), began, last=began, up=len(head))
        with self.lock:
            self.asked.append(asked)
        try:
            return self._pass(client, store, head, pipe, method, asked)
        finally:
            asked.ended = asked.last

    def _pass(
        self, client: _Stream, store: _Stream, head: bytes, pipe: tuple[int, int], method: str, asked: Asked
    ) -> bool:
        def up(size: int) -> None:
            self.to_store.carry(size)
            asked.up += size

        def down(size: int) -> None:
            self.to_client.carry(size)
            asked.down += size
            asked.last = time.monotonic()  # before the client can ask for the next one

        if _field(head, b"expect").lower() == "100-continue":
            client.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(self.delay_s)
        self.to_store.carry(len(head))
        store.socket.sendall(head)
        if "chunked" in _field(head, b"transfer-encoding"):
            client.move_chunks(store, pipe, up)
        else:
            client.move(int(_field(head, b"content-length") or 0), store, pipe, up)
        answer = store.head()
        while answer.startswith(b"HTTP/1.1 1"):  # the client has had it from us
            answer = store.head()
        asked.status = int(answer.split(b" ", 2)[1] if answer else 0)
        down(len(answer))
        size = 0 if method == "HEAD" or asked.status in (204, 304) else int(_field(answer, b"content-length") or 0)
        chunked = "chunked" in _field(answer, b"transfer-encoding") and method != "HEAD"
        client.socket.sendall(answer)
        if chunked:
            store.move_chunks(client, pipe, down)
        else:
            store.move(size, client, pipe, down)
        return bool(answer) and _field(answer, b"connection").lower() != "close"

    def told(self, line: str) -> Any:
        command, _, value = line.strip().partition(" ")
        if command == "delay":
            self.delay_s = float(value) / 1000
            return None
        with self.lock:
            taken, self.asked = self.asked, [one for one in self.asked if not one.ended]
            told = [asdict(one) for one in taken]
            for one in self.asked:
                one.up = one.down = 0
                one.rest = True
        return told


def main() -> None:
    proxy = _Proxy(sys.argv[1], float(sys.argv[2]) / 1000, float(sys.argv[3]))
    threading.Thread(target=proxy.serve, daemon=True).start()
    print(json.dumps(proxy.url), flush=True)
    for line in sys.stdin:
        print(json.dumps(proxy.told(line)), flush=True)


if __name__ == "__main__":
    main()
