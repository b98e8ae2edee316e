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
from dataclasses import dataclass
from typing import Protocol

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
    """Keys are whole keys inside one bucket. `site` labels the call for logs, metrics and fault injection.

    `timeout_s` bounds the whole call, retries included; None means the store's default (the request deadline).
    Errors common to all: AccessDenied, BucketNotFound, StoreRefused, StoreUnavailable.
    """

    @property
    def name(self) -> str:
        """For messages, such as `s3://bucket`."""
        ...

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
        """The object, or `length` bytes of it from byte `start` (fewer when it ends earlier; none past its end).

        Raises ObjectNotFound; PreconditionFailed when its ETag is not `if_match`.
        """
        ...

    def get_if_changed(self, key: str, *, site: str, etag: str, timeout_s: float | None = None) -> StoredObject | None:
        """None when the object still has this ETag (304). Raises ObjectNotFound."""
        ...

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
        """Store `body`, verified by the store (Content-MD5), and return its ETag.

        Without a condition: idempotent by the caller's promise that the key is used once, so it is retried.
        With `if_match` or `if_absent`: sent exactly once. Raises PreconditionFailed; ObjectNotFound when `if_match` was
        given and there is no object; RequestInDoubt when it may or may not apply; anything else: it was not applied.
        """
        ...

    def delete(self, keys: Sequence[str], *, site: str, timeout_s: float | None = None) -> None:
        """Delete these keys; a missing one is no error. Any number of keys."""
        ...

    def list(
        self,
        prefix: str,
        *,
        site: str,
        delimiter: str = "",
        max_keys: int | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Listed]:
        """Every key that starts with `prefix`; with a delimiter, those with another one behind the prefix rolled up.

        No order is promised. At most `max_keys` entries. `timeout_s` bounds each page.
        """
        ...

    def server_time_s(self) -> float:
        """The store's clock, from the Date of its last answer plus the time since; 0.0 before the first answer."""
        ...


class MemoryStore:
    """An `ObjectStore` in a dict, with the conditional semantics of S3: ETags are content hashes (MD5), as there."""

    def __init__(self, runtime: Runtime, name: str = "memory://store") -> None:
        self._runtime = runtime
        self._name = name
        self._lock = threading.Lock()
        self._objects: dict[str, StoredObject] = {}

    @property
    def name(self) -> str:
        return self._name

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
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise ObjectNotFound(f"{self._name}/{key}: no such object")
        if if_match is not None and found.etag != if_match:
            raise PreconditionFailed(f"{self._name}/{key}: changed")
        if start == 0 and length is None:
            return found
        end = None if length is None else start + length
        return StoredObject(found.body[start:end], found.etag, found.modified_s)

    def get_if_changed(self, key: str, *, site: str, etag: str, timeout_s: float | None = None) -> StoredObject | None:
        found = self.get(key, site=site)
        return None if found.etag == etag else found

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
        etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        with self._lock:
            found = self._objects.get(key)
            if if_absent and found is not None:
                raise PreconditionFailed(f"{self._name}/{key}: exists")
            if if_match is not None:
                if found is None:
                    raise ObjectNotFound(f"{self._name}/{key}: no such object")
                if found.etag != if_match:
                    raise PreconditionFailed(f"{self._name}/{key}: changed")
            self._objects[key] = StoredObject(bytes(body), etag, self.server_time_s())
        return etag

    def delete(self, keys: Sequence[str], *, site: str, timeout_s: float | None = None) -> None:
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

    def list(
        self,
        prefix: str,
        *,
        site: str,
        delimiter: str = "",
        max_keys: int | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Listed]:
        with self._lock:
            matching = [(k, o) for k, o in self._objects.items() if k.startswith(prefix)]
        entries: dict[str, Listed] = {}
        for key, found in matching:
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut >= 0:
                rolled = key[: cut + len(delimiter)]
                entries[rolled] = Listed(rolled, is_prefix=True)
            else:
                entries[key] = Listed(key, False, len(found.body), found.etag, found.modified_s)
        yield from list(entries.values())[:max_keys]

    def server_time_s(self) -> float:
        return self._runtime.monotonic()
