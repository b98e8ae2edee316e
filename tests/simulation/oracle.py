"""What must hold, checked at every change that the store carries out and at everything that a client is told.

It knows each committed state: the bytes that the client wanted (its *intent*), compared with what a fresh reader finds
in the store at the moment when a head with that commit is stored. Invariants: I1 to I6 of docs/DURABILITY.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from greenlet import GreenletExit

from s3blockfs import errors, header
from s3blockfs.cache import BlockCache
from s3blockfs.format import extents as map_codec
from s3blockfs.format import head as codec
from s3blockfs.format.head import Head
from s3blockfs.format.keys import rev_of
from s3blockfs.snapshot import Snapshot, Source, Version
from simulation.kernel import Kernel, Node, Task, Violation
from simulation.network import SimulatedStore

#: As long as the longest lease here, and some more.
LEASED_S = 15.0

#: (prefix, database id, commit id)
StateKey = tuple[str, bytes, bytes]


def masked(content: bytes) -> bytes:
    """The engine sets the change counter."""
    return header.without_counter(0, content)


@dataclass
class Intent:
    """What somebody asked for, and what he was told."""

    kind: str
    node: str
    prefix: str
    allows: Callable[[bytes], bool]
    base: tuple[bytes, bytes] | None = None
    """(database id, commit id) of the state that it replaces, where it may replace no other one."""
    leased: bool = False
    told: str = "nothing yet"
    applied: list[StateKey] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kind} by {self.node} on {self.prefix} (told: {self.told})"


@dataclass
class State:
    content: bytes
    seq: int
    index: int


class Oracle:
    """One per run."""

    def __init__(self, kernel: Kernel, store: SimulatedStore) -> None:
        self._kernel, self._store = kernel, store
        self.states: dict[StateKey, State] = {}
        self.by_commit: dict[bytes, State] = {}
        self.history: dict[str, list[StateKey | None]] = defaultdict(list)
        """What each prefix held, one after the other; None: a tombstone."""
        self.acknowledged: dict[str, int] = defaultdict(lambda: -1)
        """The index in `history` of the newest change that somebody was told of."""
        self.unleased_s: dict[str, float] = defaultdict(lambda: -1e9)
        """When somebody last replaced a database without the lease: copy, restore, `cp`."""
        self.foreign: dict[str, list[bytes]] = defaultdict(list)
        """Every state that sqlite-s3vfs has begun to write."""
        self.intents: list[Intent] = []
        self._by_token: dict[bytes, Intent] = {}
        self._bodies: set[bytes] = set()
        self.commits = 0
        store.watcher = self

    # --- what clients tell ------------------------------------------------------------------------------

    def token(self, token: bytes, task: Task | None) -> None:
        """Names are drawn by the task that wants something: a commit id tells whose commit it is."""
        if task is not None and task.intent is not None:
            self._by_token[token] = task.intent

    @contextmanager
    def intending(self, intent: Intent, sure: bool = True) -> Iterator[Intent]:
        """Something is asked for. Checks what comes of it (invariant I3). Not `sure`: errors may leave it done."""
        task = self._kernel.current
        assert task is not None
        self.intents.append(intent)
        before, task.intent = task.intent, intent
        try:
            yield intent
        except GreenletExit:
            intent.told = "unknown: died"
            raise
        except errors.OutcomeUnknown:
            intent.told = "unknown"
            raise
        except (errors.S3BlockFSError, OSError) as error:
            intent.told = f"failed: {type(error).__name__}: {error}" if sure else "unknown: in part"
            if intent.applied and sure:
                raise Violation(f"I3: it was done, and yet: {intent}") from error
            raise
        else:
            intent.told = "done"
            if not intent.applied and intent.kind != "rollback":
                raise Violation(f"I3: nothing was done, and yet: {intent}")
            for prefix, *_ in intent.applied:
                self.acknowledged[prefix] = max(self.acknowledged[prefix], self._index(intent.applied[-1]))
        finally:
            task.intent = before

    def expect(self, prefix: str, head: Head, newer_than: int | None) -> State | None:
        """The state that this head shows, to somebody who was promised nothing older than an index; None: whatever
        sqlite-s3vfs stored. A Violation if there never was such a state, or it is too old."""
        if head.rev == 0:
            return None
        found = self.states.get((prefix, head.id, head.commit))
        if found is None:
            raise Violation(f"I4: {prefix}: a state is shown that was never committed, seq {head.seq}")
        # Who holds the lease does not look for what was put there without one (docs/SEMANTICS.md).
        quiet = self._kernel.now - self.unleased_s[prefix] > LEASED_S
        if newer_than is not None and found.index < newer_than and quiet:
            raise Violation(f"{prefix}: shows state {found.index}, but {newer_than} had been acknowledged before")
        return found

    # --- what the store tells ---------------------------------------------------------------------------

    def stored(self, key: str, old: bytes | None, new: bytes) -> None:
        prefix, _, name = key.rpartition("/")
        if name == "head":
            self._head(prefix, old, new)
        elif old is not None and old != new and not re.fullmatch(r".*/\d{10}", key):
            raise Violation(f"I6: {key} was overwritten")

    def deleted(self, key: str) -> None:
        prefix = re.sub(r"/(data|map|archive)/.*|/head|/\d{10}", "", key)
        if key.endswith("/head"):
            raise Violation(f"I1: {key} was deleted")
        body = self._store.raw(f"{prefix}/head")
        if body is not None and key in self._needed(prefix, codec.decode(body, key)):
            raise Violation(f"I5: {key} was deleted, and something needs it")

    def _head(self, prefix: str, old: bytes | None, new: bytes) -> None:
        head = codec.decode(new, prefix)
        before = None if old is None else codec.decode(old, prefix)
        self._check_succession(prefix, before, head, new)
        needed = self._needed(prefix, head)
        missing = [key for key in needed if self._store.raw(key) is None]
        if missing:
            raise Violation(f"I2: {prefix}: a head needs {missing[0]}, which is not there")
        if before is not None and before.rev > head.floor and not self._refers(prefix, before) <= needed:
            raise Violation(f"I5: {prefix}: what commit {before.seq} needs was dropped and not archived")
        same = before is not None and (before.id, before.commit, before.deleted) == (head.id, head.commit, head.deleted)
        if same:
            known = self.states.get((prefix, head.id, head.commit))
            if known is not None and not head.deleted and known.content != self.read(prefix, head):
                raise Violation(f"I4: {prefix}: commit {head.seq} has other bytes after a swap that was no commit")
        elif head.deleted:
            self._buried(prefix, head)
        else:
            self._committed(prefix, before, head)

    def _check_succession(self, prefix: str, before: Head | None, head: Head, body: bytes) -> None:
        if body in self._bodies:
            raise Violation(f"I1: {prefix}: the same head twice")
        self._bodies.add(body)
        if before is None:
            return
        if head.rev != before.rev + 1 or head.floor < before.floor:
            raise Violation(f"I1: {prefix}: rev {before.rev}, {head.rev}; floor {before.floor}, {head.floor}")
        if (head.commit == before.commit) != (head.seq == before.seq) or head.seq < before.seq:
            raise Violation(f"I1: {prefix}: seq {before.seq}, {head.seq}")

    def _committed(self, prefix: str, before: Head | None, head: Head) -> None:
        content = self.read(prefix, head)
        key, history = (prefix, head.id, head.commit), self.history[prefix]
        if key in self.states:
            raise Violation(f"{prefix}: commit {head.seq} was applied again over others")
        intent = self._by_token.get(head.commit)
        if intent is not None:
            self._check_intent(intent, prefix, before, content)
            intent.applied.append(key)
        elif head.id != head.commit or masked(content) not in map(masked, self.foreign[prefix]):  # no conversion
            raise Violation(f"I3: {prefix}: nobody asked for commit {head.seq}, by {head.writer}")
        last = self.states.get(history[-1]) if history and history[-1] else None
        if last is not None and header.is_database(content) and header.is_database(last.content):
            expected = (header.counter(last.content) + 1) & 0xFFFFFFFF
            if header.counter(content) != expected:
                raise Violation(f"{prefix}: commit {head.seq}: SQLite would not notice it (change counter)")
        self.commits += 1
        if intent is not None and not intent.leased:
            self.unleased_s[prefix] = self._kernel.now
        self.states[key] = self.by_commit[head.commit] = State(content, head.seq, len(history))
        history.append(key)

    def _check_intent(self, intent: Intent, prefix: str, before: Head | None, content: bytes) -> None:
        if prefix != intent.prefix:
            raise Violation(f"{intent} became a commit on {prefix}")
        if intent.told.startswith("failed"):
            raise Violation(f"I3: it was done after all: {intent}")
        if intent.base is not None and (before is None or (before.id, before.commit) != intent.base):
            raise Violation(f"{intent} was not based on what it replaced: a lost update")
        if not intent.allows(content):
            raise Violation(f"I4: {intent}: what was committed is not what was written")

    def _buried(self, prefix: str, head: Head) -> None:
        intents = [i for i in self.intents if i.prefix == prefix and i.kind == "delete" and i.node == head.writer]
        open_ = [intent for intent in intents if not intent.applied and not intent.told.startswith("failed")]
        if not open_:
            raise Violation(f"I3: {prefix}: nobody asked for its deletion by {head.writer}")
        open_[-1].applied.append((prefix, head.id, head.commit))
        self.history[prefix].append(None)
        self.unleased_s[prefix] = self._kernel.now

    def _index(self, key: StateKey) -> int:
        found = self.states.get(key)
        return -1 if found is None else found.index

    # --- looking into the store without asking it -------------------------------------------------------

    def read(self, prefix: str, head: Head) -> bytes:
        """All bytes of a state, by a reader that knows nothing. Damage here is a violation, too."""
        try:
            source = self.source(prefix)
            return Snapshot.load(source, Version(head, "")).read(0, head.size)
        except errors.S3BlockFSError as error:
            raise Violation(f"I2: {prefix}: commit {head.seq} cannot be read: {error}") from error

    def source(self, prefix: str) -> Source:
        clock: Any = self._store
        store: Any = _Direct(self._store)
        cache = BlockCache(store, _Inline(clock), 1 << 20, 10)  # type: ignore[arg-type]
        return Source(store, cache, _Inline(clock), prefix)  # type: ignore[arg-type]

    def _needed(self, prefix: str, head: Head) -> set[str]:
        """Keys of everything that a head and its roots refer to, the roots included."""
        pinned = {snapshot.archive for snapshot in head.snapshots}
        needed = self._refers(prefix, head) | pinned
        for key in self._store.names():
            rev = rev_of(prefix, key)
            if "/archive/" in key and rev is not None and (key in pinned or head.floor < rev < head.rev):
                body = self._store.raw(key)
                assert body is not None
                needed |= self._refers(prefix, codec.decode(body, key)) | {key}
        return needed

    def _refers(self, prefix: str, head: Head) -> set[str]:
        keys = {segment.ref.key(prefix) for segment in head.segments}
        found = list(head.extents)
        for leaf in head.leaves:
            keys.add(leaf.key(prefix))
            body = self._store.raw(leaf.key(prefix))
            if body is not None:
                found.extend(map_codec.decode(body, prefix))
        return keys | {extent.ref.key(prefix) for extent in found}


class _Direct:
    """The store without the way to it."""

    def __init__(self, store: SimulatedStore) -> None:
        self._store = store
        self.name = store.name

    def get(self, key: str, **options: Any) -> Any:
        options.pop("site", None)
        return self._store.get(key, **options)


class _Inline:
    """A runtime for readers that never wait."""

    def __init__(self, store: SimulatedStore) -> None:
        self.monotonic = store.monotonic

    def submit(self, function: Callable[[], Any]) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        try:
            future.set_result(function())
        except errors.S3BlockFSError as error:
            future.set_exception(error)
        return future


__all__ = ["Intent", "Node", "Oracle", "masked"]
