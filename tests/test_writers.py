"""Writers at once: four processes on two machines that mount, two machines in process, one database, frozen at random.

Every machine reaches the store through a proxy of its own, which can hold what it sends. Two machines have clocks that
are wrong. Clocks that jump come with SIGSTOP. `WRITERS_MINUTES` and `WRITERS_SEED` change the long run.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from inprocess import OtherProcess, connect, elsewhere, key, rows
from mounting import PATIENCE_S, Client, Mount, Place, SqlError, command, mounted, shell, sqlite
from proxy import Fault, FaultProxy, Request
from writing import Event, Job, Spans, Worker, at_work, balances, judge, longest_gap, tables

from s3blockfs.format import head as codec

pytestmark = pytest.mark.mount

LEASE_S = 2
MINUTES = float(os.environ.get("WRITERS_MINUTES", "5"))

#: No writer may be without a commit for longer, apart from what the store, the machine and the test take.
LONGEST_GAP_S = 10.0

#: What takes longer than this in `Pulse` counts as a stall.
BEAT_S = 0.5

#: What `clock` makes a machine believe.
WRONG_CLOCK = """
import datetime, time
real, wall, off = datetime.datetime, time.time, {seconds}
class Kind(type):
    def __instancecheck__(cls, value):
        return isinstance(value, real)
class Shifted(real, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=off)
    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)
datetime.datetime = Shifted
time.time = lambda: wall() + off
"""


@dataclass(frozen=True)
class OffClock(Place):
    """A place seen by machines whose wall clock is wrong: Python runs what `folder` holds before anything else."""

    folder: str = ""

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"PYTHONPATH": self.folder}


def clock(place: Place, folder: Path, seconds: float) -> OffClock:
    where = folder / f"clock{seconds:+}"
    where.mkdir()
    (where / "sitecustomize.py").write_text(WRONG_CLOCK.format(seconds=seconds))
    return OffClock(place.url, place.access_key, place.secret_key, place.bucket, place.prefix, str(where))


class Hold:
    """A rule: the next swap of a head (of one whose path holds `name`, and to that commit or a later one) waits for
    `release`, either before it is passed on or with its answer, which may then be cut off."""

    def __init__(
        self, proxy: FaultProxy, name: str = "/", seq: int = 0, *, applied: bool = False, cut: bool = False
    ) -> None:
        self.reached, self._released = threading.Event(), threading.Event()
        self._once = threading.Lock()
        self._name, self._seq, self._applied, self._cut = name, seq, applied, cut
        self._before, proxy.rule = proxy.rule, self

    def __call__(self, request: Request) -> Fault | None:
        if not self._is_meant(request) or not self._once.acquire(blocking=False):
            return self._before(request) if self._before else None
        if self._applied:
            return Fault(apply=True, then=self._wait, cut=self._cut)
        self._wait()
        return None

    def _is_meant(self, request: Request) -> bool:
        if request.method != "PUT" or request.kind != "head" or self._name not in request.path:
            return False
        seq = re.search(rb'"seq":(\d+)', request.start)
        return seq is not None and int(seq[1]) >= self._seq

    def _wait(self) -> None:
        self.reached.set()
        self._released.wait(PATIENCE_S)

    def release(self) -> None:
        self._released.set()


# --- frozen in mid-commit ------------------------------------------------------------------------------------------

#: What becomes of a commit whose machine is frozen when it has sent it: the options of `Hold`; whether what is held
#: goes on while the machine is still frozen; whether others commit meanwhile; whether the commit must be there.
FATES: dict[str, tuple[dict[str, bool], bool, bool, bool]] = {
    "passed_on": ({}, True, True, False),  # to a head that others have replaced
    "late": ({}, False, True, False),  # only after it woke up and asked what became of it
    "alone": ({}, False, False, True),  # nobody else wrote: it is sent again, and the late one finds that
    "answered": ({"applied": True}, True, True, True),
    "cut": ({"applied": True, "cut": True}, True, True, True),
}


@pytest.mark.parametrize("face", ["mount", "process"])
def test_a_zombie_that_wakes_in_mid_commit(place: Place, tmp_path: Path, proxy: FaultProxy, face: str) -> None:
    """It loses with an I/O error, and nothing of its transaction is anywhere; or its commit was applied, and it says
    so. Then it goes on. All fates at once, a database each."""
    limits = ("--lease", str(LEASE_S), "--request-deadline", "4")
    holds: dict[str, Hold] = {}
    with contextlib.ExitStack() as stack:
        if face == "mount":
            mount = stack.enter_context(mounted(place.via(proxy.url), tmp_path, *limits))
            clients = {fate: Client(mount / f"{fate}.db") for fate in FATES}
            frozen = [mount.process.pid]
        else:
            clients = {fate: OtherProcess(place.via(proxy.url), f"{fate}.db") for fate in FATES}
            frozen = [client.process.pid for client in clients.values()]
        for client in clients.values():
            stack.enter_context(client)
            # TRUNCATE: else the commits in one directory of a mount follow one another.
            client("PRAGMA journal_mode=TRUNCATE", "CREATE TABLE t(who, n)", "INSERT INTO t VALUES ('zombie', 0)")
        for client in clients.values():
            client("BEGIN IMMEDIATE", "UPDATE t SET n = n + 1 WHERE who = 'zombie'")
        for fate, client in clients.items():
            holds[fate] = Hold(proxy, f"/{fate}.db/", seq_of(place, f"{fate}.db") + 1, **FATES[fate][0])
            stack.callback(holds[fate].release)
            client.send("COMMIT")
        for hold in holds.values():
            assert hold.reached.wait(PATIENCE_S)
        stack.callback(signal_all, frozen, signal.SIGCONT)
        signal_all(frozen, signal.SIGSTOP)
        with ThreadPoolExecutor(len(FATES)) as threads:
            list(threads.map(lambda fate: add_a_row(place, fate), [fate for fate in FATES if FATES[fate][2]]))
        for fate, hold in holds.items():
            if FATES[fate][1]:
                hold.release()
        time.sleep(0.2)  # what was released arrives
        signal_all(frozen, signal.SIGCONT)
        for fate, client in clients.items():
            _, _, others, there = FATES[fate]
            reported = answer_of(client)
            holds[fate].release()
            assert (reported == "committed") == there, f"{fate}: {reported}"
            assert there or ("I/O" in reported or "CommitLost" in reported), f"{fate}: {reported}"
            expected = [("zombie", int(there)), *[("other", 1)] * others]
            assert elsewhere(place, "SELECT * FROM t", f"{fate}.db") == expected, fate
            client("PRAGMA busy_timeout=30000", "UPDATE t SET n = n + 10 WHERE who = 'zombie'")
            expected[0] = ("zombie", there + 10)
            assert [tuple(row) for row in client("SELECT * FROM t")] == expected, fate
            assert elsewhere(place, "SELECT * FROM t", f"{fate}.db") == expected, fate


def signal_all(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def add_a_row(place: Place, fate: str) -> None:
    other = connect(place, f"{fate}.db", lease_s=LEASE_S)
    other.execute("INSERT INTO t VALUES ('other', 1)")
    other.close()


def answer_of(client: Client) -> str:
    try:
        client.receive()
    except SqlError as error:
        return str(error)
    return "committed"


# --- clocks --------------------------------------------------------------------------------------------------------


def test_a_clock_that_is_hours_off(place: Place, tmp_path: Path) -> None:
    """S3 refuses what was signed more than 15 minutes ago, or in future. Who asks is told what to do about it."""
    wrong = clock(place, tmp_path, 5 * 3600)
    (tmp_path / "mnt").mkdir()
    where = ("--endpoint-url", place.url)
    for line in (("mount", "-f", place.target, str(tmp_path / "mnt")), ("info", f"{place.target}/a.db")):
        done = command(wrong, *line, *where)
        assert done.returncode not in (0, 1)
        assert "RequestTimeTooSkewed: access denied; set the clock of this machine" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    program = f"import s3blockfs; s3blockfs.connect(bucket={place.bucket!r}, name='a.db', endpoint_url={place.url!r})"
    done = shell(sys.executable, "-c", program, env=wrong.environment)
    assert done.stderr.splitlines()[-1].startswith("apsw.CantOpenError: ")
    assert "RequestTimeTooSkewed: access denied; set the clock of this machine" in done.stderr


# --- at random -----------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A daemon or a process with its own engine, and its way to the store."""

    name: str
    process: Callable[[], int]
    proxy: FaultProxy

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        os.kill(self.process(), signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process(), signal.SIGCONT)


@dataclass
class Trouble:
    """Freezes machines and holds what they send, at random, and remembers when."""

    machines: list[Machine]
    rng: random.Random
    spans: Spans = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def go_on(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self.rng.uniform(0.2, 2))
            machine = self.rng.choice(self.machines)
            how = self.rng.choice([self.freeze, self.freeze_in_commit, self.freeze_in_commit, self.hold])
            began = time.monotonic()
            how(machine, self.rng.choice([0.3, LEASE_S * 0.9, LEASE_S * 1.5, LEASE_S * 2]))
            self.spans.append((began, time.monotonic() + LEASE_S + 3))  # others wait for a lease, and for who is next
            self.done.append(how.__name__)

    def freeze(self, machine: Machine, seconds: float) -> None:
        with machine.frozen():
            time.sleep(seconds)

    def freeze_in_commit(self, machine: Machine, seconds: float) -> None:
        """What it sent arrives while it is frozen, or after it woke up; or its answer does, or never."""
        late, applied = self.rng.random() < 0.5, self.rng.random() < 0.5
        hold = Hold(machine.proxy, applied=applied, cut=applied and self.rng.random() < 0.5)
        hold.reached.wait(5)
        try:
            with machine.frozen():
                time.sleep(seconds)
                if not late:
                    hold.release()
            time.sleep(0.3)
        finally:
            hold.release()
            machine.proxy.rule = None

    def hold(self, machine: Machine, seconds: float) -> None:
        hold = Hold(machine.proxy, applied=self.rng.random() < 0.5)
        hold.reached.wait(5)
        time.sleep(seconds)
        hold.release()
        machine.proxy.rule = None


class Pulse:
    """Asks the store for something small again and again: when it or this machine stalls is nobody's fault."""

    def __init__(self, place: Place) -> None:
        self.stalls: Spans = []
        self._place = place
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            self._place.put("pulse", b"")
            self._over.wait(0.1)
            if time.monotonic() - began > BEAT_S:
                self.stalls.append((began, time.monotonic()))

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def writers_at_once(place: Place, folder: Path, seed: int, calm_s: float, trouble_s: float, rounds: int) -> list[str]:
    """The whole scene; returns what there is to tell. The longest gap of a writer is the last line."""
    with contextlib.ExitStack() as stack:
        proxies = {name: stack.enter_context(FaultProxy(place.url)) for name in "abpq"}
        seen_by = {name: place.via(proxy.url) for name, proxy in proxies.items()}
        seen_by["b"] = clock(seen_by["b"], folder, 600)
        seen_by["q"] = clock(seen_by["q"], folder, -600)
        mounts = {
            name: stack.enter_context(mounted(seen_by[name], folder, "--lease", str(LEASE_S))) for name in ("a", "b")
        }
        writers = ["a1", "a2", "b1", "b2", "p", "q"]
        sqlite(mounts["a"] / "bank.db", *tables(writers))
        first_seq = seq_of(place)
        ledgers = {name: str(folder / f"ledger-{name}") for name in writers}
        jobs = []
        for number, name in enumerate([*writers, "a-reader", "b-reader", "p-reader"]):
            at = seen_by[name[0]]
            where = {"path": str(mounts[name[0]] / "bank.db")} if name[0] in mounts else in_process(at)
            watches = ledgers if name not in ledgers else {}
            ledger = str(folder / f"ledger-{name}")
            jobs.append((Job(name, ledger, seed * 100 + number, **where, watches=watches), at.environment))
        with Pulse(place) as pulse, at_work(jobs) as workers:
            by_name = {worker.name: worker for worker in workers}
            machines = [machine_of(name, mounts, by_name, proxy) for name, proxy in proxies.items()]
            trouble = Trouble(machines, random.Random(seed))
            for _ in range(rounds):
                time.sleep(calm_s)
                trouble.go_on(trouble_s)
            time.sleep(calm_s)
        for mount in mounts.values():
            assert "nobody foresaw" not in mount.log
        events = {worker.name: worker.events() for worker in workers}
        for worker in workers:
            wrong = [event for event in events[worker.name] if event.what == "wrong"]
            assert wrong == [], f"seed {seed}: {worker.name}"
        database = connect(place, "bank.db", refresh_s=0.0)
        done = rows(database, "SELECT * FROM done")
        counters = dict(rows(database, "SELECT writer, n FROM counters"))
        money = [balance for (balance,) in rows(database, "SELECT balance FROM accounts ORDER BY id")]
        database.close()
        told = [judge({name: events[name] for name in writers}, done, counters)]
        assert money == balances(done)
        assert elsewhere(place, "SELECT count(*) FROM done", "bank.db") == [(len(done),)]
        assert seq_of(place) - first_seq == len(done), "a commit is a transaction"
        told += [f"{len(trouble.done)} times trouble, {len(pulse.stalls)} stalls"]
        told += [summary(name, events[name]) for name in events]
        gaps = {name: longest_gap(events[name], trouble.spans + pulse.stalls) for name in writers}
        return [*told, *(f"{name} {gap:.1f}" for name, gap in gaps.items()), f"{max(gaps.values()):.1f}"]


def machine_of(name: str, mounts: dict[str, Mount], workers: dict[str, Worker], proxy: FaultProxy) -> Machine:
    process = mounts[name].process if name in mounts else workers[name].process
    return Machine(name, lambda: process.pid, proxy)


def in_process(place: Place) -> dict[str, Any]:
    return {"url": place.url, "bucket": place.bucket, "key": key(place, "bank.db"), "lease_s": LEASE_S}


def seq_of(place: Place, name: str = "bank.db") -> int:
    return codec.decode(place.get(f"{name}/head"), name).seq


def summary(name: str, events: list[Event]) -> str:
    counts = {what: sum(event.what == what for event in events) for what in ("acknowledged", "saw", "failed", "again")}
    return f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items() if count)}"


def show(capsys: pytest.CaptureFixture[str], lines: list[str]) -> None:
    with capsys.disabled():
        print("", *lines, sep="\n", file=sys.stderr)


def test_writers_at_once(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing lost, nothing torn, nothing twice; nobody is left out. How long anybody waits is for the long run."""
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    show(capsys, told := writers_at_once(place, tmp_path, seed, calm_s=4, trouble_s=8, rounds=1))
    assert float(told[-1]) < 6 * LONGEST_GAP_S


@pytest.mark.long
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_writers_at_once_for_minutes(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("WRITERS_SEED", random.randrange(1_000_000)))
    rounds = max(round(MINUTES), 1)
    told = writers_at_once(place, tmp_path, seed, calm_s=30, trouble_s=30, rounds=rounds)
    show(capsys, [f"{rounds} min, seed {seed}", *told])
    assert float(told[-1]) <= LONGEST_GAP_S
