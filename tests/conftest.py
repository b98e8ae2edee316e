"""Fixtures shared by all tests: the embedded S3, clean-up checks, and helpers to run the real command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from s3blockfs.embedded import Endpoint
from servers import seaweed


@pytest.fixture(scope="session")
def seaweed_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A real SeaweedFS for the whole run, on 127.0.0.1 and free ports."""
    directory: Path = tmp_path_factory.mktemp("seaweed")
    with seaweed(directory) as endpoint:
        yield endpoint
