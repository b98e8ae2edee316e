"""A database whose every committed state is remembered, and the things that may happen to it, for tests of the past."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from random import Random

from engine import CONFIG, Call, World

from s3blockfs.cache import BlockCache
from s3blockfs.fold import fold
from s3blockfs.gc import Report, collect
from s3blockfs.head import HeadFile
from s3blockfs.history import commits, open_at
from s3blockfs.snapshot import Snapshot, Source, Version

PREFIX = "a.db"
MOST_BYTES = 200_000


class Story:
    """Changes come from a machine that bypasses the store's rules; folds and looks back go by them."""

    def __init__(
        self, world: World, seed: object, block_size: int, *, counted: bool = False, prefix: str = PREFIX
    ) -> None:
        """Of a new database, or of one that is there."""
        self.world = world
        self.prefix = prefix
        self.rng = Random(f"{seed}-{block_size}")
        self.machine = world.machine(faulty=counted, block_size=block_size)
        self.database = self.machine.create(prefix, exclusive=False)
        self.source = self.new_source()
        self.model = bytearray(self.database.read(0, self.database.size))
        self.versions = [self.version()]
        seq = self.versions[0].head.seq
        self.states: dict[int, bytes] = {seq: bytes(self.model)}
        """What was committed, by seq."""
        self.times = {seq: world.runtime.monotonic()}

    def new_source(self, cache_bytes: int = 1 << 20) -> Source:
        store, runtime = self.world.store, self.world.runtime
        return Source(store, BlockCache(store, runtime, cache_bytes, 10), runtime, self.prefix)

    def heads(self) -> HeadFile:
        return self.world.heads(self.prefix)

    def version(self) -> Version:
        found = self.heads().read()
        assert found is not None
        return found

    # --- what happens ----------------------------------------------------------------------------------

    def write(self, offset: int, content: bytes) -> None:
        self.database.refresh(0)
        self.database.write(offset, content)
        self.model.extend(bytes(max(0, offset + len(content) - len(self.model))))
        self.model[offset : offset + len(content)] = content

    def truncate(self, size: int) -> None:
        self.database.refresh(0)
        self.database.truncate(size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def commit(self) -> None:
        if self.database.is_dirty:
            self.database.close_handle(0)
            self.states[self.database.version.head.seq] = bytes(self.model)
            self.times[self.database.version.head.seq] = self.world.runtime.monotonic()
            self.versions.append(self.database.version)

    def change(self) -> None:
        """Something in the file, not committed yet."""
        rng = self.rng
        if rng.random() < 0.8:
            offset = rng.choice([rng.randrange(len(self.model) + 1), rng.randrange(len(self.model) + 30_000)])
            length = rng.choice([1, 100, 4096, rng.randrange(1, 60_000)])
            length = max(1, min(length, MOST_BYTES - offset))
            self.write(offset % MOST_BYTES, rng.choice([bytes([rng.randrange(256)]) * length, rng.randbytes(length)]))
        else:
            self.truncate(rng.randrange(min(MOST_BYTES, len(self.model) * 2 + 1)))

    def forget(self, age_s: float) -> None:
        """What was committed longer ago."""
        now, newest = self.world.runtime.monotonic(), max(self.times)
        self.times = {seq: then for seq, then in self.times.items() if then > now - age_s or seq == newest}
        self.states = {seq: self.states[seq] for seq in self.times}
        self.versions = self.versions[-9:]

    def live(self, commits: int = 1) -> None:
        for _ in range(commits):
            for _ in range(self.rng.randrange(1, 4)):
                self.change()
            self.commit()

    def fold(
        self,
        version: Version | None = None,
        extra: Collection[int] = (),
        happens: Callable[[], object] | None = None,
        before: str = "archive",
    ) -> Version | None:
        """By a process that knows nothing. Something `happens` before its first request with this site: `archive` comes
        between the last upload and the first swap."""
        version = version or self.version()
        with self.meanwhile(before, happens):
            return fold(self.new_source(), self.heads(), CONFIG, version, extra)

    def collect(self, retain_s: float, happens: Callable[[], object] | None = None, before: str = "roots") -> Report:
        """And fold what is mostly dead, as the background does."""
        with self.meanwhile(before, happens):
            report = collect(self.new_source(), self.heads(), retain_s)
        if report.sparse:
            self.fold(extra=report.sparse)
        return report

    @contextmanager
    def meanwhile(self, site: str, happens: Callable[[], object] | None) -> Iterator[None]:
        outer = self.world.store.rule

        def rule(call: Call, when: str) -> None:
            if when == "before" and call.site == site and happens is not None:
                self.world.store.rule = None
                happens()

        self.world.store.rule = rule
        try:
            yield
        finally:
            self.world.store.rule = outer

    # --- what is seen ----------------------------------------------------------------------------------

    def check(self, snapshot: Snapshot, seq: int) -> None:
        expected = self.states[seq]
        assert snapshot.head.size == len(expected)
        assert snapshot.read(0, len(expected) + 10) == expected, f"commit {seq}"
        for _ in range(3):
            low, length = self.rng.randrange(len(expected) + 100), self.rng.randrange(20_000)
            assert snapshot.read(low, length) == expected[low : low + length]

    def check_now(self) -> None:
        """By a reader that knows nothing, and by one that was there all the time."""
        version = self.version()
        self.check(Snapshot.load(self.new_source(), version), version.head.seq)
        self.database.refresh(0)
        assert self.database.read(0, len(self.model) + 10) == self.model

    def check_past(self) -> set[int]:
        """Every commit that is said to be kept."""
        source = self.new_source()
        found = commits(source, self.heads())
        seqs = [commit.seq for commit in found]
        assert seqs == sorted(set(seqs), reverse=True)
        for commit in found:
            snapshot = open_at(source, self.heads(), commit.seq)
            assert (snapshot.head.seq, snapshot.head.commit) == (commit.seq, commit.id)
            self.check(snapshot, commit.seq)
        return set(seqs)
