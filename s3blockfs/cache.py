"""LRU cache of immutable frames (blocks and log extents), and the only code that fetches them.

Names are never reused, so an entry is valid for ever: below the head there is no cache invalidation. Concurrent misses
of one frame share one GET; frames that lie next to each other in one object are fetched by one ranged GET.

What is fetched ahead waits in a queue for few threads, so that it takes neither all of them nor the whole link; a
reader who needs something of it fetches it himself, at once.

Thread rule: any thread. Invariants: a key is in `_inflight` exactly while its run waits in `_queue` or one thread
fetches it; that one removes it and resolves the run, on success and on failure. Nobody waits for a run in `_queue`."""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from itertools import accumulate

from cachetools import LRUCache

from s3blockfs import metrics
from s3blockfs.diskcache import DiskCache
from s3blockfs.errors import ObjectNotFound, PreconditionFailed, S3BlockFSError, StoreUnavailable
from s3blockfs.format.data import OBJECT_BYTES, FrameAddress
from s3blockfs.format.keys import ObjectRef
from s3blockfs.objectstore import ObjectStore
from s3blockfs.prefetch import Density, Range
from s3blockfs.runtime import Runtime, all_of

#: Two frames of one object this close together are fetched by one GET: at 15 ms and 100 MB/s a request costs as much
#: time as 1.5 MB, in money as much as nothing; but bytes of other frames are thrown away.
MAX_GAP_BYTES = 64 * 1024
AHEAD_GETS = 6  # at a time; of 4 MiB each they fill a fast link, and Python is not faster
SLOW_S = 3.0  # a GET of what is fetched ahead that takes longer shows a slow link, which readers need for themselves
DENSITIES_KEPT = 256

OnMiss = Callable[[int], object]
_Key = tuple[str, ObjectRef, int]  # prefix, object, byte in it


class _Run:
    """Frames of one object, for one GET. `done` brings the bytes of each by its place, or what is wrong with it."""

    __slots__ = ("addresses", "done", "prefix")

    def __init__(self, prefix: str, addresses: list[FrameAddress]) -> None:
        self.prefix, self.addresses = prefix, addresses
        self.done: Future[dict[int, bytes | BaseException]] = Future()


class BlockCache:
    """Shared by every database of a mount or process."""

    def __init__(
        self,
        store: ObjectStore,
        runtime: Runtime,
        capacity_bytes: int,
        patience_s: float,
        ahead_bytes: int = 0,
        disk: DiskCache | None = None,
    ) -> None:
        """`patience_s` bounds the wait for a GET that another thread is making, `ahead_bytes` what is fetched because
        of the density of reads (see `Density`)."""
        self._disk = disk
        self._store, self._runtime, self._patience_s, self._ahead_bytes = store, runtime, patience_s, ahead_bytes
        self._lock = threading.Lock()
        self._frames: OrderedDict[_Key, bytes] = OrderedDict()  # the one used last is at the end
        self._left_bytes = self._capacity_bytes = capacity_bytes
        self._inflight: dict[_Key, _Run] = {}
        self._queue: dict[_Run, None] = {}
        self._workers = 0
        self._densities: LRUCache[str, Density] = LRUCache(DENSITIES_KEPT)  # by prefix
        self._hits = 0  # of `get`, not counted yet: a figure for Prometheus costs as much as the rest of a hit

    def fetch(
        self, prefix: str, addresses: Sequence[FrameAddress], on_miss: OnMiss = lambda offset: None
    ) -> list[bytes]:
        """The verified bytes of each frame, in order; `on_miss` hears of each GET that this takes, by the place of its
        bytes in the file. Raises DamagedObject, or what `ObjectStore.get` raises."""
        runs, waiting, found = self._claim(prefix, addresses)
        hits, self._hits = self._hits, 0
        metrics.CACHE_HITS.inc(len(found) + hits)
        if not waiting:
            return [found[address] for address in addresses]
        metrics.CACHE_MISSES.inc(len(waiting))
        try:
            all_of(self._runtime, [partial(self._fetch_run, run, on_miss) for run in runs])
        except BaseException:  # Ctrl-C, say: others would wait for these frames for as long as the process lives
            for run in runs:
                self._resolve(run, StoreUnavailable(f"{self._store.name}/{prefix}: interrupted; read again"))
            raise
        for address, run in waiting.items():
            try:
                result = run.done.result(timeout=self._patience_s)[address.pos]
            except FutureTimeout:
                key = address.ref.key(prefix)
                raise StoreUnavailable(f"{self._store.name}/{key}: no answer in {self._patience_s:g} s") from None
            if not isinstance(result, bytes):
                raise result
            found[address] = result
        return [found[address] for address in addresses]

    def prefetch(self, prefix: str, addresses: Iterable[FrameAddress]) -> None:
        """Start fetching what is not here; errors are left to whoever needs the bytes and asks again."""
        self._claim(prefix, addresses, ahead=True)
        with self._lock:
            more = min(len(self._queue), AHEAD_GETS - self._workers)
            self._workers += more
        for _ in range(more):
            try:
                self._runtime.submit(self._work)
            except RuntimeError:  # no more threads; others that begin later find nothing to do
                self._work()

    def missed(self, prefix: str, offset: int, size: int) -> Range | None:
        """What to fetch ahead, of a file of `size` bytes, because a reader had to wait for these bytes."""
        with self._lock:
            if (density := self._densities.get(prefix)) is None:
                density = self._densities[prefix] = Density(self._ahead_bytes)
            return density.missed(self._runtime.monotonic(), offset, size)

    def get(self, prefix: str, address: FrameAddress) -> bytes | None:
        """What is here already."""
        with self._lock:
            if (found := self._frames.get(key := (prefix, address.ref, address.pos))) is not None:
                self._frames.move_to_end(key)
                self._hits += 1
            return found

    def put(self, prefix: str, address: FrameAddress, data: bytes) -> None:
        """Remember bytes that this process uploaded, or fetched by other means."""
        if len(data) > self._capacity_bytes:
            return
        key = prefix, address.ref, address.pos
        with self._lock:
            self._left_bytes += len(self._frames.pop(key, b"")) - len(data)
            self._frames[key] = data
            while self._left_bytes < 0:
                self._left_bytes += len(self._frames.popitem(last=False)[1])

    def _claim(
        self, prefix: str, addresses: Iterable[FrameAddress], ahead: bool = False
    ) -> tuple[list[_Run], dict[FrameAddress, _Run], dict[FrameAddress, bytes]]:
        """(the runs that the caller must fetch now, the run of each that is not in the cache, those that are). With
        `ahead` they go into the queue; else they are needed now, so what waits there is the caller's as well."""
        claimed, waiting, found = [], {}, {}
        with self._lock:
            for address in addresses:
                key = (prefix, address.ref, address.pos)
                if (hit := self._frames.get(key)) is not None:
                    self._frames.move_to_end(key)
                    found[address] = hit
                elif (run := self._inflight.get(key)) is not None:
                    waiting[address] = run
                else:
                    claimed.append(address)
            runs = [] if ahead else [run for run in dict.fromkeys(waiting.values()) if run in self._queue]
            for run in runs:
                del self._queue[run]
            for group in _runs(claimed):
                run = _Run(prefix, group)
                waiting.update(dict.fromkeys(group, run))
                self._inflight.update(((prefix, address.ref, address.pos), run) for address in group)
                if ahead:
                    self._queue[run] = None
                else:
                    runs.append(run)
        return runs, waiting, found

    def _work(self) -> None:
        """Fetch what waits in the queue."""
        try:
            while True:
                with self._lock:
                    if (run := next(iter(self._queue), None)) is None:
                        return
                    del self._queue[run]
                began_s = self._runtime.monotonic()
                self._fetch_run(run)
                if self._runtime.monotonic() - began_s > SLOW_S:
                    self._give_up()
        finally:
            with self._lock:
                self._workers = max(0, self._workers - 1)

    def _give_up(self) -> None:
        with self._lock:
            queue, self._queue = self._queue, {}
            for run in queue:
                for address in run.addresses:
                    self._inflight.pop((run.prefix, address.ref, address.pos), None)  # it may be there twice

    def _fetch_run(self, run: _Run, on_miss: OnMiss = lambda offset: None) -> None:
        """From the disk, or by one GET; resolves the run, whatever happens."""
        try:
            self._resolve(run, self._fetched(run, on_miss))
        except BaseException as error:
            self._resolve(run, error)
            if not isinstance(error, Exception):
                raise  # KeyboardInterrupt and the like belong to this thread too

    def _fetched(self, run: _Run, on_miss: OnMiss) -> dict[int, bytes | BaseException]:
        addresses, results = run.addresses, dict[int, bytes | BaseException]()
        key, etag = addresses[0].ref.key(run.prefix), addresses[0].ref.etag
        name = f"{self._store.name}/{key}"
        disk = self._disk if etag is None else None  # what has no checksum of ours is not kept
        if disk is not None:
            start = addresses[0].pos
            kept = disk.read(name, start, addresses[-1].end - start)
            self._decode(run, addresses, start, (kept,), name, results)
            addresses = [each for each in addresses if not isinstance(results[each.pos], bytes)]
        if not addresses:
            return results
        on_miss(addresses[0].offset)
        start, end = addresses[0].pos, addresses[-1].end
        pieces: tuple[bytes, ...] | None = None
        try:
            found = self._store.get(key, site="block", start=start, length=end - start, if_match=etag)
            if etag in (None, found.etag):  # not every store knows If-Match on GET
                pieces = found.pieces
        except (ObjectNotFound, PreconditionFailed):
            pass  # damage, with the bytes that it costs; or a plain object that was replaced
        self._decode(run, addresses, start, pieces, name, results)
        if disk is not None and pieces:
            disk.write(name, start, b"".join(pieces))
        return results

    def _decode(
        self,
        run: _Run,
        addresses: Iterable[FrameAddress],
        start: int,
        pieces: tuple[bytes, ...] | None,
        name: str,
        results: dict[int, bytes | BaseException],
    ) -> None:
        """Verify these frames of an object's bytes from `start` on, and remember those that are sound."""
        starts = [] if pieces is None else [*accumulate(map(len, pieces), initial=start)]
        for address in addresses:
            try:
                frame = None if pieces is None else _part(pieces, starts, address.pos, address.end)
                results[address.pos] = data = address.decode(frame, name)
                self.put(run.prefix, address, data)
            except S3BlockFSError as error:  # damaged, or of a newer format
                results[address.pos] = error

    def _resolve(self, run: _Run, results: dict[int, bytes | BaseException] | BaseException) -> None:
        """Only the first time: a pool that raised in `submit` may run it all the same."""
        with self._lock:
            if run.done.done():
                return
            for address in run.addresses:
                self._inflight.pop((run.prefix, address.ref, address.pos), None)
            if isinstance(results, BaseException):
                run.done.set_exception(results)
            else:
                run.done.set_result(results)


def _part(pieces: Sequence[bytes], starts: Sequence[int], low: int, high: int) -> bytes | memoryview:
    """`b"".join(pieces)[low:high]`; a frame lies in one piece of a large answer, or two."""
    found, index = [], bisect_right(starts, low) - 1
    while index < len(pieces) and starts[index] < high:
        found.append(memoryview(pieces[index])[max(low - starts[index], 0) : high - starts[index]])
        index += 1
    return found[0] if len(found) == 1 else b"".join(found)


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
