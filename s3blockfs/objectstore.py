"""The port to S3: the `ObjectStore` protocol.

Every method names what it returns, what it raises and what a missing key means; `tests/test_objectstore.py` holds every
implementation to this text: `s3store.py`, and the in-memory one of the tests. Thread rule: any thread."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The answer to a GET."""

    pieces: tuple[bytes, ...]  # of the body, as they came
    etag: str
    modified_s: float  # Last-Modified, seconds since the epoch, by the store's clock
    size_bytes: int  # of the whole object, whatever part of it `body` is

    @property
    def body(self) -> bytes:
        """For 4 MiB this takes half as long as receiving them."""
        return b"".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a LIST: a key, or (with a delimiter) a common prefix that ends in the delimiter."""

    key: str
    is_prefix: bool
    size_bytes: int = 0
    etag: str = ""
    modified_s: float = 0.0


class ObjectStore(Protocol):
    """Keys are whole keys inside one bucket. `site` labels the call for logs and fault injection.

    A call lasts no longer than the store's request deadline, retries included.
    Errors common to all: AccessDenied, BucketNotFound, StoreRefused, StoreUnavailable."""

    @property
    def name(self) -> str:
        """For messages, such as `s3://bucket`."""

    def get(
        self, key: str, *, site: str, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> StoredObject:
        """The object, or `length` bytes of it from byte `start` (fewer when it ends earlier; none past its end).
        Raises ObjectNotFound; PreconditionFailed when its ETag is not `if_match`; DamagedObject for a giant."""

    def get_if_changed(self, key: str, *, site: str, etag: str) -> StoredObject | None:
        """None when the object still has this ETag (304). Raises ObjectNotFound."""

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
        """Store `body`, verified by the store (Content-MD5), and return its ETag. `timeout_s` replaces the deadline.

        Without a condition: idempotent by the caller's promise that the key is used once, so it is retried.
        With `if_match` or `if_absent`: sent exactly once. Raises PreconditionFailed; when there is no object that could
        match, ObjectNotFound (S3) or PreconditionFailed (SeaweedFS); RequestInDoubt when it may or may not apply;
        anything else: it was not applied."""

    def copy(self, source: str, target: str, *, site: str) -> None:
        """Copy up to 5 GB inside the bucket, to a key that is used once, so it is retried. Raises ObjectNotFound."""

    def begin_upload(self, key: str, *, site: str) -> str:
        """The id of a new multipart upload, which nobody sees before `complete_upload`."""

    def put_part(self, key: str, upload: str, number: int, body: bytes, *, site: str, timeout_s: float) -> str:
        """Store part `number` (from 1; all but the last have at least 5 MiB), verified by the store, and return its
        ETag. Retried: the same part again replaces it. Raises ObjectNotFound when there is no such upload."""

    def complete_upload(self, key: str, upload: str, etags: Sequence[str], *, site: str, timeout_s: float) -> str:
        """Make the parts 1, 2, ... the object, and return its ETag. Retried. Raises ObjectNotFound when there is no
        such upload; RequestInDoubt when it may or may not apply; anything else: it was not applied."""

    def abort_upload(self, key: str, upload: str, *, site: str) -> None:
        """Forget the parts, whose PUTs have all ended; no error when there is no such upload (any more)."""

    def delete(self, keys: Sequence[str], *, site: str) -> None:
        """Delete these keys; a missing one is no error. Any number of keys."""

    def list(self, prefix: str, *, site: str, delimiter: str = "", max_keys: int | None = None) -> Iterator[Listed]:
        """Every key that starts with `prefix`; with a delimiter, those with another one behind the prefix rolled up.
        No order is promised. At most `max_keys` entries. The deadline is that of each page."""

    def server_time_s(self) -> float:
        """The store's clock, from the Date of its last answer plus the time since; 0.0 before the first answer."""
