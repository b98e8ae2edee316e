"""The real `ObjectStore`: S3 and its relatives, by boto3 (no other module imports it).

Role: one request and what became of it. Every failure becomes one of the classes of `errors.py`, whose text is one line
that names the object and the next step and repeats nothing that could be secret (no message of the SDK or of the store,
no URL, no header: only the error code). Conditional PUTs are sent once; `head.py` settles the ones in doubt.

Deadlines: an attempt waits at most half of the time left for the next byte (a conditional PUT, which has one attempt:
all of it), and bodies of GET and PUT stop at the deadline. Two waits can pass it: `CONNECT_TIMEOUT_S` for each address
of the endpoint's name, and a store that trickles out the headers or the XML of an answer.

Thread rule: every method may be called from any thread. Does not belong here: formats, caching, `P/head`.
"""

from __future__ import annotations

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
from s3blockfs.telemetry import STORE_LOGGER, Counters

T = TypeVar("T")
log = logging.getLogger(STORE_LOGGER)

#: For each address that the endpoint's name resolves to; also bounds the sending of one piece (see `_Upload`).
CONNECT_TIMEOUT_S = 3.0
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
BATCH = 1000  # the most that DeleteObjects takes and ListObjectsV2 gives
PIECE = 256 * 1024  # how much of a body is received or sent between two looks at the clock

#: Everything that an attempt may end in. ValueError: the SDK met an answer (a date, a length) that it cannot parse.
_FAILURES = (sdk.BotoCoreError, sdk.ClientError, ResponseParserError, HTTPError, ValueError)
#: Raised before anything was sent; see `_outcome`.
_NOT_SENT = (sdk.EndpointConnectionError, sdk.ConnectTimeoutError)
_NO_CREDENTIALS = (
    sdk.NoCredentialsError,
    sdk.PartialCredentialsError,
    sdk.CredentialRetrievalError,
    sdk.NoAuthTokenError,
    sdk.TokenRetrievalError,
    sdk.SSOError,
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
    `request_deadline_s` bounds a call, its retries included, unless the call brings its own. `counters` count every
    attempt. `client` replaces the boto3 client that is otherwise built here (50-100 ms). Raises UsageError when the
    settings fit together in no way.
    """

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
        max_connections: int = 64,
        counters: Counters | None = None,
        client: Any = None,
    ) -> None:
        self.bucket = bucket
        self._runtime = runtime
        self._deadline_s = request_deadline_s
        self._counters = counters or Counters()
        self._local = threading.local()
        self._date: tuple[float, float] | None = None
        """The store's clock and ours at its last answer; one tuple, so that threads replace both at once."""
        if client is None:
            config = SdkConfig(
                max_pool_connections=max_connections,
                tcp_keepalive=True,
                parameter_validation=False,
                user_agent=f"s3blockfs/{__version__}",
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=request_deadline_s,
                retries={"mode": "standard", "total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                # No addressing style: botocore then uses path style with any endpoint URL, however it was set, and
                # virtual hosts on AWS.
                s3={"payload_signing_enabled": False},
                # A system-wide HTTP proxy cannot reach a server on this machine's loopback.
                proxies={} if urlsplit(endpoint_url or "").hostname in ("127.0.0.1", "localhost", "::1") else None,
            )
            try:
                if (access_key is None) != (secret_key is None):
                    raise sdk.PartialCredentialsError(provider="arguments", cred_var="access_key, secret_key")
                session = boto3.Session(access_key, secret_key, region_name=region, profile_name=profile)
                client = session.client("s3", endpoint_url=endpoint_url, config=config)
            except (sdk.BotoCoreError, ValueError) as error:
                text = f"{self.name}: cannot set up S3 ({_reason(error)}); check endpoint URL, region, profile and keys"
                raise UsageError(text) from error
        # Each PUT would otherwise wait one round trip for "100 Continue". Undocumented: tests/test_s3store.py looks at
        # the wire, so an SDK that renames it costs a failed test and a round trip, never a failed request.
        client.meta.events.unregister("before-call.s3", getattr(handlers, "add_expect_header", None))
        client.meta.events.register("before-call.s3", self._set_read_timeout)
        self._client = client

    @property
    def name(self) -> str:
        return f"s3://{self.bucket}"

    def close(self) -> None:
        """Close the pooled connections. The store can still be used afterwards and would open new ones."""
        self._client.close()

    # --- the protocol ---------------------------------------------------------------------------------

    def get(
        self,
        key: str,
        *,
        site: str,
        start: int = 0,
        length: int | None = None,
        if_match: str | None = None,
        timeout_s: float | None = None,
    ) -> StoredObject:
        condition = {} if if_match is None else {"IfMatch": if_match}
        ranged = start > 0 or length is not None
        # At least one byte: "bytes=5-4" is no range, and servers then send the whole object.
        end = "" if length is None else start + max(length, 1) - 1
        where = {"Range": f"bytes={start}-{end}"} if ranged else {}

        def attempt(deadline: float) -> StoredObject:
            try:
                answer = self._ask("get_object", Key=key, **where, **condition)
            except sdk.ClientError as error:
                if _answer(error)[0] != 416:
                    raise
                # The range begins at the end or past it; every range of an empty object does. The answer has no ETag,
                # and not every store looks at If-Match first.
                answer = self._ask("head_object", Key=key, **condition)
                if answer["ContentLength"] > start:
                    raise ValueError("the object grew between two requests") from error
                return _stored(answer, b"")
            body = self._receive(answer, deadline)
            if ranged and answer["ResponseMetadata"]["HTTPStatusCode"] == 200:
                body = body[start:]  # a store that ignores ranges
            return _stored(answer, body if length is None else body[:length])

        return self._run(attempt, [key], site, timeout_s)

    def get_if_changed(self, key: str, *, site: str, etag: str, timeout_s: float | None = None) -> StoredObject | None:
        def attempt(deadline: float) -> StoredObject | None:
            try:
                answer = self._ask("get_object", Key=key, IfNoneMatch=etag)
            except sdk.ClientError as error:
                if _answer(error)[0] == 304:
                    return None
                raise
            return _stored(answer, self._receive(answer, deadline))

        return self._run(attempt, [key], site, timeout_s)

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

        return self._run(attempt, [key], site, timeout_s, once=bool(condition))

    def delete(self, keys: Sequence[str], *, site: str, timeout_s: float | None = None) -> None:
        for first in range(0, len(keys), BATCH):
            batch = list(keys[first : first + BATCH])
            try:
                self._run(lambda _: self._delete_batch(batch), batch, site, timeout_s)  # noqa: B023 - called at once
            except StoreRefused:  # of the method as a whole, or of one key, and then the error below names that key
                for key in batch:
                    with suppress(ObjectNotFound):  # S3 says 204, some stores 404
                        self._run(lambda _: self._ask("delete_object", Key=key), [key], site, timeout_s)  # noqa: B023

    def list(
        self,
        prefix: str,
        *,
        site: str,
        delimiter: str = "",
        max_keys: int | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Listed]:
        page: dict[str, Any] = {"Prefix": prefix, "Delimiter": delimiter} if delimiter else {"Prefix": prefix}
        left = max_keys
        while left is None or left > 0:
            page["MaxKeys"] = BATCH if left is None else min(BATCH, left)
            answer = self._run(lambda _: self._ask("list_objects_v2", **page), [prefix], site, timeout_s)
            found = [
                Listed(entry["Key"], False, entry["Size"], entry["ETag"], entry["LastModified"].timestamp())
                for entry in answer.get("Contents", [])
            ] + [Listed(entry["Prefix"], True) for entry in answer.get("CommonPrefixes", [])]
            yield from found[:left]
            left = None if left is None else left - len(found)
            token = answer.get("NextContinuationToken")
            if not answer.get("IsTruncated"):
                return
            if not token or token == page.get("ContinuationToken"):  # it would go on for ever
                raise StoreRefused(
                    f"{self.name}/{prefix}: a LIST that does not advance; report it to the store's makers"
                )
            page["ContinuationToken"] = token

    def server_time_s(self) -> float:
        seen = self._date
        return 0.0 if seen is None else seen[0] + self._runtime.monotonic() - seen[1]

    # --- the bucket -----------------------------------------------------------------------------------

    def check_bucket(self, prefix: str = "") -> None:
        """See whether the bucket is there and may be listed under `prefix`.

        Raises BucketNotFound, AccessDenied, StoreRefused, StoreUnavailable. By LIST: HeadBucket's errors have no text.
        """
        self._run(lambda _: self._ask("list_objects_v2", Prefix=prefix, MaxKeys=1), [prefix], "check_bucket")

    def create_bucket(self) -> None:
        """Create the bucket in the client's region; no error when it exists and is ours."""
        region = self._client.meta.region_name
        where = {}
        if region not in (None, "us-east-1", "aws-global"):  # S3 refuses its own default as a constraint
            where = {"CreateBucketConfiguration": {"LocationConstraint": region}}

        try:
            self._run(lambda _: self._ask("create_bucket", **where), [""], "create_bucket")
        except StoreRefused as refused:
            if "BucketAlreadyOwnedByYou" not in str(refused):
                raise

    def bucket_findings(self, prefix: str = "") -> builtins.list[str]:
        """What about the bucket's settings would hurt databases under `prefix`, a line each; for `doctor`.

        A setting that the store does not have counts as unset; one that may not be read is a finding.
        """
        findings = []

        def setting(operation: str) -> Any:
            try:
                return self._run(lambda _: self._ask(operation), [""], operation)
            except (StoreRefused, ObjectNotFound):  # unset, or not implemented
                return {}
            except AccessDenied:
                findings.append(f"not allowed to {operation.replace('_', ' ')}: allow it, or check this by hand")
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
            findings.append(
                "Object Lock's default retention keeps garbage and old heads: drop it or use another bucket"
            )
        return [f"{self.name}: {finding}" for finding in findings]

    # --- one request ----------------------------------------------------------------------------------

    def _run(
        self,
        attempt: Callable[[float], T],
        keys: Sequence[str],
        site: str,
        timeout_s: float | None = None,
        *,
        once: bool = False,
    ) -> T:
        """What `attempt(deadline)` returns; repeated until then, unless `once`, while it fails for passing reasons."""
        limit_s = self._deadline_s if timeout_s is None else timeout_s
        deadline = self._runtime.monotonic() + limit_s
        pause_s = FIRST_PAUSE_S
        while True:
            left_s = max(deadline - self._runtime.monotonic(), 0.01)
            self._local.site = site
            self._local.read_timeout_s = left_s if once else min(left_s, max(left_s / 2, 1.0))
            try:
                return attempt(deadline)
            except _FAILURES as error:
                where = f"{self.name}/{keys[0]}"
                outcome = _outcome(error, where)
                if once or not isinstance(outcome, (RequestInDoubt, StoreUnavailable)):
                    raise outcome from error
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                wait_s = self._runtime.uniform(pause_s / 4, pause_s / 2)
                if self._runtime.monotonic() + wait_s >= deadline:
                    text = f"{where}: no usable answer in {limit_s:g} s ({_reason(error)}); check network and endpoint"
                    raise StoreUnavailable(text) from error
                log.debug("%s: %s: %s; again in %.2f s", site, where, _reason(error), wait_s)
            self._runtime.sleep(wait_s)

    def _ask(self, operation: str, **parameters: Any) -> Any:
        answer: Any = {}
        try:
            answer = getattr(self._client, operation)(Bucket=self.bucket, **parameters)
        except sdk.ClientError as error:
            answer = error.response
            raise
        finally:
            date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
            with suppress(ValueError):  # no answer, or no date in it
                self._date = parsedate_to_datetime(date).timestamp(), self._runtime.monotonic()
            self._counters.request(
                operation.split("_")[0],
                self._local.site,
                sent_bytes=len(parameters.get("Body", b"")),
                received_bytes=answer.get("ContentLength", 0) if "Body" in answer else 0,
            )
        return answer

    def _set_read_timeout(self, context: dict[str, Any], **_: Any) -> None:
        """Before each request. SDKs that do not know the key wait for up to the default deadline instead."""
        context["read_timeout"] = self._local.read_timeout_s

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

    def _delete_batch(self, batch: builtins.list[str]) -> None:
        """Delete these keys; those that failed stay in `batch`, which is what a repetition then asks for."""
        objects = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
        failed = [e for e in self._ask("delete_objects", Delete=objects).get("Errors", []) if e["Code"] != "NoSuchKey"]
        if failed:
            batch[:] = [entry["Key"] for entry in failed]
            status = {"AccessDenied": 403, "InternalError": 500, "ServiceUnavailable": 503}.get(failed[0]["Code"], 400)
            answer: Any = {"Error": failed[0], "ResponseMetadata": {"HTTPStatusCode": status}}
            raise sdk.ClientError(answer, "DeleteObjects")


class _Upload(io.BytesIO):
    """A large body in pieces: a socket's time-out covers the sending of a whole buffer, however much of it moves."""

    def __init__(self, body: bytes, check: Callable[[], None]) -> None:
        super().__init__(body)
        self._check = check

    def __len__(self) -> int:
        return self.getbuffer().nbytes

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(PIECE)


def _outcome(error: Exception, where: str) -> StoreError:
    """What the failure of one attempt means.

    RequestInDoubt and StoreUnavailable are worth another attempt; the latter: nothing has been or will be applied.
    `_NOT_SENT` comes from urllib3's `_new_conn` alone, that is before anything is sent. A pooled connection that the
    server had closed fails later, as ConnectionClosedError: the request may have arrived, so it is in doubt.
    """

    def text(what: str, advice: str) -> str:
        return f"{where}: {what} ({_reason(error)}); {advice}"

    if isinstance(error, _NOT_SENT):
        return StoreUnavailable(text("cannot connect", "check the network and the endpoint"))
    if isinstance(error, _NO_CREDENTIALS):
        return AccessDenied(
            text("no usable credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile")
        )
    if isinstance(error, sdk.ParamValidationError):
        return StoreRefused(text("the SDK refuses this name", "check the bucket name and the key"))
    if not isinstance(error, sdk.ClientError):
        return RequestInDoubt(text("sent, but not answered in full", "check the network and the endpoint"))
    status, code = _answer(error)
    if (status in (401, 403) and code != "InvalidObjectState") or code in _BAD_TOKEN:
        return AccessDenied(text("access denied", _ADVICE.get(code, _ACCESS_ADVICE)))
    if status == 412:
        return PreconditionFailed(text("not, or no longer, what the condition asked for", "read it again"))
    if code == "NoSuchBucket":
        return BucketNotFound(text("no such bucket", "create it or check its name"))
    if code == "NoSuchKey" or (status == 404 and error.operation_name == "HeadObject"):  # HEAD has no body to say more
        return ObjectNotFound(text("no such object", "check the name"))
    if code in _DAMAGED:
        return StoreUnavailable(text("damaged on its way to the store", "check the network"))
    passing = code in _AGAIN or status in (408, 409, 429) or status >= 500
    if passing and code != "NotImplemented" and not code.startswith("Bucket"):  # 501 and 409 that are definite
        return RequestInDoubt(text("the store failed", "try again later"))
    return StoreRefused(text("refused", _ADVICE.get(code, "check the settings of the store")))


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
