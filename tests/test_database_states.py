"""Which state is shown: refresh, several databases, unknown outcomes, deletion elsewhere."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from engine import Call, Delayed, InlineRuntime, Process, World
from scenes import PAGE, PREFIX, Scene, same, state, store_down

from s3blockfs.database import Database
from s3blockfs.errors import Busy, CommitLost, DatabaseGone, OutcomeUnknown, RequestInDoubt, StoreUnavailable
from s3blockfs.locks import RESERVED_BYTE, SHARED_FIRST, SHARED_SIZE, Kind, Level


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(world)


# --- readers and refresh -------------------------------------------------------------------------------------


def test_a_read_transaction_starts_on_the_newest_state(scene: Scene) -> None:
    """SHARED looks at the head: one conditional GET when nothing changed."""
    reader = scene.process(1)
    reader.shared()
    reader.unlock()
    assert [(call.operation, call.site) for call in scene.world.store.calls] == [("GET", "refresh")]
    scene.commit_elsewhere(2)
    reader.shared()
    assert same(scene.shown(), state(2)) and scene.moves == 1
    reader.unlock()


def open_again(scene: Scene) -> None:
    scene.machine.open(PREFIX)


def read_too(scene: Scene) -> None:
    with contextlib.suppress(Busy):  # a read that starts now would have to see the new state
        scene.process(7).shared()


def other_writer_dies(scene: Scene) -> None:
    writer = scene.process(8)
    try:
        writer.shared()
        writer.reserved()
    except Busy:
        pass
    writer.close()


@pytest.mark.parametrize("event", [open_again, read_too, other_writer_dies])
def test_the_state_never_moves_under_a_reader(scene: Scene, event: Callable[[Scene], None]) -> None:
    """I4: as long as anybody here is inside a transaction, every read is of the commit it started on."""
    reader = scene.process(1)
    reader.shared()
    first = scene.database.read(0, PAGE)
    scene.commit_elsewhere(2)
    event(scene)
    assert first + scene.database.read(PAGE, 2 * PAGE) == state(1)
    assert scene.moves == 0


def test_the_death_of_a_writer_does_not_move_a_reader(scene: Scene) -> None:
    """I4: a writer with RESERVED dies beside a reader when the head has moved already."""
    reader, writer = scene.process(1), scene.process(2)
    reader.shared()
    writer.shared()
    writer.reserved()
    scene.commit_elsewhere(2)
    first = scene.database.read(0, PAGE)
    assert writer.close()
    assert first + scene.database.read(PAGE, 2 * PAGE) == state(1)
    reader.unlock()
    reader.shared()
    assert same(scene.shown(), state(2))


def test_the_state_never_moves_under_a_writer(scene: Scene) -> None:
    """A transaction that read state 1 is never published on top of state 2, also when somebody opens the file here."""
    writer = scene.process(1)
    writer.shared()
    writer.reserved()
    scene.commit_elsewhere(2)
    open_again(scene)
    writer.write_journal()
    writer.exclusive()
    scene.database.write(PAGE, b"from state 1")
    with pytest.raises(CommitLost):
        writer.commit()
    assert scene.published(2)


def test_a_write_transaction_starts_on_the_newest_state(scene: Scene) -> None:
    """RESERVED on a state that is old is Busy, until the reader lets go and reads again."""
    writer = scene.process(1)
    writer.shared()
    scene.commit_elsewhere(2)
    with pytest.raises(Busy, match="changed elsewhere"):
        writer.reserved()
    assert same(scene.shown(), state(1))
    writer.unlock()
    writer.shared()
    assert same(scene.shown(), state(2))
    writer.reserved()
    writer.unlock()


def test_the_refresh_interval_bounds_the_looks(world: World) -> None:
    """Within `refresh_s` a read transaction costs no request; RESERVED always looks."""
    scene = Scene(world, refresh_s=10.0)
    process = scene.process(1)
    scene.commit_elsewhere(2)
    process.shared()
    assert world.store.calls == [] and same(scene.shown(), state(1))
    with pytest.raises(Busy):
        process.reserved()
    process.unlock()
    process.shared()  # a refused writer looks again at once
    assert same(scene.shown(), state(2))
    process.unlock()
    scene.commit_elsewhere(3)
    world.runtime.sleep(11)
    process.shared()
    assert same(scene.shown(), state(3))
    process.unlock()


def test_reading_through_an_outage(world: World) -> None:
    """With an interval the last known state is served; with 0 (always the newest) the lock call fails."""
    scene = Scene(world, refresh_s=1.0)
    assert same(scene.shown(), state(1))
    strict = world.machine().open(PREFIX)
    world.runtime.sleep(5)
    store_down(world)
    reader = scene.process(1)
    reader.shared()
    assert same(scene.shown(), state(1))
    with pytest.raises(StoreUnavailable):
        reader.reserved()
    reader.unlock()
    with pytest.raises(StoreUnavailable):
        strict.lock("owner", Kind.READ, SHARED_FIRST, SHARED_FIRST + SHARED_SIZE - 1, 1)
    assert strict.locks.level("owner") is Level.NONE


def test_local_processes_exclude_each_other(scene: Scene) -> None:
    """Busy comes from lock calls only, and without a request."""
    one, two = scene.process(1), scene.process(2)
    one.shared()
    two.shared()
    one.reserved()
    scene.world.store.calls.clear()
    with pytest.raises(Busy):
        two.reserved()
    with pytest.raises(Busy):
        one.exclusive()
    two.unlock()
    one.exclusive()
    with pytest.raises(Busy):
        two.shared()
    one.unlock()
    assert scene.world.store.calls == []


def test_waiting_for_a_lock_refreshes_like_asking(scene: Scene) -> None:
    """F_SETLKW ends with the same checks, and with nothing held when they fail."""
    process = scene.process(1)
    process.shared()
    scene.commit_elsewhere(2)
    with pytest.raises(Busy):
        scene.database.wait_lock(process, Kind.WRITE, RESERVED_BYTE, RESERVED_BYTE, 1, lambda: False)
    assert scene.database.locks.level(process) is Level.SHARED
    process.unlock()


# --- super-journals ------------------------------------------------------------------------------------------

SUPER = "/mnt/a.db-mj0123ABCDE"


def attached(scene: Scene) -> tuple[Database, Process, Process]:
    """A second database, and one process in one transaction over both."""
    second = scene.machine.create("b.db", exclusive=True)
    second.write(0, state(1))
    second.close_handle(0)
    writers = Process(scene.machine, scene.database, 1), Process(scene.machine, second, 1)
    for writer in writers:
        writer.begin(SUPER)
        writer.database.write(0, state(2, 4))
    return second, *writers


def test_unlinking_the_super_journal_publishes_all(scene: Scene) -> None:
    """Each whose journal names it; the journals' own finalisation then asks nothing of the store."""
    second, *writers = attached(scene)
    for database in (scene.database, second):
        database.finalise_super_journal("/mnt/other-mj000000000", 1)
        assert database.is_dirty
    for database in (scene.database, second):
        database.finalise_super_journal(SUPER, 1)
    assert scene.published(2, 4) and same(scene.world.content("b.db"), state(2, 4))
    store_down(scene.world)
    for writer in writers:
        writer.commit()
    scene.world.store.rule = None
    assert scene.published(2, 4) and same(scene.world.content("b.db"), state(2, 4))


@pytest.mark.parametrize("lost", [True, False])
def test_the_second_database_fails(scene: Scene, lost: bool) -> None:
    """The unlink fails; SQLite's play-back is a compensating commit in the first, and dropped in the second."""
    second, first_writer, second_writer = attached(scene)
    scene.database.finalise_super_journal(SUPER, 1)
    if lost:
        other = scene.world.machine(faulty=False).open("b.db")
        other.write(0, state(9))
        other.close_handle(0)
    else:
        store_down(scene.world)
    with pytest.raises(CommitLost if lost else StoreUnavailable):
        second.finalise_super_journal(SUPER, 1)
    scene.world.store.rule = None
    for writer in (first_writer, second_writer):
        writer.play_back()
        writer.finalise()
        writer.unlock()
    assert scene.published(1)
    assert same(scene.world.content("b.db"), state(9 if lost else 1))
    counter = int.from_bytes(scene.world.content()[24:28], "big")
    assert counter == 3  # readers elsewhere that saw the first commit must drop their caches


def test_a_foreign_super_journal_publishes_at_fsync(scene: Scene) -> None:
    """The main database lies elsewhere: its super-journal's unlink is not seen here."""
    writer = scene.process(1)
    writer.begin(SUPER)
    scene.database.write(0, state(2))
    scene.database.sync(1, commits=lambda name: name != SUPER)
    assert scene.published(1)
    scene.database.sync(1, commits=lambda name: name == SUPER)
    assert scene.published(2)
    writer.play_back()  # it failed after all
    writer.commit()
    assert scene.published(1)


# --- unknown outcomes ------------------------------------------------------------------------------------------


def fall_silent(world: World, fate: str) -> None:
    """The next swap is applied, not applied or delayed, and then nothing answers."""

    def silent(call: Call, when: str) -> None:
        raise StoreUnavailable("no answer")

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and (fate == "applied") == (when == "after"):
            world.store.rule = silent
            raise Delayed if fate == "delayed" else RequestInDoubt("cut")

    world.store.rule = rule


@pytest.mark.parametrize("pages", [3, 5])
@pytest.mark.parametrize("moved_on", [False, True])
@pytest.mark.parametrize("fate", ["applied", "not applied", "delayed"])
def test_fail_stop_and_recovery(scene: Scene, fate: str, moved_on: bool, pages: int) -> None:
    """Every call fails until the store answers; then it recovers by itself, journal and play-back discarded, and what
    is shown is what is published, whichever way it went and whoever committed meanwhile."""
    database, writer = scene.database, scene.process(1)
    writer.begin()
    database.write(0, state(2, pages))
    fall_silent(scene.world, fate)
    with pytest.raises(OutcomeUnknown):
        writer.finalise()
    calls: list[Callable[[], object]] = [
        partial(database.read, 0, 10),
        partial(database.write, 0, b"x"),
        partial(database.truncate, 0),
        partial(database.sync, 1),
        partial(database.close_handle, 1),
        partial(database.finalise_journal, 1),
        partial(database.refresh, 0),
    ]
    for call in calls:
        with pytest.raises(OutcomeUnknown):
            call()
    writer.unlock()
    for call in [*calls, scene.process(2).shared]:
        with pytest.raises(OutcomeUnknown):
            call()
    assert scene.swaps() == 1
    if moved_on and fate == "applied":
        scene.commit_elsewhere(9, 4)
    elif moved_on:
        scene.commit_elsewhere(8, 4)
    expected = state(2, pages) if fate == "applied" else state(1)
    if moved_on:
        expected = state(9 if fate == "applied" else 8, 4)
    scene.world.store.rule = None
    scene.world.runtime.sleep(3)
    with pytest.raises(OutcomeUnknown):  # asks again, in the background
        database.read(0, 10)
    scene.world.store.deliver()
    assert not writer.journal_exists and scene.moves > 0
    reader = scene.process(3)
    reader.shared()
    assert same(scene.shown(), expected) and same(scene.world.content(), expected)
    reader.reserved()
    reader.unlock()


def test_the_store_is_not_asked_all_the_time(scene: Scene) -> None:
    """While in doubt, calls that fail ask at most every two seconds."""
    scene.database.write(0, state(2))
    fall_silent(scene.world, "delayed")
    with pytest.raises(OutcomeUnknown):
        scene.database.close_handle(1)
    scene.world.runtime.sleep(3)
    scene.world.store.calls.clear()
    for _ in range(50):
        with pytest.raises(OutcomeUnknown):
            scene.database.read(0, 10)
    assert len(scene.world.store.calls) == 1


def test_the_writer_still_holds_its_lock_when_it_is_settled(scene: Scene) -> None:
    """It does not know yet: discard mode until it lets go, and its play-back is dropped."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2, 5))
    fall_silent(scene.world, "applied")
    with pytest.raises(OutcomeUnknown):
        writer.finalise()
    scene.world.store.rule = None
    scene.world.runtime.sleep(3)
    with pytest.raises(OutcomeUnknown):
        scene.database.read(0, 10)
    writer.play_back()
    writer.finalise()
    writer.unlock()
    assert scene.published(2, 5) and same(scene.shown(), state(2, 5))


def test_gone_while_in_doubt(scene: Scene) -> None:
    """The head vanished: every write fails for good, and what was not committed is not shown."""
    scene.database.write(0, state(2))
    fall_silent(scene.world, "not applied")
    with pytest.raises(OutcomeUnknown):
        scene.database.close_handle(1)
    scene.world.store.rule = None
    scene.world.store.inner.delete([PREFIX + "/head"], site="test")
    scene.world.runtime.sleep(3)
    with pytest.raises(OutcomeUnknown):
        scene.database.read(0, 10)
    with pytest.raises(DatabaseGone):
        scene.database.write(0, b"x")
    assert same(scene.shown(), state(1)) and scene.world.heads().read() is None


def test_a_commit_in_doubt_is_shown_before_what_others_added(scene: Scene) -> None:
    """My commit applied, its answer was lost, another machine committed on top: running readers here see mine alone,
    the next refresh shows both."""

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            scene.world.store.rule = None
            scene.commit_elsewhere(3)
            raise RequestInDoubt("answer lost")

    scene.database.write(0, state(2))
    scene.world.store.rule = rule
    scene.database.close_handle(1)
    assert same(scene.shown(), state(2))
    scene.database.refresh(1000)
    assert same(scene.shown(), state(3)) and scene.published(3)


def test_a_state_that_cannot_be_loaded_is_loaded_later(scene: Scene) -> None:
    """A commit in doubt turns out to be applied, but the state after it (with others' commits) cannot be read yet."""

    def no_index(call: Call, when: str) -> None:
        if call.site == "index":
            raise StoreUnavailable("no index")

    scene.database.write(0, state(2))
    fall_silent(scene.world, "applied")
    with pytest.raises(OutcomeUnknown):
        scene.database.close_handle(1)
    other = scene.world.machine(faulty=False).open(PREFIX)
    for number in range(100):  # scattered: a segment whose index is not known here
        other.write(number * 70_000, random.Random(number).randbytes(5000))
    other.close_handle(0)
    scene.world.store.rule = no_index
    scene.world.runtime.sleep(3)
    with pytest.raises(OutcomeUnknown):  # asks again, in the background
        scene.database.read(0, 10)
    with pytest.raises(StoreUnavailable):
        scene.database.read(0, 10)
    scene.world.store.rule = None
    assert scene.shown() == scene.world.content()
    scene.database.write(0, state(3))
    scene.database.close_handle(1)
    assert scene.shown() == scene.world.content()


# --- deleted elsewhere -------------------------------------------------------------------------------------


def test_deleted_elsewhere(scene: Scene) -> None:
    """The next transaction fails, as does the one that was running; nothing is written over the tombstone."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    scene.world.machine(faulty=False).remove(PREFIX)
    with pytest.raises(DatabaseGone):
        writer.commit()
    for act in (scene.process(2).shared, scene.process(3).shared):
        with pytest.raises(DatabaseGone):
            act()
    with pytest.raises(DatabaseGone):
        scene.database.write(0, b"x")
    version = scene.world.heads().read()
    assert version is not None and version.head.deleted


def test_deleted_after_my_commit_was_applied(scene: Scene) -> None:
    """My commit applied, its answer was lost, then somebody deleted the database: it is gone here too, and a later
    commit is never put into a tombstone."""

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            scene.world.store.rule = None
            scene.world.machine(faulty=False).remove(PREFIX)
            raise RequestInDoubt("answer lost")

    scene.database.write(0, state(2))
    scene.world.store.rule = rule
    scene.database.close_handle(1)
    with pytest.raises(DatabaseGone):
        scene.database.write(0, state(3))
        scene.database.close_handle(1)
    version = scene.world.heads().read()
    assert version is not None and version.head.deleted and version.head.size == 0


def test_created_anew_elsewhere(scene: Scene) -> None:
    """A transaction that read the old database is lost; the next one reads the new one."""
    writer = scene.process(1)
    writer.begin()
    scene.database.write(0, state(2))
    other = scene.world.machine(faulty=False)
    other.remove(PREFIX)
    database = other.create(PREFIX, exclusive=True)
    database.write(0, state(5))
    database.close_handle(0)
    with pytest.raises(CommitLost):
        writer.commit()
    reader = scene.process(2)
    reader.shared()
    assert same(scene.shown(), state(5)) and scene.published(5)
    reader.unlock()


def test_deleted_here(scene: Scene) -> None:
    """Open handles still read what was committed, and cannot write."""
    scene.database.write(0, state(2))
    scene.machine.remove(PREFIX)
    assert same(scene.shown(), state(1)) and scene.database.is_gone
    with pytest.raises(DatabaseGone):
        scene.database.write(0, b"x")
    scene.database.close_handle(1)
    assert scene.machine.lookup(PREFIX) is None
