"""An `ObjectStore` in memory, held to the same conformance suite as the real one."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

from s3blockfs.errors import ObjectNotFound, PreconditionFailed
from s3blockfs.objectstore import Listed, StoredObject
from s3blockfs.runtime import Runtime


class MemoryStore:
    """An `ObjectStore` in a dict, with the conditional semantics of S3: ETags are content hashes (MD5), as there.

    The options that mean nothing here (`site`, `timeout_s`) go by `_`.
    """

    def __init__(self, runtime: Runtime, name: str = "memory://store") -> None:
        self.name = name
        self._runtime = runtime
        self._lock = threading.Lock()
        self._objects: dict[str, StoredObject] = {}
        self._numbers = count()
        self.uploads: dict[str, dict[int, bytes]] = {}
        """Unfinished multipart uploads: their parts."""

    def get(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None, **_: Any
    ) -> StoredObject:
        with self._lock:
            found = self._existing(key, if_match)
        end = None if length is None else start + length
        return replace(found, pieces=(found.body[start:end],))

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
            self._objects[key] = StoredObject((bytes(body),), etag, self.server_time_s(), len(body))
        return etag

    def _existing(self, key: str, if_match: str | None) -> StoredObject:
        found = self._objects.get(key)
        if found is None:
            raise ObjectNotFound(f"{self.name}/{key}: no such object")
        if if_match not in (None, found.etag):
            raise PreconditionFailed(f"{self.name}/{key}: changed")
        return found

    def begin_upload(self, key: str, **_: Any) -> str:
        with self._lock:
            upload = f"upload {next(self._numbers)} of {key}"
            self.uploads[upload] = {}
        return upload

    def put_part(self, key: str, upload: str, number: int, body: bytes, **_: Any) -> str:
        with self._lock:
            self._parts(upload)[number] = bytes(body)
        return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'

    def complete_upload(self, key: str, upload: str, etags: Sequence[str], **_: Any) -> str:
        with self._lock:
            parts = self._parts(upload)
            body = b"".join(parts[number] for number in range(1, len(etags) + 1))
            del self.uploads[upload]
        return self.put(key, body)

    def abort_upload(self, key: str, upload: str, **_: Any) -> None:
        with self._lock:
            self.uploads.pop(upload, None)

    def _parts(self, upload: str) -> dict[int, bytes]:
        if upload not in self.uploads:
            raise ObjectNotFound(f"{self.name}: no such upload")
        return self.uploads[upload]

    def copy(self, source: str, target: str, **_: Any) -> None:
        self.put(target, self.get(source).body)

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
