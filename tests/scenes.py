"""Helpers for tests of one open database: a scene with a machine, its processes, and other machines."""

from __future__ import annotations

import random

from engine import Call, Process, World, sqlite_page

from s3blockfs.catalog import Catalog
from s3blockfs.database import Database
from s3blockfs.errors import StoreUnavailable

PREFIX = "a.db"
PAGE = 4096


def state(number: int, pages: int = 3) -> bytes:
    """A whole database file, another one for each number."""
    rest = random.Random(number).randbytes((pages - 1) * PAGE)
    return sqlite_page(number, pages, number) + rest


def without_counters(content: bytes) -> bytes:
    return content[:24] + content[28:92] + content[96:]


def same(content: bytes, expected: bytes) -> bool:
    """The engine sets the change counter."""
    return without_counters(content) == without_counters(expected)


class Scene:
    """One database with three pages in state 1, opened by a machine."""

    def __init__(self, world: World, kind: type[Database] = Database, **changes: object) -> None:
        self.world = world
        self.machine: Catalog = world.machine(**changes)
        self.machine.kind = kind
        self.database: Database = self.machine.create(PREFIX, exclusive=True)
        self.database.write(0, state(1))
        self.database.close_handle(0)
        self.moves = 0
        self.database.on_moved = self._count_move
        world.store.calls.clear()

    def _count_move(self) -> None:
        self.moves += 1

    def process(self, pid: int) -> Process:
        return Process(self.machine, self.database, pid)

    def shown(self) -> bytes:
        return self.database.read(0, self.database.size)

    def published(self, number: int, pages: int = 3) -> bool:
        return same(self.world.content(), state(number, pages))

    def commit_elsewhere(self, number: int, pages: int = 3) -> None:
        other = self.world.machine(faulty=False)
        database = other.open(PREFIX)
        database.write(0, state(number, pages))
        database.truncate(pages * PAGE)
        database.close_handle(0)

    def swaps(self) -> int:
        return self.world.store.count("PUT", "swap")


def store_down(world: World) -> None:
    def rule(call: Call, when: str) -> None:
        raise StoreUnavailable("the store is down")

    world.store.rule = rule


def lose_next_commit(scene: Scene) -> None:
    """Somebody else commits state 9 just before the next swap arrives."""

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            scene.world.store.rule = None
            scene.commit_elsewhere(9)

    scene.world.store.rule = rule


LEASE_S = 10.0


class Writer:
    """One machine with the database open, and a process on it."""

    def __init__(self, world: World, pid: int, kind: type[Database] = Database, **changes: object) -> None:
        self.world = world
        self.machine = world.machine(lease_s=LEASE_S, refresh_s=0.0, **changes)
        self.machine.kind = kind
        self.database = self.machine.create("a.db", exclusive=False)
        self.process = Process(self.machine, self.database, pid)

    def begin(self) -> None:
        """BEGIN IMMEDIATE; what was locked is given up when it fails, as SQLite does."""
        self.process.shared()
        try:
            self.process.reserved()
        except Exception:
            self.process.unlock()
            raise
        self.process.write_journal()
        self.process.exclusive()

    def commit(self, number: int) -> None:
        self.database.write(0, state(number))
        self.process.commit()

    def write(self, number: int) -> None:
        self.begin()
        self.commit(number)
