"""The fault proxy itself, in front of a small HTTP server that keeps what it is sent."""

from __future__ import annotations

import http.client
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy import Fault, FaultProxy, Request


class Origin(http.server.ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), OriginHandler)
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        self.hosts: set[str] = set()
        self.connections = 0

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class OriginHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Origin

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.server.log.append(self.command)
        self.server.hosts.add(self.headers["Host"])
        self.send_response(status)
        if self.path.endswith("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def do_GET(self) -> None:
        body = self.server.objects.get(self.path)
        self._answer(404 if body is None else 200, body or b"")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def log_message(self, *_: Any) -> None:
        """Not to stderr."""


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(origin: Origin) -> Iterator[FaultProxy]:
    with FaultProxy(origin.url) as running:
        yield running


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)
    yield connection
    connection.close()


def ask(
    client: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    client.request(method, path, body, headers)
    answer = client.getresponse()
    return answer.status, answer.read()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_passes_on_and_counts(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    body = bytes(range(256)) * 1000
    assert ask(client, "PUT", "/b/p/head", body) == (200, b"")
    assert ask(client, "GET", "/b/p/head") == (200, body)
    assert ask(client, "HEAD", "/b/p/head") == (200, b"")
    assert ask(client, "GET", "/b/p/data/1") == (404, b"")
    origin.objects["/b/chunked"] = body
    assert ask(client, "GET", "/b/chunked") == (200, body)
    wait_until(lambda: all(request.done for request in proxy.requests))
    assert [(request.method, request.path, request.status) for request in proxy.requests] == [
        ("PUT", "/b/p/head", 200),
        ("GET", "/b/p/head", 200),
        ("HEAD", "/b/p/head", 200),
        ("GET", "/b/p/data/1", 404),
        ("GET", "/b/chunked", 200),
    ]
    assert proxy.counts()["GET", "head"] == proxy.counts()["GET", "data"] == 1
    assert 256_000 < proxy.sent < 258_000
    assert 512_000 < proxy.received < 514_000
    assert origin.hosts == {proxy.url.removeprefix("http://")}  # what the client signs
    assert (proxy.connections, origin.connections) == (1, 1)  # kept alive on both sides
    proxy.reset()
    assert (proxy.requests, proxy.sent) == ([], 0)


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/b/p/head", "head"),
        ("PUT", "/b/p/data/0000000000000001-ab", "data"),
        ("PUT", "/b/p/map/000001-0000000000000001-ab", "map"),
        ("PUT", "/b/p/archive/0000000000000001-ab", "archive"),
        ("GET", "/b/p/0000000000", "block"),
        ("GET", "/b?list-type=2&prefix=p%2Fhead", "list"),
        ("POST", "/b?delete", "delete"),
        ("PUT", "/b", "bucket"),
        ("GET", "/b/p/anything", "other"),
    ],
)
def test_kinds_of_keys(method: str, path: str, kind: str) -> None:
    assert Request(method, path, {}, 0).kind == kind


def test_conditional() -> None:
    assert Request("PUT", "/b/k", {"if-match": '"x"'}, 0).conditional
    assert Request("PUT", "/b/k", {"if-none-match": "*"}, 0).conditional
    assert not Request("GET", "/b/k", {"if-none-match": '"x"'}, 0).conditional


def test_expect_continue(origin: Origin, proxy: FaultProxy) -> None:
    with socket.create_connection(proxy._server.server_address) as raw:  # http.client does not wait for the 100
        raw.sendall(b"PUT /b/k HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 100 ")
        raw.sendall(b"body")
        assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
    assert origin.objects["/b/k"] == b"body"


def test_status(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.rule = lambda request: Fault(status=503, code="SlowDown") if request.method == "PUT" else None
    status, body = ask(client, "PUT", "/b/k", b"x")
    assert status == 503
    assert b"<Code>SlowDown</Code>" in body
    assert origin.log == []
    proxy.rule = lambda request: Fault(status=500, apply=True)
    assert ask(client, "PUT", "/b/k", b"x")[0] == 500
    assert origin.objects == {"/b/k": b"x"}


@pytest.mark.parametrize("apply", [False, True])
def test_cut(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection, apply: bool) -> None:
    proxy.rule = lambda request: Fault(cut=True, apply=apply)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(client, "PUT", "/b/k", b"x")
    assert origin.objects == ({"/b/k": b"x"} if apply else {})
    assert proxy.requests[0].status == 0


def test_then(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    """When it was passed on, and the client has heard nothing yet."""
    seen: list[tuple[list[str], int]] = []
    proxy.rule = lambda request: Fault(then=lambda: seen.append((list(origin.log), request.status)))
    assert ask(client, "PUT", "/b/a", b"x") == (200, b"")
    assert seen == [(["PUT"], 0)]


def test_hang(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.rule = lambda request: Fault(hang_s=60)
    client.timeout = 0.2
    with pytest.raises(TimeoutError):
        ask(client, "GET", "/b/k")
    assert origin.log == []


def test_delay(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.rule = lambda request: Fault(delay_s=0.3)
    began = time.monotonic()
    assert ask(client, "PUT", "/b/k", b"x")[0] == 200
    assert 0.3 <= time.monotonic() - began < 5


def test_twice(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.rule = lambda request: Fault(twice=True)
    assert ask(client, "PUT", "/b/k", b"x")[0] == 200
    assert origin.log == ["PUT", "PUT"]
    assert len(proxy.requests) == 1


def test_late(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.rule = lambda request: Fault(cut=True, late_s=0.3)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(client, "PUT", "/b/k", b"x")
    assert origin.objects == {}
    wait_until(lambda: origin.objects == {"/b/k": b"x"})


def test_late_requests_are_dropped_at_the_end(origin: Origin) -> None:
    with FaultProxy(origin.url) as proxy:
        proxy.rule = lambda request: Fault(status=500, late_s=60)
        client = http.client.HTTPConnection(proxy.url.removeprefix("http://"))
        assert ask(client, "PUT", "/b/k", b"x")[0] == 500
        client.close()
    assert origin.objects == {}


def test_corrupt(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.rule = lambda request: Fault(corrupt_request=True)
    ask(client, "PUT", "/b/k", b"abc")
    assert origin.objects == {"/b/k": b"acc"}
    proxy.rule = lambda request: Fault(corrupt=True)
    assert ask(client, "GET", "/b/k") == (200, b"abc")


def test_truncate(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    origin.objects["/b/k"] = b"0123456789"
    proxy.rule = lambda request: Fault(truncate=4)
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(client, "GET", "/b/k")
    assert caught.value.partial == b"0123"


def test_trickle(origin: Origin, proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    origin.objects["/b/k"] = bytes(1000)
    proxy.rule = lambda request: Fault(bytes_per_s=2000)
    began = time.monotonic()
    assert ask(client, "GET", "/b/k") == (200, bytes(1000))
    assert 0.45 <= time.monotonic() - began < 5


def test_survives_a_store_that_closes_idle_connections(origin: Origin, proxy: FaultProxy) -> None:
    OriginHandler.timeout, before = 0.1, OriginHandler.timeout
    try:
        client = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)
        for _ in range(2):
            assert ask(client, "PUT", "/b/k", b"x")[0] == 200
            time.sleep(0.4)
        client.close()
    finally:
        OriginHandler.timeout = before
    assert origin.connections == 2


def test_cut_all(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    assert ask(client, "PUT", "/b/k", b"x")[0] == 200
    proxy.cut_all()
    wait_until(lambda: proxy.connections == 0)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask(client, "GET", "/b/k")


def test_as_a_process(origin: Origin, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, str(Path(__file__).with_name("proxy.py")), "--upstream", origin.url, "--log", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            client = http.client.HTTPConnection(process.stdout.readline().strip().removeprefix("http://"), timeout=10)
            assert ask(client, "PUT", "/b/p/head", b"x" * 1000)[0] == 200
            assert ask(client, "GET", "/b/p/head")[0] == 200
            client.close()
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["method"], line["path"], line["kind"], line["status"]) for line in lines] == [
        ("PUT", "/b/p/head", "head", 200),
        ("GET", "/b/p/head", "head", 200),
    ]
    assert lines[0]["sent"] > 1000
    assert lines[1]["received"] > 1000
