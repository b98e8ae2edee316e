"""Who is measured: a contestant opens a database, its own way, as often as it is asked, each time with empty caches.

A `Session` is one such opening: a client in a process of its own (worker.py), and the daemon if there is one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from mounting import Place, command, mounted

from bench import rows
from bench.wire import Figures, Wire
from bench.worker import Worker

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Measured:
    """One repetition."""

    seconds: float
    cpu: float = 0.0
    """Of the client and the daemon."""
    figures: Figures = field(default_factory=lambda: Figures([]))
    notes: dict[str, float] = field(default_factory=dict)


@dataclass
class Ground:
    """What all contestants share: one store, one way to it, one folder, one database as a local file."""

    place: Place
    """The store itself, without the proxy: what is only prepared goes there."""
    wire: Wire
    folder: Path
    rows: int
    limit_s: float
    file: Path
    delay_ms: float
    transactions: int = 200
    databases: int = 10_000
    commits: int = 30_000
    page_size: int = 4096

    @property
    def through(self) -> Place:
        return self.place.via(self.wire.url)

    @property
    def size(self) -> int:
        return self.file.stat().st_size

    def client(self) -> Any:
        session = boto3.Session(self.place.access_key, self.place.secret_key, region_name="us-east-1")
        return session.client("s3", endpoint_url=self.place.url)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """What is done inside is neither delayed nor counted."""
        self.wire.delay(0)
        try:
            yield
        finally:
            self.wire.delay(self.delay_ms)
            self.wire.take()

    def worker(self, kind: str, limit_s: float = 0.0, **how: Any) -> Worker:
        what = {"kind": kind, "rows": self.rows, "page_size": self.page_size}
        return Worker(self.through.environment, limit_s or self.limit_s, **what, **how)


class Session:
    """See the module."""

    def __init__(self, wire: Wire, worker: Worker, daemons: Sequence[int] = (), **fixed: Any) -> None:
        self._wire, self.worker, self._daemons, self._fixed = wire, worker, daemons, fixed

    def do(self, what: str, **arguments: Any) -> None:
        """A step that is not measured, and may take longer than one that is."""
        self.worker(what, patience=10, **arguments)

    @property
    def memory(self) -> float:
        """Of the daemon, or of the client if there is none, in MB."""
        return sum(map(memory_of, self._daemons or [self.worker.process.pid]))

    def step(self, what: str, **arguments: Any) -> Measured:
        self._wire.take()
        before = sum(map(cpu_of, self._daemons))
        said = self.worker(what, **arguments, **self._fixed)
        cpu = said["cpu"] + sum(map(cpu_of, self._daemons)) - before
        notes: dict[str, float] = {name: said[name] for name in ("began", "commit") if name in said}
        return Measured(said["seconds"], cpu, self._wire.take(), notes)


def cpu_of(pid: int) -> float:
    """Seconds that a process has used so far, and those of the session that it leads (juicefs starts another one)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            numbers = stat.read_text().rpartition(")")[2].split()
            if stat.parent.name == str(pid) or numbers[3] == str(pid):
                ticks += int(numbers[11]) + int(numbers[12])
    return ticks / TICKS_PER_S


def memory_of(pid: int) -> float:
    """What a process has in memory, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1000


class Contestant:
    """One of them. `seed` gives it a database with all rows under a name, `session` opens one."""

    name = ""
    durable = True
    """Whether COMMIT returns when S3 has it."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground

    def __str__(self) -> str:
        return self.name

    def seed(self, name: str) -> None:
        raise NotImplementedError

    def session(self, name: str) -> contextlib.AbstractContextManager[Session]:
        raise NotImplementedError

    def settled(self, measured: Measured) -> Measured:
        """With what followed until the session was over: a lease that is given back, bytes still under way."""
        measured.figures += self.ground.wire.take()
        return measured


class S3BlockFS(Contestant):
    """Both faces have the same databases."""

    options: Sequence[str] = ()
    """Of the commands that make and mount them; `--exclusive` only of mounts."""

    def seed(self, name: str) -> None:
        place = self.ground.place
        line = ["import", "--force", str(self.ground.file), f"{place.target}/{name}", "--endpoint-url", place.url]
        done = command(place, *line, *(option for option in self.options if option != "--exclusive"))
        assert done.returncode == 0, done.stderr


class OnMount(S3BlockFS):
    name = "s3blockfs mount"

    def __init__(self, ground: Ground, *options: str) -> None:
        super().__init__(ground)
        self.options = options
        if options:
            self.name = " ".join((self.name, *options))

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[Session]:
        ground = self.ground
        with (
            mounted(ground.through, ground.folder, *self.options, refresh="1") as mount,
            ground.worker("file", path=str(mount / name)) as worker,
        ):
            yield Session(ground.wire, worker, [mount.process.pid])


class InProcess(S3BlockFS):
    name = "s3blockfs in process"

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[Session]:
        ground = self.ground
        with ground.worker("s3blockfs", url=ground.wire.url, bucket=ground.place.bucket, name=name) as worker:
            yield Session(ground.wire, worker)


class Local(Contestant):
    """A file on this machine."""

    name = "local file"

    def seed(self, name: str) -> None:
        shutil.copyfile(self.ground.file, self.ground.folder / name)

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[Session]:
        with self.ground.worker("file", path=str(self.ground.folder / name)) as worker:
            yield Session(self.ground.wire, worker)


class AsObject(Contestant):
    """Whoever has the SQLite file as one object."""

    def seed(self, name: str) -> None:
        self.ground.client().upload_file(str(self.ground.file), self.ground.place.bucket, f"files/{name}")

    def key(self, name: str) -> str:
        return f"files/{name}"


class RawS3(AsObject):
    name = "boto3 alone"

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[Session]:
        ground = self.ground
        with ground.worker("raw", url=ground.wire.url, bucket=ground.place.bucket) as worker:
            yield Session(ground.wire, worker, key=self.key(name))


class _WholeSession(Session):
    def step(self, what: str, **arguments: Any) -> Measured:
        return super().step("whole", then=what, **arguments)


class WholeFile(AsObject):
    """Download the file, use it, and upload it if it has changed."""

    name = "whole file"

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[Session]:
        ground = self.ground
        with (
            tempfile.TemporaryDirectory(dir=ground.folder) as folder,
            ground.worker("raw", url=ground.wire.url, bucket=ground.place.bucket) as worker,
        ):
            yield _WholeSession(ground.wire, worker, key=self.key(name), path=f"{folder}/copy")


def make_ground(place: Place, wire: Wire, folder: Path, count: int, limit_s: float, delay_ms: float) -> Ground:
    file = folder / "rows.sqlite"
    rows.make(file, count)
    return Ground(place, wire, folder, count, limit_s, file, delay_ms)
