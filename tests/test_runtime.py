"""The runtime's threads: periodic calls, long jobs, and the end of both."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest
from engine import InlineRuntime, ManualRuntime

from s3blockfs.runtime import IO_THREADS, Runtime

WAIT_S = 30
"""Far more than anything here takes; reached only by a bug."""


_others: set[threading.Thread] = set()
"""Of engines that earlier tests of the in-process face used."""


@pytest.fixture(autouse=True)
def remember_others() -> None:
    _others.update(threading.enumerate())


def threads() -> set[str]:
    return {each.name for each in threading.enumerate() if each.name.startswith("s3blockfs") and each not in _others}


@pytest.fixture
def runtime(remember_others: None) -> Iterator[Runtime]:
    real = Runtime()
    yield real
    real.close()
    assert threads() == set()


def test_every_calls_until_it_is_stopped(runtime: Runtime) -> None:
    called = threading.Semaphore(0)
    began = time.monotonic()
    stop = runtime.every(0.05, called.release)
    for _ in range(3):
        assert called.acquire(timeout=WAIT_S)
    assert time.monotonic() - began >= 0.14
    stop()
    stop()
    time.sleep(0.12)
    while called.acquire(blocking=False):
        pass  # one may have been under way
    time.sleep(0.12)
    assert not called.acquire(blocking=False)


def test_all_periodic_calls_share_one_thread_and_keep_their_own_intervals(runtime: Runtime) -> None:
    seen: list[tuple[str, int]] = []
    slow = threading.Semaphore(0)

    def note(name: str) -> None:
        seen.append((name, threading.get_ident()))
        if name == "slow":
            slow.release()

    runtime.every(WAIT_S * 10, lambda: note("never"))
    runtime.every(0.2, lambda: note("slow"))
    runtime.every(0.02, lambda: note("quick"))  # earlier than what the thread waits for
    for _ in range(2):
        assert slow.acquire(timeout=WAIT_S)
    names = [name for name, _ in seen]
    assert set(names) == {"slow", "quick"}
    assert names.index("slow") >= 2
    assert len({thread for _, thread in seen}) == 1
    assert threads() == {"s3blockfs-ticker"}


def test_a_periodic_call_that_raises_is_logged_and_called_again(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = threading.Semaphore(0), threading.Semaphore(0)

    def fail() -> None:
        failing.release()
        raise ValueError("a bug")

    runtime.every(0.01, fail)
    runtime.every(0.01, other.release)
    with caplog.at_level(logging.ERROR, "s3blockfs.runtime"):
        for each in (failing, failing, failing, other):
            assert each.acquire(timeout=WAIT_S)
    assert "a bug" in caplog.text
    caplog.clear()


def test_a_periodic_call_may_stop_itself_and_begin_another(runtime: Runtime) -> None:
    known, done = threading.Event(), threading.Event()
    calls: list[str] = []

    def first() -> None:
        known.wait(WAIT_S)
        calls.append("first")
        stop()
        runtime.every(0.01, done.set)

    stop = runtime.every(0.01, first)
    known.set()
    assert done.wait(WAIT_S)
    assert calls == ["first"]


def test_background_jobs_follow_one_another_and_may_wait_for_io(runtime: Runtime) -> None:
    """Also while every I/O thread is busy: they end, since they wait for nobody."""
    go, order = threading.Event(), []
    busy = [runtime.submit(lambda: go.wait(WAIT_S)) for _ in range(IO_THREADS)]

    def job(number: int) -> int:
        order.append(number)
        found = sum(future.result(WAIT_S) for future in [runtime.submit(lambda n=n: n) for n in range(3)])
        order.append(-number)
        return found

    jobs = [runtime.background(lambda number=number: job(number)) for number in (1, 2)]  # type: ignore[misc]
    go.set()
    assert [future.result(WAIT_S) for future in jobs] == [3, 3]
    assert order == [1, -1, 2, -2]
    assert all(future.result(WAIT_S) for future in busy)


def test_a_background_job_that_fails_tells_its_future(runtime: Runtime) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    assert isinstance(runtime.background(fail).exception(WAIT_S), ValueError)
    assert runtime.background(lambda: 7).result(WAIT_S) == 7


def test_close_finishes_what_has_begun_and_drops_jobs_that_have_not() -> None:
    runtime = Runtime()
    begun, go = threading.Event(), threading.Event()

    def job() -> int:
        begun.set()
        assert go.wait(WAIT_S)
        return runtime.submit(lambda: 7).result(WAIT_S)

    running, queued = runtime.background(job), runtime.background(lambda: 8)
    runtime.every(0.01, lambda: None)
    assert begun.wait(WAIT_S)
    closing = threading.Thread(target=runtime.close)
    closing.start()
    while not queued.cancelled():
        assert closing.is_alive()
        time.sleep(0.01)
    go.set()
    closing.join(WAIT_S)
    assert running.result(0) == 7
    assert threads() == set()
    for action in (runtime.submit, runtime.background, lambda function: runtime.every(1, function)):
        with pytest.raises(RuntimeError):
            action(lambda: None)
    runtime.close()


def test_close_waits_for_a_periodic_call_under_way() -> None:
    runtime = Runtime()
    begun, ended = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.2)
        ended.set()

    runtime.every(0.01, slow)
    assert begun.wait(WAIT_S)
    runtime.close()
    assert ended.is_set()


def test_a_runtime_made_before_a_fork_works_after_it() -> None:
    """Its threads start when they are first needed, so the child has its own."""
    runtime = Runtime()
    child = os.fork()
    if child == 0:
        called = threading.Event()
        runtime.every(0.01, called.set)
        fine = called.wait(WAIT_S) and runtime.background(lambda: runtime.submit(lambda: 7).result()).result() == 7
        runtime.close()
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert threads() == set()
    runtime.close()


@pytest.mark.parametrize("kind", [ManualRuntime, InlineRuntime])
def test_the_runtimes_of_tests_tick_by_hand(kind: type[ManualRuntime]) -> None:
    runtime, calls = kind(), []
    stop = runtime.every(1, lambda: calls.append("a"))
    runtime.every(1, lambda: calls.append("b"))
    runtime.sleep(60)
    assert calls == []
    runtime.tick()
    stop()
    stop()
    runtime.tick()
    assert calls == ["a", "b", "b"]
    assert runtime.background(lambda: 7).result(WAIT_S) == 7
    runtime.close()
