"""WAL mode on the engine alone: what is left of a database, its log and its lease when somebody is done with it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from engine import Call, ManualRuntime, Process, World
from memory_fs import until
from test_wal_faults import connected
from walclient import MY_READ, NAME, Connection, elsewhere, insert, make, ran, wait, wal_machine

from s3blockfs import catalog
from s3blockfs.errors import Busy, DatabaseGone, RequestInDoubt, StoreUnavailable
from s3blockfs.locks import SHARED_FIRST, SHARED_LAST, Kind
from s3blockfs.walmode import WRITE


def rest(connection: Connection) -> None:
    """The lease is given back if nobody needs it."""
    for _ in range(3):
        connection.machine._runtime.sleep(3)
        connection.machine.tick()


def test_checkpoint_that_publishes_what_waits_leaves_the_lease_to_others() -> None:
    """It has no write lock whose end would tell."""
    with connected(sync=False) as (world, connection):
        connection.checkpoint("PASSIVE", sync=True)
        rest(connection)
        Connection(wal_machine(world)).commit(insert(2, 1, 100), sync=True)


def test_locking_mode_exclusive_that_is_refused_leaves_the_lease_to_others() -> None:
    with connected(sync=True) as (world, connection):
        rest(connection)
        Process(connection.machine, connection.database, 2).shared()
        with connection.locked(Kind.READ, MY_READ), pytest.raises(Busy):
            connection.database.lock(connection.process, Kind.WRITE, SHARED_FIRST, SHARED_LAST, 1)
        rest(connection)
        Connection(wal_machine(world)).commit(insert(2, 1, 100), sync=True)


def test_what_waits_is_kept_when_many_other_databases_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has it open any more, and S3 refuses writes for a while."""

    def rule(call: Call, when: str) -> None:
        if call.operation == "PUT":
            raise StoreUnavailable("outage")

    monkeypatch.setattr(catalog, "IDLE_KEPT", 0)
    with connected(sync=False) as (world, connection):
        new = connection.rows()
        connection.process.close()  # it died
        world.store.rule = rule
        connection.machine.release(connection.database)
        world.store.rule = None
        wait(connection)
        assert elsewhere(world) == new
        wait(connection)
        assert connection.machine.opened_at(NAME) is None, "it is one of many that are remembered no more"


def test_end_waits_for_a_recovery_that_is_under_way() -> None:
    """What NORMAL left waits for that."""
    asked, go_on = threading.Event(), threading.Event()

    def rule(call: Call, when: str) -> None:
        if when == "before" and call.site == "swap":
            raise RequestInDoubt("cut")
        if when == "before" and down:
            raise StoreUnavailable("outage")
        if when == "before" and call.site == "head":
            asked.set()
            go_on.wait(10)

    down = True
    with World(ManualRuntime()) as world:
        machine = wal_machine(world)
        make(machine)
        connection = Connection(machine)
        connection.commit(insert(1, 1, 100), sync=False)
        new = connection.rows()
        world.store.rule = rule
        wait(connection)
        until(lambda: connection.database.in_doubt, 10)
        down = False
        wait(connection)
        wait(connection)
        assert asked.wait(10)
        end = threading.Thread(target=machine.close)
        end.start()
        end.join(0.5)
        world.store.rule = None
        go_on.set()
        end.join(10)
        assert elsewhere(world) == new


def test_log_of_a_database_that_was_deleted_elsewhere_is_not_found_by_the_next_of_its_name() -> None:
    """Its frames would be read over the pages of that one, whose commits would go nowhere."""
    with connected(sync=True) as (world, connection):
        rest(connection)
        there = wal_machine(world)
        there.remove(NAME)
        with pytest.raises(DatabaseGone):
            connection.rows()
        make(there)
        successor = Connection(connection.machine)
        assert successor.database is not connection.database
        assert successor.files()[1] == b""
        assert successor.rows() == elsewhere(world)
        successor.commit(insert(7, 1, 10), sync=True)
        assert elsewhere(world) == successor.rows()


@pytest.mark.parametrize("sync", [False, True])
def test_last_close_of_a_deleted_database_leaves_the_log_of_the_next_of_its_name(sync: bool) -> None:
    """And its lease."""
    with connected(sync=sync) as (world, connection):
        machine = connection.machine
        machine.remove(NAME)
        make(machine)
        successor = Connection(machine)
        successor.commit(insert(2, 1, 10), sync=False)
        new = successor.rows()
        machine.release(connection.database)
        assert successor.rows() == new
        wait(successor)
        assert elsewhere(world) == new


def test_writer_of_a_deleted_database_does_not_keep_the_lease_of_the_next() -> None:
    with connected(sync=True) as (world, connection):
        machine = connection.machine
        connection.database.lock_index(connection.process, Kind.READ, MY_READ, MY_READ, 1, 1)
        connection.database.lock_index(connection.process, Kind.WRITE, WRITE, WRITE, 1, 1)
        machine.remove(NAME)
        make(machine)
        successor = Connection(machine)
        successor.commit(insert(2, 1, 10), sync=True)
        assert elsewhere(world) == successor.rows()


def test_what_others_overtook_is_given_up_once(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody has the log open any more, and nobody comes."""
    with connected(sync=False) as (world, connection):
        connection.process.close()  # it died
        other = world.machine(faulty=False).open(NAME)
        other.write(4096, bytes(10))  # without a lock
        other.close_handle(0)
        for _ in range(20):
            world.runtime.sleep(0.3)
            connection.machine.tick()
        assert not connection.database.is_logged
        assert len(caplog.records) < 5, caplog.text


def in_thread(function: Callable[[], object], wait_s: float) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(wait_s)
    return thread


@pytest.mark.parametrize("beside", ["another writer", "a writer that died", "nobody"])
def test_readers_do_not_wait_for_a_commit_on_its_way(beside: str) -> None:
    """Nor who opens it."""
    sent, go_on = threading.Event(), threading.Event()

    def rule(call: Call, when: str) -> None:
        if when == "before" and call.site == "swap":
            sent.set()
            go_on.wait(10)

    with World(ManualRuntime()) as world:
        machine = wal_machine(world)
        make(machine)
        connection = Connection(machine)
        connection.commit(insert(1, 1, 100), sync=False)
        database, threads = connection.database, list[threading.Thread]()
        reader, writer = Process(machine, database, 2), Process(machine, database, 3)
        if beside == "nobody":
            connection.process.close()
        else:
            reader.shared()
            writer.shared()
            database.lock_index(writer, Kind.READ, MY_READ, MY_READ, 3, 3)
        if beside == "a writer that died":
            database.lock_index(writer, Kind.WRITE, WRITE, WRITE, 3, 3)
        world.store.rule = rule
        wait(connection)
        assert sent.wait(10)
        if beside == "another writer":
            threads.append(in_thread(lambda: database.lock_index(writer, Kind.WRITE, WRITE, WRITE, 3, 3), 0.3))
        elif beside == "a writer that died":
            threads.append(in_thread(lambda: database.index_closes(writer), 0.3))
        threads.append(in_thread(lambda: machine.open(NAME).lock_index(reader, Kind.READ, MY_READ, MY_READ, 2, 2), 3))
        waits = threads[-1].is_alive()
        world.store.rule = None
        go_on.set()
        for thread in threads:
            thread.join(10)
        database.unlock_index(writer, WRITE, WRITE)
        assert not waits


def test_reader_of_a_database_that_is_deleted_keeps_its_state() -> None:
    """Until its transaction ends: not what was committed meanwhile, nor what a checkpoint has to undo."""
    with connected(sync=True) as (_, connection):
        connection.checkpoint("PASSIVE", sync=True)
        other = Connection(connection.machine)
        with connection.locked(Kind.READ, MY_READ):
            before = connection.files()[0]
            assert before == ran(connection.files(), "PRAGMA wal_checkpoint")[0][0]
            other.commit(insert(2, 1, 10), sync=True)
            connection.machine.remove(NAME)
            assert connection.database.read(0, connection.database.size) == before
