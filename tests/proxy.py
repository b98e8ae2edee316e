"""An HTTP proxy in front of a store, outside the engine: counts what really crosses the wire, breaks it on demand.

Every request and every answer is read whole, then passed on byte for byte (the Host header too, so that signatures stay
valid). Keep-alive on both sides, one upstream connection per client connection, a thread each, no Nagle.

    with FaultProxy(upstream_url) as proxy:
        proxy.rule = lambda request: Fault(status=503) if request.kind == "head" else None
        ...
        proxy.requests, proxy.counts(), proxy.reset()

As a process: `python tests/proxy.py --upstream URL --port 0 --log FILE` prints its URL and appends a JSON line for each
request; SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, TextIO
from urllib.parse import urlsplit

DRIP_PIECES_PER_S = 20


@dataclass
class Request:
    """One request as the client sent it. `status`, `received` and `done` follow when it is over."""

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    sent: int
    """Bytes from the client, head and body; `received` is the same for what the client was sent."""
    status: int = 0
    """What the client was answered; 0: nothing."""
    received: int = 0
    done: bool = False

    @property
    def kind(self) -> str:
        """The kind of key, as in the key table of the design; `list` and `delete` for requests on the whole bucket."""
        path, _, query = self.path.partition("?")
        if not path.strip("/").partition("/")[2]:
            if "list-type=" in query:
                return "list"
            return "delete" if self.method == "POST" and "delete" in query else "bucket"
        parts = path.split("/")
        if parts[-2] in ("data", "map", "archive"):
            return parts[-2]
        return "head" if parts[-1] == "head" else "block" if re.fullmatch(r"\d{10}", parts[-1]) else "other"

    @property
    def conditional(self) -> bool:
        """A PUT with If-Match or If-None-Match."""
        return self.method == "PUT" and ("if-match" in self.headers or "if-none-match" in self.headers)


@dataclass(frozen=True)
class Fault:
    """What to do to one request. Fields combine; they act in the order in which they stand here."""

    delay_s: float = 0.0
    """Wait before anything else."""
    corrupt_request: bool = False
    """Flip a bit in the middle of the request's body."""
    apply: bool | None = None
    """Pass the request on? By default yes, unless the client is to get no answer or one that is made up (below)."""
    twice: bool = False
    """Pass it on a second time, right after the first; the client gets the first answer."""
    late_s: float = 0.0
    """Pass it on only so many seconds *after* the client was answered or cut off (needs `status` or `cut`)."""
    then: Callable[[], object] | None = None
    """Called now: it was passed on (or not), and the client has heard nothing yet."""
    hang_s: float = 0.0
    """Say nothing for so long, then cut the connection."""
    cut: bool = False
    """Cut the connection instead of answering."""
    status: int = 0
    """Answer with this status and `code` in S3's XML."""
    code: str = "InternalError"
    corrupt: bool = False
    """Flip a bit in the middle of the answer's body."""
    bytes_per_s: int = 0
    """Let the answer's body trickle."""
    truncate: int | None = None
    """Send only so many bytes of the answer's body, then cut the connection."""

    @property
    def applies(self) -> bool:
        made_up = bool(self.status or self.cut or self.hang_s or self.late_s)
        return not made_up if self.apply is None else self.apply

    def __str__(self) -> str:
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return ",".join(f"{name}={value}" for name, (value, default) in values.items() if value != default)


@dataclass(frozen=True)
class _Message:
    head: bytes
    body: bytes
    last: bool
    """Whether the connection ends with it."""

    @property
    def start(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)

    def corrupted(self) -> _Message:
        middle = len(self.body) // 2
        flipped = bytes([self.body[middle] ^ 1]) if self.body else b""
        return _Message(self.head, self.body[:middle] + flipped + self.body[middle + 1 :], self.last)


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}


def _exactly(stream: Any, size: int) -> bytes:
    data: bytes = stream.read(size)
    if len(data) < size:
        raise ConnectionError("the connection ended within a message")
    return data


def _receive(stream: Any, *, answer_to: str = "", on_expect: Callable[[], None] | None = None) -> _Message | None:
    """The next message as raw bytes; None at the end. `answer_to` is the method that an answer belongs to."""
    lines = []
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line)
    if not lines:
        return None
    head = b"".join(lines) + b"\r\n"
    headers = _headers(head)
    if on_expect and headers.get("expect", "").lower() == "100-continue":
        on_expect()
    last = headers.get("connection", "").lower() == "close"
    status = int(head.split(b" ", 2)[1]) if answer_to else 0
    if 100 <= status < 200:  # an interim answer, which the client has had from us
        return _receive(stream, answer_to=answer_to)
    if answer_to == "HEAD" or status in (204, 304):
        return _Message(head, b"", last)
    if "chunked" in headers.get("transfer-encoding", ""):
        body = b""
        size = -1
        while size:
            line = stream.readline()
            size = int(line.split(b";")[0], 16)
            body += line + _exactly(stream, size + 2)
        return _Message(head, body, last)
    if "content-length" in headers:
        return _Message(head, _exactly(stream, int(headers["content-length"])), last)
    return _Message(head, stream.read(), True) if answer_to else _Message(head, b"", last)


class _Upstream:
    """A connection to the store that reconnects when the store had closed it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._stream: IO[bytes] | None = None

    def ask(self, message: _Message) -> _Message:
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self.close()
        if self._socket is None or self._stream is None:
            self._socket = socket.create_connection(self._address)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stream = self._socket.makefile("rb")
        self._socket.sendall(message.head + message.body)
        answer = _receive(self._stream, answer_to=message.start[0])
        if answer is None:
            raise ConnectionError("no answer from upstream")
        if answer.last:
            self.close()
        return answer

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._stream = None


class _Cut(Exception):
    """End this client's connection now."""


class _Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: _Server

    def handle(self) -> None:
        proxy = self.server.proxy
        upstream = _Upstream(proxy.upstream)
        try:
            while message := _receive(self.rfile, on_expect=self._continue):
                method, path, _ = message.start
                size = len(message.head) + len(message.body)
                request = Request(method, path, _headers(message.head), size)
                proxy.began(request)
                try:
                    self._serve(request, message, upstream)
                finally:
                    proxy.ended(request)
                if message.last:
                    return
        except (_Cut, ConnectionError, ValueError):  # ValueError: the server closed our files while we read
            return
        finally:
            upstream.close()
            with suppress(OSError):  # the client may have gone first
                self.connection.shutdown(socket.SHUT_RDWR)

    def _continue(self) -> None:
        self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _serve(self, request: Request, message: _Message, upstream: _Upstream) -> None:
        proxy = self.server.proxy
        fault = (proxy.rule(request) if proxy.rule else None) or Fault()
        proxy.pause(fault.delay_s)
        if fault.corrupt_request:
            message = message.corrupted()
        answer = None
        if fault.applies:
            answer = upstream.ask(message)
            if fault.twice:
                upstream.ask(message)
        if fault.late_s:
            proxy.later(fault.late_s, message)
        if fault.then:
            fault.then()
        if fault.hang_s:
            self._hang(fault.hang_s)
        if fault.cut or fault.hang_s:
            raise _Cut
        if fault.status or answer is None:
            xml = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
            head = f"HTTP/1.1 {fault.status or 502} Injected\r\nContent-Type: application/xml\r\n"
            answer = _Message(f"{head}Content-Length: {len(xml)}\r\n\r\n".encode(), xml, False)
        self._answer(request, answer.corrupted() if fault.corrupt else answer, fault)

    def _hang(self, seconds: float) -> None:
        """Until the client gives up at the latest."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not select.select([self.connection], [], [], 0)[0]:
            self.server.proxy.pause(0.02)

    def _answer(self, request: Request, answer: _Message, fault: Fault) -> None:
        body = answer.body if fault.truncate is None else answer.body[: fault.truncate]
        request.status = int(answer.start[1])
        request.received = len(answer.head) + len(body)
        if not fault.bytes_per_s:
            self.wfile.write(answer.head + body)
        else:
            self.wfile.write(answer.head)
            step = max(fault.bytes_per_s // DRIP_PIECES_PER_S, 1)
            for first in range(0, len(body), step):
                self.server.proxy.pause(step / fault.bytes_per_s)
                self.wfile.write(body[first : first + step])
        if fault.truncate is not None or answer.last:
            raise _Cut


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy, port: int) -> None:
        self.proxy = proxy
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.proxy.errors.append(sys.exc_info()[1])


class FaultProxy:
    """See the module. Leaving it stops all threads; what was to be passed on late is then dropped."""

    def __init__(self, upstream_url: str, *, port: int = 0, log: TextIO | None = None) -> None:
        parts = urlsplit(upstream_url)
        self.upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.rule: Callable[[Request], Fault | None] | None = None
        self.requests: list[Request] = []
        self.errors: list[BaseException | None] = []
        """What broke in the proxy itself; leaving the context raises the first."""
        self._log = log
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._late: list[threading.Thread] = []
        self._server = _Server(self, port)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._thread.join()
        self.cut_all()
        self._server.server_close()  # waits for the threads of the connections
        for thread in self._late:
            thread.join()
        if self.errors and self.errors[0] is not None:
            raise self.errors[0]

    def reset(self) -> None:
        """Forget rule and requests so far."""
        self.rule = None
        with self._lock:
            self.requests = []

    def counts(self) -> Counter[tuple[str, str]]:
        """How many requests of each (method, kind of key)."""
        return Counter((request.method, request.kind) for request in list(self.requests))

    @property
    def sent(self) -> int:
        """Bytes from the client; `received`: to it."""
        return sum(request.sent for request in list(self.requests))

    @property
    def received(self) -> int:
        return sum(request.received for request in list(self.requests))

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return len(self._server.connections)

    def cut_all(self) -> None:
        """End every client's connection, as a store does with idle ones."""
        for connection in list(self._server.connections):
            with suppress(OSError):  # it may be ending by itself
                connection.shutdown(socket.SHUT_RDWR)

    # --- for the handlers -------------------------------------------------------------------------

    def began(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def ended(self, request: Request) -> None:
        request.done = True
        if self._log:
            record = {k: v for k, v in asdict(request).items() if k not in ("headers", "done")} | {"kind": request.kind}
            with self._lock:
                print(json.dumps(record), file=self._log, flush=True)

    def pause(self, seconds: float) -> None:
        if seconds and self._stop.wait(seconds):
            raise _Cut

    def later(self, seconds: float, message: _Message) -> None:
        def run() -> None:
            upstream = _Upstream(self.upstream)
            with suppress(_Cut, ConnectionError):
                self.pause(seconds)
                upstream.ask(message)
            upstream.close()

        thread = threading.Thread(target=run)
        self._late.append(thread)
        thread.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    with (
        arguments.log.open("a", encoding="utf-8") as log,
        FaultProxy(arguments.upstream, port=arguments.port, log=log) as proxy,
    ):
        print(proxy.url, flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
