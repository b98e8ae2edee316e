"""Objects of many gigabytes for tests: sparse local files, served as S3 would serve one object."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ZEROS = bytes(16 << 20)


class SparseFile(io.FileIO):
    """Skips ZEROS that are written to it; whoever closes it has written something else at the end."""

    def write(self, data: Any) -> int:
        if data is not ZEROS:
            return super().write(data)
        self.seek(len(data), io.SEEK_CUR)
        return len(data)


@contextlib.contextmanager
def serving(file: Path) -> Iterator[str]:
    """The URL of an S3 with one object, `file`, under its name in any bucket. It knows ranges and If-Match."""
    etag = '"of-this-file"'

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if not self.path.split("?")[0].endswith(f"/{file.name}"):
                return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            if self.headers.get("If-Match", etag) != etag:
                return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            size = file.stat().st_size
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            last = min(last, size - 1)
            with file.open("rb") as stream:
                stream.seek(first)
                body = stream.read(last - first + 1)
            return self.answer(206, body, {"Content-Range": f"bytes {first}-{last}/{size}", "ETag": etag})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Not to stderr."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
