"""When a transaction is published, discarded, refused or unknown: the engine driven through locks and journals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from engine import Call, Delayed, InlineRuntime, Process, World, build_journal, sqlite_page

from s3blockfs.catalog import Catalog
from s3blockfs.database import Database
from s3blockfs.errors import (
    Busy,
    CommitLost,
    DatabaseGone,
    NotSupported,
    OutcomeUnknown,
    ReadOnly,
    RequestInDoubt,
    StoreUnavailable,
)
from s3blockfs.locks import RESERVED_BYTE, SHARED_FIRST, SHARED_SIZE, Kind, Level

PREFIX = "a.db"
PAGE = 4096


@pytest.fixture
def world() -> Iterator[World]:
    with World(InlineRuntime()) as made:
        yield made


def state(number: int, pages: int = 3) -> bytes:
    """A whole database file, another one for each number."""
    rest = random.Random(number).randbytes((pages - 1) * PAGE)
    return sqlite_page(number, pages, number) + rest


def without_counters(content: bytes) -> bytes:
    return content[:24] + content[28:92] + content[96:]


def same(content: bytes, expected: bytes) -> bool:
    """The engine sets the change counter."""
    return without_counters(content) == without_counters(expected)


class Scene:
    """One database with three pages in state 1, opened by a machine."""

    def __init__(self, world: World, **changes: object) -> None:
        self.world = world
        self.machine: Catalog = world.machine(**changes)
        self.database: Database = self.machine.create(PREFIX, exclusive=True)
        self.database.write(0, state(1))
        self.database.close_handle(0)
        self.moves = 0
        self.database.on_moved = self._count_move
        world.store.calls.clear()

    def _count_move(self) -> None:
        self.moves += 1

    def process(self, pid: int) -> Process:
        return Process(self.machine, self.database, pid)

    def shown(self) -> bytes:
        return self.database.read(0, self.database.size)

    def published(self, number: int, pages: int = 3) -> bool:
        return same(self.world.content(), state(number, pages))

    def commit_elsewhere(self, number: int, pages: int = 3) -> None:
        other = self.world.machine(faulty=False)
        database = other.open(PREFIX)
        database.write(0, state(number, pages))
        database.truncate(pages * PAGE)
        database.close_handle(0)

    def swaps(self) -> int:
        return self.world.store.count("PUT", "swap")


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(world)


def store_down(world: World) -> None:
    def rule(call: Call, when: str) -> None:
        raise StoreUnavailable("the store is down")

    world.store.rule = rule


def lose_next_commit(scene: Scene) -> None:
    """Somebody else commits state 9 just before the next swap arrives."""

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            scene.world.store.rule = None
            scene.commit_elsewhere(9)

    scene.world.store.rule = rule


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


@pytest.mark.parametrize("ask", ["sync", "close_handle"])
def test_a_cold_journal_does_not_hold_publishing_back(scene: Scene, ask: str) -> None:
    """A journal that is empty or begins with a zero (TRUNCATE, PERSIST) is none."""
    for content in (b"", bytes(600)):
        side = scene.machine.side_files.create(PREFIX + "-journal", 0o600, False)
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
    side = machine.side_files.create(writer.journal_path, 0o600, True)
    machine.side_files.release(side)
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
    scene.database.sync(1, foreign=lambda name: name != SUPER)
    assert scene.published(1)
    scene.database.sync(1, foreign=lambda name: name == SUPER)
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


def test_a_state_that_cannot_be_loaded_is_loaded_later(scene: Scene) -> None:
    """The commit is reported as done though the state after it (with others' commits) cannot be read now."""

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            other = scene.world.machine(faulty=False).open(PREFIX)
            for number in range(100):  # scattered: a segment whose index is not known here
                other.write(number * 70_000, random.Random(number).randbytes(5000))
            other.close_handle(0)
            scene.world.store.rule = no_index
            raise RequestInDoubt("answer lost")

    def no_index(call: Call, when: str) -> None:
        if call.site == "index":
            raise StoreUnavailable("no index")

    scene.database.write(0, state(2))
    scene.world.store.rule = rule
    scene.database.close_handle(1)
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
