"""`S3Store` through the fault proxy, fault by fault, in front of a real SeaweedFS."""

from __future__ import annotations

import base64
import hashlib
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest
import urllib3.connectionpool
from botocore.config import Config
from proxy import Fault, FaultProxy, Request
from servers import BUCKET, DEADLINE_S, SECRET, connect, without_aws

from s3blockfs import s3store
from s3blockfs.errors import (
    AccessDenied,
    BucketNotFound,
    ObjectNotFound,
    PreconditionFailed,
    RequestInDoubt,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    UsageError,
)
from s3blockfs.s3store import S3Store

#: What a call may take beyond its deadline on a busy machine.
GRACE_S = 2.0
BIG = bytes(range(256)) * 4096 * 2

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def proxy(seaweed_endpoint: Any) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed_endpoint.url) as running:
        yield running


@pytest.fixture(scope="module")
def opened(seaweed_endpoint: Any, proxy: FaultProxy) -> Iterator[S3Store]:
    with_bucket = connect(proxy.url, seaweed_endpoint)
    with_bucket.create_bucket()
    yield with_bucket
    with_bucket.close()


@pytest.fixture
def store(opened: S3Store, proxy: FaultProxy) -> Iterator[S3Store]:
    """Through the proxy, which has seen nothing yet and has no rule."""
    proxy.reset()
    yield opened
    proxy.reset()


@pytest.fixture
def key(store: S3Store) -> str:
    return f"tests/{uuid.uuid4().hex}/head"


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which boto3 finds nothing."""
    return without_aws(monkeypatch)


def first(count: int, fault: Fault, method: str = "") -> Callable[[Request], Fault | None]:
    """A rule that breaks the first `count` requests (of `method`)."""
    left = [count]

    def rule(request: Request) -> Fault | None:
        if (method and request.method != method) or not left[0]:
            return None
        left[0] -= 1
        return fault

    return rule


def assert_helpful(error: StoreError, secret_key: str = SECRET) -> None:
    text = str(error)
    assert "\n" not in text
    assert text.startswith(f"s3://{BUCKET}/")
    assert "; " in text, "it must say what to do"
    for leak in (secret_key, "http://", "Signature=", "AWS4", "Authorization:", "injected"):
        assert leak not in text


def body_of(store: S3Store, proxy: FaultProxy, key: str) -> bytes | None:
    proxy.rule = None
    try:
        return store.get(key, site="check").body
    except ObjectNotFound:
        return None


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# --- conditional PUTs: sent once, and what became of them ---------------------------------------------

APPLIED, NOT_APPLIED = True, False


@pytest.mark.parametrize(
    ("fault", "expected", "applied"),
    [
        (Fault(status=409, code="ConditionalRequestConflict"), RequestInDoubt, NOT_APPLIED),
        (Fault(status=500), RequestInDoubt, NOT_APPLIED),
        (Fault(status=500, apply=True), RequestInDoubt, APPLIED),
        (Fault(status=503, code="SlowDown"), RequestInDoubt, NOT_APPLIED),
        (Fault(status=400, code="RequestTimeout"), RequestInDoubt, NOT_APPLIED),
        (Fault(cut=True), RequestInDoubt, NOT_APPLIED),
        (Fault(cut=True, apply=True), RequestInDoubt, APPLIED),
        (Fault(hang_s=60), RequestInDoubt, NOT_APPLIED),
        (Fault(hang_s=60, apply=True), RequestInDoubt, APPLIED),
        (Fault(twice=True), None, APPLIED),
        (Fault(status=412, code="PreconditionFailed"), PreconditionFailed, NOT_APPLIED),
        (Fault(status=404, code="NoSuchKey"), ObjectNotFound, NOT_APPLIED),
        (Fault(status=404, code="NoSuchBucket"), BucketNotFound, NOT_APPLIED),
        (Fault(status=404, code=""), StoreRefused, NOT_APPLIED),
        (Fault(status=401, code="Unauthorized"), AccessDenied, NOT_APPLIED),
        (Fault(status=403, code="AccessDenied"), AccessDenied, NOT_APPLIED),
        (Fault(status=400, code="ExpiredToken"), AccessDenied, NOT_APPLIED),
        (Fault(status=400, code="InvalidArgument"), StoreRefused, NOT_APPLIED),
        (Fault(status=501, code="NotImplemented"), StoreRefused, NOT_APPLIED),
        (Fault(corrupt_request=True), StoreUnavailable, NOT_APPLIED),
    ],
    ids=lambda value: str(value) if isinstance(value, Fault) else getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("condition", ["if_absent", "if_match"])
def test_a_conditional_put(
    store: S3Store, proxy: FaultProxy, key: str, condition: str, fault: Fault, expected: Any, applied: bool
) -> None:
    before = None if condition == "if_absent" else b"before"
    etag = None if before is None else store.put(key, before, site="test")
    proxy.reset()
    proxy.rule = first(1, fault)
    began = time.monotonic()
    if expected is None:
        store.put(key, b"after!", site="test", if_absent=etag is None, if_match=etag)
    else:
        with pytest.raises(StoreError) as caught:
            store.put(key, b"after!", site="test", if_absent=etag is None, if_match=etag, timeout_s=0.5)
        assert type(caught.value) is expected
        assert_helpful(caught.value)
    assert time.monotonic() - began < 0.5 + GRACE_S
    assert [request.method for request in proxy.requests] == ["PUT"], "sent exactly once"
    assert proxy.requests[0].conditional
    assert body_of(store, proxy, key) == (b"after!" if applied else before)


def test_a_conditional_put_that_lands_after_the_connection_was_cut(store: S3Store, proxy: FaultProxy, key: str) -> None:
    proxy.rule = first(1, Fault(cut=True, late_s=0.5))
    with pytest.raises(RequestInDoubt):
        store.put(key, b"late", site="test", if_absent=True)
    assert body_of(store, proxy, key) is None
    deadline = time.monotonic() + 10
    while body_of(store, proxy, key) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_conditional_put_that_cannot_connect_was_not_applied() -> None:
    store = connect(closed_port())
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="cannot connect") as caught:
        store.put("head", b"x", site="test", if_absent=True)
    assert time.monotonic() - began < GRACE_S, "not retried"
    assert_helpful(caught.value)
    store.close()


def test_a_conditional_put_whose_connection_times_out_was_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3store, "CONNECT_TIMEOUT_S", 0.3)
    with socket.socket() as server, socket.socket() as filler:
        server.bind(("127.0.0.1", 0))
        server.listen(0)  # room for one that nobody accepts; the kernel drops what comes next
        filler.connect(server.getsockname())
        store = connect(f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StoreUnavailable, match="ConnectTimeoutError"):
            store.put("head", b"x", site="test", if_absent=True)
        store.close()


def test_a_reused_connection_that_dies_under_a_conditional_put_is_in_doubt(
    store: S3Store, proxy: FaultProxy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    etag = store.put(key, b"before", site="test")
    proxy.cut_all()
    # The server's FIN has not arrived yet, as far as the pool can see: the race that a store's idle time-out makes.
    monkeypatch.setattr(urllib3.connectionpool, "is_connection_dropped", lambda connection: False)
    with pytest.raises(RequestInDoubt, match="ConnectionClosedError") as caught:
        store.put(key, b"after", site="test", if_match=etag)
    assert_helpful(caught.value)


def test_a_reused_connection_that_is_seen_to_be_dead_is_replaced(store: S3Store, proxy: FaultProxy, key: str) -> None:
    etag = store.put(key, b"before", site="test")
    proxy.cut_all()
    time.sleep(0.1)
    store.put(key, b"after", site="test", if_match=etag)
    assert body_of(store, proxy, key) == b"after"


def test_a_pooled_connection_to_a_store_that_has_gone_away_was_not_used(seaweed_endpoint: Any) -> None:
    with FaultProxy(seaweed_endpoint.url) as proxy:
        store = connect(proxy.url, seaweed_endpoint)
        list(store.list("", site="test", max_keys=1))
    with pytest.raises(StoreUnavailable, match="cannot connect"):
        store.put("head", b"x", site="test", if_absent=True)
    store.close()


# --- everything else: repeated until the deadline -----------------------------------------------------

PASSING = [
    Fault(status=500),
    Fault(status=503, code="SlowDown"),
    Fault(status=429, code="TooManyRequests"),
    Fault(status=409, code="OperationAborted"),
    Fault(status=400, code="RequestTimeout"),
    Fault(cut=True),
    Fault(cut=True, apply=True),
    Fault(truncate=1),
]


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        (operation, fault)
        for operation in ("get", "get_if_changed", "put", "list", "delete")
        for fault in PASSING
        if operation != "put" or fault.truncate is None  # the answer to a PUT has no body
    ],
    ids=str,
)
def test_passing_failures_are_retried(
    store: S3Store, proxy: FaultProxy, key: str, operation: str, fault: Fault
) -> None:
    store.put(key, b"a body", site="test")
    proxy.reset()
    proxy.rule = first(2, fault)
    if operation == "get":
        assert store.get(key, site="test").body == b"a body"
    elif operation == "get_if_changed":
        found = store.get_if_changed(key, site="test", etag='"other"')
        assert found is not None
        assert found.body == b"a body"
    elif operation == "put":
        store.put(key, b"another", site="test")
    elif operation == "list":
        assert [entry.key for entry in store.list(key, site="test")] == [key]
    else:
        store.delete([key], site="test")
    assert len(proxy.requests) == 3
    assert body_of(store, proxy, key) == {"put": b"another", "delete": None}.get(operation, b"a body")


def test_a_body_damaged_on_its_way_is_sent_again(store: S3Store, proxy: FaultProxy, key: str) -> None:
    for body in (b"small", BIG):
        proxy.reset()
        proxy.rule = first(1, Fault(corrupt_request=True))
        store.put(key, body, site="test")
        assert [request.status for request in proxy.requests] == [400, 200]
        assert body_of(store, proxy, key) == body


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(cut=True), Fault(hang_s=60)], ids=str)
def test_failures_that_do_not_pass_end_at_the_deadline(
    store: S3Store, proxy: FaultProxy, key: str, seaweed_endpoint: Any, fault: Fault
) -> None:
    hasty = connect(proxy.url, seaweed_endpoint, request_deadline_s=2.4)
    actions: list[Callable[[], Any]] = [
        lambda: hasty.get(key, site="test"),
        lambda: store.put(key, b"x", site="test", timeout_s=2.4),
        lambda: list(hasty.list(key, site="test")),
        lambda: hasty.delete([key], site="test"),
    ]
    for action in actions:
        proxy.reset()
        proxy.rule = lambda request: fault
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"in 2\.4 s") as caught:
            action()
        assert time.monotonic() - began < 2.4 + GRACE_S
        assert len(proxy.requests) > 1
        assert_helpful(caught.value)
    hasty.close()


def test_the_default_deadline(store: S3Store, proxy: FaultProxy, key: str) -> None:
    proxy.rule = lambda request: Fault(hang_s=60)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="in 3 s"):
        store.get(key, site="test")
    assert DEADLINE_S / 2 < time.monotonic() - began < DEADLINE_S + GRACE_S


def test_a_trickle_cannot_hold_the_deadline_up(store: S3Store, proxy: FaultProxy, key: str) -> None:
    store.put(key, BIG, site="test")
    proxy.reset()
    proxy.rule = lambda request: Fault(bytes_per_s=2000)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="in 3 s"):
        store.get(key, site="test")
    assert DEADLINE_S * 0.9 < time.monotonic() - began < DEADLINE_S + GRACE_S


def test_an_upload_that_nobody_reads_ends_at_the_deadline() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)  # connects, but never reads: the kernel's buffers fill up
        store = connect(f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.put("k", bytes(64 << 20), site="test", timeout_s=1.0)
        assert time.monotonic() - began < 1.0 + s3store.CONNECT_TIMEOUT_S + GRACE_S
        store.close()


@pytest.mark.parametrize(
    ("status", "code", "expected", "says"),
    [
        (403, "AccessDenied", AccessDenied, "s3:ListBucket"),
        (403, "RequestTimeTooSkewed", AccessDenied, "clock"),
        (403, "InvalidObjectState", StoreRefused, "lifecycle"),
        (404, "NoSuchBucket", BucketNotFound, "create it"),
        (404, "", StoreRefused, "check"),
        (405, "MethodNotAllowed", StoreRefused, "check"),
        (501, "NotImplemented", StoreRefused, "doctor"),
        (400, "a\nb http://x?Signature=1", StoreRefused, "check"),
    ],
)
def test_definite_answers_are_not_retried(
    store: S3Store, proxy: FaultProxy, key: str, status: int, code: str, expected: type[StoreError], says: str
) -> None:
    proxy.rule = lambda request: Fault(status=status, code=code)
    with pytest.raises(expected, match=says) as caught:
        store.get(key, site="test")
    assert len(proxy.requests) == 1
    assert_helpful(caught.value)


def test_a_store_without_delete_objects(store: S3Store, proxy: FaultProxy, key: str) -> None:
    keys = [f"{key}{number}" for number in range(3)]
    for each in keys:
        store.put(each, b"x", site="test")
    proxy.reset()
    proxy.rule = lambda request: Fault(status=501, code="NotImplemented") if request.method == "POST" else None
    store.delete([*keys, key + "missing"], site="test")
    assert [request.method for request in proxy.requests] == ["POST"] + ["DELETE"] * 4
    proxy.rule = None
    assert list(store.list(key, site="test")) == []


# --- credentials and secrets --------------------------------------------------------------------------


def test_wrong_keys(store: S3Store, proxy: FaultProxy, seaweed_endpoint: Any) -> None:
    wrong_key = connect(proxy.url)
    wrong_secret = connect(proxy.url, access_key=seaweed_endpoint.access_key)
    for each in (wrong_key, wrong_secret):
        for action in (
            each.check_bucket,
            lambda each=each: each.get("k", site="test"),
            lambda each=each: each.put("k", b"x", site="test", if_absent=True),
            lambda each=each: each.delete(["k"], site="test"),
        ):
            with pytest.raises(AccessDenied, match="check credentials") as caught:
                action()
            assert_helpful(caught.value)
        each.close()


def test_no_credentials(store: S3Store, proxy: FaultProxy, no_aws: pytest.MonkeyPatch) -> None:
    nobody = connect(proxy.url, access_key=None, secret_key=None)
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID") as caught:
        nobody.put("k", b"x", site="test", if_absent=True)
    assert_helpful(caught.value)
    assert proxy.requests == []
    nobody.close()


def test_the_log_holds_no_secret(
    store: S3Store, proxy: FaultProxy, key: str, seaweed_endpoint: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "s3blockfs.s3store")
    proxy.rule = first(2, Fault(status=503, code="SlowDown"))
    store.put(key, b"x", site="here")
    assert sum(f"here: s3://{BUCKET}/{key}: HTTP 503 SlowDown" in record.message for record in caplog.records) == 2
    for leak in (seaweed_endpoint.secret_key, "AWS4", "http://"):
        assert leak not in caplog.text


@pytest.mark.parametrize("settings", [{"profile": "no-such-profile"}, {"url": "no url"}, {"secret_key": None}])
def test_settings_that_do_not_fit(no_aws: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="check endpoint URL, region, profile and keys"):
        connect(**({"url": "http://127.0.0.1:1"} | settings))


# --- the wire -----------------------------------------------------------------------------------------


def test_no_put_waits_for_100_continue(store: S3Store, proxy: FaultProxy, key: str, seaweed_endpoint: Any) -> None:
    """If this fails after an upgrade of botocore, it has renamed `add_expect_header` (see S3Store)."""
    store.put(key, b"small", site="test")
    store.put(key, BIG, site="test")
    puts = [request for request in proxy.requests if request.method == "PUT"]
    assert len(puts) == 2
    assert not any("expect" in request.headers for request in puts)
    proxy.reset()
    session = boto3.Session(seaweed_endpoint.access_key, seaweed_endpoint.secret_key)
    plain = session.client("s3", endpoint_url=proxy.url, config=Config(retries={"total_max_attempts": 1}))
    plain.put_object(Bucket=BUCKET, Key=key, Body=b"small")
    plain.close()
    assert proxy.requests[0].headers["expect"] == "100-continue", "the SDK does it by itself no more: nothing to remove"


def test_every_put_carries_its_digest_and_nothing_superfluous(store: S3Store, proxy: FaultProxy, key: str) -> None:
    for body in (b"", b"small", BIG):
        proxy.reset()
        store.put(key, body, site="test")
        headers = proxy.requests[0].headers
        assert headers["content-md5"] == base64.b64encode(hashlib.md5(body).digest()).decode()
        assert headers["content-length"] == str(len(body))
        assert headers["user-agent"].startswith("s3blockfs/")
        assert headers["amz-sdk-request"] == "attempt=1; max=1"
        assert not any("checksum" in name for name in headers)


def test_connections_are_kept(store: S3Store, proxy: FaultProxy, key: str) -> None:
    proxy.cut_all()
    store.put(key, BIG, site="test")
    for _ in range(10):
        assert store.get(key, site="test", start=100, length=300_000).body == BIG[100:300_100]
        store.get(key, site="test")
        with pytest.raises(ObjectNotFound):
            store.get(key + "missing", site="test")
    assert proxy.connections == 1


def test_many_threads(store: S3Store, proxy: FaultProxy, key: str) -> None:
    bodies = {f"{key}{number}": bytes([number]) * 50_000 for number in range(32)}

    def work(name: str) -> bool:
        store.put(name, bodies[name], site="test")
        return all(store.get(name, site="test").body == bodies[name] for _ in range(5))

    with ThreadPoolExecutor(32) as threads:
        assert all(threads.map(work, bodies))


def test_server_time(proxy: FaultProxy, store: S3Store, seaweed_endpoint: Any) -> None:
    fresh = connect(proxy.url, seaweed_endpoint)
    assert fresh.server_time_s() == 0.0
    with pytest.raises(ObjectNotFound):
        fresh.get("missing", site="test")
    assert abs(fresh.server_time_s() - time.time()) < 2
    fresh.close()


def test_loopback_is_not_asked_through_a_system_wide_proxy(
    store: S3Store, proxy: FaultProxy, seaweed_endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", closed_port())
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    fresh = connect(proxy.url, seaweed_endpoint)
    fresh.check_bucket()
    fresh.close()


def test_an_object_that_grows_between_two_looks_at_its_end(store: S3Store, proxy: FaultProxy, key: str) -> None:
    """A range past the end costs a second request; what that one finds is what is returned, never a mix."""
    store.put(key, b"01234", site="test")

    def grow(request: Request) -> None:
        if request.method == "GET" and "range" not in request.headers:
            proxy.rule = None
            store.put(key, b"0123456789", site="test")

    proxy.rule = grow
    found = store.get(key, site="test", start=5, length=3)
    assert proxy.rule is None
    assert (found.body, found.etag) == (b"567", store.get(key, site="test").etag)
