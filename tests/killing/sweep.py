"""A process dies at the k-th request to S3 of what it does, for every k; what S3 then holds is looked at afresh.

Real: SeaweedFS, the command line, the FUSE mount, SQLite, SIGKILL. In between is a proxy that counts the requests of
one script (steps.py) and kills when the k-th arrives. Ways:

    before          the daemon (or who is in process, or the command) is killed, and the request is not passed on
    after           it is passed on and answered, then the process is killed; the answer is not delivered
    dropped         it is passed on, the answer is not delivered, the connection is cut; the process has to settle that
                    by itself, and its application may not notice
    dropped-killed  the same, and the process is killed before its next request is passed on
    client-before   a mount's client is killed, then the request is passed on; the daemon goes on
    client-after    the client is killed after it was passed on

Then another process, with a mount of its own and nothing cached, looks: nothing acknowledged is missing, nothing is
there in part, what was not acknowledged is there or not; every database can still be written.
"""

from __future__ import annotations

import contextlib
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from mounting import Place, is_mounted, shell
from proxy import Fault, FaultProxy, Request

from killing.children import LEASE_S, MUTANT
from killing.folders import Files, State
from killing.forks import PATIENCE_S, ForkServer, Hung, Process
from killing.steps import COMMAND, MOUNT, Step, fill

WAYS = "before", "after", "dropped", "dropped-killed"
CLIENT_WAYS = "client-before", "client-after"

#: What steps are run with: block sizes, page sizes and journal modes of all kinds.
STATES = (
    State(65536, 4096, "DELETE"),
    State(4096, 4096, "TRUNCATE"),
    State(16384, 1024, "PERSIST"),
    State(4096, 8192, "MEMORY"),
    State(16384, 4096, "WAL"),
)

#: A job in the background may come too late on a busy machine.
ATTEMPTS = 4


class Failure(Exception):
    """Something was lost, torn, damaged, or hung."""


@dataclass(frozen=True)
class Point:
    step: Step
    face: str
    state: State
    k: int
    way: str

    def __str__(self) -> str:
        return f"{self.step.name} {self.face} {self.state} k={self.k} {self.way}"


@dataclass(frozen=True)
class Reference:
    """What each database holds after each `done` (None: there is none), from the start on."""

    states: tuple[dict[str, str | None], ...]
    empty: frozenset[str | None]
    """What a database without a table holds: one without a byte, and in WAL mode one that knows that."""
    source: str

    @property
    def names(self) -> list[str]:
        return sorted({name for state in self.states for name in state})

    def objection(self, step: Step, done: int, firm: int, found: dict[str, str | None]) -> str | None:
        """What is wrong with what was found after so many `done`, of which so many are for ever."""
        before, after = self.states[done], self.states[min(done + 1, len(self.states) - 1)]
        for name in self.names:
            allowed = {state.get(name) for state in (*self.states[firm:done], before, after)}
            if None in allowed and len(allowed) > 1 and not step.at_once:
                allowed |= self.empty  # a database that is created is there before its first transaction is
            if found[name] not in allowed:
                return f"{name} holds {found[name]!r} after {done} of {len(self.states) - 1}, and not one of {allowed}"
        changed = [found[name] == after.get(name) for name in step.order]
        if changed != sorted(changed, reverse=True):
            return f"of {step.order}, which change in this order, have changed: {changed}"
        return None


class Trigger:
    """The proxy's rule for one point: counts requests, kills at the k-th."""

    def __init__(self, k: int, way: str) -> None:
        self.k, self.way = k, way
        self.victim: Future[Process] = Future()
        self.count = 0
        self.fired = self.killed = False
        self.kinds: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Fault | None:
        with self._lock:
            self.count += 1
            self.kinds.add(request.kind)
            at = self.count - self.k
            self.fired |= at == (1 if self.way == "dropped-killed" else 0)
        if at == 0:
            return self._at_k()
        if at == 1 and self.way == "dropped-killed":
            self._kill()
            return Fault(cut=True)
        return None

    def _at_k(self) -> Fault | None:
        if self.way == "before":
            self._kill()
            return Fault(cut=True)
        if self.way == "after":
            return Fault(apply=True, then=self._kill, cut=True)
        if self.way == "client-before":
            self._signal()
            return None
        if self.way == "client-after":
            return Fault(then=self._signal)
        return Fault(apply=True, cut=True)

    def _kill(self) -> None:
        self.killed = True
        self.victim.result(PATIENCE_S).kill()

    def _signal(self) -> None:
        """Not waited for: the kernel lets a client die when the daemon has answered it. It may have ended before."""
        self.fired = self.victim.result(PATIENCE_S).signal()


class Sweep:
    """Runs points, one at a time; others may run beside it, and share with it what a script starts from."""

    def __init__(self, place: Place, directory: Path, beside: Sweep | None = None, mutant: str = "") -> None:
        """`mutant`: one of mutants.py, by which whatever runs a script is broken."""
        self._place, self._directory, self._mutant = place, directory, mutant
        self._stack = contextlib.ExitStack()
        self._stored: dict[tuple[str, State], dict[str, bytes]] = beside._stored if beside else {}
        self._references: dict[tuple[str, State], Reference] = beside._references if beside else {}

    def __enter__(self) -> Sweep:
        self._proxy = self._stack.enter_context(FaultProxy(self._place.url))
        self._forks = self._stack.enter_context(ForkServer("killing.children"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- a point ------------------------------------------------------------------------------------------

    def control(self, step: Step, face: str, state: State) -> int:
        """Run a script to its end; how many requests that took. Raises Failure."""
        for _ in range(ATTEMPTS):
            trigger = self._run(Point(step, face, state, 0, "control"), True)
            if trigger.kinds.issuperset(step.needs):
                return trigger.count
        raise Failure(f"{step.name} {face} {state}: needs requests of the kinds {step.needs}, made {trigger.kinds}")

    def kill(self, point: Point, thorough: bool) -> bool:
        """Whether there was a k-th request. Raises Failure."""
        return self._run(point, thorough).fired

    def _run(self, point: Point, thorough: bool) -> Trigger:
        reference = self._reference(point)
        place = self._place.inside(uuid.uuid4().hex)
        self._start(point, place)
        folder = Path(tempfile.mkdtemp(dir=self._directory))
        try:
            trigger, done, error = self._act(point, place, folder, reference)
            if error and not trigger.killed and not point.way.startswith("client"):
                raise Failure(f"failed after {done} of {len(reference.states) - 1} parts: {error}")
            died = trigger.killed and not point.way.startswith("client")
            firm = point.step.oldest(done) if died else done
            self._examine(point, place, folder, reference, done, firm, thorough)
        except (Failure, Hung) as problem:
            logs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.log")))
            raise Failure(f"{point}: {problem}\n{place.target}\n{logs}") from problem
        finally:
            shutil.rmtree(folder)
        return trigger

    def _act(self, point: Point, place: Place, folder: Path, reference: Reference) -> tuple[Trigger, int, str]:
        """Run the script, with the kill: (the trigger, how often it said "done", the error that ended it)."""
        via = place.via(self._proxy.url)
        trigger = Trigger(point.k, point.way)
        self._proxy.reset()
        self._proxy.errors.clear()
        with contextlib.ExitStack() as stack:
            daemon = None
            if point.face == MOUNT:
                daemon = stack.enter_context(self._mounted(via, folder, "victim", point.state))
            self._proxy.rule = trigger
            arguments = point.step.name, reference.source
            worker = stack.enter_context(self._started("work", point, via, folder, "victim", *arguments))
            trigger.victim.set_result(worker if daemon is None or point.way.startswith("client") else daemon)
            if daemon is not None and not point.way.startswith("client"):
                _first_to_end(daemon, worker)
                worker.dismiss()  # when the daemon is dead, there is nothing to wait for
            worker.wait()
            said = worker.said()
        self._drain()
        words = [word for word in said if word != "done"]
        return trigger, said.count("done"), "" if words == ["end"] else str(words or "killed")

    def _examine(
        self, point: Point, place: Place, folder: Path, reference: Reference, done: int, firm: int, thorough: bool
    ) -> None:
        """By other processes, who know nothing but the store. Raises Failure."""
        with contextlib.ExitStack() as stack:
            if point.face == MOUNT:
                stack.enter_context(self._mounted(place, folder, "after", point.state))
            with self._started("look", point, place, folder, "after", reference.names) as looker:
                code, said = looker.wait(), looker.said()
        if len(said) < 2:
            raise Failure(f"nobody could look: exit code {code}")
        found, listed = said
        if objection := reference.objection(point.step, done, firm, found):
            raise Failure(objection)
        there = [name for name, what in found.items() if what is not None]
        if listed != there:
            raise Failure(f"listed are {listed}, but there are {there}")
        if code != 0:
            raise Failure(f"cannot be written any more: exit code {code}")
        if thorough and there:
            with self._started("verify", point, place, folder, "after", there) as checker:
                code, said = checker.wait(), checker.said()
            if code != 0:
                raise Failure(str(said))

    def _drain(self) -> None:
        """Until nothing is on its way any more from who was killed."""
        deadline = time.monotonic() + PATIENCE_S
        while self._proxy.connections:
            if time.monotonic() > deadline:
                raise Hung("requests of a dead process are still on their way")
            time.sleep(0.002)
        if self._proxy.errors:
            raise Failure(f"the proxy failed: {self._proxy.errors[0]!r}")

    # --- processes ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _started(
        self, what: str, point: Point, place: Place, folder: Path, mount: str, *arguments: Any
    ) -> Iterator[Process]:
        where = {"url": place.url, "bucket": place.bucket, "prefix": place.prefix, "directory": f"{folder / mount}/mnt"}
        process = self._forks.start(
            f"killing.children:{what}",
            *(point.face, where, astuple(point.state), *arguments),
            environment=self._environment(place, folder),
            log=folder / f"{what}.log",
        )
        try:
            yield process
        finally:
            process.release()

    @contextlib.contextmanager
    def _mounted(self, place: Place, folder: Path, name: str, state: State) -> Iterator[Process]:
        """The command line's own mount, with nothing of an earlier one. It has to end well, or by SIGKILL."""
        root = folder / name
        for each in ("mnt", "spill"):
            (root / each).mkdir(parents=True)
        line = [place.target, str(root / "mnt"), "--endpoint-url", place.url, "--spill-dir", str(root / "spill")]
        line += ["--refresh", "0", "--lease", str(LEASE_S), "--block-size", str(state.block_size)]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.bind("")  # an abstract address of the kernel's choice
            notify = "@" + channel.getsockname()[1:].decode()
            environment = self._environment(place, folder) | {"NOTIFY_SOCKET": notify}
            log = folder / f"{name}.log"
            daemon = self._forks.start("killing.children:mount", *line, environment=environment, log=log)
            try:
                if not daemon.ends(0) and channel not in _first_to_end(daemon, channel):
                    raise Failure(f"the mount did not come up: exit code {daemon.wait()}")
                yield daemon
                if not daemon.ends(0):
                    done = shell("fusermount", "-u", root / "mnt")
                    if done.returncode:
                        raise Failure(f"cannot be unmounted: {done.stderr}")
                if (code := daemon.wait()) not in (0, -signal.SIGKILL):
                    raise Failure(f"the daemon ended with exit code {code}")
            finally:
                daemon.release()
                if is_mounted(root / "mnt"):
                    shell("fusermount", "-u", "-z", root / "mnt")

    def _environment(self, place: Place, folder: Path) -> dict[str, str]:
        mutant = {MUTANT: self._mutant} if place.url == self._proxy.url else {}
        return place.environment | {"TMPDIR": str(folder)} | mutant

    # --- where a script starts, and what it should do -----------------------------------------------------

    def _start(self, point: Point, place: Place) -> None:
        """Bring about what the script starts from."""
        key = point.step.name, point.state
        if not point.step.movable:
            self._make(point, place)
        elif key not in self._stored:
            first = self._place.inside(uuid.uuid4().hex)
            self._make(point, first)
            self._stored[key] = {name: first.get(name) for name in first.listing()}
        for name, body in self._stored.get(key, {}).items():
            place.put(name, body)

    def _make(self, point: Point, place: Place) -> None:
        there = replace(point, face=COMMAND)
        with (
            tempfile.TemporaryDirectory(dir=self._directory) as folder,
            self._started("make", there, place, Path(folder), "make", point.step.name) as maker,
        ):
            if maker.wait() != 0:
                raise Failure(f"{point}: {(Path(folder) / 'make.log').read_text()}")

    def _reference(self, point: Point) -> Reference:
        key = point.step.name, point.state
        if key not in self._references:
            directory = Path(tempfile.mkdtemp(dir=self._directory))
            (directory / "there").mkdir()
            source = directory / "source.sqlite"
            other = Files(directory, replace(point.state, seed=-1 - point.state.seed))
            fill(other, source.name, 90)
            (directory / "empty").touch()
            with other.open("fresh"):
                pass
            empty = frozenset(map(other.content, ("empty", "fresh")))
            states: list[dict[str, str | None]] = []

            def done() -> None:
                names = sorted(path.name for path in place.directory.glob("*.db"))
                states.append({name: place.content(name) for name in names})

            place = Files(directory / "there", point.state, str(source), done)
            point.step.prepare(place)
            done()
            point.step.script(place)
            self._references[key] = Reference(tuple(states), empty, str(source))
        return self._references[key]


def _first_to_end(process: Process, other: Process | socket.socket) -> list[Any]:
    return select.select([process, other], [], [], PATIENCE_S)[0]
