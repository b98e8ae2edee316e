"""Fixtures shared by all tests: the embedded S3, clean-up checks, and helpers to run the real command."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Place
from proxy import FaultProxy
from servers import seaweed

from s3blockfs.embedded import Endpoint


@pytest.fixture(scope="session")
def seaweed_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A real SeaweedFS for the whole run, on 127.0.0.1 and free ports."""
    directory: Path = tmp_path_factory.mktemp("seaweed")
    with seaweed(directory) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def mount_bucket(seaweed_endpoint: Endpoint) -> Place:
    """One bucket for all tests that mount."""
    bucket = Place(seaweed_endpoint.url, seaweed_endpoint.access_key, seaweed_endpoint.secret_key, "mounts")
    bucket.create_bucket()
    return bucket


@pytest.fixture
def place(mount_bucket: Place) -> Place:
    """A key prefix that no other test uses."""
    return mount_bucket.inside(uuid.uuid4().hex)


@pytest.fixture
def proxy(seaweed_endpoint: Endpoint) -> Iterator[FaultProxy]:
    """In front of the server; counts and breaks what goes through `place.via(proxy.url)`."""
    with FaultProxy(seaweed_endpoint.url) as running:
        yield running
