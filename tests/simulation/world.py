"""A run: nodes, clients, operators and weather, all chosen by a seed; then fair weather, and a last look at everything.

Each run has other actors, faults and sizes (swarm testing: Groce et al., ISSTA 2012), because faults that are always
all there hide one another.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from s3blockfs import blockmap, commit, errors, fold, housekeeping, uploads
from s3blockfs.catalog import Catalog
from s3blockfs.config import Config
from s3blockfs.format import data, extents
from s3blockfs.overlap import MountedDatabase
from simulation.actors import Foreign, Operators
from simulation.clients import TOLD, Client
from simulation.kernel import Kernel, Node, SimulatedRuntime, Violation, install
from simulation.network import FAULTS, Network, SimulatedStore
from simulation.oracle import Intent, Oracle

JOBS = ("fold", "collect", "clean_up", "delete", "rename", "copy", "restore", "keep", "past")
ACTORS = ("client-a", "client-b", "client-c", "reader-a", "reader-b", *JOBS, "foreign")
PATHS = ("a.db", "b.db")
OLD = "old.db"

#: Small sizes reach every branch with little data.
LIMITS: tuple[tuple[Any, str, Any], ...] = (
    (commit, "SMALL_COMMIT_BYTES", 2500),
    (commit, "ROLL_BYTES", 1500),
    (commit, "FULL_TAIL_BYTES", 3000),
    (commit, "ROLL_COMMITS", 6),
    (commit, "ROLL_SEGMENTS", 3),
    (commit, "OBJECT_BYTES", 4096),
    (data, "OBJECT_BYTES", 4096),
    (uploads, "OBJECT_BYTES", 4096),
    (extents, "LEAF_EXTENTS", 3),
    (blockmap, "LEAF_EXTENTS", 3),
    (blockmap, "INLINE_MAP_BYTES", 120),
    (fold, "DUE_SEGMENTS", 2),
    (housekeeping, "COLLECT_EVERY_S", 60.0),
    (housekeeping, "PAUSE_S", 5.0),
)


@dataclass(frozen=True)
class Plan:
    """What a seed means; a shrunk one has less of everything."""

    seed: int
    actors: tuple[str, ...] = ACTORS
    faults: tuple[str, ...] = FAULTS
    rounds: int = 12
    """How often each actor acts."""

    @classmethod
    def of(cls, seed: int) -> Plan:
        rng = Random(f"plan-{seed}")
        others = tuple(actor for actor in ACTORS[2:] if rng.random() < 0.55)
        faults = tuple(fault for fault in FAULTS if rng.random() < 0.45)
        return cls(seed, ACTORS[:2] + others, faults, rng.choice([4, 8, 12, 20]))


@dataclass
class Run:
    """The outcome."""

    plan: Plan
    steps: int = 0
    commits: int = 0
    seconds: float = 0.0
    failure: BaseException | None = None
    trace: list[tuple[float, str, str]] = field(default_factory=list)


class World:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = Random(f"world-{plan.seed}")
        self.kernel = Kernel(plan.seed)
        install(self.kernel)
        self.store = SimulatedStore(self.kernel)
        self.oracle = Oracle(self.kernel, self.store)
        self.networks: list[Network] = []
        self.clients: list[Client] = []
        self.active = 0
        rng = self.rng
        self.config = Config(
            block_size=rng.choice([512, 1024, 4096]),
            lease_s=rng.choice([0.0, 2.0, 10.0]),
            refresh_s=rng.choice([0.0, 0.0, 1.0]),
            retain_s=rng.choice([20.0, 200.0, 3600.0]),
            memory=rng.choice([4096, 1 << 20]),
            cache_size=rng.choice([4096, 1 << 20]),
            only_writer=True,  # the store need not be probed
            spill_dir="/tmp",
            request_deadline_s=5,
            transaction_deadline_s=rng.choice([6.0, 20.0]),
        )

    # --- nodes ------------------------------------------------------------------------------------------

    def node(self, name: str, fair: bool = False) -> tuple[Node, Catalog]:
        node = Node(self.kernel, name)
        weather = {} if fair else {fault: self._likely(fault) for fault in self.plan.faults}
        network = Network(node, self.store, weather, self.plan.seed)
        self.networks.append(network)
        runtime: Any = SimulatedRuntime(node, self.plan.seed, self.oracle.token)
        config = replace(self.config, refresh_s=self.rng.choice([0.0, self.config.refresh_s]))
        catalog = Catalog(network, runtime, config, "")
        catalog._writer = name
        catalog.kind = MountedDatabase  # what a mount adds; an in-process connection does without
        return node, catalog

    def _likely(self, fault: str) -> float:
        often = [0.1, 0.3] if len(self.plan.faults) == 1 else [0.002, 0.01, 0.04]
        return self.rng.choice(often) * (0.1 if fault in ("kill", "torn") else 1)

    def client(self, name: str, node: Node, catalog: Catalog, number: int, in_process: bool) -> Client:
        paths = (*PATHS, OLD) if "foreign" in self.plan.actors else PATHS
        path = self.rng.choice([PATHS[0], *paths])
        rng = Random(f"client-{self.plan.seed}-{name}")
        client = Client(node, self.oracle, catalog, path, number, rng, in_process=in_process)
        client.fresh = catalog._config.refresh_s == 0
        self.clients.append(client)
        return client

    # --- the run ----------------------------------------------------------------------------------------

    def populate(self) -> None:
        """Two machines with clients, of which one may hold two programs; one for each operator."""
        for number, actor in enumerate(self.plan.actors, 1):
            rng = Random(f"actor-{self.plan.seed}-{actor}")
            if actor == "foreign":
                node = Node(self.kernel, actor)
                foreign = Foreign(node, self.store, self.oracle, OLD, rng)
                self._start(node, actor, rng, foreign.write, 5.0)
            elif actor in JOBS:
                node, catalog = self.node(actor)
                operators = Operators(node, self.oracle, catalog, catalog._config, list(PATHS), rng)
                self._start(node, actor, rng, operators.job(actor), 10.0)
            else:
                self._programs(actor, number, rng)

    def _programs(self, actor: str, number: int, rng: Random) -> None:
        node, catalog = self.node(actor)
        in_process = rng.random() < 0.5
        for extra in range(rng.choice([1, 1, 2])):
            client = self.client(f"{actor}-{extra}", node, catalog, number * 10 + extra, in_process)
            if extra and in_process is False:
                client.path = self.clients[-2].path
            self._start(node, f"{actor}-{extra}", rng, lambda client=client: self._act(client, actor), 2.0)

    def _act(self, client: Client, actor: str) -> None:
        dice = client.rng.random()
        try:
            if actor.startswith("reader") or dice < 0.2:
                client.look(client.rng.choice([0.0, 1.0, 40.0]))
            elif dice < 0.25:
                client.close()
            elif dice < 0.33:
                client.overwrite()
            else:
                client.transact()
        except (errors.DatabaseGone, errors.DatabaseNotFound):
            client.close()
            raise

    def _start(self, node: Node, name: str, rng: Random, act: Callable[[], None], pause_s: float) -> None:
        def loop() -> None:
            for _ in range(self.plan.rounds):
                self.kernel.sleep(rng.expovariate(1 / pause_s))
                if rng.random() < 0.02:
                    self.store.jump_s += rng.choice([-50.0, 50.0, 5000.0]) if "late" in self.plan.faults else 0.0
                self._bear(node, act)

        self.active += 1
        task = self.kernel.spawn(node, name, loop)

        def watch() -> None:
            if task in node.tasks:
                self.kernel.at(5.0, watch)
            else:
                self.active -= 1

        self.kernel.at(5.0, watch)

    def _bear(self, node: Node, act: Callable[[], None]) -> bool:
        try:
            act()
        except TOLD as error:
            self.kernel.note(node, f"was told {type(error).__name__}: {error}")
            return False
        return True

    def finish(self) -> None:
        """Fair weather: whoever lives sees the newest states and can commit again; what is kept can be read."""
        for network in self.networks:
            network.weather = {}
            network.node.stopped_until = 0.0
        self.kernel.note(None, "fair weather from here on")
        self._do("wait", lambda: self.kernel.sleep(2000.0))
        for client in self.clients:
            if not client.node.dead:
                self._do("last look", lambda client=client: self._recover(client), client.node)
        node, catalog = self.node("auditor", fair=True)
        operators = Operators(node, self.oracle, catalog, catalog._config, [*PATHS], self.rng)
        for path in [*PATHS, OLD]:
            if self.oracle.history[path]:
                client = Client(node, self.oracle, catalog, path, 999, self.rng, in_process=True)
                client.fresh = True
                self._do(f"audit {path}", lambda client=client: self._audit(client), node)
        for job in (operators.past, operators.past, operators.clean_up, operators.past):
            self._do("audit the past", lambda job=job: self._bear_missing(job), node)

    def _recover(self, client: Client) -> None:
        reason: Exception | None = None
        for _ in range(60):
            try:
                client.look()
                if client.database.is_gone:
                    client.close()
                self.kernel.sleep(10.0)  # longer than any refresh interval
                client.fresh = True
                client.look()
                return
            except (errors.DatabaseGone, errors.DatabaseNotFound):
                client.close()
            except (
                errors.Busy,
                errors.OutcomeUnknown,
                errors.StoreUnavailable,
                errors.DamagedObject,
                errors.TooOld,
            ) as error:
                reason = error
                if client.database.is_gone:  # its past is collected
                    client.close()
                self.kernel.sleep(5.0)
        raise Violation(f"I8: {client.node.name} does not recover in fair weather: {reason}")

    def _audit(self, client: Client) -> None:
        for _ in range(60):
            try:
                client.transact()
                break
            except errors.Busy:
                self.kernel.sleep(5.0)
        else:
            raise Violation(f"I8: nobody can write to {client.path} in fair weather")
        client.look()
        client.close()

    def _bear_missing(self, job: Callable[[], None]) -> None:
        with suppress(errors.DatabaseNotFound, errors.TooOld):
            job()

    def _do(self, name: str, act: Callable[[], None], node: Node | None = None) -> None:
        done: list[bool] = []

        def run() -> None:
            act()
            done.append(True)

        node = node or Node(self.kernel, "director")
        self.kernel.spawn(node, name, run)
        self.kernel.run(until=lambda: bool(done))

    def close(self) -> None:
        for network in self.networks:
            network.node.dead = True
            for task in list(network.node.tasks):
                task.end()


def simulate(plan: Plan) -> Run:
    """One run. What it finds is in `failure`."""
    logging.disable(logging.CRITICAL)
    gc.disable()  # when it runs depends on everything that ran before
    run = Run(plan)
    before = [(module, name, getattr(module, name)) for module, name, _ in LIMITS]
    for module, name, value in LIMITS:
        setattr(module, name, value)
    world = World(plan)
    try:
        world.populate()
        world.kernel.run(until=lambda: world.active == 0)
        world.finish()
    except Exception as error:  # noqa: BLE001  whatever it is, it is what was looked for
        run.failure = error
    finally:
        world.close()
        for module, name, value in before:
            setattr(module, name, value)
        gc.enable()
        gc.collect()
        logging.disable(logging.NOTSET)
    run.steps, run.commits, run.seconds = world.kernel.steps, world.oracle.commits, world.kernel.now
    run.trace = world.kernel.trace
    return run


__all__ = ["ACTORS", "Intent", "Plan", "Run", "World", "simulate"]
