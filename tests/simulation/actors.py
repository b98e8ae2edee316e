"""Everybody but SQLite's clients: folder, collector, renamer, deleter, restorer, reader of the past, sqlite-s3vfs.

What they are told of errors they bear, as an operator would.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from engine import build_journal

from s3blockfs import errors, gc, header, history
from s3blockfs.catalog import Catalog
from s3blockfs.config import Config
from s3blockfs.fold import fold
from s3blockfs.housekeeping import clean_up
from simulation.clients import MOST_PAGES, first_page
from simulation.kernel import Node, Violation
from simulation.network import SimulatedStore
from simulation.oracle import Intent, Oracle, State, StateKey, masked


class Operators:
    """The jobs of one node that is no client."""

    def __init__(self, node: Node, oracle: Oracle, catalog: Catalog, config: Config, paths: list[str], rng: Random):
        self.node, self.oracle, self.catalog, self.config = node, oracle, catalog, config
        self.paths, self.rng = paths, rng
        self.labels = 0

    def job(self, name: str) -> Callable[[], None]:
        found: Callable[[], None] = getattr(self, name)
        return found

    def _path(self) -> str:
        return self.rng.choice(self.paths)

    # --- housekeeping -----------------------------------------------------------------------------------

    def fold(self) -> None:
        source, heads = self.catalog.at(self._path())
        version = heads.stored()
        if version is not None and not version.head.deleted:
            last = version.head.size // version.head.block_size
            extra = {self.rng.randrange(last + 1) for _ in range(3)} if self.rng.random() < 0.3 else ()
            fold(source, heads, self.config, version, extra)

    def collect(self) -> None:
        """Also right after a swap that was no commit, so that uploads of somebody's open transaction are let go."""
        path = self._path()
        source, heads = self.catalog.at(path)
        if self.rng.random() < 0.5:
            self.keep(path)
        gc.collect(source, heads, self.rng.choice([0.0, 0.0, 5.0, 60.0, 600.0]))

    def clean_up(self) -> None:
        source, heads = self.catalog.at(self._path())
        clean_up(source, heads, self.config)

    # --- names and the past -----------------------------------------------------------------------------

    def delete(self) -> None:
        path = self._path()
        with self.oracle.intending(Intent("delete", self.node.name, path, lambda content: False)) as intent:
            try:
                self.catalog.remove(path)
            except errors.DatabaseNotFound:  # it is gone: whether it was by this tombstone cannot be told, nor matters
                intent.kind = "rollback"

    def rename(self) -> None:
        """The bytes of one become those of another, or both stay."""
        old, new = self.rng.sample(self.paths, 2)
        moved = self._arrival("rename", new, old, new)  # it may be put back
        begun = len(self.oracle.history[old])
        last = self.oracle.history[old][-1] if begun else None
        moved_id = last and last[1]
        with (
            self.oracle.intending(Intent("delete", self.node.name, old, lambda content: False), sure=False) as buried,
            self.oracle.intending(Intent("delete", self.node.name, new, lambda content: False), sure=False) as undone,
            self.oracle.intending(moved, sure=False),
        ):
            self.catalog.rename(old, new)
            buried.kind = undone.kind = "rollback"  # others may have deleted it, and nothing had to be put back
        # None: by this tombstone or another one. Or somebody has put another database there meanwhile.
        if not any(state is None or state[1] != moved_id for state in self.oracle.history[old][begun:]):
            raise Violation(f"I3: {old} was renamed to {new}, and is still there")

    def copy(self) -> None:
        old, new = self.rng.sample(self.paths, 2)
        with self.oracle.intending(self._arrival("copy", new, old)):
            self.catalog.copy(old, new, overwrite=True)

    def restore(self) -> None:
        path = self._path()
        source, heads = self.catalog.at(path)
        known = history.commits(source, heads)
        seq = self.rng.choice(known).seq
        # A copy brings numbers of its source along; one may stand for that once the older commit is collected.
        wanted = {masked(state.content) for state in self.oracle.by_commit.values() if state.seq == seq}
        with self.oracle.intending(Intent("restore", self.node.name, path, lambda found: masked(found) in wanted)):
            self.catalog.copy(path, path, overwrite=True, at=seq)

    def keep(self, path: str | None = None) -> None:
        """Name a state, or let one go."""
        source, heads, version = self.catalog.find(path or self._path())
        labels = [snapshot.label for snapshot in version.head.snapshots]
        if labels and self.rng.random() < 0.5:
            history.forget(source, heads, version, self.rng.choice(labels))
        else:
            self.labels += 1
            history.keep(source, heads, heads.convert(version), f"{self.node.name}-{self.labels}")

    def past(self) -> None:
        """Whatever is said to be kept is what was committed then, perhaps under another name before a copy."""
        path = self._path()
        source, heads = self.catalog.at(path)
        known = history.commits(source, heads)
        for commit in self.rng.sample(known, min(3, len(known))):
            snapshot = history.open_at(source, heads, commit.seq)
            content = snapshot.read(0, snapshot.head.size)
            state = self.oracle.by_commit.get(snapshot.head.commit)  # after a copy over it the number means another one
            if state is None or content != state.content:
                raise Violation(f"I4: {path}: commit {commit.seq}, opened later, has other bytes")

    def _of(self, path: str) -> list[tuple[StateKey, State]]:
        return [(key, state) for key, state in self.oracle.states.items() if key[0] == path]

    def _states(self, path: str) -> set[bytes]:
        return {masked(state.content) for _, state in self._of(path)}

    def _arrival(self, kind: str, new: str, *of: str) -> Intent:
        """A state that one of these has had by then."""

        def allows(content: bytes) -> bool:
            return any(masked(content) in self._states(path) for path in of)

        return Intent(kind, self.node.name, new, allows)


class Foreign:
    """sqlite-s3vfs: one PUT for a page, no conditions, no locks; its journal lies in the store as well. It dies now
    and then, and stops for good when it finds that its database is none any more."""

    def __init__(self, node: Node, store: SimulatedStore, oracle: Oracle, path: str, rng: Random) -> None:
        self.node, self.store, self.oracle, self.path, self.rng = node, store, oracle, path, rng
        self.page = 512
        self.content = first_page(512, 3, 1, 1) + b"\2" * 1024
        oracle.foreign[path].append(self.content)
        for number in range(3):
            store.put(f"{path}/{number:010d}", self._block(self.content, number))

    def write(self) -> None:
        """A transaction of that library, which is the only one of its kind at a time."""
        rng, old, page = self.rng, self.content, self.page
        if self.store.raw(f"{self.path}/head") is not None:
            return
        counter = header.counter(old) + 1
        pages = max(1, min(MOST_PAGES, len(old) // page + rng.randrange(-1, 3)))
        body = bytearray(old[page:].ljust((pages - 1) * page, b"\1")[: (pages - 1) * page])
        for _ in range(2):
            if pages > 1:
                at = rng.randrange(pages - 1) * page
                body[at : at + page] = bytes([rng.randrange(4)]) * page
        new = first_page(page, pages, counter, rng.randrange(4)) + bytes(body)
        self.oracle.foreign[self.path] += [new, new + old[len(new) :]]  # SQLite cuts the file after its commit point
        log = build_journal(old, page)
        journal = [log[at : at + page] for at in range(0, len(log), page)]
        for number, block in enumerate(journal):
            self._pause()
            self.store.put(f"{self.path}-journal/{number:010d}", block)
        for number in range(pages):
            if self._block(new, number) != self._block(old, number):
                self._pause()
                self.store.put(f"{self.path}/{number:010d}", self._block(new, number))
        for number in range(len(journal)):
            self._pause()
            self.store.delete([f"{self.path}-journal/{number:010d}"])
        for number in range(pages, len(old) // page):
            self._pause()
            self.store.delete([f"{self.path}/{number:010d}"])
        self.content = new

    def _block(self, content: bytes, number: int) -> bytes:
        return content[number * self.page : (number + 1) * self.page]

    def _pause(self) -> None:
        self.node.kernel.sleep(self.rng.expovariate(20))
        if self.rng.random() < 0.005:
            self.node.kill()
