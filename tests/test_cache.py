"""The cache of immutable frames: one GET for whoever wants a frame, whole verification, a bound in bytes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from cachetools import LRUCache
from engine import ManualRuntime
from memorystore import MemoryStore

from s3blockfs.cache import MAX_GAP_BYTES, SLOW_S, BlockCache
from s3blockfs.errors import DamagedObject, S3BlockFSError, StoreUnavailable
from s3blockfs.format.data import (
    BASE,
    FRAME_BYTES,
    HEADER_BYTES,
    OBJECT_BYTES,
    FrameAddress,
    Index,
    build,
    slot_address,
)
from s3blockfs.format.keys import ObjectRef
from s3blockfs.objectstore import StoredObject
from s3blockfs.snapshot import Source
from s3blockfs.uploads import build_segment

T = TypeVar("T")
BLOCK = 1024
WAIT_S = 60
"""Far more than anything here takes; reached only by a bug."""


@dataclass
class Store(MemoryStore):
    """Records every GET as (key, start, length); `on_get` may block or raise before it is answered."""

    gets: list[tuple[str, int, int]] = field(default_factory=list)
    on_get: Callable[[str], None] = lambda key: None

    def __init__(self, runtime: ManualRuntime) -> None:
        super().__init__(runtime)
        self.gets = []
        self.on_get = lambda key: None

    def get(self, key: str, *, site: str, start: int = 0, length: int | None = None, **options: Any) -> StoredObject:
        assert length is not None
        self.gets.append((key, start, length))
        self.on_get(key)
        return super().get(key, site=site, start=start, length=length, **options)


class World:
    """A store with block objects of BLOCK bytes a slot, and a cache in front of it."""

    def __init__(self, runtime: ManualRuntime) -> None:
        self.runtime = runtime
        self.store = Store(runtime)
        self.cache = self.new_cache()

    def new_cache(self, capacity: int = 1 << 20, patience_s: float = WAIT_S) -> BlockCache:
        self.cache = BlockCache(self.store, self.runtime, capacity, patience_s)
        return self.cache

    def object(self, number: int, slots: int = 8, size: int = BLOCK) -> list[FrameAddress]:
        """Store a block object; the addresses of its slots."""
        ref = ObjectRef(number, number.to_bytes(8, "big"), number.to_bytes(8, "big"))
        frames = [(slot * size, 1, content(number, slot, size)) for slot in range(slots)]
        self.store.put(ref.key("P"), build(ref.uid, BASE, frames).body, site="t")
        return [slot_address(ref, slot, slot, size) for slot in range(slots)]

    def damage(self, address: FrameAddress, at: int) -> None:
        """Flip a bit of byte `at` of the object."""
        key = address.ref.key("P")
        body = bytearray(MemoryStore.get(self.store, key, site="t").body)
        body[at] ^= 1
        self.store.put(key, bytes(body), site="t")

    def hold(self) -> tuple[threading.Event, threading.Event]:
        """(set when a GET has begun, set it to let GETs go on)."""
        begun, go = threading.Event(), threading.Event()

        def wait(key: str) -> None:
            begun.set()
            assert go.wait(WAIT_S)

        self.store.on_get = wait
        return begun, go

    def waiting(self, count: int) -> threading.Semaphore:
        """Released once by each of the calls that have looked a missing frame up and found somebody fetching it."""
        joined = threading.Semaphore(0)
        real = self.cache._claim

        def claim(prefix: str, addresses: Any, ahead: bool = False) -> Any:
            result = real(prefix, addresses, ahead)
            if not ahead and result[1] and not result[0]:
                joined.release()
            return result

        self.cache._claim = claim  # type: ignore[method-assign]
        return joined


def content(number: int, slot: int, size: int = BLOCK) -> bytes:
    return bytes([number, slot]) * (size // 2)


@pytest.fixture
def world() -> Iterator[World]:
    runtime = ManualRuntime()
    yield World(runtime)
    runtime.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def fetch_shared(
    world: World, threads: ThreadPoolExecutor, wanted: Sequence[FrameAddress]
) -> list[Future[list[bytes]]]:
    """One thread fetches, three more ask for the same while its GET is under way."""
    begun, go = world.hold()
    joined = world.waiting(3)
    futures = [threads.submit(world.cache.fetch, "P", wanted)]
    assert begun.wait(WAIT_S)
    futures += [threads.submit(world.cache.fetch, "P", wanted) for _ in range(3)]
    for _ in range(3):
        assert joined.acquire(timeout=WAIT_S)
    go.set()
    return futures


def test_a_hit_asks_nobody(world: World) -> None:
    """Names are never reused, so what was fetched once is right for ever."""
    (first, second, *_) = world.object(1)
    assert world.cache.fetch("P", [first, second, first]) == [content(1, 0), content(1, 1), content(1, 0)]
    assert world.cache.fetch("P", [second]) == [content(1, 1)]
    assert world.store.gets == [(first.ref.key("P"), HEADER_BYTES, 2 * (FRAME_BYTES + BLOCK))]
    world.cache.fetch("Q", [])
    assert len(world.store.gets) == 1


def test_readers_of_one_frame_share_one_get(world: World, threads: ThreadPoolExecutor) -> None:
    """Four threads, one request, the same bytes."""
    wanted = world.object(1)[:1]
    futures = fetch_shared(world, threads, wanted)
    assert [f.result(WAIT_S) for f in futures] == [[content(1, 0)]] * 4
    assert len(world.store.gets) == 1


def test_an_error_reaches_every_reader_and_is_not_remembered(world: World, threads: ThreadPoolExecutor) -> None:
    """The next one asks again."""
    wanted = world.object(1)[:1]
    key = wanted[0].ref.key("P")
    body = MemoryStore.get(world.store, key, site="t").body
    world.store.put(key, b"", site="t")
    futures = fetch_shared(world, threads, wanted)
    errors = [f.exception(WAIT_S) for f in futures]
    assert all(isinstance(error, DamagedObject) for error in errors)
    world.store.put(key, body, site="t")
    assert world.cache.fetch("P", wanted) == [content(1, 0)]
    assert len(world.store.gets) == 2


@pytest.mark.parametrize("error", [StoreUnavailable("down"), RuntimeError("a bug"), MemoryError()])
def test_whatever_a_get_raises_is_raised_and_not_remembered(world: World, error: Exception) -> None:
    """Also in the thread of a read-ahead, where nobody listens."""
    wanted = world.object(1)[:1]

    def fail(key: str) -> None:
        raise error

    world.store.on_get = fail
    world.cache.prefetch("P", wanted)
    with pytest.raises(type(error)):
        world.cache.fetch("P", wanted)
    world.store.on_get = lambda key: None
    assert world.cache.fetch("P", wanted) == [content(1, 0)]


def test_an_interrupt_is_raised_and_leaves_nobody_waiting(world: World) -> None:
    """Ctrl-C in the middle of a GET belongs to that thread; the frame can be fetched afterwards."""
    wanted = world.object(1)[:1]

    def interrupt(key: str) -> None:
        raise KeyboardInterrupt

    world.store.on_get = interrupt
    with pytest.raises(KeyboardInterrupt):
        world.cache.fetch("P", wanted)
    world.store.on_get = lambda key: None
    assert world.cache.fetch("P", wanted) == [content(1, 0)]


@pytest.mark.parametrize("queued", [False, True])
def test_without_threads_frames_are_fetched_all_the_same(
    queued: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When an I/O thread cannot be started, nothing stays marked as being fetched, to be waited for by every reader.

    A pool may have queued what it raised for; a thread that it has already runs it then.
    """
    far = [world.object(n)[0] for n in (1, 2, 3)]
    cache = world.cache
    real = world.runtime.submit
    started: list[Future[Any]] = []

    def refuse(function: Callable[[], T]) -> Future[T]:
        if queued:
            started.append(real(function))
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(world.runtime, "submit", refuse)
    cache.prefetch("P", far[:2])
    assert cache.fetch("P", far) == [content(n, 0) for n in (1, 2, 3)]
    cache = world.new_cache()
    assert cache.fetch("P", far) == [content(n, 0) for n in (1, 2, 3)]
    for future in started:
        assert future.exception(WAIT_S) is None
    assert cache._inflight == {}


def test_a_get_that_never_ends_is_not_waited_for_for_ever(world: World, threads: ThreadPoolExecutor) -> None:
    """The reader that joined it gets StoreUnavailable; the one that makes it gets its answer when it comes."""
    wanted = world.object(1)[:1]
    cache = world.new_cache(patience_s=0.01)
    begun, go = world.hold()
    first = threads.submit(cache.fetch, "P", wanted)
    try:
        assert begun.wait(WAIT_S)
        with pytest.raises(StoreUnavailable, match=f"{wanted[0].ref.key('P')}: no answer in 0.01 s"):
            cache.fetch("P", wanted)
    finally:
        go.set()
    assert first.result(WAIT_S) == [content(1, 0)]


def test_neighbours_are_fetched_by_one_get(world: World) -> None:
    """Whatever the order asked for; small gaps are read and thrown away."""
    slots = world.object(1)
    assert world.cache.fetch("P", [slots[5], slots[2], slots[3]]) == [content(1, 5), content(1, 2), content(1, 3)]
    assert world.store.gets == [(slots[0].ref.key("P"), slots[2].pos, slots[5].end - slots[2].pos)]
    world.cache.fetch("P", slots)
    assert world.store.gets[1:] == [(slots[0].ref.key("P"), slots[0].pos, slots[7].end - slots[0].pos)]


def test_distant_frames_and_other_objects_are_fetched_apart(world: World) -> None:
    """A wide gap costs more than a request; no GET is longer than two objects' payload."""
    slots = world.object(1, slots=200)
    near = next(s for s in slots if s.pos - slots[0].end > MAX_GAP_BYTES - BLOCK)
    far = next(s for s in slots if s.pos - slots[0].end > MAX_GAP_BYTES)
    other = world.object(2)
    world.cache.fetch("P", [slots[0], far, other[0]])
    assert len(world.store.gets) == 3
    world.new_cache().fetch("P", [slots[0], near])
    assert len(world.store.gets) == 4
    large = world.object(3, slots=3, size=OBJECT_BYTES)
    world.new_cache(capacity=1).fetch("P", large)
    assert [length for _, _, length in world.store.gets[4:]] == [FRAME_BYTES + OBJECT_BYTES] * 3


def test_one_failing_object_does_not_spoil_the_others(world: World) -> None:
    """Frames of other objects in the same read are cached all the same."""
    good, bad = world.object(1)[0], world.object(2)[0]
    world.store.delete([bad.ref.key("P")], site="t")
    with pytest.raises(DamagedObject, match=f"memory://store/{bad.ref.key('P')}: missing"):
        world.cache.fetch("P", [good, bad])
    world.cache.fetch("P", [good])
    assert world.store.gets.count((good.ref.key("P"), good.pos, good.end - good.pos)) == 1


def test_a_damaged_frame_is_named_and_its_neighbours_are_read(world: World) -> None:
    """The text names the object, the byte in it and the bytes of the database; nothing wrong is ever returned."""
    slots = world.object(1)
    for at in (slots[3].pos, slots[3].pos + 20, slots[3].end - 1):
        world.damage(slots[3], at)
        with pytest.raises(DamagedObject) as caught:
            world.new_cache().fetch("P", slots)
        assert f"memory://store/{slots[3].ref.key('P')}: damaged at byte {slots[3].pos} " in str(caught.value)
        assert f"(database bytes {3 * BLOCK}..{4 * BLOCK})" in str(caught.value)
        assert world.cache.fetch("P", slots[:3] + slots[4:]) == [content(1, s) for s in (0, 1, 2, 4, 5, 6, 7)]
        world.damage(slots[3], at)
    assert world.new_cache().fetch("P", slots[3:4]) == [content(1, 3)]


def test_a_truncated_object_is_damaged(world: World) -> None:
    """At every length: the frames that are whole are read, the others are errors."""
    slots = world.object(1, slots=2)
    key = slots[0].ref.key("P")
    body = MemoryStore.get(world.store, key, site="t").body
    for length in (0, slots[0].pos, slots[0].end - 1, slots[0].end, slots[1].pos + 10, slots[1].end - 1):
        world.store.put(key, body[:length], site="t")
        cache = world.new_cache()
        for slot, address in enumerate(slots):
            if address.end <= length:
                assert cache.fetch("P", [address]) == [content(1, slot)]
            else:
                with pytest.raises(DamagedObject, match="truncated"):
                    cache.fetch("P", [address])


def test_another_object_under_the_name_is_damaged(world: World) -> None:
    """Swapped or restored from elsewhere: the uid in the checksums tells."""
    mine, other = world.object(1), world.object(2)
    world.store.put(mine[0].ref.key("P"), MemoryStore.get(world.store, other[0].ref.key("P"), site="t").body, site="t")
    for address in mine:
        with pytest.raises(DamagedObject, match="checksum"):
            world.cache.fetch("P", [address])


def test_the_least_recently_used_goes_first_and_bytes_are_bounded(world: World) -> None:
    """Room for four blocks: a fifth evicts the one that was not used longest."""
    cache = world.new_cache(capacity=4 * BLOCK + 100)
    slots = world.object(1)
    for slot in (0, 1, 2, 3, 0, 4):
        cache.fetch("P", [slots[slot]])
        assert len(cache._frames) <= 4  # looking at the values would count as using them
    world.store.gets.clear()
    cache.fetch("P", [slots[0], slots[2], slots[3], slots[4]])
    assert not world.store.gets
    cache.fetch("P", [slots[1]])
    assert len(world.store.gets) == 1


def test_a_frame_larger_than_the_cache_is_read_all_the_same(world: World) -> None:
    """And not kept; nor does it evict others."""
    cache = world.new_cache(capacity=2 * BLOCK)
    small, large = world.object(1)[0], world.object(2, slots=1, size=4 * BLOCK)[0]
    cache.fetch("P", [small])
    for _ in range(2):
        assert cache.fetch("P", [large]) == [content(2, 0, 4 * BLOCK)]
    assert [key for key, _, _ in world.store.gets] == [small.ref.key("P"), *[large.ref.key("P")] * 2]
    cache.fetch("P", [small])
    assert len(world.store.gets) == 3
    assert world.new_cache(capacity=0).fetch("P", [small]) == [content(1, 0)]


def test_what_this_process_uploaded_is_not_fetched(world: World) -> None:
    """`put` is as good as a GET."""
    address = world.object(1)[0]
    world.cache.put("P", address, content(1, 0))
    assert world.cache.fetch("P", [address]) == [content(1, 0)]
    assert not world.store.gets


def test_a_prefix_is_part_of_the_name(world: World) -> None:
    """A copy of a database keeps its objects' names under another prefix, and may be damaged by itself."""
    address = world.object(1)[0]
    world.cache.fetch("P", [address])
    with pytest.raises(DamagedObject, match="memory://store/Q/data/"):
        world.cache.fetch("Q", [address])


def test_read_ahead_is_joined_by_readers(world: World, threads: ThreadPoolExecutor) -> None:
    """A reader that comes while the read-ahead is under way waits for it; nothing is fetched twice."""
    slots = world.object(1)
    begun, go = world.hold()
    joined = world.waiting(1)
    world.cache.prefetch("P", slots)
    assert begun.wait(WAIT_S)
    reader = threads.submit(world.cache.fetch, "P", slots[2:4])
    assert joined.acquire(timeout=WAIT_S)
    world.cache.prefetch("P", slots)
    go.set()
    assert reader.result(WAIT_S) == [content(1, 2), content(1, 3)]
    assert world.cache.fetch("P", slots) == [content(1, slot) for slot in range(8)]
    assert len(world.store.gets) == 1


def test_indexes_are_kept_for_many_threads(world: World, threads: ThreadPoolExecutor) -> None:
    """A look-up in an LRU changes it: with room for two, threads that load, find and evict never meet half a change."""
    source = Source(world.store, world.cache, world.runtime, "P", LRUCache(2))
    segments, built = [], []
    for number in range(1, 5):
        segment, whole = build_segment(source, number, [(0, number, content(number, 0))], ())
        world.store.put(segment.ref.key("P"), whole.body, site="t")
        segments.append(segment)
        built.append(whole)

    def work(seed: int) -> None:
        for step in range(400):
            chosen = (seed + step * (seed % 3 + 1)) % 4
            assert source.load_index(segments[chosen]).extents == built[chosen].entries
            source.remember_index(segments[seed % 4].ref, Index((), built[seed % 4].entries))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for future in [threads.submit(work, seed) for seed in range(8)]:
            future.result(WAIT_S)
    finally:
        sys.setswitchinterval(interval)


def test_many_threads_on_a_small_cache(world: World, threads: ThreadPoolExecutor) -> None:
    """Claims, evictions and failures together: every answer is right or the error, and nothing stays in flight."""
    slots = [address for number in range(1, 5) for address in world.object(number)]
    cache = world.new_cache(capacity=5 * BLOCK)
    failing = iter([False, True, False] * 100_000)

    def sometimes(key: str) -> None:
        if next(failing):
            raise StoreUnavailable("down")

    world.store.on_get = sometimes

    def work(seed: int) -> tuple[int, int]:
        good = bad = 0
        for step in range(300):
            chosen = [slots[(seed * 7 + step * k) % 32] for k in (1, 3, 5)]
            try:
                found = cache.fetch("P", chosen)
            except S3BlockFSError:
                bad += 1
                continue
            good += 1
            assert found == [content(a.ref.rev, a.offset // BLOCK) for a in chosen]
        return good, bad

    counts = [f.result(WAIT_S) for f in [threads.submit(work, seed) for seed in range(8)]]
    world.runtime.close()
    assert all(good and bad for good, bad in counts)
    assert cache._inflight == {}


# --- the queue of what is fetched ahead -------------------------------------------------------------------


@pytest.fixture
def two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3blockfs.cache.AHEAD_GETS", 2)


@pytest.mark.usefixtures("two_at_a_time")
def test_a_reader_does_not_wait_for_what_is_queued_before(world: World, threads: ThreadPoolExecutor) -> None:
    """Two GETs of read-ahead are under way; a reader of what comes last fetches it himself, and only once."""
    objects = [world.object(number) for number in range(1, 7)]
    held, go = threading.Semaphore(0), threading.Event()
    last = objects[-1][0].ref.key("P")

    def wait(key: str) -> None:
        if key != last:
            held.release()
            assert go.wait(WAIT_S)

    world.store.on_get = wait
    world.cache.prefetch("P", [slot for slots in objects for slot in slots])
    assert all(held.acquire(timeout=WAIT_S) for _ in range(2))
    reader = threads.submit(world.cache.fetch, "P", objects[-1][2:4])
    assert reader.result(WAIT_S) == [content(6, 2), content(6, 3)]
    assert len(world.store.gets) == 3
    go.set()
    for slots in objects:
        assert len(world.cache.fetch("P", slots)) == 8
    assert len(world.store.gets) == 6


@pytest.mark.usefixtures("two_at_a_time")
def test_a_slow_link_is_left_to_readers(world: World) -> None:
    """What has not begun when a GET took long is not fetched ahead; whoever needs it still gets it. Also a frame that
    was asked for twice, as one of the log is when newer bytes lie over its middle."""
    objects = [world.object(number) for number in range(1, 11)]
    world.store.on_get = lambda key: world.runtime.sleep(SLOW_S + 1)
    world.cache.prefetch("P", [slot for slots in objects for slot in (*slots, slots[3])])
    world.runtime.close()
    assert len(world.store.gets) <= 4
    assert world.cache._inflight == {}
    world.store.on_get = lambda key: None
    world.cache._runtime = ManualRuntime()
    for number, slots in enumerate(objects, 1):
        assert world.cache.fetch("P", slots) == [content(number, slot) for slot in range(8)]
    assert len(world.store.gets) == 10
    world.cache._runtime.close()


def test_a_damaged_frame_that_was_fetched_ahead_is_an_error_for_its_reader(world: World) -> None:
    """Each time; the others are read."""
    slots = world.object(1)
    world.damage(slots[3], slots[3].pos + FRAME_BYTES)
    world.cache.prefetch("P", slots)
    for _ in range(2):
        with pytest.raises(DamagedObject, match="checksum"):
            world.cache.fetch("P", slots)
    assert world.cache.fetch("P", slots[:3]) == [content(1, slot) for slot in range(3)]
