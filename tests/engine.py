"""Helpers for tests of the engine on the in-memory store: a hand-driven clock and a store that fails on command."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar

import pytest
from memorystore import MemoryStore

from s3blockfs import commit, journal, uploads
from s3blockfs.catalog import Catalog
from s3blockfs.config import Config
from s3blockfs.database import Database
from s3blockfs.errors import RequestInDoubt, StoreError
from s3blockfs.format import data, extents
from s3blockfs.head import HeadFile
from s3blockfs.locks import PENDING_BYTE, RESERVED_BYTE, SHARED_FIRST, SHARED_SIZE, TO_END, Kind
from s3blockfs.objectstore import Listed, StoredObject
from s3blockfs.runtime import Runtime

T = TypeVar("T")

CONFIG = Config(
    lease_s=0.0, refresh_s=0, only_writer=True, spill_dir="/tmp", request_deadline_s=5, transaction_deadline_s=20
)


class ManualRuntime:
    """A clock that only `sleep` moves, and names that follow from a seed."""

    def __init__(self, seed: int = 1) -> None:
        self._random = Random(seed)
        self._now = 1000.0
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(4)
        self._ticking: dict[object, Callable[[], object]] = {}

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

    def background(self, function: Callable[[], T]) -> Future[T]:
        return self.submit(function)

    def every(self, seconds: float, function: Callable[[], object]) -> Callable[[], None]:
        """Only recorded: `tick` calls it."""
        call = object()
        self._ticking[call] = function

        def stop() -> None:
            self._ticking.pop(call, None)

        return stop

    def tick(self) -> None:
        """Call everything that is to be called periodically, once; what it raises is raised."""
        for function in list(self._ticking.values()):
            function()

    def close(self) -> None:
        self._executor.shutdown()


class InlineRuntime(ManualRuntime):
    """Runs what is submitted at once, so that requests have one order."""

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001  belongs to whoever asks the future
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Call:
    """One request, as a rule sees it."""

    operation: str
    site: str
    key: str
    conditional: bool


#: Called before and after a request is applied; what it raises is what the engine gets.
Rule = Callable[[Call, str], None]


class Delayed(Exception):
    """Raised by a rule: the request is kept on the way, and the engine is left in doubt."""


@dataclass
class FaultyStore:
    """An ObjectStore that asks `rule` before ("before") and after ("after") every request is applied."""

    inner: MemoryStore
    rule: Rule | None = None
    calls: list[Call] = field(default_factory=list)
    swaps: list[bytes] = field(default_factory=list)
    """The body of every conditional PUT that was sent."""
    delayed: list[Callable[[], object]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    def _run(self, call: Call, apply: Callable[[], T]) -> T:
        self.calls.append(call)
        if self.rule is not None:
            try:
                self.rule(call, "before")
            except Delayed:
                self.delayed.append(apply)
                raise RequestInDoubt("delayed") from None
        result = apply()
        if self.rule is not None:
            self.rule(call, "after")
        return result

    def deliver(self) -> list[bool]:
        """The delayed requests arrive now, each with the condition it was sent with: which were applied?"""
        outcomes = []
        for apply in self.delayed:
            try:
                apply()
                outcomes.append(True)
            except StoreError:
                outcomes.append(False)
        self.delayed.clear()
        return outcomes

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
        if call.conditional:
            self.swaps.append(body)
        return self._run(call, lambda: self.inner.put(key, body, site=site, if_match=if_match, if_absent=if_absent))

    def copy(self, source: str, target: str, *, site: str) -> None:
        self._run(Call("COPY", site, target, False), lambda: self.inner.copy(source, target, site=site))

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

    def begin_upload(self, key: str, *, site: str) -> str:
        return self._run(Call("BEGIN", site, key, False), lambda: self.inner.begin_upload(key))

    def put_part(self, key: str, upload: str, number: int, body: bytes, *, site: str, timeout_s: float) -> str:
        return self._run(Call("PART", site, key, False), lambda: self.inner.put_part(key, upload, number, body))

    def complete_upload(self, key: str, upload: str, etags: Sequence[str], *, site: str, timeout_s: float) -> str:
        return self._run(Call("COMPLETE", site, key, False), lambda: self.inner.complete_upload(key, upload, etags))

    def abort_upload(self, key: str, upload: str, *, site: str) -> None:
        self._run(Call("ABORT", site, key, False), lambda: self.inner.abort_upload(key, upload))

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


def shrink_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes reach every branch with little data: segments, block objects, rolls."""
    monkeypatch.setattr(commit, "SMALL_COMMIT_BYTES", 8192)
    monkeypatch.setattr(commit, "ROLL_BYTES", 6000)
    monkeypatch.setattr(commit, "FULL_TAIL_BYTES", 9000)
    for module in (commit, data, uploads):
        monkeypatch.setattr(module, "OBJECT_BYTES", 32768)


def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of a few extents are cut into leaves."""
    monkeypatch.setattr(extents, "LEAF_EXTENTS", 4)
    monkeypatch.setattr("s3blockfs.blockmap.LEAF_EXTENTS", 4)
    monkeypatch.setattr("s3blockfs.blockmap.INLINE_MAP_BYTES", 150)


@dataclass
class World:
    """A store and the machines on it; a context manager that closes them."""

    runtime: ManualRuntime = field(default_factory=ManualRuntime)

    def __post_init__(self) -> None:
        self.store = FaultyStore(MemoryStore(self.runtime))
        self.machines: list[Catalog] = []

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.rule = None
        self.runtime.close()
        for machine in self.machines:
            machine.close()

    def machine(self, *, faulty: bool = True, root: str = "", **changes: object) -> Catalog:
        """Another machine; one that is not `faulty` bypasses the rules and counters of the store."""
        store = self.store if faulty else self.store.inner
        made = Catalog(store, self.runtime, replace(CONFIG, **changes), root)  # type: ignore[arg-type]
        self.machines.append(made)
        return made

    def heads(self, prefix: str = "a.db", *, faulty: bool = True) -> HeadFile:
        return HeadFile(self.store if faulty else self.store.inner, self.runtime, CONFIG, prefix)

    def content(self, path: str = "a.db") -> bytes:
        """What a machine that knows nothing reads."""
        machine = self.machine(faulty=False)
        database = machine.open(path)
        try:
            return database.read(0, database.size)
        finally:
            machine.close()
            self.machines.remove(machine)


class Process:
    """Drives one open database as SQLite's unix VFS does, through its locks and its journal."""

    def __init__(self, machine: Catalog, database: Database, pid: int) -> None:
        self.machine, self.database, self.pid = machine, database, pid

    def _lock(self, kind: Kind, start: int, length: int = 1) -> None:
        self.database.lock(self, kind, start, start + length - 1, self.pid)

    def shared(self) -> None:
        self._lock(Kind.READ, PENDING_BYTE)
        try:
            self._lock(Kind.READ, SHARED_FIRST, SHARED_SIZE)
        finally:
            self.database.unlock(self, PENDING_BYTE, PENDING_BYTE)

    def reserved(self) -> None:
        self._lock(Kind.WRITE, RESERVED_BYTE)

    def exclusive(self) -> None:
        self._lock(Kind.WRITE, PENDING_BYTE)
        self._lock(Kind.WRITE, SHARED_FIRST, SHARED_SIZE)

    def unlock(self) -> None:
        """EXCLUSIVE to SHARED to nothing."""
        if self.database.locks.level(self) > 1:
            self._lock(Kind.READ, SHARED_FIRST, SHARED_SIZE)
            self.database.unlock(self, PENDING_BYTE, RESERVED_BYTE)
        self.database.unlock(self, 0, TO_END)

    def close(self) -> bool:
        """What the kernel sends when the process dies or closes: FLUSH, then the end of its locks."""
        in_mid_transaction = self.database.owner_closes(self)
        self.database.unlock(self, 0, TO_END)
        return in_mid_transaction

    def begin(self, super_name: str | None = None) -> None:
        """Up to the first write: SHARED, RESERVED, a journal with an image of every page, EXCLUSIVE."""
        self.shared()
        self.reserved()
        self.write_journal(super_name)
        self.exclusive()

    def write_journal(self, super_name: str | None = None, page: int = 4096) -> None:
        self.images = self.database.read(0, self.database.size)
        side = self.machine.side_files.create(self.journal_path)
        self.database.journal_begins()
        side.write(0, build_journal(self.images, page, super_name))

    @property
    def journal_path(self) -> str:
        return self.database.path + "-journal"

    def commit(self) -> None:
        """Unlink the journal, then let go; when the commit fails SQLite lets go as well and leaves the journal."""
        try:
            self.finalise()
        finally:
            self.unlock()

    def finalise(self) -> None:
        self.database.finalise_journal(self.pid)
        self.machine.side_files.remove(self.journal_path)

    def play_back(self) -> None:
        """The images go back, and the file gets its old size."""
        self.database.write(0, self.images)
        self.database.truncate(len(self.images))

    @property
    def journal_exists(self) -> bool:
        return self.machine.side_files.get(self.journal_path) is not None


def build_journal(images: bytes, page: int, super_name: str | None = None) -> bytes:
    """A synced rollback journal: https://sqlite.org/fileformat2.html#the_rollback_journal"""
    nonce, sector = 77, 512
    records = []
    for number in range(0, len(images), page):
        image = images[number : number + page]
        total = journal.checksum(nonce, image).to_bytes(4, "big")
        records.append((number // page + 1).to_bytes(4, "big") + image + total)
    fields = (len(records), nonce, len(images) // page, sector, page)
    head = journal.MAGIC + b"".join(value.to_bytes(4, "big") for value in fields)
    end = b""
    if super_name is not None:
        name = super_name.encode()
        end = bytes(4) + name + len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big") + journal.MAGIC
    return head.ljust(sector, b"\0") + b"".join(records) + end
