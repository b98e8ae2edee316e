"""Two mounts, on each a process with Python's sqlite3 and one with APSW; a third that is read-only (`--direct-io`),
and on it a process whose threads overlap; one process without a mount. Three databases: in rollback mode (each
process with a journal mode of its own), in WAL mode with synchronous=FULL, and with NORMAL. For hours. Processes
are killed now and then, and so is the daemon of one mount."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mounting import PATIENCE_S, Mount, Place, command, mounted, sqlite

from soak.worker import TABLES, Job, Ledger, look

DATABASES = ("rollback.db", "wal-full.db", "wal-normal.db")
OPTIONS = ("--refresh", "1", "--lease", "15")  # a machine that is busy must not lose what waits with NORMAL


class Failed(Exception):
    """What somebody saw that must never be."""


@dataclass
class Machine:
    """A mount, and the processes on it."""

    mount: Mount | None
    stack: contextlib.ExitStack
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)


@dataclass
class Soak:
    place: Place
    folder: Path
    rng: random.Random
    say: Callable[[str], None]
    figures: Counter[str] = field(default_factory=Counter)
    oldest_s: dict[str, float] = field(default_factory=dict)
    databases = DATABASES

    def run(self, seconds: float, kill_every_s: float) -> None:
        """Raises Failed."""
        ledgers = self.folder / "ledgers"
        ledgers.mkdir()
        with contextlib.ExitStack() as stack:
            machines = {name: self._machine(stack, name) for name in ("here", "there", "watch", "none")}
            self._make(machines["here"])
            for name in machines:
                self._start(machines, name, None)
            stack.callback(lambda: [self._kill(each) for each in machines.values()])
            until, kill_s = time.monotonic() + seconds, time.monotonic() + kill_every_s
            while (now := time.monotonic()) < until:
                time.sleep(0.2)
                for machine in machines.values():
                    for name, process in machine.processes.items():
                        if process.poll() is not None:
                            raise Failed(f"{name} ended, {process.returncode}: {''.join(process.communicate())}")
                if now > kill_s and until - now > 3:
                    kill_s = now + kill_every_s * self.rng.uniform(0.5, 1.5)
                    self._disturb(machines)
            for machine in machines.values():
                for process in machine.processes.values():
                    assert process.stdin is not None
                    process.stdin.close()
                    process.stdin = None
            for machine in machines.values():
                for name, process in machine.processes.items():
                    said, complaint = process.communicate(timeout=3 * PATIENCE_S)
                    if process.returncode:
                        raise Failed(f"{name}: {complaint}")
                    self._add(said)
                machine.processes.clear()
            self._judge(machines)

    def _machine(self, stack: contextlib.ExitStack, name: str, root: Path | None = None) -> Machine:
        own = stack.enter_context(contextlib.ExitStack())
        more = ("--read-only", "--direct-io") if name == "watch" else ()
        mount = (
            None if name == "none" else own.enter_context(mounted(self.place, self.folder, *OPTIONS, *more, root=root))
        )
        return Machine(mount, own)

    def _make(self, machine: Machine) -> None:
        assert machine.mount is not None
        for database in DATABASES:
            mode = "WAL" if database.startswith("wal") else "DELETE"
            sqlite(machine.mount / database, f"PRAGMA journal_mode={mode}", "BEGIN", *TABLES, "COMMIT")

    def _start(self, machines: dict[str, Machine], where: str, only: str | None) -> None:
        machine, place = machines[where], self.place
        base = Job("", "sqlite3", {}, str(self.folder / "ledgers"), 0, "DELETE")
        if machine.mount is None:
            keys = {database: f"{place.prefix}/{database}".strip("/") for database in DATABASES}
            jobs = [replace(base, library="s3blockfs", databases=keys, bucket=place.bucket, url=place.url)]
        elif where == "watch":
            jobs = [
                replace(base, databases={database: str(machine.mount / database) for database in DATABASES}, readers=3)
            ]
        else:
            paths = {database: str(machine.mount / database) for database in DATABASES}
            modes = ("DELETE", "TRUNCATE") if where == "here" else ("PERSIST", "MEMORY")
            jobs = [
                replace(base, library=library, databases=paths, journal_mode=mode)
                for library, mode in zip(("sqlite3", "apsw"), modes, strict=True)
            ]
        for job in jobs:
            name = f"{where}-{job.library}"
            if only in (None, name):
                whole = replace(job, name=name, seed=self.rng.randrange(1 << 32))
                line = [sys.executable, "-m", "soak.worker", json.dumps(asdict(whole))]
                folders = [os.fspath(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
                environment = place.environment | {"PYTHONPATH": os.pathsep.join(folders)}
                pipe = subprocess.PIPE
                machine.processes[name] = subprocess.Popen(
                    line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
                )

    def _disturb(self, machines: dict[str, Machine]) -> None:
        if self.rng.random() < 0.3:  # the daemon, and what runs on it
            machine = machines["there"]
            assert machine.mount is not None
            self.say("kill the daemon")
            root = machine.mount.directory.parent
            machine.mount.kill()
            names = self._kill(machine)
            machine.stack.close()
            for path in (self.folder / "ledgers").glob("wal-normal.db--*"):
                if path.name.partition("--")[2] in names:
                    Ledger(path).say("lost", 0)
            machine.mount = machine.stack.enter_context(mounted(self.place, self.folder, *OPTIONS, root=root))
            self._start(machines, "there", None)
            self.figures["daemons killed"] += 1
        else:
            where, name = self.rng.choice([(w, n) for w, machine in machines.items() for n in machine.processes])
            self.say(f"kill {name}")
            self._kill(machines[where], name)
            self._start(machines, where, name)
            self.figures["processes killed"] += 1

    def _kill(self, machine: Machine, only: str | None = None) -> list[str]:
        names = [name for name in machine.processes if only in (None, name)]
        for name in names:
            process = machine.processes.pop(name)
            process.kill()
            process.communicate()
        return names

    def _add(self, said: str) -> None:
        figures, oldest_s = json.loads(said)
        self.figures.update(figures)
        for database, seconds in oldest_s.items():
            self.oldest_s[database] = max(seconds, self.oldest_s.get(database, 0.0))

    def _judge(self, machines: dict[str, Machine]) -> None:
        """All machines show one sound state, and in it what was acknowledged."""
        time.sleep(2.5)  # for an interval, and for what waits to be published
        for database in DATABASES:
            states = []
            for machine in (machines["here"], machines["there"]):
                assert machine.mount is not None
                connection = sqlite3.connect(machine.mount / database, isolation_level=None, timeout=PATIENCE_S)
                with contextlib.closing(connection):
                    connection.execute("BEGIN")
                    states.append(look(lambda *a: connection.execute(*a).fetchall(), True))  # noqa: B023  called here
                    connection.execute("COMMIT")
            if states[0] != states[1]:
                raise Failed(f"{database}: {states}")
            for writer, (number, chain) in states[0].items():
                Ledger(self.folder / "ledgers" / f"{database}--{writer}").check(number, chain)
        for database in DATABASES:
            place = self.place
            done = command(place, "check", f"{place.target}/{database}", "--endpoint-url", place.url)
            if done.returncode:
                raise Failed(f"check {database}: {done.stdout}{done.stderr}")


@contextlib.contextmanager
def shown(soak: Soak) -> Iterator[None]:
    """The figures, at the end, and after a failure what the daemons said last."""
    began = time.monotonic()
    try:
        yield
    except Exception:
        for path in sorted(soak.folder.glob("mount-*/log")):
            soak.say("\n".join([path.parent.name, *path.read_text().splitlines()[-30:]]))
        raise
    finally:
        for path in soak.folder.glob("mount-*/log"):
            for line in path.read_text().splitlines():
                if " ERROR " in line:  # without time, thread and numbers, to count those that are alike
                    soak.figures[re.sub(r"[0-9]+", "N", f"log: {line.split(' ERROR ')[1].partition(': ')[2]}")] += 1
        for what, count in sorted(soak.figures.items()):
            soak.say(f"{count:7} {what}")
        ages = ", ".join(f"{database} {seconds:.1f} s" for database, seconds in sorted(soak.oldest_s.items()))
        soak.say(f"the oldest state that a transaction began on: {ages}; {time.monotonic() - began:.0f} s in all")
