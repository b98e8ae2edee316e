"""The `ObjectStore` protocol, sentence by sentence, for every implementation.

Another S3 joins by S3BLOCKFS_TEST_S3=s3://bucket/prefix (credentials, region, endpoint as boto3 finds them): the bucket
must exist; everything is written below the prefix and deleted afterwards. `ministack` joins when it is on the PATH (it
pins botocore, so it belongs into an environment of its own).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from memorystore import MemoryStore

from s3blockfs.errors import ObjectNotFound, PreconditionFailed, RequestInDoubt, StoreError
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store

REAL_S3 = os.environ.get("S3BLOCKFS_TEST_S3", "")
MINISTACK = shutil.which("ministack", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
WRITERS = 8
MANY = 1005  # more than a page of LIST and a batch of DeleteObjects

ODD_NAMES = [
    "a b",
    "é/ü",
    "☃",
    "100%",
    "%41",
    "1+1",
    "x#y",
    "q?z=1",
    "a&b",
    "'q'",
    "<x>",
    "a=b;c,d",
    "~tilde",
    "(1)*!$@:",
]


@contextlib.contextmanager
def ministack(directory: Path) -> Iterator[str]:
    """The URL of a second implementation. It does not check credentials."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "LOG_LEVEL": "ERROR", "S3_PERSIST": "1"}
    places = {"S3_DATA_DIR": str(directory), "PERSIST_STATE": "1", "STATE_DIR": str(directory / "state")}
    url = f"http://127.0.0.1:{port}"
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen([str(MINISTACK)], env=os.environ | settings | places, stdout=log, stderr=log)
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/_ministack/health", timeout=1):
                    break
                assert server.poll() is None, (directory / "log").read_text()
                time.sleep(0.1)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def implementations() -> list[Any]:
    found = ["memory", pytest.param("seaweed", marks=pytest.mark.s3)]
    if MINISTACK:
        found.append("ministack")
    if REAL_S3:
        found.append("s3")
    return found


@pytest.fixture(scope="module", params=implementations())
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ObjectStore, str]]:
    """A store and the prefix that all tests keep to."""
    runtime = Runtime()
    with contextlib.ExitStack() as stack:
        stack.callback(runtime.close)
        if request.param == "memory":
            yield MemoryStore(runtime), ""
            return
        prefix = ""
        if request.param == "s3":
            bucket, _, prefix = REAL_S3.removeprefix("s3://").partition("/")
            store = S3Store(bucket, runtime=runtime)
        else:
            if request.param == "ministack":
                url, keys = stack.enter_context(ministack(tmp_path_factory.mktemp("ministack"))), ("test", "test")
            else:
                endpoint = request.getfixturevalue("seaweed_endpoint")
                url, keys = endpoint.url, (endpoint.access_key, endpoint.secret_key)
            name = f"conformance-{uuid.uuid4().hex[:8]}"
            store = S3Store(name, runtime=runtime, endpoint_url=url, access_key=keys[0], secret_key=keys[1])
            store.create_bucket()
        stack.callback(store.close)
        store.check_bucket()
        yield store, f"{prefix.rstrip('/')}/" if prefix else ""


@pytest.fixture
def store(opened: tuple[ObjectStore, str]) -> ObjectStore:
    return opened[0]


@pytest.fixture
def prefix(opened: tuple[ObjectStore, str]) -> Iterator[str]:
    """A prefix of this test's own, empty before and after it."""
    store, outer = opened
    own = f"{outer}{uuid.uuid4().hex}/"
    yield own
    store.delete([entry.key for entry in store.list(own, site="test")], site="test")


def test_a_store_names_itself(store: ObjectStore) -> None:
    assert "://" in store.name


@pytest.mark.parametrize("size", [0, 1, 70_000, 5 << 20])
def test_get_returns_what_put_stored(store: ObjectStore, prefix: str, size: int) -> None:
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    etag = store.put(prefix + "k", body, site="test")
    found = store.get(prefix + "k", site="test")
    assert found.body == body
    assert found.etag == etag
    assert abs(found.modified_s - store.server_time_s()) < 60


def test_put_without_a_condition_replaces(store: ObjectStore, prefix: str) -> None:
    first = store.put(prefix + "k", b"one", site="test")
    second = store.put(prefix + "k", b"two!", site="test")
    assert first != second
    assert store.get(prefix + "k", site="test").body == b"two!"


@pytest.mark.parametrize(
    ("start", "length"),
    [
        (0, None),
        (0, 0),
        (0, 4),
        (0, 10),
        (0, 99),
        (3, None),
        (3, 0),
        (3, 4),
        (3, 99),
        (9, 1),
        (10, 1),
        (10, None),
        (99, 5),
    ],
)
def test_get_of_a_range(store: ObjectStore, prefix: str, start: int, length: int | None) -> None:
    etag = store.put(prefix + "k", b"0123456789", site="test")
    found = store.get(prefix + "k", site="test", start=start, length=length)
    assert found.body == b"0123456789"[start : None if length is None else start + length]
    assert (found.etag, found.size_bytes) == (etag, 10)
    assert store.get(prefix + "k", site="test", start=start, length=length, if_match=etag) == found
    with pytest.raises(PreconditionFailed):
        store.get(prefix + "k", site="test", start=start, length=length, if_match='"other"')


@pytest.mark.parametrize(("start", "length"), [(0, None), (0, 7), (7, None), (7, 7)])
def test_any_range_of_an_empty_object_is_empty(store: ObjectStore, prefix: str, start: int, length: int | None) -> None:
    etag = store.put(prefix + "k", b"", site="test")
    found = store.get(prefix + "k", site="test", start=start, length=length)
    assert (found.body, found.etag, found.size_bytes) == (b"", etag, 0)


@pytest.mark.parametrize("arguments", [{}, {"start": 5, "length": 5}, {"start": 3}, {"if_match": '"x"'}])
def test_get_of_a_missing_key(store: ObjectStore, prefix: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ObjectNotFound, match="missing"):
        store.get(prefix + "missing", site="test", **arguments)


def test_get_if_changed(store: ObjectStore, prefix: str) -> None:
    old = store.put(prefix + "k", b"old", site="test")
    assert store.get_if_changed(prefix + "k", site="test", etag=old) is None
    new = store.put(prefix + "k", b"new", site="test")
    found = store.get_if_changed(prefix + "k", site="test", etag=old)
    assert found is not None
    assert (found.body, found.etag) == (b"new", new)
    with pytest.raises(ObjectNotFound):
        store.get_if_changed(prefix + "missing", site="test", etag=old)


def test_put_if_absent(store: ObjectStore, prefix: str) -> None:
    etag = store.put(prefix + "k", b"first", site="test", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put(prefix + "k", b"second", site="test", if_absent=True)
    found = store.get(prefix + "k", site="test")
    assert (found.body, found.etag) == (b"first", etag)


def test_put_if_match(store: ObjectStore, prefix: str) -> None:
    first = store.put(prefix + "k", b"first", site="test")
    second = store.put(prefix + "k", b"second", site="test", if_match=first)
    assert store.get(prefix + "k", site="test", if_match=second).body == b"second"
    with pytest.raises(PreconditionFailed):
        store.put(prefix + "k", b"third", site="test", if_match=first)
    assert store.get(prefix + "k", site="test").body == b"second"


def test_put_if_match_without_an_object(store: ObjectStore, prefix: str) -> None:
    etag = store.put(prefix + "k", b"here", site="test")
    store.delete([prefix + "k"], site="test")
    with pytest.raises((ObjectNotFound, PreconditionFailed)):  # S3 says 404, SeaweedFS 412: both are definite
        store.put(prefix + "k", b"back", site="test", if_match=etag)
    with pytest.raises(ObjectNotFound):
        store.get(prefix + "k", site="test")


def race(writers: int, action: Callable[[int], str]) -> list[str | StoreError]:
    """What each of `writers` threads got from `action`, begun together."""
    start = threading.Barrier(writers)

    def run(number: int) -> str | StoreError:
        start.wait(30)
        try:
            return action(number)
        except StoreError as error:
            return error

    with ThreadPoolExecutor(writers) as threads:
        return list(threads.map(run, range(writers)))


def winner_of(results: list[str | StoreError]) -> int:
    won = [number for number, result in enumerate(results) if isinstance(result, str)]
    lost = [result for result in results if not isinstance(result, str)]
    assert len(won) == 1, results
    # S3 may answer 409 to a loser of a close race.
    assert all(isinstance(result, (PreconditionFailed, RequestInDoubt)) for result in lost), lost
    return won[0]


def test_exactly_one_of_eight_writers_wins_each_swap(store: ObjectStore, prefix: str) -> None:
    key = prefix + "head"
    etag = store.put(key, b"start", site="test")
    for round_number in range(10):

        def swap(number: int, etag: str = etag, round_number: int = round_number) -> str:
            return store.put(key, b"%d by %d" % (round_number, number), site="test", if_match=etag, timeout_s=60)

        results = race(WRITERS, swap)
        winner = winner_of(results)
        found = store.get(key, site="test")
        assert found.body == b"%d by %d" % (round_number, winner)
        assert found.etag == results[winner]
        etag = found.etag


def test_exactly_one_of_eight_writers_creates(store: ObjectStore, prefix: str) -> None:
    for round_number in range(3):
        key = f"{prefix}head{round_number}"

        def create(number: int, key: str = key) -> str:
            return store.put(key, b"by %d" % number, site="test", if_absent=True, timeout_s=60)

        winner = winner_of(race(WRITERS, create))
        assert store.get(key, site="test").body == b"by %d" % winner


PART = bytes(range(256)) * (5 << 12)  # 5 MiB, the least that S3 takes for all but the last


def test_a_multipart_upload_appears_when_it_is_complete(store: ObjectStore, prefix: str) -> None:
    key = prefix + "k"
    store.put(key, b"before", site="test")
    upload = store.begin_upload(key, site="test")
    second = store.put_part(key, upload, 2, b"end", site="test", timeout_s=60)
    store.put_part(key, upload, 1, PART[::-1], site="test", timeout_s=60)
    first = store.put_part(key, upload, 1, PART, site="test", timeout_s=60)  # the same part again
    assert store.get(key, site="test").body == b"before"
    etag = store.complete_upload(key, upload, [first, second], site="test", timeout_s=60)
    found = store.get(key, site="test")
    assert (found.body, found.etag, found.size_bytes) == (PART + b"end", etag, len(PART) + 3)
    assert store.get(key, site="test", start=len(PART), length=3, if_match=etag).body == b"end"
    (listed,) = store.list(key, site="test")
    assert listed.etag == etag


def test_an_aborted_upload_leaves_nothing(store: ObjectStore, prefix: str) -> None:
    upload = store.begin_upload(prefix + "k", site="test")
    etag = store.put_part(prefix + "k", upload, 1, PART, site="test", timeout_s=60)
    store.abort_upload(prefix + "k", upload, site="test")
    store.abort_upload(prefix + "k", upload, site="test")
    with pytest.raises(ObjectNotFound):
        store.complete_upload(prefix + "k", upload, [etag], site="test", timeout_s=60)
    with pytest.raises(ObjectNotFound):
        store.get(prefix + "k", site="test")
    assert list(store.list(prefix, site="test")) == []


def test_delete(store: ObjectStore, prefix: str) -> None:
    for name in ("a", "b", "c"):
        store.put(prefix + name, b"x", site="test")
    store.delete([], site="test")
    store.delete([prefix + "a", prefix + "missing", prefix + "c"], site="test")
    store.delete([prefix + "missing"], site="test")
    assert [entry.key for entry in store.list(prefix, site="test")] == [prefix + "b"]
    with pytest.raises(ObjectNotFound):
        store.get(prefix + "a", site="test")


def test_list(store: ObjectStore, prefix: str) -> None:
    etags = {
        name: store.put(prefix + name, name.encode(), site="test")
        for name in ("db/head", "db/data/1", "db/data/22", "db2/head", "top")
    }
    everything = {entry.key.removeprefix(prefix): entry for entry in store.list(prefix, site="test")}
    assert everything.keys() == etags.keys()
    for name, entry in everything.items():
        assert (entry.is_prefix, entry.size_bytes, entry.etag) == (False, len(name), etags[name])
        assert abs(entry.modified_s - store.server_time_s()) < 60

    def listed(under: str, **arguments: Any) -> set[tuple[str, bool]]:
        found = [
            (e.key.removeprefix(prefix), e.is_prefix) for e in store.list(prefix + under, site="test", **arguments)
        ]
        assert len(found) == len(set(found))
        return set(found)

    assert listed("", delimiter="/") == {("db/", True), ("db2/", True), ("top", False)}
    assert listed("db/", delimiter="/") == {("db/head", False), ("db/data/", True)}
    assert listed("db", delimiter="/") == {("db/", True), ("db2/", True)}
    assert listed("db/data/2") == {("db/data/22", False)}
    assert listed("nothing/") == set()
    assert len(listed("", max_keys=2)) == 2
    assert len(listed("", max_keys=2, delimiter="/")) == 2
    assert listed("", max_keys=0) == set()


def test_list_and_delete_of_more_than_a_page(store: ObjectStore, prefix: str) -> None:
    keys = {f"{prefix}{number:04d}/x" for number in range(MANY)}
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: store.put(key, b"x", site="test"), keys))
    whole = [entry.key for entry in store.list(prefix, site="test")]
    assert len(whole) == MANY
    assert set(whole) == keys
    rolled = list(store.list(prefix, site="test", delimiter="/"))
    assert all(entry.is_prefix for entry in rolled)
    assert sorted(entry.key + "x" for entry in rolled) == sorted(keys)
    assert len(list(store.list(prefix, site="test", max_keys=MANY - 2))) == MANY - 2
    store.delete(sorted(keys), site="test")
    assert list(store.list(prefix, site="test")) == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(store: ObjectStore, prefix: str, name: str) -> None:
    key = prefix + name
    etag = store.put(key, b"odd", site="test", if_absent=True)
    assert store.get(key, site="test", start=1, if_match=etag).body == b"dd"
    assert store.get_if_changed(key, site="test", etag=etag) is None
    assert [entry.key for entry in store.list(prefix, site="test")] == [key]
    assert [entry.key for entry in store.list(key, site="test")] == [key]
    store.delete([key], site="test")
    assert list(store.list(prefix, site="test")) == []


def test_server_time_goes_on_without_requests(store: ObjectStore, prefix: str) -> None:
    store.put(prefix + "k", b"x", site="test")
    before, began = store.server_time_s(), time.monotonic()
    time.sleep(0.2)
    passed = store.server_time_s() - before
    assert 0.2 <= passed <= time.monotonic() - began + 0.01


@pytest.mark.parametrize("name", ["k", *ODD_NAMES])
def test_copy(store: ObjectStore, prefix: str, name: str) -> None:
    body = bytes(range(256)) * 20_000
    source, target = prefix + name, f"{prefix}copies/{name}"
    store.put(source, body, site="test")
    store.copy(source, target, site="test")
    store.copy(source, target, site="test")  # a repetition changes nothing
    assert store.get(source, site="test").body == store.get(target, site="test").body == body
    store.delete([source], site="test")
    assert store.get(target, site="test", start=5, length=5).body == body[5:10]


def test_copy_of_an_empty_object(store: ObjectStore, prefix: str) -> None:
    store.put(prefix + "k", b"", site="test")
    store.copy(prefix + "k", prefix + "copy", site="test")
    assert store.get(prefix + "copy", site="test").body == b""


def test_copy_of_a_missing_key(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(ObjectNotFound, match="missing"):
        store.copy(prefix + "missing", prefix + "copy", site="test")
    assert list(store.list(prefix, site="test")) == []
