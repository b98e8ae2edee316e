"""Fixtures shared by all tests: the embedded S3, clean-up checks, and helpers to run the real command."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from clienting import REFRESH_S, Desks
from mounting import Folder, Mount, Place, Shared, mounted
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


@pytest.fixture(scope="module")
def machines(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Mount, Mount]]:
    """Two daemons that know nothing of each other, for the tests of a module that need no others."""
    place, folder = mount_bucket.inside(uuid.uuid4().hex), tmp_path_factory.mktemp("machines")
    with mounted(place, folder) as mount, mounted(place, folder) as other:
        yield place, mount, other


@pytest.fixture
def shared(machines: tuple[Place, Mount, Mount]) -> Shared:
    """A folder of its own on them, which is there as soon as anything is in it."""
    place, mount, other = machines
    name = uuid.uuid4().hex
    return place.inside(name), Folder(mount / name), Folder(other / name)


@pytest.fixture(scope="module")
def desks(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desks]:
    """Two daemons that look for news once in an interval only."""
    place, folder, refresh = mount_bucket.inside(uuid.uuid4().hex), tmp_path_factory.mktemp("desks"), str(REFRESH_S)
    with mounted(place, folder, refresh=refresh) as here, mounted(place, folder, refresh=refresh) as there:
        yield Desks(here, there)


@pytest.fixture
def proxy(seaweed_endpoint: Endpoint) -> Iterator[FaultProxy]:
    """In front of the server; counts and breaks what goes through `place.via(proxy.url)`."""
    with FaultProxy(seaweed_endpoint.url) as running:
        yield running
