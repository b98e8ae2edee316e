"""Clock, randomness and threads, injected everywhere so that a simulation can replay a seed.

This is the only module that may touch `time`, `os.urandom` or start threads for the engine (ruff TID251 bans the
globals elsewhere). Wall clocks are not offered at all: time stamps come from the store (`ObjectStore.server_time_s`).
"""

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

#: Threads that wait for S3. boto3 needs about 1 ms of the GIL for a request, so more of them add nothing.
IO_THREADS = 32


class Runtime:
    """The real machine; tests and simulations bring another one with the same methods.

    Threads start at the first `submit`, so building one before a fork is harmless.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="s3blockfs-io")
        self._jitter = random.Random()

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
        return self._jitter.uniform(low, high)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on an I/O thread; it must not wait for another one. RuntimeError when none can be started."""
        return self._executor.submit(function)

    def close(self) -> None:
        """Wait for what was submitted and end the threads."""
        self._executor.shutdown(wait=True)
