"""Servers for tests: the embedded SeaweedFS, started and stopped around a `with` block or a fixture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from s3blockfs.embedded import EmbeddedServer, Endpoint
from s3blockfs.runtime import SystemRuntime


@contextlib.contextmanager
def seaweed(directory: Path) -> Iterator[Endpoint]:
    """The embedded server with its data in `directory`, ready; stopped at the end unless somebody else uses it."""
    runtime = SystemRuntime()
    try:
        with EmbeddedServer.join(directory, runtime) as server:
            yield server.endpoint
    finally:
        runtime.close()
