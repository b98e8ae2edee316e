"""The real `ObjectStore`: S3 and its relatives, by botocore (no other module imports it).

Every failure becomes one of the classes of `errors.py`, in one line that names the object and the next step and repeats
nothing that could be secret (no message of the SDK or of the store, no URL, no header: only the error code). The SDK's
exception is no `__cause__`: a traceback would show its text, which may quote a header, session token and all.

Deadlines: an attempt waits at most half of the time left for the next byte (a conditional PUT, which has one attempt:
all of it). Two waits can pass it: `CONNECT_TIMEOUT_S` for each address of the endpoint's name, and a store that
trickles out the headers or the XML of an answer. Thread rule: any thread."""

import base64
import hashlib
import io
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as sdk
from botocore import handlers
from botocore.config import Config
from botocore.parsers import ResponseParserError
from botocore.session import Session
from botocore.utils import parse_timestamp
from urllib3.exceptions import HTTPError

from s3blockfs import __version__, errors, metrics
from s3blockfs.objectstore import Listed, StoredObject
from s3blockfs.runtime import Runtime

T = TypeVar("T")
log = logging.getLogger(__name__)

#: For each address that the endpoint's name resolves to; also bounds the sending of one piece (see `_Upload`).
CONNECT_TIMEOUT_S = 3.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
RENEW_EVERY_S = 1.0  # how often credentials are looked for that replace refused ones
BATCH = 1000  # the most that DeleteObjects takes and ListObjectsV2 gives
MOST_BYTES = 256 * 1024 * 1024  # of one object: heads and what they lead to are smaller, whoever wrote them
PIECE = 256 * 1024  # how much of a body is received or sent between two looks at the clock

#: Everything that an attempt may end in. ValueError: the SDK met an answer (a date, a length) that it cannot parse.
#: RuntimeError, OSError: from asking for credentials; a network's errors come wrapped.
_FAILURES = (sdk.BotoCoreError, sdk.ClientError, ResponseParserError, HTTPError, ValueError, RuntimeError, OSError)
#: Raised by urllib3's `_new_conn` alone, that is before anything was sent. A pooled connection that the server had
#: closed fails later, as ConnectionClosedError: that request may have arrived, so it is in doubt.
_NOT_SENT = (sdk.EndpointConnectionError, sdk.ConnectTimeoutError)
_PERHAPS_SENT = (sdk.BotoCoreError, HTTPError, Exception)  # before the OSError among the bases of some
_NO_CREDENTIALS = (
    *(sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.CredentialRetrievalError),
    *(sdk.NoAuthTokenError, sdk.TokenRetrievalError, sdk.SSOError, sdk.LoginError, RuntimeError, OSError),
)

_DENIED = "access denied; check credentials and policy (without s3:ListBucket, S3 says this for a missing key, too)"
_BAD_TOKEN = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId")
#: What a failed attempt is: an exception, and in words what happened and what to do about it. RequestInDoubt and
#: StoreUnavailable are worth another attempt; the latter: nothing has been or will be applied. The first hit counts
#: among the SDK's exception and its bases, or an answer's code, status and class. S3 says 400 to an ExpiredToken, to a
#: body that came too slowly (RequestTimeout) or damaged (BadDigest: it was thrown away, so it may be sent again).
_MEANINGS: dict[object, tuple[type[errors.StoreError], str]] = {
    word: (kind, text)
    for kind, text, words in (
        (errors.StoreUnavailable, "cannot connect; check the network and the endpoint", _NOT_SENT),
        (errors.AccessDenied, "no credentials; set AWS_ACCESS_KEY_ID and its secret, or a profile", _NO_CREDENTIALS),
        (errors.StoreRefused, "the SDK refuses this name; check bucket and key", (sdk.ParamValidationError,)),
        (errors.RequestInDoubt, "sent, but not answered in full; check the network and the endpoint", _PERHAPS_SENT),
        (errors.AccessDenied, _DENIED, ("401", "403", *_BAD_TOKEN)),
        (errors.AccessDenied, "access denied; set the clock of this machine", ("RequestTimeTooSkewed",)),
        (errors.BucketNotFound, "no such bucket; create it or check its name", ("NoSuchBucket",)),
        (errors.ObjectNotFound, "no such object; check the name", ("NoSuchKey",)),
        (errors.ObjectNotFound, "no such upload, or no longer; write it again", ("NoSuchUpload",)),
        (errors.PreconditionFailed, "not, or no longer, what the condition asked for; read it again", ("412",)),
        (errors.StoreUnavailable, "damaged on its way; check the network", ("BadDigest", "XAmzContentSHA256Mismatch")),
        (errors.RequestInDoubt, "the store failed; try again later", ("408", "409", "429", "2xx", "5xx")),
        (errors.RequestInDoubt, "the store is busy; try again later", ("RequestTimeout", "SlowDown", "Throttling")),
        (errors.StoreRefused, "refused; choose another bucket name", ("BucketAlreadyExists", "InvalidBucketName")),
        (errors.PreconditionFailed, "exists, and is yours; choose another bucket name", ("BucketAlreadyOwnedByYou",)),
        (errors.StoreRefused, "archived by a lifecycle rule; restore it and remove the rule", ("InvalidObjectState",)),
        (errors.StoreRefused, "not a feature of this store; run `s3blockfs doctor`", ("NotImplemented",)),
        (errors.StoreRefused, "refused; check the region", ("AuthorizationHeaderMalformed",)),
        (errors.StoreRefused, "this is no answer of S3; check endpoint URL and region", ("404", "PermanentRedirect")),
        (errors.StoreRefused, "refused; check the settings of the store", ("3xx", "4xx")),
    )
    for word in words
}


class S3Store:
    """One bucket.

    Credentials, region, endpoint and profile come from the SDK's ordinary chain (environment, files, roles) unless
    given. `bucket` is its name, or a boto3 `Bucket`, whose client's settings then count (those of TLS, proxy and
    addressing, too). `request_deadline_s` bounds a call, its retries included, unless the call brings its own. Raises
    UsageError when the settings fit together in no way."""

    def __init__(
        self,
        bucket: Any,
        *,
        runtime: Runtime,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        sse: str | None = None,
        sse_kms_key_id: str | None = None,
        request_deadline_s: float = 10.0,
    ) -> None:
        self.bucket: str = bucket if isinstance(bucket, str) else bucket.name
        like = None if isinstance(bucket, str) else bucket.meta.client
        self.name = f"s3://{self.bucket}"
        self._runtime = runtime
        self._deadline_s = request_deadline_s
        asked = {"ServerSideEncryption": sse or (sse_kms_key_id and "aws:kms"), "SSEKMSKeyId": sse_kms_key_id}
        self._encryption: dict[str, Any] = {name: value for name, value in asked.items() if value}
        self._attempt = threading.local()  # `deadline` and `read_timeout_s` of this thread's call
        # The store's clock and ours at its last answer; one tuple, so that threads replace both at once.
        self._date: tuple[float, float] | None = None
        keys = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}
        self._connect = partial(self._new_client, like, endpoint_url, region, profile, keys)
        self._renewing, self._renew_after_s = threading.Lock(), 0.0
        self._client = self._connect()

    def _new_client(
        self, like: Any, endpoint_url: str | None, region: str | None, profile: str | None, keys: dict[str, str | None]
    ) -> Any:
        """One that looks for credentials anew."""
        base: Any = Config()
        verify = None
        try:
            session: Any = Session(profile=profile)
            if like is not None:
                endpoint_url, region, base = like.meta.endpoint_url, like.meta.region_name, like.meta.config
                verify = like._endpoint.http_session._verify  # like the next one, private to the SDK: there is no other
                chain = SimpleNamespace(load_credentials=like._get_credentials)  # they may refresh themselves
                session.register_component("credential_provider", chain)
            session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
            # An addressing style only for AWS: with any other endpoint URL botocore uses path style.
            host = urlsplit(endpoint_url or "").hostname or ""
            style: Any = {"addressing_style": "virtual"} if host.endswith(".amazonaws.com") else {}
            config = Config(
                max_pool_connections=64,
                tcp_keepalive=True,
                parameter_validation=False,
                user_agent=f"s3blockfs/{__version__}",
                connect_timeout=CONNECT_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3=style | (base.s3 or {}) | {"payload_signing_enabled": False},
                # A system-wide HTTP proxy cannot reach a server on this machine's loopback.
                proxies={} if host in ("127.0.0.1", "localhost", "::1") else base.proxies,
            )
            options = {"endpoint_url": endpoint_url, "config": base.merge(config), "verify": verify, **keys}
            client = session.create_client("s3", region, **options)
            if "@" in urlsplit(client.meta.endpoint_url).netloc:
                raise ValueError("user and password, which the SDK ignores and shows everywhere")
        except (sdk.BotoCoreError, ValueError, OSError) as error:
            text = f"cannot be used ({type(error).__name__}); check endpoint URL, region, profile and keys"
            raise errors.UsageError(f"{self.name}: {text}") from None
        events = client.meta.events
        # Each PUT would otherwise wait one round trip for "100 Continue". Undocumented: tests/test_s3store.py looks at
        # the wire, so an SDK that renames it costs a failed test and a round trip, never a failed request.
        events.unregister("before-call.s3", getattr(handlers, "add_expect_header", None))
        events.register("before-call.s3", self._set_read_timeout)
        events.register("response-received.s3", self._note_date)
        return client

    def _renew(self, refused: Any) -> bool:
        """The store says that this client's credentials are no longer valid: are there others now? The SDK itself reads
        files once, and asks a `credential_process` again only at the time that it named."""
        with self._renewing:
            if self._client is not refused:
                return True  # another thread was faster
            now = self._runtime.monotonic()
            if now >= self._renew_after_s:
                self._renew_after_s = now + RENEW_EVERY_S
                with suppress(errors.UsageError, *_FAILURES):
                    client = self._connect()
                    old, new = (each._get_credentials() for each in (refused, client))
                    if new is not None and new.get_frozen_credentials() != old.get_frozen_credentials():
                        self._client = client
                        refused.close()
            return self._client is not refused

    @staticmethod
    def identity(bucket: Any) -> tuple[str | None, ...]:
        """Equal for boto3 `Bucket`s whose stores would do the same."""
        client, keys = bucket.meta.client, bucket.meta.client._get_credentials()
        return bucket.name, client.meta.endpoint_url, client.meta.region_name, keys and keys.access_key

    def close(self) -> None:
        """Close the pooled connections. The store can still be used afterwards and would open new ones."""
        self._client.close()

    # --- the protocol ---------------------------------------------------------------------------------

    def get(
        self, key: str, *, site: str, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> StoredObject:
        condition: dict[str, Any] = {} if if_match is None else {"IfMatch": if_match}
        # At least one byte: "bytes=5-4" is no range, and servers then send the whole object.
        end = "" if length is None else start + max(length, 1) - 1
        where = {"Range": f"bytes={start}-{end}"} if start or length is not None else {}

        def attempt() -> StoredObject:
            answer = self._ask("get_object", unless=416, Key=key, **condition, **where)
            # 416: the range begins at the end or past it; every range of an empty object does. That answer has no ETag,
            # and not every store looks at If-Match first.
            answer = answer or self._ask("get_object", Key=key, **condition)
            found = self._receive(answer, key)
            skip = start if answer["ResponseMetadata"]["HTTPStatusCode"] == 200 else 0  # 200: the whole object, not 206
            if skip or (length is not None and sum(map(len, found.pieces)) > length):
                return replace(found, pieces=(found.body[skip : None if length is None else skip + length],))
            return found

        return self._run(attempt, key, site)

    def get_if_changed(self, key: str, *, site: str, etag: str) -> StoredObject | None:
        def attempt() -> StoredObject | None:
            answer = self._ask("get_object", unless=304, Key=key, IfNoneMatch=etag)
            return None if answer is None else self._receive(answer, key)

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
        more = self._encryption | ({} if if_match is None else {"IfMatch": if_match})
        if if_absent:
            more["IfNoneMatch"] = "*"
        once = if_absent or if_match is not None
        return self._send("put_object", key, body, site, timeout_s, once=once, **more)

    def _send(
        self, operation: str, key: str, body: bytes, site: str, timeout_s: float | None, *, once: bool, **more: Any
    ) -> str:
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()

        def attempt() -> str:
            payload = body if len(body) <= PIECE else _Upload(body, self._check)
            etag: str = self._ask(operation, Key=key, Body=payload, ContentMD5=digest, **more).get("ETag", "")
            if not etag:
                raise ValueError("an answer to PUT without an ETag")
            return etag

        metrics.SENT.inc(len(body))
        return self._run(attempt, key, site, timeout_s, once=once)

    def begin_upload(self, key: str, *, site: str) -> str:
        upload: str = self._call(key, site, "create_multipart_upload", Key=key, **self._encryption)["UploadId"]
        return upload

    def put_part(self, key: str, upload: str, number: int, body: bytes, *, site: str, timeout_s: float) -> str:
        part = {"UploadId": upload, "PartNumber": number}
        return self._send("upload_part", key, body, site, timeout_s, once=False, **part)

    def complete_upload(self, key: str, upload: str, etags: Sequence[str], *, site: str, timeout_s: float) -> str:
        parts = {"Parts": [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]}
        attempts = 0

        def attempt() -> str:
            nonlocal attempts
            attempts += 1
            name = "complete_multipart_upload"
            answer = self._ask(name, Key=key, UploadId=upload, MultipartUpload=parts)
            return str(answer.get("ETag", ""))

        try:
            return self._run(attempt, key, site, timeout_s)
        except errors.StoreError as error:
            if attempts == 1 and not isinstance(error, errors.StoreUnavailable):
                raise
            raise errors.RequestInDoubt(str(error)) from None  # an earlier attempt may have been applied

    def abort_upload(self, key: str, upload: str, *, site: str) -> None:
        with suppress(errors.ObjectNotFound):
            self._call(key, site, "abort_multipart_upload", Key=key, UploadId=upload)

    def copy(self, source: str, target: str, *, site: str) -> None:
        place = {"Bucket": self.bucket, "Key": source}
        self._call(source, site, "copy_object", Key=target, CopySource=place, **self._encryption)

    def delete(self, keys: Sequence[str], *, site: str) -> None:
        for first in range(0, len(keys), BATCH):
            batch = keys[first : first + BATCH]
            objects = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
            try:
                answer = self._call(batch[0], site, "delete_objects", Delete=objects)
                left = [entry["Key"] for entry in answer.get("Errors", [])]
            except errors.StoreRefused:  # not every store has this request
                left = list(batch)
            for key in left:  # alone: what fails now names its key
                with suppress(errors.ObjectNotFound):  # S3 says 204, some stores 404
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
                raise errors.StoreRefused(f"{self.name}/{page['Prefix']}: {text}")
            page["ContinuationToken"] = token

    def server_time_s(self) -> float:
        seen = self._date
        return 0.0 if seen is None else seen[0] + self._runtime.monotonic() - seen[1]

    # --- the bucket -----------------------------------------------------------------------------------

    def check_bucket(self, prefix: str = "") -> None:
        """Whether the bucket is there and may be listed; else what LIST raises (HeadBucket's errors have no text)."""
        self._call(prefix, "check_bucket", "list_objects_v2", Prefix=prefix and f"{prefix}/", MaxKeys=1)

    def create_bucket(self) -> None:
        """Create the bucket on a server of our own, which knows no regions; no error when it exists and is ours."""
        with suppress(errors.PreconditionFailed):
            self._call("", "create_bucket", "create_bucket")

    def bucket_findings(self, prefix: str = "") -> Sequence[str]:
        """What about the bucket's settings would hurt databases under `prefix`, a line each; for `doctor`.
        A setting that the store does not have counts as unset; one that may not be read is a finding."""
        found: list[str] = []
        settings: dict[str, Any] = {}
        for setting in ("bucket_lifecycle_configuration", "bucket_versioning", "object_lock_configuration"):
            try:
                settings |= self._call("", setting, f"get_{setting}")
            except errors.AccessDenied:
                found.append(f"not allowed to get {setting.replace('_', ' ')}: allow it, or check this by hand")
            except (errors.StoreRefused, errors.ObjectNotFound):  # unset, or not implemented
                pass
        rules = [r for r in settings.get("Rules", []) if r.get("Status") == "Enabled" and _applies(r, prefix)]
        for rule in rules:
            name = f"lifecycle rule {_word(rule.get('ID'))}"
            tiers = {step.get("StorageClass", "") for step in rule.get("Transitions", [])} - {"INTELLIGENT_TIERING"}
            if {"Days", "Date"} & rule.get("Expiration", {}).keys():
                found.append(f"{name} deletes objects by age and will destroy databases: remove it")
            if tiers:
                found.append(f"{name} moves objects to {_word(' '.join(sorted(tiers)))}, slow or dear: remove it")
        if settings.get("Status") == "Enabled" and not any("NoncurrentVersionExpiration" in rule for rule in rules):
            found.append("versioning keeps and bills every replaced head: add a rule to expire noncurrent versions")
        if settings.get("ObjectLockConfiguration", {}).get("Rule"):
            found.append("Object Lock's default retention keeps old heads: drop it or use another bucket")
        return [f"{self.name}: {finding}" for finding in found]

    # --- one request ----------------------------------------------------------------------------------

    def _run(
        self, attempt: Callable[[], T], key: str, site: str, timeout_s: float | None = None, *, once: bool = False
    ) -> T:
        """What `attempt` returns; repeated until the deadline, unless `once`, while it fails for passing reasons."""
        limit_s = self._deadline_s if timeout_s is None else timeout_s
        deadline = self._attempt.deadline = self._runtime.monotonic() + limit_s
        pause_s = FIRST_PAUSE_S
        while True:
            left_s = max(deadline - self._runtime.monotonic(), 0.01)
            self._attempt.read_timeout_s = left_s if once else min(left_s, max(left_s / 2, 1.0))
            client = self._client
            try:
                return metrics.request(site, attempt)
            except _FAILURES as error:
                kind, text, reason = _explain(error)
                if isinstance(error, sdk.ClientError) and _answer(error)[1] in _BAD_TOKEN and self._renew(client):
                    continue
                where = f"{self.name}/{key}: {reason}"
                if once or kind not in (errors.RequestInDoubt, errors.StoreUnavailable):
                    raise kind(f"{where}: {text}") from None
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                wait_s = self._runtime.uniform(pause_s / 4, pause_s / 2)
                if self._runtime.monotonic() + wait_s >= deadline:
                    text = f"{where}: no usable answer in {limit_s:g} s; check network and endpoint"
                    raise errors.StoreUnavailable(text) from None
                log.debug("%s: %s; again in %.2f s", site, where, wait_s)
            self._runtime.sleep(wait_s)

    def _call(self, key: str, site: str, operation: str, **parameters: Any) -> Any:
        """A request that is the whole attempt; `key` is for messages."""
        return self._run(lambda: self._ask(operation, **parameters), key, site)

    def _ask(self, operation: str, *, unless: int = 0, **parameters: Any) -> Any:
        """The answer; None when its status is `unless`."""
        try:
            return getattr(self._client, operation)(Bucket=self.bucket, **parameters)
        except sdk.ClientError as error:
            if _answer(error)[0] != unless:
                raise
            return None

    def _set_read_timeout(self, context: dict[str, Any], **_: Any) -> None:
        context["read_timeout"] = self._attempt.read_timeout_s

    def _note_date(self, response_dict: Any, **_: Any) -> None:
        with suppress(ValueError, TypeError, KeyError):  # no answer, or no date in it
            date = parsedate_to_datetime(response_dict["headers"]["date"])
            self._date = date.timestamp(), self._runtime.monotonic()

    def _check(self) -> None:
        if self._runtime.monotonic() > self._attempt.deadline:
            raise sdk.ReadTimeoutError(endpoint_url=self.name)

    def _receive(self, answer: Any, key: str) -> StoredObject:
        """Read the body. `read1` returns what has arrived: a trickle cannot hold the deadline up, as with `read`."""
        pieces = []
        with answer["Body"] as raw:
            if answer.get("ContentLength", 0) > MOST_BYTES:
                raise errors.DamagedObject(f"{self.name}/{key}: larger than anything that is stored here")
            while piece := raw.read1(PIECE):
                pieces.append(piece)
                self._check()
        length, modified = sum(map(len, pieces)), answer.get("LastModified")
        if length != answer.get("ContentLength", length):
            raise sdk.IncompleteReadError(actual_bytes=length, expected_bytes=answer["ContentLength"])
        size = answer["ContentRange"].rpartition("/")[2] if "ContentRange" in answer else length
        return StoredObject(tuple(pieces), answer.get("ETag", ""), modified.timestamp() if modified else 0.0, int(size))


class _Upload(io.BytesIO):
    """A large body in pieces: a socket's time-out covers the sending of a whole buffer, however much of it moves."""

    def __init__(self, body: bytes, check: Callable[[], None]) -> None:
        super().__init__(body)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(PIECE)


def _explain(error: Exception) -> tuple[type[errors.StoreError], str, str]:
    """The exception to raise, its text, and a short reason for it: never a text of the SDK or of the store."""
    reason = type(error).__name__
    words: Sequence[object] = type(error).__mro__
    if isinstance(error, sdk.ClientError):
        status, code = _answer(error)
        reason = f"HTTP {status} {code}".removesuffix(f" {status}").rstrip()
        words = code, str(status), f"{status // 100}xx"
    return *next(_MEANINGS[word] for word in words if word in _MEANINGS), reason


def _time(text: Any) -> datetime:
    """Of an answer's head, or of a LIST. The SDK's own parser tries every format there is, for 0.3 ms of CPU."""
    for parse in (parsedate_to_datetime, lambda text: datetime.fromisoformat(text.replace("Z", "+00:00"))):
        with suppress(ValueError, TypeError, AttributeError, OverflowError):
            if (found := parse(text)).tzinfo is not None:
                return found
    return parse_timestamp(text)


def _word(text: str | None) -> str:
    """Short and printable, whatever the store sent."""
    return re.sub(r"[^\w.:-]+", " ", text or "", flags=re.ASCII).strip()[:64]


def _answer(error: sdk.ClientError) -> tuple[int, str]:
    return error.response["ResponseMetadata"]["HTTPStatusCode"], _word(error.response["Error"].get("Code"))


def _applies(rule: dict[str, Any], prefix: str) -> bool:
    """Whether a lifecycle rule touches objects under `prefix`. Ours carry no tags."""
    scope = rule.get("Filter") or {}
    scope = scope.get("And", scope)
    path: str = scope.get("Prefix", rule.get("Prefix", ""))
    return not ({"Tag", "Tags"} & scope.keys()) and (path.startswith(prefix) or prefix.startswith(path))
