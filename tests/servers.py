"""Servers for tests, the embedded SeaweedFS foremost, and stores connected to them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s3blockfs.embedded import EmbeddedServer, Endpoint
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store

BUCKET = "s3store-tests"
SECRET = "a-Secret-that-must-never-be-seen"
DEADLINE_S = 3.0


@contextlib.contextmanager
def seaweed(directory: Path) -> Iterator[Endpoint]:
    """The embedded server with its data in `directory`, ready; stopped at the end unless somebody else uses it."""
    runtime = Runtime()
    try:
        with EmbeddedServer.join(directory, runtime) as server:
            yield server.endpoint
    finally:
        runtime.close()


@contextlib.contextmanager
def seaweed_with(directory: Path, identities: Iterable[Any], **more: Any) -> Iterator[Endpoint]:
    """The same with more identities, and other parts of SeaweedFS's s3.json."""

    def dumps(content: Any) -> str:
        if "identities" in content:
            content = {"identities": [*content["identities"], *identities], **more}
        return json.dumps(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s3blockfs.embedded.json", SimpleNamespace(loads=json.loads, load=json.load, dumps=dumps))
        with seaweed(directory) as endpoint:
            yield endpoint


def without_aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Change the environment so that boto3 finds nothing in it."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name in ("ENDPOINT_URL", "ENDPOINT_URL_S3"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


def connect(url: str, endpoint: Any = None, **settings: Any) -> S3Store:
    keys = {"access_key": "KEY", "secret_key": SECRET}
    if endpoint is not None:
        keys = {"access_key": endpoint.access_key, "secret_key": endpoint.secret_key}
    return S3Store(
        **{"bucket": BUCKET, "runtime": Runtime(), "endpoint_url": url, "request_deadline_s": DEADLINE_S}
        | keys
        | settings
    )
