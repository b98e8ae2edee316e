"""LRU cache of immutable frames (blocks and log extents), and the only code that fetches them.

Names are never reused, so an entry is valid for ever: below the head there is no cache invalidation. Concurrent misses
of one frame share one GET; frames that lie next to each other in one object are fetched by one ranged GET.

Thread rule: any thread. Invariant: a key is in `_inflight` exactly while one thread fetches it; whoever put it there
resolves its future and removes it, on success and on failure."""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from functools import partial

from cachetools import LRUCache

from s3blockfs import metrics
from s3blockfs.errors import ObjectNotFound, PreconditionFailed, S3BlockFSError, StoreUnavailable
from s3blockfs.format.data import OBJECT_BYTES, FrameAddress
from s3blockfs.format.keys import ObjectRef
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import Runtime, all_of

#: Two frames of one object this close together are fetched by one GET: at 15 ms and 100 MB/s a request costs as much
#: time as 1.5 MB, in money as much as nothing; but bytes of other frames are thrown away.
MAX_GAP_BYTES = 64 * 1024

_Key = tuple[str, ObjectRef, int]  # prefix, object, byte in it


class BlockCache:
    """Shared by every database of a mount or process."""

    def __init__(self, store: ObjectStore, runtime: Runtime, capacity_bytes: int, patience_s: float) -> None:
        """`patience_s` bounds the wait for a GET that another thread is making."""
        self._store, self._runtime, self._patience_s = store, runtime, patience_s
        self._lock = threading.Lock()
        self._frames: LRUCache[_Key, bytes] = LRUCache(capacity_bytes, getsizeof=len)
        self._inflight: dict[_Key, Future[bytes]] = {}
        self._hits = 0  # of `get`, not counted yet: a figure for Prometheus costs as much as the rest of a hit

    def fetch(self, prefix: str, addresses: Sequence[FrameAddress]) -> list[bytes]:
        """The verified bytes of each frame, in order. Raises DamagedObject, or what `ObjectStore.get` raises."""
        runs, waiting, found = self._claim(prefix, addresses)
        hits, self._hits = self._hits, 0
        metrics.CACHE_HITS.inc(len(found) + hits)
        metrics.CACHE_MISSES.inc(len(waiting))
        try:
            all_of(self._runtime, [partial(self._fetch_run, prefix, run) for run in runs])
        except BaseException:  # Ctrl-C, say: others would wait for these frames for as long as the process lives
            with self._lock:
                left = [self._inflight.pop((prefix, address.ref, address.pos), None) for run in runs for address in run]
            for future in filter(None, left):
                future.set_exception(StoreUnavailable(f"{self._store.name}/{prefix}: interrupted; read again"))
            raise
        for address, future in waiting.items():
            try:
                found[address] = future.result(timeout=self._patience_s)
            except FutureTimeout:
                key = address.ref.key(prefix)
                raise StoreUnavailable(f"{self._store.name}/{key}: no answer in {self._patience_s:g} s") from None
        return [found[address] for address in addresses]

    def prefetch(self, prefix: str, addresses: Iterable[FrameAddress]) -> None:
        """Start fetching what is not here; errors are left to whoever needs the bytes and asks again."""
        for run in self._claim(prefix, addresses)[0]:
            fetch = partial(self._fetch_run, prefix, run)
            try:
                self._runtime.submit(fetch)
            except RuntimeError:  # no more threads: what was claimed must be resolved
                fetch()

    def get(self, prefix: str, address: FrameAddress) -> bytes | None:
        """What is here already."""
        with self._lock:
            found = self._frames.get((prefix, address.ref, address.pos))
            self._hits += found is not None
            return found

    def put(self, prefix: str, address: FrameAddress, data: bytes) -> None:
        """Remember bytes that this process uploaded, or fetched by other means."""
        with self._lock, suppress(ValueError):  # larger than the cache
            self._frames[prefix, address.ref, address.pos] = data

    def _claim(
        self, prefix: str, addresses: Iterable[FrameAddress]
    ) -> tuple[list[list[FrameAddress]], dict[FrameAddress, Future[bytes]], dict[FrameAddress, bytes]]:
        """(the runs that the caller must fetch now, a future for each that is not in the cache, those that are)."""
        claimed, waiting, found = [], {}, {}
        with self._lock:
            for address in addresses:
                key = (prefix, address.ref, address.pos)
                if (hit := self._frames.get(key)) is not None:
                    found[address] = hit
                    continue
                if key not in self._inflight:
                    self._inflight[key] = Future()
                    claimed.append(address)
                waiting[address] = self._inflight[key]
        return _runs(claimed), waiting, found

    def _fetch_run(self, prefix: str, run: Sequence[FrameAddress]) -> None:
        """One GET for frames of one object; resolves the future of each, whatever happens."""
        start, key, etag = run[0].pos, run[0].ref.key(prefix), run[0].ref.etag
        name = f"{self._store.name}/{key}"
        body: memoryview | None = None
        failure: BaseException | None = None
        try:
            length = run[-1].end - start
            found = self._store.get(key, site="block", start=start, length=length, if_match=etag)
            if etag in (None, found.etag):  # not every store knows If-Match on GET
                body = memoryview(found.body)
        except (ObjectNotFound, PreconditionFailed):
            body = None  # damage, with the bytes that it costs; or a plain object that was replaced
        except BaseException as error:  # noqa: BLE001  handed to everybody who waits, below
            failure = error
        for address in run:
            try:
                frame = body and body[address.pos - start : address.end - start]
                result = failure or address.decode(frame, name)
            except S3BlockFSError as error:  # damaged, or of a newer format
                result = error
            if isinstance(result, bytes):
                self.put(prefix, address, result)
            with self._lock:
                # It is gone when a pool that raised in `submit` ran this all the same.
                future = self._inflight.pop((prefix, address.ref, address.pos), Future())
            if isinstance(result, bytes):
                future.set_result(result)
            else:
                future.set_exception(result)
        if failure is not None and not isinstance(failure, Exception):
            raise failure  # KeyboardInterrupt and the like belong to this thread too


def _runs(addresses: Iterable[FrameAddress]) -> list[list[FrameAddress]]:
    """Group into ranges for one GET each: same object, at most MAX_GAP_BYTES apart, at most about OBJECT_BYTES long."""
    runs: list[list[FrameAddress]] = []
    for address in sorted(addresses, key=lambda a: (a.ref, a.pos)):
        run = runs[-1] if runs else [address]
        near = run[0].ref == address.ref and address.pos - run[-1].end <= MAX_GAP_BYTES
        if runs and near and address.end - run[0].pos <= OBJECT_BYTES * 2:
            run.append(address)
        else:
            runs.append([address])
    return runs
