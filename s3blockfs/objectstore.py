"""The port to S3: the `ObjectStore` protocol and the in-memory implementation.

Every method names what it returns, what it raises and what a missing key means; `tests/test_objectstore.py` holds every
implementation to this text. The real one is `s3store.py`. Does not belong here: retries of conditional PUTs (`head.py`
alone settles them), formats, caching.

Thread rule: every method may be called from any thread.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from s3blockfs.errors import ObjectNotFound, PreconditionFailed
from s3blockfs.runtime import Runtime


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The answer to a GET."""

    body: bytes
    etag: str
    modified_s: float
    """Last-Modified, seconds since the epoch, by the store's clock."""


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
    Errors common to all: AccessDenied, BucketNotFound, StoreRefused, StoreUnavailable.
    """

    @property
    def name(self) -> str:
        """For messages, such as `s3://bucket`."""

    def get(
        self, key: str, *, site: str, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> StoredObject:
        """The object, or `length` bytes of it from byte `start` (fewer when it ends earlier; none past its end).

        Raises ObjectNotFound; PreconditionFailed when its ETag is not `if_match`.
        """

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
        anything else: it was not applied.
        """

    def delete(self, keys: Sequence[str], *, site: str) -> None:
        """Delete these keys; a missing one is no error. Any number of keys."""

    def list(self, prefix: str, *, site: str, delimiter: str = "", max_keys: int | None = None) -> Iterator[Listed]:
        """Every key that starts with `prefix`; with a delimiter, those with another one behind the prefix rolled up.

        No order is promised. At most `max_keys` entries. The deadline is that of each page.
        """

    def server_time_s(self) -> float:
        """The store's clock, from the Date of its last answer plus the time since; 0.0 before the first answer."""


class MemoryStore:
    """An `ObjectStore` in a dict, with the conditional semantics of S3: ETags are content hashes (MD5), as there.

    The options that mean nothing here (`site`, `timeout_s`) go by `_`.
    """

    def __init__(self, runtime: Runtime, name: str = "memory://store") -> None:
        self.name = name
        self._runtime = runtime
        self._lock = threading.Lock()
        self._objects: dict[str, StoredObject] = {}

    def get(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None, **_: Any
    ) -> StoredObject:
        with self._lock:
            found = self._existing(key, if_match)
        end = None if length is None else start + length
        return replace(found, body=found.body[start:end])

    def get_if_changed(self, key: str, *, etag: str, **_: Any) -> StoredObject | None:
        found = self.get(key)
        return None if found.etag == etag else found

    def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False, **_: Any) -> str:
        etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        with self._lock:
            if if_absent and key in self._objects:
                raise PreconditionFailed(f"{self.name}/{key}: exists")
            if if_match is not None:
                self._existing(key, if_match)
            self._objects[key] = StoredObject(bytes(body), etag, self.server_time_s())
        return etag

    def _existing(self, key: str, if_match: str | None) -> StoredObject:
        found = self._objects.get(key)
        if found is None:
            raise ObjectNotFound(f"{self.name}/{key}: no such object")
        if if_match not in (None, found.etag):
            raise PreconditionFailed(f"{self.name}/{key}: changed")
        return found

    def delete(self, keys: Sequence[str], **_: Any) -> None:
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

    def list(self, prefix: str, *, delimiter: str = "", max_keys: int | None = None, **_: Any) -> Iterator[Listed]:
        with self._lock:
            matching = [(key, found) for key, found in self._objects.items() if key.startswith(prefix)]
        entries: dict[str, Listed] = {}
        for key, found in matching:
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut >= 0:
                rolled = key[: cut + len(delimiter)]
                entries[rolled] = Listed(rolled, is_prefix=True)
            else:
                entries[key] = Listed(key, False, len(found.body), found.etag, found.modified_s)
        return islice(entries.values(), max_keys)

    def server_time_s(self) -> float:
        return self._runtime.monotonic()
