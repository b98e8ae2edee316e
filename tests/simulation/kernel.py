"""The scheduler: tasks are greenlets, time is virtual, and the order of everything follows from one seed.

A task gives up control only by waiting (for time, a reply, a lock, a future), so between two waits it runs alone. The
engine's locks and futures are replaced by ones that wait in the same way. A node is one operating-system process: it
can be stopped for a while, or killed; its tasks then end at once without another request.
"""

from __future__ import annotations

import heapq
import types
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from random import Random
from typing import Any, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from s3blockfs import blockmap, cache, catalog, head, lease, names, state, view

T = TypeVar("T")

#: Modules that take locks which may be held during a request.
LOCKING = (blockmap, cache, catalog, head, lease, names, state, view)

#: Nothing may take longer than this, by the simulated clock: longer is a hang (invariant I8).
LONGEST_S = 1_000_000.0


class Violation(Exception):
    """The engine did what it must never do."""


class Node:
    """One process on some machine."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.dead = False
        self.stopped_until = 0.0
        self.skew_s = kernel.rng.uniform(0, 1e6)
        """Its clock agrees with nobody's."""
        self.tasks: set[Task] = set()

    def kill(self) -> None:
        """SIGKILL: nothing that it still does reaches the store. What it sent is on its way."""
        self.kernel.note(self, "killed")
        self.dead = True
        for task in sorted(self.tasks, key=lambda task: task.number):
            if task.greenlet is not getcurrent():
                task.end()
        if self.kernel.current is not None and self.kernel.current.node is self:
            raise GreenletExit

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so long."""
        self.kernel.note(self, f"stopped for {seconds:.1f} s")
        self.stopped_until = max(self.stopped_until, self.kernel.now + seconds)


class Task:
    """A thread of a node."""

    def __init__(self, kernel: Kernel, node: Node, name: str, function: Callable[[], object]) -> None:
        self.kernel, self.node, self.name = kernel, node, name
        self.number = kernel.numbers = kernel.numbers + 1
        self.intent: Any = None
        """What the client is about to commit (oracle.py)."""
        self.waiting = 0
        """Changes with every wait, so that a wake-up that comes too late is told apart."""

        def run() -> None:
            try:
                function()
            except GreenletExit:
                pass
            except BaseException as error:  # noqa: BLE001  the run ends with it
                kernel.failure = kernel.failure or error
            finally:
                node.tasks.discard(self)

        self.greenlet = greenlet(run, parent=kernel.hub)
        node.tasks.add(self)

    def end(self) -> None:
        """Unwind it now; a dead node's requests raise GreenletExit, so it does nothing more."""
        if self.greenlet:  # started, and not finished
            before, self.kernel.current = self.kernel.current, self
            self.greenlet.parent = getcurrent()
            self.greenlet.throw(GreenletExit)
            self.kernel.current = before
        self.node.tasks.discard(self)


class Kernel:
    """One run."""

    def __init__(self, seed: object, most_steps: int = 200_000) -> None:
        self.rng = Random(f"kernel-{seed}")
        self.now = 0.0
        self.steps = self.numbers = 0
        self.most_steps = most_steps
        self.failure: BaseException | None = None
        self.current: Task | None = None
        self.hub = getcurrent()
        self.trace: list[tuple[float, str, str]] = []
        self._agenda: list[tuple[float, float, int, Callable[[], None], Node | None]] = []
        self._sequence = 0

    def note(self, node: Node | None, text: str) -> None:
        task = self.current.name if self.current is not None else ""
        self.trace.append((self.now, f"{node.name if node else 'store'}/{task}", text))

    def at(self, delay_s: float, call: Callable[[], None], node: Node | None = None) -> None:
        """Call something later; with a node only while that runs."""
        self._sequence += 1
        heapq.heappush(self._agenda, (self.now + delay_s, self.rng.random(), self._sequence, call, node))

    def spawn(self, node: Node, name: str, function: Callable[[], object], delay_s: float = 0.0) -> Task:
        task = Task(self, node, name, function)
        self.at(delay_s, lambda: self._switch(task), node)
        return task

    def run(self, until: Callable[[], bool]) -> None:
        """Until this is true. Raises what went wrong; a Violation when nothing can go on, or time goes on for ever."""
        while not until():
            if self.failure is not None:
                raise self.failure
            if not self._agenda:
                raise Violation("hang: every task waits for another one")
            when, _, _, call, node = heapq.heappop(self._agenda)
            self.now = max(self.now, when)
            if node is not None and node.dead:
                continue
            if node is not None and node.stopped_until > self.now:
                self.at(node.stopped_until - self.now, call, node)
                continue
            self.steps += 1
            if self.now > LONGEST_S or self.steps > self.most_steps:
                raise Violation(f"hang: not done after {self.now:.0f} s and {self.steps} steps")
            call()
        if self.failure is not None:
            raise self.failure

    def wait(self, ready: Callable[[Callable[[], None]], object], timeout_s: float | None = None) -> bool:
        """Suspend the current task. `ready` gets what wakes it up; False when the time was over before."""
        task = self.current
        if task is None:
            raise Violation("hang: a check of the simulation itself had to wait")
        self.check_alive(task.node)
        task.waiting += 1
        turn, outcome = task.waiting, [True]

        def wake(in_time: bool = True) -> None:
            if task.waiting == turn:
                task.waiting += 1
                outcome[0] = in_time
                self._switch(task)

        ready(lambda: self.at(self.rng.random() * 1e-4, wake, task.node))
        if timeout_s is not None:
            self.at(timeout_s, lambda: wake(False), task.node)
        self.hub.switch()
        self.check_alive(task.node)
        return outcome[0]

    def sleep(self, seconds: float) -> None:
        self.wait(lambda wake: None, max(seconds, 0.0))

    def check_alive(self, node: Node) -> None:
        if node.dead:
            raise GreenletExit

    def _switch(self, task: Task) -> None:
        if task.node.dead or task.greenlet.dead:
            return
        before, self.current = self.current, task
        task.greenlet.switch()
        self.current = before


class Lock:
    """threading.Lock and RLock. Contended ones are handed out in random order."""

    def __init__(self, kernel: Kernel, reentrant: bool) -> None:
        self._kernel, self._reentrant = kernel, reentrant
        self._owner: object = None
        self._depth = 0
        self._waiters: list[Callable[[], None]] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = getcurrent()
        while self._owner is not None and not (self._reentrant and self._owner is me):
            if not blocking:
                return False
            self._kernel.wait(self._waiters.append)
        self._owner, self._depth = me, self._depth + 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            waiters, self._waiters = self._waiters, []
            for wake in waiters:
                wake()

    def locked(self) -> bool:
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def install(kernel: Kernel) -> None:
    """The engine's locks and futures are those of this run from now on."""

    class SimulatedFuture(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> Any:
            self._settle(timeout)
            return super().result(0)

        def exception(self, timeout: float | None = None) -> BaseException | None:
            self._settle(timeout)
            return super().exception(0)

        def _settle(self, timeout: float | None) -> None:
            if not self.done() and not kernel.wait(lambda wake: self.add_done_callback(lambda _: wake()), timeout):
                raise FutureTimeout

    kernel.Future = SimulatedFuture  # type: ignore[attr-defined]
    threads = types.SimpleNamespace(Lock=lambda: Lock(kernel, False), RLock=lambda: Lock(kernel, True))
    for module in LOCKING:
        module.threading = threads  # type: ignore[attr-defined]
    cache.Future = SimulatedFuture  # type: ignore[attr-defined]


class SimulatedRuntime:
    """What a node has for a machine: `runtime.Runtime` with the same methods."""

    def __init__(self, node: Node, seed: object, on_token: Callable[[bytes, Task | None], None]) -> None:
        self._node, self._kernel = node, node.kernel
        self._rng = Random(f"runtime-{seed}-{node.name}")
        self._on_token = on_token
        self._jobs: deque[tuple[Any, Callable[[], Any]]] = deque()
        self._job_running = False

    def monotonic(self) -> float:
        return self._kernel.now + self._node.skew_s

    def sleep(self, seconds: float) -> None:
        self._kernel.sleep(seconds)

    def token(self, size_bytes: int) -> bytes:
        token = self._rng.randbytes(size_bytes)
        self._on_token(token, self._kernel.current)
        return token

    def uniform(self, low: float, high: float) -> float:
        return self._rng.uniform(low, high)

    def submit(self, function: Callable[[], T]) -> Any:
        future = self._future()
        self._kernel.spawn(self._node, self._name("io"), lambda: _run(future, function))
        return future

    def background(self, function: Callable[[], T]) -> Any:
        """One at a time, as on the one thread there is."""
        future = self._future()
        self._jobs.append((future, function))
        if not self._job_running:
            self._job_running = True
            self._kernel.spawn(self._node, self._name("background"), self._work)
        return future

    def every(self, seconds: float, function: Callable[[], object]) -> Callable[[], None]:
        stopped: list[bool] = []

        def loop() -> None:
            while not stopped:
                function()
                self._kernel.sleep(seconds * self._rng.uniform(1, 4))

        self._kernel.spawn(self._node, "ticker", loop, seconds)
        return lambda: stopped.append(True)

    def close(self) -> None:
        """Threads of a node end with it."""

    def _work(self) -> None:
        while self._jobs:
            _run(*self._jobs.popleft())
        self._job_running = False

    def _future(self) -> Any:
        return self._kernel.Future()  # type: ignore[attr-defined]

    def _name(self, kind: str) -> str:
        current = self._kernel.current
        return f"{current.name}.{kind}" if current is not None and current.name.count(".") < 3 else kind


def _run(future: Any, function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except GreenletExit:
        raise
    except Exception as error:  # noqa: BLE001  belongs to whoever asks the future
        future.set_exception(error)
    else:
        future.set_result(result)


__all__ = ["CancelledError", "Kernel", "Lock", "Node", "SimulatedRuntime", "Task", "Violation", "install"]
