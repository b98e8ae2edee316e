"""When a transaction is published, rolled back or discarded: the engine driven through locks and journals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import pytest
from engine import InlineRuntime, Process, World, build_journal
from scenes import PAGE, PREFIX, Scene, lose_next_commit, same, state, store_down

from s3blockfs.errors import CommitLost, NotSupported, ReadOnly, StoreUnavailable
from s3blockfs.locks import Level


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(world)


# --- commit points -----------------------------------------------------------------------------------------


def test_writing_publishes_nothing(scene: Scene) -> None:
    """Uncommitted bytes are seen on this machine and by nobody else."""
    scene.database.write(0, state(2))
    assert scene.shown() == state(2) and scene.published(1) and scene.swaps() == 0


def test_finalising_the_journal_is_the_commit_point(scene: Scene) -> None:
    """Journal modes DELETE, TRUNCATE, PERSIST: fsync with a hot journal does nothing, its finalisation publishes."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    scene.database.sync(1)
    scene.database.close_handle(1)
    assert scene.published(1) and scene.swaps() == 0
    writer.commit()
    assert scene.published(2) and scene.swaps() == 1
    scene.database.sync(1)
    assert scene.swaps() == 1


@pytest.mark.parametrize("ask", ["sync", "close_handle"])
def test_without_a_journal_fsync_and_close_publish(scene: Scene, ask: str) -> None:
    """`cp`, journal_mode=OFF and MEMORY."""
    scene.database.write(0, state(2))
    getattr(scene.database, ask)(1)
    assert scene.published(2) and same(scene.shown(), state(2))


def unjournalled(scene: Scene, pid: int) -> Process:
    """A writer with journal_mode MEMORY or OFF and synchronous=OFF: nothing but its locks tells of a transaction."""
    writer = scene.process(pid)
    writer.shared()
    writer.reserved()
    writer.exclusive()
    return writer


def test_without_journal_and_fsync_the_release_of_the_lock_publishes(scene: Scene) -> None:
    """So a writer that dies takes its own transaction along, not those that ended before: their change counters, which
    tell connections that their caches are current, would be used again."""
    writer = unjournalled(scene, 1)
    scene.database.write(0, state(2))
    assert scene.published(1) and scene.swaps() == 0
    writer.unlock()
    assert scene.published(2) and scene.swaps() == 1 and not scene.database.is_writing
    dies = unjournalled(scene, 2)
    scene.database.write(0, state(3))
    assert dies.close()
    assert scene.shown() == scene.world.content() == state(2) and scene.swaps() == 1
    reader = scene.process(3)
    reader.shared()
    reader.unlock()
    unjournalled(scene, 4).unlock()
    assert scene.swaps() == 1  # who changed nothing


@pytest.mark.parametrize("lost", [True, False])
def test_a_release_that_cannot_publish_fails_and_releases(scene: Scene, lost: bool) -> None:
    writer = unjournalled(scene, 1)
    scene.database.write(0, state(2))
    lose_next_commit(scene) if lost else store_down(scene.world)
    with pytest.raises(CommitLost if lost else StoreUnavailable):
        writer.unlock()
    scene.world.store.rule = None
    writer.unlock()  # SQLite tries again
    assert not scene.database.is_writing and not scene.database.is_dirty
    unjournalled(scene, 2).unlock()
    assert same(scene.shown(), state(9 if lost else 1)) and scene.published(9 if lost else 1)


def test_an_fsync_of_the_holder_cuts_the_file(scene: Scene) -> None:
    """SQLite does so after it, by which a second commit would follow: one that may fail when the first one did not."""
    writer = unjournalled(scene, 1)
    scene.database.write(0, state(2, 2)[:PAGE])
    scene.database.sync(1)
    assert scene.database.size == 2 * PAGE and scene.swaps() == 1
    scene.database.truncate(2 * PAGE)
    writer.unlock()
    assert scene.swaps() == 1


@pytest.mark.parametrize("ask", ["sync", "close_handle"])
def test_a_cold_journal_does_not_hold_publishing_back(scene: Scene, ask: str) -> None:
    """A journal that is empty or begins with a zero (TRUNCATE, PERSIST) is none."""
    for content in (b"", bytes(600)):
        side = scene.machine.side_files.create(PREFIX + "-journal")
        side.write(0, content)
        before = scene.swaps()
        scene.database.write(PAGE, random.randbytes(10))
        getattr(scene.database, ask)(1)
        assert scene.swaps() == before + 1


@pytest.mark.parametrize("ask", ["sync", "close_handle"])
def test_another_process_in_mid_transaction_is_not_published(scene: Scene, ask: str) -> None:
    """Somebody else's fsync or close never publishes half a transaction; the writer's own does (MEMORY, OFF)."""
    writer = scene.process(1)
    writer.shared()
    writer.reserved()
    scene.database.write(0, state(2)[:PAGE])
    getattr(scene.database, ask)(2)
    assert scene.published(1) and scene.swaps() == 0
    scene.database.write(PAGE, state(2)[PAGE:])
    getattr(scene.database, ask)(1)
    assert scene.published(2)
    writer.unlock()


@pytest.mark.parametrize("in_discard_mode", [False, True])
def test_a_foreign_finalisation_is_refused(scene: Scene, in_discard_mode: bool) -> None:
    """`rm x-journal` by another process neither commits nor ends somebody's transaction."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    if in_discard_mode:
        lose_next_commit(scene)
        with pytest.raises(CommitLost):
            writer.finalise()
    with pytest.raises(OSError, match="another process"):
        scene.process(2).finalise()
    assert writer.journal_exists
    assert scene.published(9 if in_discard_mode else 1)
    if in_discard_mode:
        writer.play_back()
        writer.finalise()
        assert same(scene.shown(), state(9))
    else:
        writer.finalise()
        assert scene.published(2)
    writer.unlock()


def test_a_change_of_the_counter_is_made_known(scene: Scene) -> None:
    """Caches hold what the application wrote: when the engine published another counter they are dropped, else not."""
    scene.database.write(0, state(2))
    scene.database.close_handle(0)
    assert scene.moves == 0
    scene.database.write(0, state(77))
    scene.database.close_handle(0)
    assert scene.moves == 1 and scene.database.read(24, 4) == (3).to_bytes(4, "big")


def test_wal_is_refused(scene: Scene) -> None:
    """PRAGMA journal_mode=WAL fails at its write; a file that says WAL can be copied here and is shown without."""
    wal = state(2)[:18] + b"\2\2" + state(2)[20:]
    scene.database.write(0, wal)
    scene.database.close_handle(0)
    assert scene.world.content()[18:20] == scene.shown()[18:20] == b"\1\1"
    writer = scene.process(1)
    writer.begin()
    with pytest.raises(NotSupported):
        scene.database.write(0, wal)
    writer.play_back()
    writer.commit()


def test_read_only(world: World) -> None:
    """Nothing can be written or locked for writing, everything can be read."""
    Scene(world)
    machine = world.machine(read_only=True)
    database = machine.open(PREFIX)
    reader = Process(machine, database, 1)
    reader.shared()
    assert same(database.read(0, 99999), state(1))
    for act in (reader.reserved, partial(database.write, 0, b"x"), partial(database.truncate, 0)):
        with pytest.raises(ReadOnly):
            act()
    reader.unlock()


# --- roll-back ---------------------------------------------------------------------------------------------


def test_a_roll_back_of_spilled_pages_publishes_nothing(scene: Scene) -> None:
    """SQLite wrote pages and put them back; judged from the journal, so without any request, also in an outage."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    scene.database.write(3 * PAGE, bytes(5 * PAGE))
    scene.world.store.calls.clear()
    writer.play_back()
    scene.database.truncate(3 * PAGE)
    store_down(scene.world)
    writer.finalise()
    writer.unlock()
    assert scene.world.store.calls == [] and not scene.database.is_dirty
    assert scene.moves == 1
    assert scene.published(1)


def test_a_commit_that_looks_like_the_images_but_for_a_byte_is_published(scene: Scene) -> None:
    """Nothing but equality with the images is a roll-back."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(2 * PAGE, state(1)[2 * PAGE : -1] + b"!")
    writer.commit()
    assert scene.world.content()[-1:] == b"!"


def test_images_of_uncommitted_bytes_are_no_roll_back(scene: Scene) -> None:
    """journal_mode=OFF left unpublished bytes; a journal begun after that holds them, not what is committed."""
    scene.database.write(2 * PAGE, b"unpublished")
    writer = scene.process(1)
    writer.begin()
    writer.play_back()
    writer.commit()
    assert scene.world.content()[2 * PAGE :].startswith(b"unpublished")


# --- discard mode ------------------------------------------------------------------------------------------


def failing_commit(scene: Scene, lost: bool) -> Process:
    """A writer whose commit failed: another machine committed state 9 first, or the store was down."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2, 5))
    if lost:
        lose_next_commit(scene)
    else:
        store_down(scene.world)
    with pytest.raises(CommitLost if lost else StoreUnavailable):
        writer.finalise()
    assert writer.journal_exists
    scene.world.store.rule = None
    return writer


@pytest.mark.parametrize("lost", [True, False])
def test_after_a_failed_commit_the_lock_is_released(scene: Scene, lost: bool) -> None:
    """What SQLite does with journal modes on disk: it lets go. The journal goes, what is committed is shown."""
    writer = failing_commit(scene, lost)
    writer.unlock()
    assert not writer.journal_exists and not scene.database.is_dirty and scene.moves > 0
    reader = scene.process(2)
    reader.shared()
    assert same(scene.shown(), state(9 if lost else 1))
    reader.unlock()
    assert scene.published(9 if lost else 1)


@pytest.mark.parametrize("lost", [True, False])
def test_after_a_failed_commit_the_play_back_is_dropped(scene: Scene, lost: bool) -> None:
    """A play-back under the same lock: writes and cuts are accepted and dropped until the journal is finalised."""
    writer = failing_commit(scene, lost)
    sent = scene.swaps()
    writer.play_back()
    assert not scene.database.is_dirty
    writer.finalise()
    writer.unlock()
    assert scene.swaps() == sent
    reader = scene.process(2)
    reader.shared()
    assert same(scene.shown(), state(9 if lost else 1)) and scene.published(9 if lost else 1)
    reader.unlock()


@pytest.mark.parametrize("lost", [True, False])
def test_after_a_failed_commit_without_journal_none_succeeds(scene: Scene, lost: bool) -> None:
    """journal_mode=MEMORY and OFF: fsync and close fail until the lock is released."""
    writer = scene.process(1)
    writer.shared()
    writer.reserved()
    writer.exclusive()
    scene.database.write(0, state(2))
    lose_next_commit(scene) if lost else store_down(scene.world)
    with pytest.raises(CommitLost if lost else StoreUnavailable):
        scene.database.sync(1)
    scene.world.store.rule = None
    scene.database.write(0, state(1))  # MEMORY plays back
    for ask in (scene.database.sync, scene.database.close_handle):
        with pytest.raises(StoreUnavailable, match="roll back"):
            ask(1)
    writer.unlock()
    scene.database.sync(1)
    assert scene.published(9 if lost else 1)


@pytest.mark.parametrize("lost", [True, False])
def test_after_a_failed_commit_the_next_one_succeeds(scene: Scene, lost: bool) -> None:
    """The machine has moved on to what is committed; nothing of the failed transaction comes back."""
    failing_commit(scene, lost).unlock()
    again = scene.process(3)
    again.begin()
    scene.database.write(PAGE, b"second try")
    again.commit()
    expected = bytearray(state(9 if lost else 1))
    expected[PAGE : PAGE + 10] = b"second try"
    assert same(scene.world.content(), bytes(expected))


def test_the_release_needs_no_store(scene: Scene) -> None:
    """Finalising and unlocking succeed in an outage, and the database is read from what is here."""
    scene.shown()
    for play_back in (True, False):
        writer = scene.process(1)
        writer.begin()
        scene.database.write(0, state(2))
        store_down(scene.world)
        with pytest.raises(StoreUnavailable):
            writer.finalise()
        if play_back:
            writer.play_back()
            writer.finalise()
        writer.unlock()
        assert same(scene.shown(), state(1))
        scene.world.store.rule = None


@pytest.mark.parametrize("ask", ["sync", "close_handle"])
def test_a_failed_commit_without_a_lock_is_forgotten(scene: Scene, ask: str) -> None:
    """`cp` gets the error; the committed state is shown again, and caches of the lost bytes are dropped."""
    scene.database.write(0, state(2))
    store_down(scene.world)
    with pytest.raises(StoreUnavailable):
        getattr(scene.database, ask)(1)
    scene.world.store.rule = None
    assert scene.moves == 1
    assert same(scene.shown(), state(1)) and scene.published(1)


def test_a_commit_that_fails_before_it_is_sent(world: World) -> None:
    """locking_mode=EXCLUSIVE leaves page 1 alone: when it cannot be fetched that is a failed commit like any other."""
    Scene(world)
    bulk = world.machine(faulty=False).open(PREFIX)
    bulk.write(0, state(2, 300))
    bulk.close_handle(0)
    machine = world.machine()
    database = machine.open(PREFIX)
    writer = Process(machine, database, 1)
    writer.shared()
    writer.reserved()
    side = machine.side_files.create(writer.journal_path, exclusive=True)
    side.write(0, build_journal(bytes(PAGE), PAGE))
    database.journal_begins()
    writer.exclusive()
    database.write(200 * PAGE, bytes(PAGE))
    store_down(world)
    with pytest.raises(StoreUnavailable):
        writer.finalise()
    assert not database.is_dirty
    writer.unlock()
    assert not writer.journal_exists


# --- death of the writer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [Level.RESERVED, Level.EXCLUSIVE])
def test_the_death_of_the_writer_discards_its_transaction(scene: Scene, level: Level) -> None:
    """Its dirty bytes go, and with them its journal: nobody plays back, nobody publishes."""
    writer = scene.process(1)
    writer.shared()
    writer.reserved()
    writer.write_journal()
    if level is Level.EXCLUSIVE:
        writer.exclusive()
    scene.database.write(0, state(2))
    assert writer.close()
    assert not writer.journal_exists and not scene.database.is_dirty
    scene.database.sync(2)
    assert scene.published(1) and same(scene.shown(), state(1)) and scene.moves > 0


def test_a_second_descriptor_that_closes_ends_the_transaction(scene: Scene) -> None:
    """POSIX drops the process's locks; what it still writes before they are gone is dropped too."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    assert scene.database.owner_closes(writer)
    scene.database.write(0, state(3))
    for ask in (scene.database.sync, scene.database.close_handle):
        with pytest.raises(StoreUnavailable):
            ask(1)
    writer.unlock()
    assert scene.published(1) and same(scene.shown(), state(1))


def test_closing_outside_a_transaction_ends_nothing(scene: Scene) -> None:
    """Readers and the idle close as they like, also while somebody else writes."""
    reader, writer = scene.process(1), scene.process(2)
    reader.shared()
    writer.shared()
    writer.reserved()
    writer.write_journal()
    scene.database.write(PAGE, b"pending")
    assert not reader.close()
    writer.exclusive()
    writer.commit()
    assert not writer.close()
    assert scene.world.content()[PAGE:].startswith(b"pending")


def test_bytes_of_others_do_not_vanish_in_discard_mode(scene: Scene) -> None:
    """While a lost transaction is being undone its own writes are dropped, those of a program without locks refused."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    scene.commit_elsewhere(3)
    with pytest.raises(CommitLost):
        writer.finalise()
    ((owner, _),) = scene.database.locks.writers()
    scene.database.write(0, state(1), {owner})
    with pytest.raises(StoreUnavailable, match="try again"):
        scene.database.write(0, b"x", set())
    with pytest.raises(StoreUnavailable, match="try again"):
        scene.database.truncate(0, set())
    writer.unlock()
    scene.database.write(0, state(4), set())
    scene.database.close_handle(2)
    assert same(scene.shown(), state(4)) and scene.published(4)


def test_an_unforeseen_failure_of_a_commit_leaves_nothing_behind(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more threads, say: the commit fails, its bytes are gone, and the next transaction starts clean."""
    monkeypatch.setattr("s3blockfs.commit._upload", lambda *_: (_ for _ in ()).throw(RuntimeError("no threads")))
    scene.database.write(0, state(2))
    with pytest.raises(RuntimeError):
        scene.database.close_handle(1)
    assert not scene.database.is_dirty and same(scene.shown(), state(1))
    monkeypatch.undo()
    scene.database.write(0, state(3))
    scene.database.close_handle(1)
    assert scene.published(3)
