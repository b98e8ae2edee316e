"""Interleavings found by reading the engine as somebody who wants to lose a commit or to mix two states."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from engine import CONFIG, Call, Delayed, InlineRuntime, ManualRuntime, Process, World, shrink_limits, sqlite_page

from s3blockfs import catalog as catalog_module
from s3blockfs.config import Config
from s3blockfs.errors import CommitLost, NewerFormat, OutcomeUnknown, RequestInDoubt, S3BlockFSError, StoreUnavailable
from s3blockfs.locks import RESERVED_BYTE, SHARED_FIRST, SHARED_SIZE, Kind, Level
from s3blockfs.state import RECOVER_EVERY_S

if TYPE_CHECKING:
    from s3blockfs.catalog import Catalog

PAGE = 4096

#: fcntl.h of Linux, as in fuse_binding.py, whose import needs libfuse.
F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2
F_SETLK = 6


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def pages(counter: int, filler: int, count: int = 3) -> bytes:
    return sqlite_page(counter, count, filler) + bytes([filler]) * PAGE * (count - 1)


def put(machine: Catalog, content: bytes, path: str = "a.db") -> None:
    """One commit of a whole file, as `cp` makes it."""
    database = machine.create(path, exclusive=False)
    try:
        database.refresh(0)
        database.write(0, content)
        database.close_handle(0)
    finally:
        machine.release(database)


def opened(machine: Catalog, pid: int = 1, path: str = "a.db") -> Process:
    return Process(machine, machine.open(path), pid)


def unreachable(call: Call, when: str) -> None:
    raise StoreUnavailable("outage")


# --- locks that were waited for ------------------------------------------------------------------------------


def test_a_lock_that_was_waited_for_ends_discard_mode(world: World) -> None:
    """After a failed commit the next transaction counts again, also when the lock was downgraded by F_SETLKW."""
    put(world.machine(), pages(1, 1))
    here = world.machine()
    writer = opened(here)
    writer.begin()
    writer.database.write(PAGE, b"\3" * PAGE)
    put(world.machine(), pages(2, 2))
    with pytest.raises(CommitLost):
        writer.finalise()
    writer.database.wait_lock(writer, Kind.READ, 0, 1 << 62, writer.pid, lambda: False)
    assert writer.database.locks.level(writer) is Level.SHARED
    writer.unlock()
    writer.begin()
    writer.database.write(PAGE, b"\4" * PAGE)
    writer.commit()
    assert world.content()[PAGE : 2 * PAGE] == b"\4" * PAGE


def test_a_lock_that_was_waited_for_starts_on_the_newest_state(world: World) -> None:
    """SHARED by F_SETLKW looks for a newer head, as by F_SETLK."""
    put(world.machine(), pages(1, 1))
    reader = opened(world.machine())
    put(world.machine(), pages(2, 2))
    last = SHARED_FIRST + SHARED_SIZE - 1
    reader.database.wait_lock(reader, Kind.READ, SHARED_FIRST, last, reader.pid, lambda: False)
    assert reader.database.read(0, 3 * PAGE) == pages(2, 2)


# --- what is left of a transaction ---------------------------------------------------------------------------


def test_caches_are_dropped_when_a_close_fails(world: World) -> None:
    """I4: what a failed commit wrote is shown to nobody."""
    put(world.machine(), pages(1, 1))
    database = world.machine().open("a.db")
    moved: list[bytes] = []

    def on_moved() -> None:
        """The kernel waits here for a write that it has sent: that must get through."""
        world.runtime.submit(lambda: database.truncate(database.size)).result(timeout=30)
        moved.append(database.read(PAGE, 1))

    database.on_moved = on_moved
    database.write(PAGE, b"\3" * PAGE)
    put(world.machine(), pages(2, 2))
    with pytest.raises(CommitLost):
        database.close_handle(1)
    assert moved == [b"\1"]


def test_a_journal_in_doubt_is_not_played_back_over_others() -> None:
    """I3: after an unknown outcome the file can be closed and opened again; nothing stale is ever committed."""
    with World(InlineRuntime()) as world:
        _close_in_doubt_and_open_again(world)


def _close_in_doubt_and_open_again(world: World) -> None:
    put(world.machine(), pages(1, 1))
    here = world.machine()
    writer = opened(here)
    writer.begin()
    writer.database.write(0, pages(2, 2, count=5))

    def cut_off(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            raise Delayed
        raise StoreUnavailable("outage")

    world.store.rule = cut_off
    with pytest.raises(OutcomeUnknown):
        writer.commit()
    assert writer.journal_exists
    writer.close()
    here.release(writer.database)
    world.store.rule = None
    assert world.store.deliver() == [True]
    put(world.machine(), pages(3, 3, count=5))
    again = opened(here)
    with pytest.raises(OutcomeUnknown):
        again.shared()
    world.runtime.sleep(RECOVER_EVERY_S)
    with pytest.raises(OutcomeUnknown):
        again.shared()  # the runtime settles inside this call
    assert not again.journal_exists
    again.shared()
    assert again.database.read(0, 5 * PAGE) == pages(3, 3, count=5)


def test_a_database_in_doubt_stays_closed_when_it_is_opened_again(world: World) -> None:
    """I3, (d): every call fails until it is settled, on every handle; a reader must not see "rolled back" too early."""
    put(world.machine(), pages(1, 1))
    here = world.machine()
    writer = opened(here)
    writer.begin()
    writer.database.write(PAGE, b"\2" * PAGE)

    def cut_off(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            raise Delayed
        if call.site == "head":
            raise StoreUnavailable("outage")

    world.store.rule = cut_off
    with pytest.raises(OutcomeUnknown):
        writer.commit()
    writer.close()
    here.release(writer.database)
    world.store.rule = None
    with pytest.raises(OutcomeUnknown):
        opened(here).database.read(0, 1)


def test_a_journal_without_its_transaction_is_not_played_back(world: World) -> None:
    """A process that takes no locks dies in mid-transaction: its journal must not outlive its bytes."""
    put(world.machine(), pages(1, 1))
    here = world.machine()
    process = opened(here)
    process.write_journal()
    process.database.write(0, pages(2, 2, count=5))
    process.database.close_handle(process.pid)  # a hot journal: nothing is published
    here.release(process.database)
    assert not process.journal_exists
    assert world.content() == pages(1, 1)


def test_a_journal_of_an_older_state_is_removed(world: World) -> None:
    """Played back onto a newer state it would undo the commits of others."""
    put(world.machine(), pages(1, 1))
    here = world.machine()
    process = opened(here)
    process.write_journal()
    put(world.machine(), pages(2, 2, count=5))
    process.shared()
    assert process.database.size == 5 * PAGE
    assert not process.journal_exists


def test_play_back_in_discard_mode_may_sync(world: World) -> None:
    """After a failed commit SQLite's play-back (fsync, then the journal) must succeed without S3; with
    locking_mode=EXCLUSIVE nothing else would ever end discard mode."""
    put(world.machine(), pages(1, 1))
    writer = opened(world.machine())
    writer.begin()
    writer.database.write(PAGE, b"\3" * PAGE)
    put(world.machine(), pages(2, 2))
    with pytest.raises(CommitLost):
        writer.finalise()
    world.store.rule = unreachable
    writer.play_back()
    writer.database.sync(writer.pid)
    writer.finalise()
    world.store.rule = None
    assert world.content() == pages(2, 2)


def test_a_transaction_given_up_by_a_close_is_not_committed(world: World) -> None:
    """I3: a second descriptor closes while another thread is about to finalise the journal: that must not succeed,
    neither before nor after the locks are gone."""
    put(world.machine(), pages(1, 1))
    writer = opened(world.machine())
    writer.begin()
    writer.database.write(PAGE, b"\2" * PAGE)
    assert writer.database.owner_closes(writer)
    with pytest.raises(StoreUnavailable):
        writer.finalise()
    with pytest.raises(StoreUnavailable):
        writer.database.sync(writer.pid)
    writer.unlock()
    writer.begin()
    writer.database.write(PAGE, b"\3" * PAGE)
    writer.commit()
    assert world.content()[PAGE : 2 * PAGE] == b"\3" * PAGE


# --- deleted meanwhile ---------------------------------------------------------------------------------------


def test_nothing_is_committed_into_a_tombstone(world: World) -> None:
    """A commit whose answer was lost, and the database deleted elsewhere before it was found: later writes fail."""
    put(world.machine(), pages(1, 1))
    elsewhere = world.machine(faulty=False)
    writer = opened(world.machine())
    writer.begin()
    writer.database.write(PAGE, b"\2" * PAGE)

    def lose_answer(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            world.store.rule = None
            elsewhere.remove("a.db")
            raise RequestInDoubt("answer lost")

    world.store.rule = lose_answer
    writer.commit()  # it is in the past of the tombstone
    with pytest.raises(S3BlockFSError):
        writer.begin()
    with pytest.raises(S3BlockFSError):
        writer.database.write(PAGE, b"\3" * PAGE)


def test_a_creation_that_was_deleted_at_once_is_no_database(world: World) -> None:
    """The same for a creation: its head must not be taken for that of a living database."""
    elsewhere = world.machine(faulty=False)

    def lose_answer(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            world.store.rule = None
            elsewhere.remove("a.db")
            raise RequestInDoubt("answer lost")

    world.store.rule = lose_answer
    with pytest.raises(S3BlockFSError):
        world.machine().create("a.db", exclusive=True)


def test_a_handle_of_a_deleted_database_does_not_follow_its_successor(world: World) -> None:
    """Once deleted elsewhere it stays gone: two databases must not share the kernel's pages of one inode."""
    put(world.machine(), pages(1, 1))
    reader = opened(world.machine())
    elsewhere = world.machine()
    elsewhere.remove("a.db")
    with pytest.raises(S3BlockFSError):
        reader.shared()
    put(elsewhere, pages(2, 2))
    with pytest.raises(S3BlockFSError):
        reader.shared()


# --- looking -------------------------------------------------------------------------------------------------


def test_own_commits_are_seen_after_closing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size and content of what was just written here, at once, also when the refresh interval has not passed."""
    monkeypatch.setattr(catalog_module, "IDLE_KEPT", 0)
    here = world.machine(refresh_s=60.0)
    put(here, pages(1, 1))
    entry = here.lookup("a.db")
    assert entry is not None
    assert entry.size == 3 * PAGE
    assert opened(here).database.read(0, 3 * PAGE) == pages(1, 1)


# --- threads -------------------------------------------------------------------------------------------------


def test_a_frame_of_a_newer_format_is_reported_every_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that fails in whatever way leaves nobody waiting for it."""
    put(world.machine(), bytes(range(256)) * 4096)  # a block object

    def refuse(*_: object) -> NoReturn:
        raise NewerFormat("upgrade")

    monkeypatch.setattr("s3blockfs.format.data.decode_frame", refuse)
    database = world.machine(request_deadline_s=0.01).open("a.db")
    for _ in range(2):
        with pytest.raises(NewerFormat):
            database.read(0, 10)


class _OneThread(ManualRuntime):
    """An executor whose only thread is busy with whatever was submitted first."""

    def __init__(self) -> None:
        super().__init__()
        self._executor.shutdown()
        self._executor = ThreadPoolExecutor(1)


def test_loading_a_state_on_an_io_thread_does_not_wait_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: databases that settle load their segments on I/O threads; all of those may be busy with just that."""
    shrink_limits(monkeypatch)
    with World(_OneThread()) as world:
        writer = world.machine().create("a.bin", exclusive=True)
        for number in range(4):
            for block in range(0, 8 * 65536, 65536):
                writer.write(block + number * 4096, bytes([number]) * 2000)
            writer.close_handle(0)
        machine = world.machine()
        loaded: Future[Any] = world.runtime.submit(lambda: machine.open("a.bin").read(0, 10))
        assert loaded.result(timeout=30) == bytes(10)


class _NoMoreThreads(InlineRuntime):
    """`submit` fails as a ThreadPoolExecutor does when the machine has no more threads."""

    exhausted = False

    def submit(self, function: Any) -> Future[Any]:
        if self.exhausted:
            raise RuntimeError("can't start new thread")
        return super().submit(function)


def test_a_commit_that_applied_does_not_fail_for_lack_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """I3: nothing after the swap may turn success into failure."""
    monkeypatch.setattr("s3blockfs.commit.ROLL_BYTES", 10)
    runtime = _NoMoreThreads()
    with World(runtime) as world:
        database = world.machine().create("a.bin", exclusive=True)
        runtime.exhausted = True
        database.write(0, b"x" * 1000)
        database.close_handle(0)
        runtime.exhausted = False
        assert world.content("a.bin") == b"x" * 1000


# --- the kernel's pages --------------------------------------------------------------------------------------


class _Kernel:
    """What the FUSE face asks of a mount."""

    def __init__(self) -> None:
        self.invalidated: list[int] = []

    def inode(self, path: str) -> int:
        return 7

    def invalidate_inode(self, inode: int) -> None:
        self.invalidated.append(inode)


def face(machine: Catalog, config: Config = CONFIG) -> tuple[Any, _Kernel]:
    from s3blockfs.fuse_ops import FileSystem  # needs libfuse

    system = FileSystem(machine, config, ManualRuntime(), "/nowhere", lambda: None)
    system.mounted = kernel = _Kernel()  # type: ignore[assignment]
    return system, kernel


def handle(flags: int = os.O_RDWR, owner: int = 1) -> Any:
    return SimpleNamespace(flags=flags, fh=0, keep_cache=0, lock_owner=owner)


def wish(kind: int, start: int, length: int) -> Any:
    return SimpleNamespace(l_type=kind, l_start=start, l_len=length, l_pid=1)


def test_pages_are_kept_only_behind_an_open_that_the_kernel_has_seen(world: World) -> None:
    """I4: the first open drops stale pages when its answer arrives; a second one may arrive before it."""
    put(world.machine(), pages(1, 1))
    system, _ = face(world.machine())
    first, second, third = handle(), handle(), handle()
    for each in (first, second):
        system.open("/a.db", each)
        assert each.keep_cache == 0
    system.flush(None, first)  # the kernel uses it
    system.open("/a.db", third)
    assert third.keep_cache == 1


def test_a_move_before_the_first_lock_drops_pages_at_that_lock(world: World) -> None:
    """I4: what the kernel read through a handle that never locked is gone before SHARED is granted."""
    put(world.machine(), pages(1, 1))
    system, kernel = face(world.machine())
    first = handle()
    system.open("/a.db", first)
    put(world.machine(), pages(2, 2))
    system.open("/a.db", handle(owner=2))  # finds the newer head; its answer is still on its way
    system.lock(None, first, F_SETLK, wish(F_RDLCK, SHARED_FIRST, SHARED_SIZE))
    assert kernel.invalidated == [7]


def test_what_moved_since_it_was_looked_up_is_looked_up_again(world: World) -> None:
    """I4: the kernel remembers the size of the look-up, at which it would cut reads through the new handle. While it is
    told to forget, by a handle that it uses, it need not."""
    put(world.machine(), pages(1, 1))
    system, kernel = face(world.machine(), replace(CONFIG, refresh_s=1.0))
    assert system.getattr("/a.db", None)["st_size"] == 3 * PAGE
    put(world.machine(), pages(2, 2, count=5))
    with pytest.raises(OSError) as error:  # the engine of these tests looks every time
        system.open("/a.db", handle())
    assert error.value.errno == errno.ESTALE
    assert system.getattr("/a.db", None)["st_size"] == 5 * PAGE
    system.open("/a.db", first := handle())
    system.lock(None, first, F_SETLK, wish(F_RDLCK, SHARED_FIRST, SHARED_SIZE))
    system.lock(None, first, F_SETLK, wish(F_UNLCK, 0, 0))
    put(world.machine(), pages(3, 3, count=6))
    system.open("/a.db", handle())
    assert kernel.invalidated[-1:] == [7]


def test_an_open_that_fails_drops_no_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """I4: a failed O_TRUNC leaves the kernel with its pages, of whatever state they are."""
    put(world.machine(), pages(1, 1))
    system, _ = face(world.machine())
    first = handle()
    system.open("/a.db", first)
    system.flush(None, first)
    system.release(None, first)
    put(world.machine(), pages(2, 2))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("s3blockfs.view.View.truncate", _full)
        system.open("/a.db", handle(os.O_RDWR | os.O_TRUNC))
    again = handle()
    system.open("/a.db", again)
    assert again.keep_cache == 0


def _full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "full")


def test_closing_with_a_write_lock_reports_the_loss(world: World) -> None:
    """A program that locks the whole file, writes and closes is not told that its bytes were written."""
    put(world.machine(), pages(1, 1))
    system, _ = face(world.machine())
    writer = handle()
    system.open("/a.db", writer)
    system.lock(None, writer, F_SETLK, wish(F_WRLCK, 0, 0))
    system.write(None, b"x" * PAGE, PAGE, writer)
    with pytest.raises(OSError, match="lost"):
        system.flush(None, writer)
    system.lock(None, writer, F_SETLK, wish(F_UNLCK, 0, 0))
    assert world.content() == pages(1, 1)


def test_a_removed_journal_cannot_be_finalised(world: World) -> None:
    """I3: with journal_mode=TRUNCATE and PERSIST the commit point needs no name, and may come too late."""
    put(world.machine(), pages(1, 1))
    system, _ = face(world.machine())
    writer, journal = handle(), handle()
    system.open("/a.db", writer)
    for start, length in ((SHARED_FIRST, SHARED_SIZE), (RESERVED_BYTE, 1)):
        system.lock(None, writer, F_SETLK, wish(F_WRLCK, start, length))
    system.create("/a.db-journal", 0o600, journal)
    system.write(None, b"\xd9" + bytes(511), 0, journal)
    system.write(None, b"x" * PAGE, PAGE, writer)
    second = handle()
    system.open("/a.db", second)
    system.flush(None, second)
    system.lock(None, second, F_SETLK, wish(F_UNLCK, 0, 0))
    with pytest.raises(OSError, match="lost"):
        system.truncate(None, 0, journal)
    with pytest.raises(OSError, match="lost"):
        system.write(None, bytes(28), 0, journal)
    system.release(None, journal)
