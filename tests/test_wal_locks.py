"""Who gets the write lock of a log has the lease, in whatever order SQLite takes its locks; by the engine alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine import InlineRuntime, World
from scenes import LEASE_S, PREFIX, Scene

from s3blockfs.errors import Busy
from s3blockfs.locks import RESERVED_BYTE, SHARED_FIRST, SHARED_LAST, Kind
from s3blockfs.wal import INDEX_HEADERS_BYTES
from s3blockfs.walmode import FIRST_READ, WRITE, WalDatabase


class Overtaken:
    """A lock before which somebody else gets in once."""

    def __init__(self, lock: Any, somebody: Callable[[], None]) -> None:
        self._lock, self._somebody = lock, [somebody]

    def __enter__(self) -> None:
        while self._somebody:
            self._somebody.pop()()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


class Logged(Scene):
    """State 1, open in WAL mode, with an index."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.machine = world.machine(lease_s=LEASE_S)
        self.machine.kind = WalDatabase
        opened = self.machine.open(PREFIX)
        assert isinstance(opened, WalDatabase)
        self.database = self.logged = opened
        index = self.machine.side_files.create(f"{opened.path}-shm")
        index.write(0, b"\1" * INDEX_HEADERS_BYTES)

    def write_lock(self, owner: str) -> None:
        self.logged.lock_index(owner, Kind.WRITE, WRITE, WRITE, 1, 1)

    def begin(self, owner: str) -> None:
        """As most: a read lock comes first."""
        self.logged.lock_index(owner, Kind.READ, FIRST_READ, FIRST_READ, 1, 1)
        self.write_lock(owner)

    def end(self, owner: str) -> None:
        self.logged.unlock_index(owner, WRITE, WRITE)
        self.logged.unlock_index(owner, FIRST_READ, FIRST_READ)

    @property
    def has_lease(self) -> bool:
        version = self.world.heads(faulty=False).read()
        return version is not None and version.head.lease is not None

    def rest(self) -> None:
        """The lease is given back."""
        for _ in range(3):
            self.world.runtime.sleep(LEASE_S / 2)
            self.machine.tick()
        assert not self.has_lease


@pytest.fixture
def scene() -> Iterator[Logged]:
    with World(InlineRuntime()) as world:
        yield Logged(world)


@pytest.mark.parametrize("reads_first", [True, False])
def test_it_comes_with_the_lease(scene: Logged, reads_first: bool) -> None:
    """A SQLite that was built with SQLITE_ENABLE_SETLK_TIMEOUT takes it before it reads."""
    scene.begin("one") if reads_first else scene.write_lock("one")
    assert scene.has_lease
    with pytest.raises(Busy):
        scene.write_lock("two")
    scene.end("one")
    scene.rest()


def test_it_goes_to_nobody_who_met_another_writer(scene: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor when that one lets go at this moment: while he wrote it could not be told what it was wanted for."""
    scene.begin("one")

    def let_go() -> None:
        scene.end("one")
        scene.rest()

    monkeypatch.setattr(scene.logged, "_gate", Overtaken(scene.logged._gate, let_go))
    with pytest.raises(Busy):
        scene.write_lock("two")
    assert not scene.has_lease and not scene.logged.is_writing
    scene.write_lock("two")
    assert scene.has_lease and scene.logged.is_writing
    scene.end("two")


def test_it_is_not_begun_by_a_thread_that_only_reads(scene: Logged) -> None:
    """While another of its process has the lock to recover the index, and another machine writes."""
    scene.machine.side_files.get(f"{scene.logged.path}-shm").write(0, bytes(INDEX_HEADERS_BYTES))
    scene.write_lock("one")
    elsewhere = scene.world.machine(lease_s=LEASE_S).open(PREFIX)
    elsewhere.lock("else", Kind.READ, SHARED_FIRST, SHARED_LAST, 1)
    elsewhere.lock("else", Kind.WRITE, RESERVED_BYTE, RESERVED_BYTE, 1)
    before_s = scene.world.runtime.monotonic()
    scene.logged.lock_index("one", Kind.READ, FIRST_READ, FIRST_READ, 1, 2)
    assert scene.world.runtime.monotonic() == before_s, "it had to wait"
    scene.logged.unlock_index("one", FIRST_READ, FIRST_READ)
    with pytest.raises(Busy):
        scene.logged.lock_index("one", Kind.READ, FIRST_READ, FIRST_READ, 1, 1)
