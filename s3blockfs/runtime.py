"""Clock, randomness and threads, injected everywhere so that a simulation can replay a seed.

This is the only module that may touch `time`, `os.urandom` or start threads for the engine (ruff TID251 bans the
globals elsewhere). Wall clocks are not offered: time stamps come from the store (`ObjectStore.server_time_s`)."""

import logging
import os
import random
import sched
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import zip_longest
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], None]  # called with (done, in all)
log = logging.getLogger(__name__)

IO_THREADS = 64  # that wait for S3; boto3 needs about 1 ms of the GIL for a request, so more of them add nothing


class Runtime:
    """The real machine; tests and simulations bring another one with the same methods. Threads start when they are
    first needed, so building one before a fork is harmless."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="s3blockfs-io")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="s3blockfs-background")
        self._agenda = sched.scheduler(self.monotonic)
        self._ticker = threading.Thread(target=self._tick, name="s3blockfs-ticker", daemon=True)
        self._starting, self._wake, self._closing = threading.Lock(), threading.Event(), False

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps and counts suspended time."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def token(self, size_bytes: int) -> bytes:
        """Unpredictable bytes; two processes never get the same ones."""
        return os.urandom(size_bytes)

    def uniform(self, low: float, high: float) -> float:
        """A random number for jitter; not for names."""
        return random.uniform(low, high)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on an I/O thread; it must not wait for another one. RuntimeError when none can be started."""
        return self._executor.submit(function)

    def background(self, function: Callable[[], T]) -> Future[T]:
        """Run a long job on the one thread for such; it may wait for what it submits. RuntimeError as above."""
        return self._background.submit(function)

    def every(self, seconds: float, function: Callable[[], object]) -> Callable[[], None]:
        """Call `function` at this interval until the callable returned is called, which does not wait for a call under
        way. All share one thread: be quick, and leave work to `background`. What is raised is logged."""
        stopped = threading.Event()

        def call() -> None:
            if stopped.is_set():
                return
            try:
                function()
            except Exception:
                log.exception("%r failed; it is called again in %g s", function, seconds)
            self._agenda.enter(seconds, 0, call)

        self._agenda.enter(seconds, 0, call)
        with self._starting:
            if not self._ticker.is_alive():
                self._ticker.start()
        self._wake.set()
        return stopped.set

    def _tick(self) -> None:
        while not self._closing:
            self._wake.wait(self._agenda.run(blocking=False))
            self._wake.clear()

    def close(self) -> None:
        """End all threads; what was submitted is finished first, background jobs that have not begun are dropped."""
        self._closing = True
        self._wake.set()
        if self._ticker.is_alive():
            self._ticker.join()
        self._background.shutdown(wait=True, cancel_futures=True)
        self._executor.shutdown(wait=True)


def all_of(runtime: Runtime, calls: Sequence[Callable[[], T]]) -> list[T]:
    """What these calls return: the first is made here, the others on I/O threads."""
    futures: list[Future[T]] = []
    with suppress(RuntimeError):  # no more threads
        futures.extend(runtime.submit(call) for call in calls[1:])
    results = [call() for call in calls[:1]]
    for call, future in zip_longest(calls[1:], futures):
        # What no I/O thread has begun is done here: this may be one of them, and all of them may wait like this.
        results.append(call() if future is None or future.cancel() else future.result())
    return results


def in_flight(runtime: Runtime, most: int, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What these calls return, in order; so many of them at a time are under way on I/O threads."""
    running: deque[Future[T]] = deque()
    for call in calls:
        if len(running) == most:
            yield running.popleft().result()
        running.append(runtime.submit(call))
    for future in running:
        yield future.result()


def uninterrupted(function: Callable[[], object], interrupts: list[BaseException]) -> None:
    """Call `function` where no exception of a signal handler (Ctrl-C) can tear it, and add those to `interrupts`."""
    if threading.current_thread() is not threading.main_thread():  # handlers run nowhere else
        function()
        return
    outcome = Future[object]()

    def run() -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(function())
            except BaseException as error:  # noqa: BLE001  raised below
                outcome.set_exception(error)

    try:
        threading.Thread(target=run, name="s3blockfs-uninterrupted").start()
    except BaseException as error:
        if outcome.cancel():
            raise  # it has not begun, and never will
        interrupts.append(error)
    while not outcome.done():
        try:
            wait([outcome])
        except BaseException as error:  # noqa: BLE001  the caller raises it in its own time
            interrupts.append(error)
    outcome.result()
