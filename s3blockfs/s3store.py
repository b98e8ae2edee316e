"""The real `ObjectStore`: S3 and its relatives, by boto3 (no other module imports it).

Every failure becomes one of the classes of `errors.py`, in one line that names the object and the next step and repeats
nothing that could be secret (no message of the SDK or of the store, no URL, no header: only the error code).

Deadlines: an attempt waits at most half of the time left for the next byte (a conditional PUT, which has one attempt:
all of it). Two waits can pass it: `CONNECT_TIMEOUT_S` for each address of the endpoint's name, and a store that
trickles out the headers or the XML of an answer. Thread rule: any thread.
"""

import base64
import builtins
import hashlib
import io
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as sdk
from botocore import handlers
from botocore.config import Config as SdkConfig
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from s3blockfs import __version__
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
from s3blockfs.objectstore import Listed, StoredObject
from s3blockfs.runtime import Runtime

T = TypeVar("T")
log = logging.getLogger(__name__)

#: For each address that the endpoint's name resolves to; also bounds the sending of one piece (see `_Upload`).
CONNECT_TIMEOUT_S = 3.0
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
BATCH = 1000  # the most that DeleteObjects takes and ListObjectsV2 gives
PIECE = 256 * 1024  # how much of a body is received or sent between two looks at the clock

#: Everything that an attempt may end in. ValueError: the SDK met an answer (a date, a length) that it cannot parse.
_FAILURES = (sdk.BotoCoreError, sdk.ClientError, ResponseParserError, HTTPError, ValueError)
#: Raised by urllib3's `_new_conn` alone, that is before anything was sent. A pooled connection that the server had
#: closed fails later, as ConnectionClosedError: that request may have arrived, so it is in doubt.
_NOT_SENT = (sdk.EndpointConnectionError, sdk.ConnectTimeoutError)
_NO_CREDENTIALS = (
    *(sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.CredentialRetrievalError),
    *(sdk.NoAuthTokenError, sdk.TokenRetrievalError, sdk.SSOError, sdk.LoginError),
)
_BAD_TOKEN = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}  # S3 sends them as 400
#: 4xx that say "not now": 400 RequestTimeout is S3's word for a body that came too slowly.
_AGAIN = {"RequestTimeout", "SlowDown", "Throttling"}
#: The body was damaged on the way and the store threw it away, so it is safe to send it again.
_DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch"}
_ACCESS_ADVICE = "check credentials and policy (without s3:ListBucket, S3 says this for a missing key, too)"
_ADVICE = {
    "AuthorizationHeaderMalformed": "check the region",
    "PermanentRedirect": "check the region and the endpoint URL",
    "404": "this is no answer of S3: check the endpoint URL",
    "BucketAlreadyExists": "choose another bucket name",
    "InvalidBucketName": "choose another bucket name",
    "InvalidObjectState": "a lifecycle rule has moved it to an archive tier: restore it and remove the rule",
    "NotImplemented": "this store lacks a feature that s3blockfs needs: run `s3blockfs doctor`",
    "RequestTimeTooSkewed": "set the clock of this machine",
}


class S3Store:
    """One bucket.

    Credentials, region, endpoint and profile come from boto3's ordinary chain (environment, files, roles) unless given.
    `request_deadline_s` bounds a call, its retries included, unless the call brings its own. Raises UsageError when the
    settings fit together in no way."""

    def __init__(
        self,
        bucket: str,
        *,
        runtime: Runtime,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        request_deadline_s: float = 10.0,
    ) -> None:
        self.bucket = bucket
        self.name = f"s3://{bucket}"
        self._runtime = runtime
        self._deadline_s = request_deadline_s
        self._attempt = threading.local()
        self._date: tuple[float, float] | None = None
        """The store's clock and ours at its last answer; one tuple, so that threads replace both at once."""
        config = SdkConfig(
            max_pool_connections=64,
            tcp_keepalive=True,
            parameter_validation=False,
            user_agent=f"s3blockfs/{__version__}",
            connect_timeout=CONNECT_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # No addressing style: botocore then uses path style with any endpoint URL, and virtual hosts on AWS.
            s3={"payload_signing_enabled": False},
            # A system-wide HTTP proxy cannot reach a server on this machine's loopback.
            proxies={} if urlsplit(endpoint_url or "").hostname in ("127.0.0.1", "localhost", "::1") else None,
        )
        try:
            session: Any = boto3.Session(region_name=region, profile_name=profile)
            keys = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}
            self._client = session.client("s3", endpoint_url=endpoint_url, config=config, **keys)
        except (sdk.BotoCoreError, ValueError) as error:
            text = f"{self.name}: cannot set up S3 ({_reason(error)}); check endpoint URL, region, profile and keys"
            raise UsageError(text) from error
        events = self._client.meta.events
        # Each PUT would otherwise wait one round trip for "100 Continue". Undocumented: tests/test_s3store.py looks at
        # the wire, so an SDK that renames it costs a failed test and a round trip, never a failed request.
        events.unregister("before-call.s3", getattr(handlers, "add_expect_header", None))
        events.register("before-call.s3", self._set_read_timeout)
        events.register("response-received.s3", self._note_date)

    def close(self) -> None:
        """Close the pooled connections. The store can still be used afterwards and would open new ones."""
        self._client.close()

    # --- the protocol ---------------------------------------------------------------------------------

    def get(
        self, key: str, *, site: str, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> StoredObject:
        condition = {} if if_match is None else {"IfMatch": if_match}
        # At least one byte: "bytes=5-4" is no range, and servers then send the whole object.
        end = "" if length is None else start + max(length, 1) - 1
        where = {"Range": f"bytes={start}-{end}"} if start or length is not None else {}

        def attempt(deadline: float) -> StoredObject:
            try:
                answer = self._ask("get_object", Key=key, **where, **condition)
            except sdk.ClientError as error:
                if _answer(error)[0] != 416:
                    raise
                # The range begins at the end or past it; every range of an empty object does. That answer has no ETag,
                # and not every store looks at If-Match first.
                answer = self._ask("get_object", Key=key, **condition)
            body = self._receive(answer, deadline)
            if answer["ResponseMetadata"]["HTTPStatusCode"] == 200:  # not 206: the whole object
                body = body[start:]
            return _stored(answer, body if length is None else body[:length])

        return self._run(attempt, key, site)

    def get_if_changed(self, key: str, *, site: str, etag: str) -> StoredObject | None:
        def attempt(deadline: float) -> StoredObject | None:
            try:
                answer = self._ask("get_object", Key=key, IfNoneMatch=etag)
            except sdk.ClientError as error:
                if _answer(error)[0] == 304:
                    return None
                raise
            return _stored(answer, self._receive(answer, deadline))

        return self._run(attempt, key, site)

    def put(
        self,
        key: str,
        body: bytes,
        *,
        site: str,
        if_match: str | None = None,
        if_absent: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        condition = {} if if_match is None else {"IfMatch": if_match}
        if if_absent:
            condition["IfNoneMatch"] = "*"
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()

        def attempt(deadline: float) -> str:
            payload = body if len(body) <= PIECE else _Upload(body, lambda: self._check(deadline))
            etag: str = self._ask("put_object", Key=key, Body=payload, ContentMD5=digest, **condition).get("ETag", "")
            if not etag:
                raise ValueError("an answer to PUT without an ETag")
            return etag

        return self._run(attempt, key, site, timeout_s, once=bool(condition))

    def delete(self, keys: Sequence[str], *, site: str) -> None:
        for first in range(0, len(keys), BATCH):
            batch = keys[first : first + BATCH]
            objects = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
            try:
                answer = self._call(batch[0], site, "delete_objects", Delete=objects)
                left = [entry["Key"] for entry in answer.get("Errors", [])]
            except StoreRefused:  # not every store has this request
                left = list(batch)
            for key in left:  # alone: what fails now names its key
                with suppress(ObjectNotFound):  # S3 says 204, some stores 404
                    self._call(key, site, "delete_object", Key=key)

    def list(self, prefix: str, *, site: str, delimiter: str = "", max_keys: int | None = None) -> Iterator[Listed]:
        page = {"Prefix": prefix, "MaxKeys": min(BATCH, max_keys or BATCH)}
        return islice(self._entries(page | ({"Delimiter": delimiter} if delimiter else {}), site), max_keys)

    def _entries(self, page: dict[str, Any], site: str) -> Iterator[Listed]:
        while True:
            answer = self._call(page["Prefix"], site, "list_objects_v2", **page)
            for entry in answer.get("Contents", []):
                yield Listed(entry["Key"], False, entry["Size"], entry["ETag"], entry["LastModified"].timestamp())
            for entry in answer.get("CommonPrefixes", []):
                yield Listed(entry["Prefix"], True)
            if not answer.get("IsTruncated"):
                return
            token = answer.get("NextContinuationToken")
            if not token or token == page.get("ContinuationToken"):  # it would go on for ever
                text = "a LIST that does not advance; report it to the store's makers"
                raise StoreRefused(f"{self.name}/{page['Prefix']}: {text}")
            page["ContinuationToken"] = token

    def server_time_s(self) -> float:
        seen = self._date
        return 0.0 if seen is None else seen[0] + self._runtime.monotonic() - seen[1]

    # --- the bucket -----------------------------------------------------------------------------------

    def check_bucket(self, prefix: str = "") -> None:
        """See whether the bucket is there and may be listed under `prefix`.
        Raises BucketNotFound, AccessDenied, StoreRefused, StoreUnavailable. By LIST: HeadBucket's errors have no text.
        """
        self._call(prefix, "check_bucket", "list_objects_v2", Prefix=prefix, MaxKeys=1)

    def create_bucket(self) -> None:
        """Create the bucket on a server of our own, which knows no regions; no error when it exists and is ours."""
        try:
            self._call("", "create_bucket", "create_bucket")
        except StoreRefused as refused:
            if "BucketAlreadyOwnedByYou" not in str(refused):
                raise

    def bucket_findings(self, prefix: str = "") -> builtins.list[str]:
        """What about the bucket's settings would hurt databases under `prefix`, a line each; for `doctor`.
        A setting that the store does not have counts as unset; one that may not be read is a finding."""
        findings = []

        def setting(operation: str) -> Any:
            try:
                return self._call("", operation, operation)
            except AccessDenied:
                findings.append(f"not allowed to {operation.replace('_', ' ')}: allow it, or check this by hand")
            except (StoreRefused, ObjectNotFound):  # unset, or not implemented
                pass
            return {}

        rules = setting("get_bucket_lifecycle_configuration").get("Rules", [])
        rules = [rule for rule in rules if rule.get("Status") == "Enabled" and _applies(rule, prefix)]
        for rule in rules:
            name = f"lifecycle rule {_word(rule.get('ID'))}"
            tiers = {step.get("StorageClass", "") for step in rule.get("Transitions", [])} - {"INTELLIGENT_TIERING"}
            if {"Days", "Date"} & rule.get("Expiration", {}).keys():
                findings.append(f"{name} deletes objects by age and will destroy databases: remove it")
            if tiers:
                findings.append(f"{name} moves objects to {_word(' '.join(sorted(tiers)))}, slow or dear: remove it")
        expires = any("NoncurrentVersionExpiration" in rule for rule in rules)
        if setting("get_bucket_versioning").get("Status") == "Enabled" and not expires:
            findings.append("versioning keeps and bills every replaced head: add a rule to expire noncurrent versions")
        if setting("get_object_lock_configuration").get("ObjectLockConfiguration", {}).get("Rule"):
            findings.append("Object Lock's default retention keeps old heads: drop it or use another bucket")
        return [f"{self.name}: {finding}" for finding in findings]

    # --- one request ----------------------------------------------------------------------------------

    def _run(
        self, attempt: Callable[[float], T], key: str, site: str, timeout_s: float | None = None, *, once: bool = False
    ) -> T:
        """What `attempt(deadline)` returns; repeated until then, unless `once`, while it fails for passing reasons."""
        limit_s = self._deadline_s if timeout_s is None else timeout_s
        deadline = self._runtime.monotonic() + limit_s
        pause_s = FIRST_PAUSE_S
        while True:
            left_s = max(deadline - self._runtime.monotonic(), 0.01)
            self._attempt.read_timeout_s = left_s if once else min(left_s, max(left_s / 2, 1.0))
            try:
                return attempt(deadline)
            except _FAILURES as error:
                where = f"{self.name}/{key}"
                kind, what, advice = _meaning(error)
                if once or kind not in (RequestInDoubt, StoreUnavailable):
                    raise kind(f"{where}: {what} ({_reason(error)}); {advice}") from error
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                wait_s = self._runtime.uniform(pause_s / 4, pause_s / 2)
                if self._runtime.monotonic() + wait_s >= deadline:
                    text = f"{where}: no usable answer in {limit_s:g} s ({_reason(error)}); check network and endpoint"
                    raise StoreUnavailable(text) from error
                log.debug("%s: %s: %s; again in %.2f s", site, where, _reason(error), wait_s)
            self._runtime.sleep(wait_s)

    def _call(self, key: str, site: str, operation: str, **parameters: Any) -> Any:
        """A request that is the whole attempt; `key` is for messages."""
        return self._run(lambda _: self._ask(operation, **parameters), key, site)

    def _ask(self, operation: str, **parameters: Any) -> Any:
        return getattr(self._client, operation)(Bucket=self.bucket, **parameters)

    def _set_read_timeout(self, context: dict[str, Any], **_: Any) -> None:
        context["read_timeout"] = self._attempt.read_timeout_s

    def _note_date(self, response_dict: Any, **_: Any) -> None:
        with suppress(ValueError, TypeError, KeyError):  # no answer, or no date in it
            date = parsedate_to_datetime(response_dict["headers"]["date"])
            self._date = date.timestamp(), self._runtime.monotonic()

    def _check(self, deadline: float) -> None:
        if self._runtime.monotonic() > deadline:
            raise sdk.ReadTimeoutError(endpoint_url=self.name)

    def _receive(self, answer: Any, deadline: float) -> bytes:
        """The body. `read1` returns what has arrived, so that a trickle cannot hold the deadline up as `read` could."""
        pieces = []
        with answer["Body"] as raw:
            while piece := raw.read1(PIECE):
                pieces.append(piece)
                self._check(deadline)
        body = b"".join(pieces)
        expected = answer.get("ContentLength", len(body))
        if len(body) != expected:
            raise sdk.IncompleteReadError(actual_bytes=len(body), expected_bytes=expected)
        return body


class _Upload(io.BytesIO):
    """A large body in pieces: a socket's time-out covers the sending of a whole buffer, however much of it moves."""

    def __init__(self, body: bytes, check: Callable[[], None]) -> None:
        super().__init__(body)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(PIECE)


def _meaning(error: Exception) -> tuple[type[StoreError], str, str]:
    """What the failure of one attempt is, in an exception and in words, and what to do about it.
    RequestInDoubt and StoreUnavailable are worth another attempt; the latter: nothing has been or will be applied."""
    if isinstance(error, _NOT_SENT):
        return StoreUnavailable, "cannot connect", "check the network and the endpoint"
    if isinstance(error, _NO_CREDENTIALS):
        return AccessDenied, "no usable credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
    if isinstance(error, sdk.ParamValidationError):
        return StoreRefused, "the SDK refuses this name", "check the bucket name and the key"
    if not isinstance(error, sdk.ClientError):
        return RequestInDoubt, "sent, but not answered in full", "check the network and the endpoint"
    status, code = _answer(error)
    if (status in (401, 403) and code != "InvalidObjectState") or code in _BAD_TOKEN:
        return AccessDenied, "access denied", _ADVICE.get(code, _ACCESS_ADVICE)
    if status == 412:
        return PreconditionFailed, "not, or no longer, what the condition asked for", "read it again"
    if code == "NoSuchBucket":
        return BucketNotFound, "no such bucket", "create it or check its name"
    if code == "NoSuchKey":
        return ObjectNotFound, "no such object", "check the name"
    if code in _DAMAGED:
        return StoreUnavailable, "damaged on its way to the store", "check the network"
    passing = code in _AGAIN or status in (408, 409, 429) or status >= 500
    if passing and code != "NotImplemented" and not code.startswith("Bucket"):  # 501 and 409 that are definite
        return RequestInDoubt, "the store failed", "try again later"
    return StoreRefused, "refused", _ADVICE.get(code, "check the settings of the store")


def _reason(error: Exception) -> str:
    """For messages: never the SDK's own text, which may hold URLs, nor the store's, which may hold anything."""
    if not isinstance(error, sdk.ClientError):
        return type(error).__name__
    status, code = _answer(error)
    return f"HTTP {status} {code}".removesuffix(f" {status}").rstrip()


def _word(text: str | None) -> str:
    """Short and printable, whatever the store sent."""
    return re.sub(r"[^\w.:-]+", " ", text or "", flags=re.ASCII).strip()[:64]


def _answer(error: sdk.ClientError) -> tuple[int, str]:
    return error.response["ResponseMetadata"]["HTTPStatusCode"], _word(error.response["Error"].get("Code"))


def _stored(answer: Any, body: bytes) -> StoredObject:
    modified = answer.get("LastModified")
    return StoredObject(body, answer.get("ETag", ""), modified.timestamp() if modified else 0.0)


def _applies(rule: dict[str, Any], prefix: str) -> bool:
    """Whether a lifecycle rule touches objects under `prefix`. Ours carry no tags."""
    scope = rule.get("Filter") or {}
    scope = scope.get("And", scope)
    path: str = scope.get("Prefix", rule.get("Prefix", ""))
    return not ({"Tag", "Tags"} & scope.keys()) and (path.startswith(prefix) or prefix.startswith(path))
