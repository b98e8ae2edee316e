"""Publishing: where bytes go and what that costs, the change counter, rolling the tail, uploads ahead of the commit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import pytest
from engine import Call, InlineRuntime, ManualRuntime, World, shrink_limits, small_leaves

from s3blockfs import commit
from s3blockfs.database import Database
from s3blockfs.errors import CommitLost, StoreRefused, StoreUnavailable
from s3blockfs.format import data
from s3blockfs.format import head as codec
from s3blockfs.format.data import decode_object
from s3blockfs.format.extents import Extent
from s3blockfs.format.head import Head
from s3blockfs.format.keys import ObjectRef

T = TypeVar("T")
KIB, MIB = 1024, 1024 * 1024
PREFIX = "a.db"


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def head_of(world: World) -> Head:
    version = world.heads(faulty=False).read()
    assert version is not None
    return version.head


def new_database(world: World, **changes: object) -> Database:
    database = world.machine(**changes).create(PREFIX, exclusive=True)
    world.store.calls.clear()
    return database


def puts(world: World) -> dict[str, int]:
    """PUTs since the last look, by what they were for."""
    found = Counter(call.site for call in world.store.calls if call.operation == "PUT")
    world.store.calls.clear()
    return dict(found)


def save(database: Database, *writes: tuple[int, bytes]) -> None:
    for offset, content in writes:
        database.write(offset, content)
    database.close_handle(0)


# --- where bytes go --------------------------------------------------------------------------------------


def test_a_small_commit_is_one_put(world: World) -> None:
    """Up to 256 KiB, scattered or not: one PUT, nothing read, everything in the tail."""
    database = new_database(world)
    save(database, *[(number * 40_000, noise(4096, number)) for number in range(60)])
    assert len(world.store.calls) == 1 and puts(world) == {"swap": 1}
    save(database, (0, noise(256 * KIB, 1)))
    assert len(world.store.calls) == 2 and puts(world) == {"swap": 1, "roll": 1}  # that one in the background
    head = head_of(world)
    assert len(head.tail.commits) == 3 and not head.segments and not head.extents


def test_a_scattered_large_commit_is_a_segment(world: World) -> None:
    """More than 256 KiB in no runs: one segment, one swap; the commit's record is still in the log."""
    database = new_database(world)
    save(database, *[(number * 100_000, noise(4096, number)) for number in range(100)])
    assert puts(world) == {"data": 1, "swap": 1}
    head = head_of(world)
    assert len(head.segments) == 1 and not head.extents
    assert head.tail.commits[-1].record.id == head.commit and not head.tail.commits[-1].chunks
    assert world.content()[99 * 100_000 :] == noise(4096, 99)


def test_a_bulk_load_is_block_objects(world: World) -> None:
    """10 MiB: three block objects while the data still streams in or at the commit, one swap, a record in the log."""
    database = new_database(world)
    content = noise(10 * MIB)
    for start in range(0, len(content), 128 * KIB):
        database.write(start, content[start : start + 128 * KIB])
    assert world.store.count("PUT", "swap") == 0
    database.close_handle(0)
    assert puts(world) == {"data": 3, "swap": 1}
    head = head_of(world)
    assert [e.blocks for e in head.extents] == [64, 64, 32] and not head.segments
    assert head.tail.commits[-1].record.id == head.commit
    assert world.content() == content


def test_a_mixed_commit_uses_both_roles_once(world: World) -> None:
    """Runs go into block objects, small rests into the tail, large rests into a segment; no block into two of them."""
    database = new_database(world)
    run = noise(MIB)
    save(database, (0, run), (3 * MIB + 100, b"rest"))
    assert puts(world) == {"data": 1, "swap": 1}
    assert [offset for offset, _ in head_of(world).tail.commits[-1].chunks] == [3 * MIB + 100]
    save(database, (0, run), *[(2 * MIB + number * 70_000, noise(5000, number)) for number in range(80)])
    assert puts(world) == {"archive": 1, "data": 2, "swap": 1}
    content = bytearray(2 * MIB + 79 * 70_000 + 5000)
    content[:MIB] = run
    content[3 * MIB + 100 : 3 * MIB + 104] = b"rest"
    for number in range(80):
        content[2 * MIB + number * 70_000 : 2 * MIB + number * 70_000 + 5000] = noise(5000, number)
    assert world.content() == content


def test_nothing_dirty_is_no_request(world: World) -> None:
    """A commit point with nothing to publish, and a size set to what it is, cost nothing."""
    database = new_database(world)
    database.truncate(0)
    database.close_handle(0)
    database.sync(0)
    assert world.store.calls == []


def test_the_memory_of_uploads_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the commit, no more than `memory` is in flight, and as much as that in parallel."""

    class LazyFuture(Future[T]):
        """Runs when it is asked for, so what was submitted and not awaited is in flight for sure."""

        def __init__(self, function: Callable[[], T]) -> None:
            super().__init__()
            self.function: Callable[[], T] | None = function

        def _run(self) -> None:
            nonlocal flying
            if self.function is not None:
                function, self.function = self.function, None
                flying -= 1
                self.set_result(function())

        def cancel(self) -> bool:
            """By who waits for it and makes the call himself."""
            nonlocal flying
            flying -= self.function is not None
            self.function = None
            return super().cancel()

        def result(self, timeout: float | None = None) -> T:
            self._run()
            return super().result(timeout)

        def exception(self, timeout: float | None = None) -> BaseException | None:
            self._run()
            return super().exception(timeout)

    class LazyRuntime(ManualRuntime):
        def submit(self, function: Callable[[], T]) -> Future[T]:
            nonlocal flying, peak
            flying += 1
            peak = max(peak, flying)
            return LazyFuture(function)

    flying = peak = 0
    with World(LazyRuntime()) as lazy:
        database = new_database(lazy, memory=3 * data.OBJECT_BYTES)
        for start in range(0, 10 * data.OBJECT_BYTES, MIB):
            database.write(start, noise(1024, start) * 1024)
        database.write(10 * data.OBJECT_BYTES + 5, b"not whole")
        save(database, *[(20 * data.OBJECT_BYTES + number * 99_999, noise(5000)) for number in range(100)])
        assert puts(lazy) == {"data": 11, "swap": 1}
    assert (flying, peak) == (0, 3)


# --- rolling the tail --------------------------------------------------------------------------------------


def commit_noise(database: Database, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        save(database, (number * 3000, noise(3000, number)))


def noise_file(count: int) -> bytes:
    return b"".join(noise(3000, number) for number in range(count))


def test_the_tail_is_rolled_in_the_background(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ROLL_BYTES a segment is uploaded beside the commits, and rides on a later head; each commit stays separate."""
    shrink_limits(monkeypatch)
    monkeypatch.setattr(commit, "FULL_TAIL_BYTES", MIB)
    machine = world.machine()
    database = machine.create(PREFIX, exclusive=True)
    for count in range(1, 20):
        commit_noise(database, 1, count - 1)
        if head_of(world).segments:
            break
    head = head_of(world)
    assert head.segments and world.store.count("PUT", "roll") >= 1
    (segment,) = head.segments
    first_in_tail = head.tail.commits[0].record.seq
    body = world.store.inner.get(segment.ref.key(PREFIX), site="test").body
    _, index = decode_object(body, segment.ref, "segment")
    assert [record.seq for record in index.commits] == list(range(1, first_in_tail))
    assert index.extents[-1].offset == 0, "next to the index, for whoever opens the database"
    assert head.tail.encoded_bytes < len(body)
    assert world.content() == database.read(0, 10**6) == noise_file(count)


def test_the_tail_has_a_hard_cap(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no roll succeeds the tail grows to the cap and no further: then commits wait for one, and fail with it."""
    shrink_limits(monkeypatch)
    database = new_database(world)

    def no_roll(call: Call, when: str) -> None:
        if call.site == "roll":
            raise StoreUnavailable("no rolls")

    world.store.rule = no_roll
    with pytest.raises(StoreUnavailable, match="no rolls"):
        commit_noise(database, 20)
    published = len(world.content()) // 3000
    assert head_of(world).tail.encoded_bytes >= commit.FULL_TAIL_BYTES > 3000 * (published - 1)
    assert world.content() == noise_file(published)
    world.store.rule = None
    commit_noise(database, 3, published)
    assert head_of(world).segments and len(head_of(world).tail.commits) <= 3
    assert world.content() == noise_file(published + 3)


@pytest.mark.parametrize("limit", ["ROLL_RAW_BYTES", "ROLL_COMMITS"])
def test_the_tail_is_bounded_in_every_direction(world: World, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: well compressed or tiny commits are rolled as well."""
    monkeypatch.setattr(commit, limit, {"ROLL_RAW_BYTES": 20_000, "ROLL_COMMITS": 10}[limit])
    database = new_database(world)
    most = 0
    for number in range(50):
        save(database, (0, bytes([number]) * 3000))
        most = max(most, len(head_of(world).tail.commits))
    assert most <= 21 and head_of(world).segments
    assert world.content() == bytes([49]) * 3000


def test_a_roll_is_taken_in_after_others_committed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished roll holds the start of a tail that grew since: the rest of the tail stays."""
    shrink_limits(monkeypatch)
    monkeypatch.setattr(commit, "FULL_TAIL_BYTES", MIB)
    mine, other = world.machine(), world.machine(faulty=False)
    database = mine.create(PREFIX, exclusive=True)
    rolled: list[Call] = []
    world.store.rule = lambda call, when: rolled.append(call) if (call.site, when) == ("roll", "after") else None
    count = 0
    while not rolled:
        commit_noise(database, 1, count)
        count += 1
    monkeypatch.setattr(commit, "ROLL_BYTES", MIB)  # the other machine does not roll
    theirs = other.open(PREFIX)
    commit_noise(theirs, 1, count)
    database.refresh(0)
    commit_noise(database, 1, count + 1)
    head = head_of(world)
    assert len(head.segments) == 1
    assert head.segments[0].last_seq + 1 == head.tail.commits[0].record.seq < head.seq
    assert head.seq == count + 3  # creation is the first commit
    assert world.content() == database.read(0, 10**6) == noise_file(count + 2)


def test_a_roll_that_came_too_late_is_dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other machine rolled the same commits first, or the database is another one: my roll is not referred to."""
    shrink_limits(monkeypatch)
    mine, other = world.machine(), world.machine(faulty=False)
    database = mine.create(PREFIX, exclusive=True)
    theirs = other.open(PREFIX)
    commit_noise(database, 3)  # starts a roll
    theirs.refresh(0)
    commit_noise(theirs, 6, 3)
    database.refresh(0)
    commit_noise(database, 3, 9)
    spans = [(segment.first_seq, segment.last_seq) for segment in head_of(world).segments]
    assert spans == sorted(set(spans)) and all(a[1] < b[0] for a, b in pairwise(spans))
    assert world.content() == database.read(0, 10**6) == noise_file(12)


# --- uploads -----------------------------------------------------------------------------------------------


def raise_floor(world: World) -> None:
    heads = world.heads(faulty=False)
    version = heads.read()
    assert version is not None
    heads.swap(version, lambda replaced: replace(replaced, floor=replaced.rev))


def test_uploads_below_the_floor_are_not_referred_to(world: World) -> None:
    """A transaction outlasts the retention: its uploads may be garbage already, so it fails; run again it succeeds."""
    database = new_database(world)
    content = noise(8 * MIB)
    database.write(0, content)
    raise_floor(world)
    with pytest.raises(StoreUnavailable, match="run it again"):
        database.close_handle(0)
    assert world.content() == b""
    database.refresh(0)  # what opening it again does
    database.write(0, content)
    database.close_handle(0)
    assert world.content() == content


def test_the_floor_rises_between_two_tries(world: World) -> None:
    """Also when the collector's swap is what came first."""
    database = new_database(world)
    fired: list[Call] = []

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before" and not fired:
            fired.append(call)
            raise_floor(world)

    world.store.rule = rule
    with pytest.raises(StoreUnavailable, match="run it again"):
        save(database, (0, noise(8 * MIB)))
    assert world.content() == b""
    database.refresh(0)
    save(database, (0, b"small commits upload nothing, and live"))
    assert world.content().startswith(b"small")


@pytest.mark.parametrize("when", ["before", "after"])
def test_streamed_uploads_that_failed_are_repeated(world: World, when: str) -> None:
    """An upload ahead of the commit that failed is no failure yet: the commit uploads it under another name."""
    database = new_database(world)
    failed: list[str] = []

    def rule(call: Call, now: str) -> None:
        if call.site == "data" and now == when and len(failed) < 2:
            failed.append(call.key)
            raise StoreUnavailable("cut")

    world.store.rule = rule
    content = noise(12 * MIB)
    save(database, *[(start, content[start : start + MIB]) for start in range(0, len(content), MIB)])
    assert puts(world) == {"data": 5, "swap": 1}
    used = {extent.ref.key(PREFIX) for extent in head_of(world).extents}
    assert used.isdisjoint(failed) and world.content() == content


@pytest.mark.parametrize("error", [StoreUnavailable("cut"), StoreRefused("quota")])
def test_uploads_that_fail_at_the_commit_fail_it(world: World, error: Exception) -> None:
    """I2: no head is written that refers to what was not stored."""
    database = new_database(world)

    def rule(call: Call, when: str) -> None:
        if call.site == "data":
            raise error

    world.store.rule = rule
    with pytest.raises(type(error)):
        save(database, (0, noise(6 * MIB)))
    assert world.store.count("PUT", "swap") == 0
    world.store.rule = None
    assert world.content() == b"" == database.read(0, 10)


def test_every_object_is_stored_before_the_head_refers_to_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """I2, I6: at each swap everything the new head names is there; no key is written twice but the head's."""
    shrink_limits(monkeypatch)
    database = new_database(world, block_size=4096)
    checked = 0

    def rule(call: Call, when: str) -> None:
        nonlocal checked
        if call.site == "swap" and when == "after":
            head = head_of(world)
            for ref in {e.ref for e in head.extents} | {s.ref for s in head.segments}:
                decode_object(world.store.inner.get(ref.key(PREFIX), site="test").body, ref, "object")
                checked += 1

    world.store.rule = rule
    rng = random.Random(3)
    for _ in range(40):
        save(database, (rng.randrange(60_000), rng.randbytes(rng.choice([10, 3000, 40_000]))))
    keys = Counter(call.key for call in world.store.calls if call.operation == "PUT" and call.site != "swap")
    assert checked > 50 and len(keys) > 20 and max(keys.values()) == 1


def leave_archives(world: World) -> Callable[[], int]:
    """From now on every head that replaces one it does not fully refer to needs an archive of it: a count of them."""
    seen = head_of(world)
    found: list[str] = []

    def rule(call: Call, when: str) -> None:
        nonlocal seen
        if (call.site, when) != ("swap", "after"):
            return
        before, seen = seen, head_of(world)
        rows = [({*head.extents}, {*head.leaves}, {*head.segments}) for head in (before, seen)]
        if any(not old <= new for old, new in zip(*rows, strict=True)):
            start = f"{PREFIX}/archive/{before.rev:016x}-"
            (entry,) = world.store.inner.list(start, site="test")
            assert codec.decode(world.store.inner.get(entry.key, site="test").body, "archive") == before
            found.append(entry.key)

    world.store.rule = rule
    return lambda: len(found)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_swap_that_drops_a_reference_archives_its_predecessor(
    world: World, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes: extents, whole or in part, leaves of the map, everything at a deletion."""
    shrink_limits(monkeypatch)
    if leaves:
        small_leaves(monkeypatch)
    machine = world.machine(block_size=4096)
    database = machine.create(PREFIX, exclusive=True)
    archived = leave_archives(world)
    rng = random.Random(5)
    for _ in range(30):
        save(database, (rng.randrange(60) * 4096, rng.randbytes(rng.choice([10, 12_000, 40_000]))))
    commits = archived()
    assert commits > 5 and bool(head_of(world).leaves) == leaves and head_of(world).segments
    machine.remove(PREFIX)
    assert archived() == commits + 1


def test_what_a_fold_added_meanwhile_is_archived(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head that is replaced counts, not the one the transaction read: a fold that came first put extents there."""
    shrink_limits(monkeypatch)
    database = new_database(world, block_size=4096)
    save(database, (0, noise(4096)))
    database.write(0, noise(40_000))
    base = head_of(world)
    ref = ObjectRef(base.rev, b"folded!!", b"folded!!")
    heads = world.heads(faulty=False)
    version = heads.read()
    assert version is not None
    heads.swap(version, lambda replaced: replace(replaced, extents=(Extent(0, 1, ref, 0, base.seq),)))
    archived = leave_archives(world)
    database.close_handle(0)
    assert archived() == 1 and head_of(world).extents[0].ref != ref


def test_a_block_written_again_after_it_was_streamed(world: World) -> None:
    """The commit publishes the last version, also of one byte, also when the file was cut and grew in between."""
    database = new_database(world)
    content = bytearray(noise(8 * MIB))
    database.write(0, bytes(content))
    assert world.store.count("PUT", "data") == 2
    database.write(5 * MIB, b"!")
    database.write(0, bytes(content[:MIB]))
    assert world.store.count("PUT", "data") == 2  # an object is not uploaded again for each block written again
    content[5 * MIB : 5 * MIB + 1] = b"!"
    database.truncate(7 * MIB + 17)
    database.truncate(8 * MIB)
    content[7 * MIB + 17 :] = bytes(MIB - 17)
    database.close_handle(0)
    assert world.content() == content == database.read(0, 9 * MIB)


@pytest.mark.parametrize("size", [100, 4096, 70_000])
@pytest.mark.parametrize("separately", [True, False])
def test_cut_and_grown_again_reads_zeros(world: World, size: int, separately: bool) -> None:
    """What was cut off never comes back, from the tail, a segment or a block object, in one commit or in two."""
    database = new_database(world)
    for first in (noise(200_000), noise(2 * MIB)):
        save(database, (0, first))
        save(database, (150_000, b"in the tail"))
        database.truncate(size)
        if separately:
            database.close_handle(0)
            assert world.content() == first[:size]
        database.truncate(180_000)
        save(database, (175_000, b"new"))
        expected = bytearray(first[:size].ljust(180_000, b"\0"))
        expected[175_000:175_003] = b"new"
        assert world.content() == expected == database.read(0, 10**7)


# --- after others ------------------------------------------------------------------------------------------


def test_a_lost_bulk_commit_leaves_no_trace(world: World) -> None:
    """I3: uploads of a commit that lost are garbage; what is read is the winner's."""
    database, other = new_database(world), world.machine(faulty=False).open(PREFIX)
    database.write(0, noise(8 * MIB))
    save(other, (0, b"winner"))
    with pytest.raises(CommitLost):
        database.close_handle(0)
    assert database.read(0, 100) == b""
    database.refresh(0)
    assert world.content() == b"winner" == database.read(0, 100)
