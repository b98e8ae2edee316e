"""`S3Store` on buckets, their settings and many keys: mostly answers of AWS, from the SDK's own stubber."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import Any

import boto3
import botocore.session
import pytest
from botocore import exceptions as sdk
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.stub import Stubber
from botocore.utils import parse_timestamp
from proxy import Fault, FaultProxy
from servers import BUCKET, SECRET, connect, without_aws

from s3blockfs import s3store
from s3blockfs.embedded import Endpoint
from s3blockfs.errors import AccessDenied, BucketNotFound, StoreError, StoreRefused, StoreUnavailable
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store

pytestmark = pytest.mark.s3


@pytest.fixture
def store(proxy: FaultProxy, seaweed_endpoint: Any) -> Iterator[S3Store]:
    through_proxy = connect(proxy.url, seaweed_endpoint)
    yield through_proxy
    through_proxy.close()


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [
        ("http://127.0.0.1:9", None, "http://127.0.0.1:9/some-bucket/k"),
        (None, "http://127.0.0.1:9", "http://127.0.0.1:9/some-bucket/k"),
        (None, None, "https://some-bucket.s3.amazonaws.com/k"),
        ("https://s3.amazonaws.com", None, "https://some-bucket.s3.amazonaws.com/k"),
    ],
)
def test_addressing(monkeypatch: pytest.MonkeyPatch, argument: str | None, variable: str | None, expected: str) -> None:
    """Path style wherever an endpoint is named, virtual hosts on AWS."""
    without_aws(monkeypatch)
    if variable:
        monkeypatch.setenv("AWS_ENDPOINT_URL", variable)
    store = S3Store("some-bucket", runtime=Runtime(), endpoint_url=argument, access_key="K", secret_key=SECRET)
    assert url_of(store) == expected
    store.close()


def test_buckets(proxy: FaultProxy, seaweed_endpoint: Any) -> None:
    fresh = connect(proxy.url, seaweed_endpoint, bucket=f"fresh-{uuid.uuid4().hex[:8]}")
    with pytest.raises(BucketNotFound, match="create it"):
        fresh.check_bucket()
    with pytest.raises(BucketNotFound):
        fresh.get("k", site="test")
    fresh.create_bucket()
    fresh.create_bucket()
    fresh.check_bucket()
    assert fresh.bucket_findings() == []
    fresh._client.put_bucket_versioning(Bucket=fresh.bucket, VersioningConfiguration={"Status": "Enabled"})
    assert ["versioning" in finding for finding in fresh.bucket_findings()] == [True]
    fresh._client.delete_bucket(Bucket=fresh.bucket)
    fresh.close()


def test_a_bucket_that_belongs_to_others(store: S3Store, proxy: FaultProxy) -> None:
    proxy.rule = lambda request: Fault(status=409, code="BucketAlreadyExists")
    with pytest.raises(StoreRefused, match="another bucket name"):
        store.create_bucket()
    assert len(proxy.requests) == 1


def test_findings_of_a_store_without_such_settings(store: S3Store, proxy: FaultProxy) -> None:
    proxy.rule = lambda request: Fault(status=501, code="NotImplemented")
    assert store.bucket_findings() == []
    proxy.rule = lambda request: Fault(status=403, code="AccessDenied")
    assert len(store.bucket_findings()) == 3
    assert all("not allowed" in finding for finding in store.bucket_findings())


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3Store, Stubber]]:
    """A store whose answers are written down in the test and checked by the SDK against the model of S3."""
    without_aws(monkeypatch)
    store = connect("http://127.0.0.1:1")
    with Stubber(store._client) as stubber:
        yield store, stubber
    stubber.assert_no_pending_responses()
    store.close()


def findings(stubbed: tuple[S3Store, Stubber], rule: dict[str, Any], versioning: str, lock: dict[str, Any]) -> str:
    store, stubber = stubbed
    rules = [{"ID": "r", "Status": "Enabled", "Filter": {}, **rule}] if rule else []
    stubber.add_response("get_bucket_lifecycle_configuration", {"Rules": rules})
    stubber.add_response("get_bucket_versioning", {"Status": versioning} if versioning else {})
    stubber.add_response("get_object_lock_configuration", {"ObjectLockConfiguration": lock} if lock else {})
    return " | ".join(store.bucket_findings("app/db"))


@pytest.mark.parametrize(
    ("rule", "versioning", "lock", "says"),
    [
        ({}, "", {}, None),
        ({"Expiration": {"Days": 3}}, "", {}, "will destroy databases"),
        ({"Expiration": {"Days": 3}, "Filter": {"Prefix": "app/"}}, "", {}, "rule r deletes objects"),
        ({"Expiration": {"Days": 3}, "Filter": {"Prefix": "app/db/data/"}}, "", {}, "rule r deletes objects"),
        ({"Expiration": {"Days": 3}, "Filter": {"And": {"Prefix": "app/"}}}, "", {}, "rule r deletes objects"),
        ({"Expiration": {"Days": 3}, "Filter": {"Prefix": "logs/"}}, "", {}, None),
        ({"Expiration": {"Days": 3}, "Filter": {"Tag": {"Key": "a", "Value": "b"}}}, "", {}, None),
        ({"Expiration": {"Days": 3}, "Status": "Disabled"}, "", {}, None),
        ({"Expiration": {"ExpiredObjectDeleteMarker": True}}, "", {}, None),
        ({"Transitions": [{"Days": 1, "StorageClass": "GLACIER"}]}, "", {}, "moves objects to GLACIER"),
        ({"Transitions": [{"Days": 1, "StorageClass": "INTELLIGENT_TIERING"}]}, "", {}, None),
        ({}, "Enabled", {}, "expire noncurrent versions"),
        ({}, "Suspended", {}, None),
        ({"NoncurrentVersionExpiration": {"NoncurrentDays": 1}}, "Enabled", {}, None),
        ({}, "", {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Days": 9}}}, "Object Lock"),
        ({}, "", {"ObjectLockEnabled": "Enabled"}, None),
    ],
)
def test_findings(
    stubbed: tuple[S3Store, Stubber], rule: dict[str, Any], versioning: str, lock: dict[str, Any], says: str | None
) -> None:
    text = findings(stubbed, rule, versioning, lock)
    assert text == "" if says is None else says in text and text.startswith(f"s3://{BUCKET}: ")


def test_creating_a_bucket_that_is_ours_already_is_no_error(stubbed: tuple[S3Store, Stubber]) -> None:
    store, stubber = stubbed
    stubber.add_client_error("create_bucket", "BucketAlreadyOwnedByYou", http_status_code=409)
    store.create_bucket()


def deletion(*keys: str) -> dict[str, Any]:
    return {"Bucket": BUCKET, "Delete": {"Objects": [{"Key": key} for key in keys], "Quiet": True}}


def test_only_the_keys_that_failed_are_deleted_again(stubbed: tuple[S3Store, Stubber]) -> None:
    store, stubber = stubbed
    failed = {"Errors": [{"Key": "b", "Code": "InternalError"}, {"Key": "c", "Code": "NoSuchKey"}]}
    stubber.add_response("delete_objects", failed, deletion("a", "b", "c"))
    stubber.add_response("delete_object", {}, {"Bucket": BUCKET, "Key": "b"})
    stubber.add_client_error("delete_object", "NoSuchKey", http_status_code=404)
    store.delete(["a", "b", "c"], site="test")


@pytest.mark.parametrize(
    ("code", "status", "expected"), [("AccessDenied", 403, AccessDenied), ("Odd", 400, StoreRefused)]
)
def test_a_deletion_that_fails_names_the_key(
    stubbed: tuple[S3Store, Stubber], code: str, status: int, expected: type[StoreError]
) -> None:
    store, stubber = stubbed
    stubber.add_response("delete_objects", {"Errors": [{"Key": "b", "Code": code}]}, deletion("a", "b"))
    stubber.add_client_error("delete_object", code, http_status_code=status)
    with pytest.raises(expected, match=f"s3://{BUCKET}/b: "):
        store.delete(["a", "b"], site="test")


def test_a_list_that_does_not_advance(stubbed: tuple[S3Store, Stubber]) -> None:
    store, stubber = stubbed
    for _ in range(2):
        stubber.add_response("list_objects_v2", {"IsTruncated": True, "NextContinuationToken": "same"})
    with pytest.raises(StoreRefused, match="does not advance"):
        list(store.list("p", site="test"))


# --- the bucket of a boto3 resource ---------------------------------------------------------------------


class Rotating:
    """Hands out temporary credentials that are always about to end."""

    def __init__(self, endpoint: Any, right: bool = True) -> None:
        self.endpoint, self.right, self.calls = endpoint, right, 0

    def __call__(self) -> dict[str, str]:
        self.calls += 1
        ends = datetime.now(timezone.utc) + timedelta(seconds=60)
        secret = self.endpoint.secret_key if self.right else SECRET
        return {
            "access_key": self.endpoint.access_key,
            "secret_key": secret,
            "token": "",
            "expiry_time": ends.isoformat(),
        }


def resource(url: str | None, endpoint: Any, session: Any = None, **options: Any) -> Any:
    session = session or boto3.Session(endpoint.access_key, endpoint.secret_key, region_name="eu-west-1")
    return session.resource("s3", endpoint_url=url, **options)


def test_a_store_like_a_bucket(proxy: FaultProxy, seaweed_endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint, region and keys are those of the resource, whatever the environment says; the rest is ours."""
    without_aws(monkeypatch).setenv("AWS_ACCESS_KEY_ID", "INTRUDER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "intruder")
    bucket = resource(proxy.url, seaweed_endpoint).Bucket(f"like-{uuid.uuid4().hex[:8]}")
    bucket.create()
    with closing(S3Store(bucket, runtime=Runtime(), request_deadline_s=2.5)) as store:
        assert store.name == f"s3://{bucket.name}"
        proxy.reset()
        etag = store.put("k", b"mine", site="test", if_absent=True)
        assert [request.headers["amz-sdk-request"] for request in proxy.requests] == ["attempt=1; max=1"]
        assert "/eu-west-1/s3/" in proxy.requests[0].headers["authorization"]
        assert "expect" not in proxy.requests[0].headers
        assert store.get("k", site="test", if_match=etag).body == bucket.Object("k").get()["Body"].read() == b"mine"
        proxy.rule = lambda request: Fault(hang_s=60)
        with pytest.raises(StoreUnavailable, match=r"in 2\.5 s"):
            store.get("k", site="test")
        proxy.rule = None
        store.delete(["k"], site="test")
    bucket.delete()


def test_credentials_of_a_bucket_may_change(proxy: FaultProxy, seaweed_endpoint: Any) -> None:
    """They are asked for anew with each request, and refreshed by the chain that the resource came with."""
    source = Rotating(seaweed_endpoint)
    session = botocore.session.Session()
    session._credentials = RefreshableCredentials.create_from_metadata(source(), source, "test")  # type: ignore[attr-defined]
    bucket = resource(proxy.url, seaweed_endpoint, boto3.Session(botocore_session=session)).Bucket(BUCKET)
    with closing(S3Store(bucket, runtime=Runtime())) as store:
        store.create_bucket()
        before = source.calls
        store.put("k", b"x", site="test")
        assert source.calls > before
        source.right = False
        with pytest.raises(AccessDenied):
            store.put("k", b"x", site="test")


def test_tls_proxy_and_addressing_settings_of_a_bucket_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    without_aws(monkeypatch)
    endpoint = Endpoint("", "KEY", SECRET)
    config = Config(proxies={"https": "http://127.0.0.1:9"}, s3={"addressing_style": "virtual"})
    bucket = resource("https://s3.example.org", endpoint, verify=False, config=config).Bucket("some-bucket")
    with closing(S3Store(bucket, runtime=Runtime())) as store:
        assert store._client._endpoint.http_session._verify is False
        assert store._client.meta.config.proxies == {"https": "http://127.0.0.1:9"}
        assert url_of(store) == "https://some-bucket.s3.example.org/k"
    with closing(S3Store(resource(None, endpoint).Bucket("some-bucket"), runtime=Runtime())) as store:
        assert url_of(store) == "https://some-bucket.s3.eu-west-1.amazonaws.com/k"
    with closing(S3Store(resource(None, endpoint).Bucket("a.dotted.one"), runtime=Runtime())) as store:
        assert url_of(store) == "https://s3.eu-west-1.amazonaws.com/a.dotted.one/k"


def url_of(store: S3Store) -> str:
    """Where an object would be asked for."""
    url: str = store._client.generate_presigned_url("get_object", Params={"Bucket": store.bucket, "Key": "k"})
    return url.partition("?")[0]


# --- server-side copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault(status=503, code="SlowDown"), Fault(cut=True), Fault(cut=True, apply=True)])
def test_a_copy_is_retried(store: S3Store, proxy: FaultProxy, fault: Fault) -> None:
    store.create_bucket()
    source = f"tests/{uuid.uuid4().hex}"
    store.put(source, b"body", site="test")
    proxy.reset()
    faults = [fault, fault]
    proxy.rule = lambda request: faults.pop() if faults else None
    store.copy(source, source + "-copy", site="test")
    assert [request.method for request in proxy.requests] == ["PUT"] * 3
    assert store.get(source + "-copy", site="test").body == b"body"


def test_a_copy_that_fails_names_its_source(stubbed: tuple[S3Store, Stubber]) -> None:
    store, stubber = stubbed
    stubber.add_client_error("copy_object", "AccessDenied", http_status_code=403)
    with pytest.raises(AccessDenied, match=f"s3://{BUCKET}/source: "):
        store.copy("source", "target", site="test")


def test_no_failure_on_the_wire_is_taken_for_missing_credentials() -> None:
    """That would say of a commit that it was not applied, which nobody knows after a time-out."""
    kinds = [each for each in vars(sdk).values() if isinstance(each, type) and issubclass(each, sdk.BotoCoreError)]
    assert sdk.ReadTimeoutError in kinds
    credentials = tuple(each for each in s3store._NO_CREDENTIALS if issubclass(each, sdk.BotoCoreError))
    for kind in kinds:
        meaning = next(s3store._MEANINGS[base][0] for base in kind.__mro__ if base in s3store._MEANINGS)
        assert (meaning is AccessDenied) == issubclass(kind, credentials), kind
    assert s3store._explain(RuntimeError("still expired"))[0] is AccessDenied


def test_times_are_those_of_the_sdk_without_its_parser(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 0.3 ms for each answer. What is in neither of the two forms that S3 sends is left to it."""
    key = f"times/{uuid.uuid4().hex}"
    store.put(key, b"body", site="test")
    with monkeypatch.context() as patched:
        patched.setattr(s3store, "parse_timestamp", None)
        found, (listed,) = store.get(key, site="test"), store.list(key, site="test")
    assert abs(found.modified_s - store.server_time_s()) < 60 and abs(listed.modified_s - found.modified_s) < 2
    for text in ("Sun, 22 Nov 2026 14:07:56 GMT", "2026-11-22T14:07:56.123Z", "1700000000", 1.5, "20261122T140756Z"):
        assert s3store._time(text) == parse_timestamp(text)
    for text in ("", "no time", "Sun, 99 Nov 2026 14:07:56 GMT", "Sun, 22 Nov 99999 14:07:56 GMT"):
        with pytest.raises(ValueError, match="Invalid timestamp"):
            s3store._time(text)
