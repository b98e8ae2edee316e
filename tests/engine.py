"""Helpers for tests of the engine on the in-memory store: a hand-driven clock and a store that fails on command."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar

from s3blockfs.catalog import Catalog
from s3blockfs.config import Config
from s3blockfs.objectstore import Listed, MemoryStore, StoredObject
from s3blockfs.runtime import Runtime

T = TypeVar("T")

CONFIG = Config(refresh_s=0, only_writer=True, spill_dir="/tmp", request_deadline_s=5, transaction_deadline_s=20)


class ManualRuntime:
    """A clock that only `sleep` moves, and names that follow from a seed."""

    def __init__(self, seed: int = 1) -> None:
        self._random = Random(seed)
        self._now = 1000.0
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(4)

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds

    def token(self, size_bytes: int) -> bytes:
        with self._lock:
            return self._random.randbytes(size_bytes)

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2

    def submit(self, function: Callable[[], T]) -> Future[T]:
        return self._executor.submit(function)

    def close(self) -> None:
        self._executor.shutdown()


@dataclass(frozen=True)
class Call:
    """One request, as a rule sees it."""

    operation: str
    site: str
    key: str
    conditional: bool


#: Called before and after a request is applied; what it raises is what the engine gets.
Rule = Callable[[Call, str], None]


@dataclass
class FaultyStore:
    """An ObjectStore that asks `rule` before ("before") and after ("after") every request is applied."""

    inner: MemoryStore
    rule: Rule | None = None
    calls: list[Call] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    def _run(self, call: Call, apply: Callable[[], T]) -> T:
        self.calls.append(call)
        if self.rule is not None:
            self.rule(call, "before")
        result = apply()
        if self.rule is not None:
            self.rule(call, "after")
        return result

    def count(self, operation: str, site: str | None = None) -> int:
        return sum(1 for c in self.calls if c.operation == operation and site in (None, c.site))

    def get(self, key: str, *, site: str, **options: object) -> StoredObject:
        return self._run(Call("GET", site, key, False), lambda: self.inner.get(key, site=site, **options))  # type: ignore[arg-type]

    def get_if_changed(self, key: str, *, site: str, etag: str, timeout_s: float | None = None) -> StoredObject | None:
        call = Call("GET", site, key, True)
        return self._run(call, lambda: self.inner.get_if_changed(key, site=site, etag=etag))

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
        call = Call("PUT", site, key, if_match is not None or if_absent)
        return self._run(
            call, lambda: self.inner.put(key, body, site=site, if_match=if_match, if_absent=if_absent)
        )

    def delete(self, keys: Sequence[str], *, site: str, timeout_s: float | None = None) -> None:
        self._run(Call("DELETE", site, ",".join(keys), False), lambda: self.inner.delete(keys, site=site))

    def list(
        self,
        prefix: str,
        *,
        site: str,
        delimiter: str = "",
        max_keys: int | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Listed]:
        call = Call("LIST", site, prefix, False)
        return iter(
            self._run(call, lambda: list(self.inner.list(prefix, site=site, delimiter=delimiter, max_keys=max_keys)))
        )

    def server_time_s(self) -> float:
        return self.inner.server_time_s()


def new_store(seed: int = 1) -> tuple[FaultyStore, ManualRuntime]:
    runtime = ManualRuntime(seed)
    return FaultyStore(MemoryStore(runtime)), runtime


def catalog(store: FaultyStore, runtime: Runtime, **changes: object) -> Catalog:
    """Another machine on this store: its own caches and side files."""
    return Catalog(store, runtime, replace(CONFIG, **changes), "")  # type: ignore[arg-type]


def sqlite_page(counter: int, pages: int, filler: int = 0, page_size: int = 4096) -> bytes:
    """A first page as far as the engine looks at it."""
    header = bytearray(b"SQLite format 3\0" + page_size.to_bytes(2, "big") + b"\1\1" + bytes(80))
    header[24:28] = header[92:96] = counter.to_bytes(4, "big")
    header[28:32] = pages.to_bytes(4, "big")
    return bytes(header) + bytes([filler]) * (page_size - 100)
