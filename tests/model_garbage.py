"""A small model of what is stored and deleted: uploads, references, archives, the floor (fold.py, gc.py, transfer.py).

Writers, a folder, removers, restorers and collectors run programs of jobs, each cut into the requests that it makes;
everybody may stall or die between two of them, and swaps may arrive late. (What callers are told of their swaps is
model_outcomes.py's business: here a swap that is in doubt ends its job.)

Properties, in every state: all that the head and its roots refer to is there, and is what was uploaded for them (I2,
I5, I6); so is what any head above the floor refers to, so that no reader of one misses an object (I4); the head shows
its own commits, all of them and no others, whatever was folded (I3, I4); rev counts, floor never falls (I1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

#: Each of these can be left out.
RULES = frozenset({
    "objects are stored before the swap",
    "a commit's uploads are above the floor",
    "a fold's uploads are above the floor",
    "a fold finds the segments that it read",
    "a fold leaves newer blocks alone",
    "a fold needs its base's database",
    "what is restored is above the floor",
    "a head is archived before its references are dropped",
    "archives above the floor are roots",
    "roots are listed after the floor was raised",
    "only what is not above the floor is deleted",
    "the floor is raised by a swap",
    "nobody but a collector deletes uploads",
    "names are never used again",
    "named snapshots are roots",
    "a snapshot is named above the floor",
    "deletion leaves a tombstone",
})  # fmt: skip


class Ref(NamedTuple):
    """An object with its name (rev, maker), its place in the log or in the map, and the commits whose bytes it has. A
    `cut` is the record of a commit that emptied the file: it masks what is older. (In truth it needs no object.)"""

    rev: int
    maker: str
    seq: int
    holds: frozenset[str] = frozenset()
    log: bool = False
    cut: bool = False

    def __str__(self) -> str:
        return f"{self.maker}@{self.rev}"


class Head(NamedTuple):
    rev: int
    database: str
    commit: str
    seq: int
    floor: int = 0
    deleted: bool = False
    refs: frozenset[Ref] = frozenset()
    past: frozenset[str] = frozenset()
    """The commits that it has to show; for the properties only."""
    nonce: str = ""
    snapshots: frozenset[Any] = frozenset()
    """The archives that have names."""

    def __str__(self) -> str:
        refs = " ".join(sorted(map(str, self.refs)))
        named = f" snapshots {_names(self.snapshots)}" if self.snapshots else ""
        what = "tombstone" if self.deleted else self.database
        return f"[rev {self.rev} floor {self.floor} {what}: {refs or '-'}{named}]"


class Put(NamedTuple):
    condition: Head | None
    head: Head
    job: str


class Actor(NamedTuple):
    number: int
    job: int = 0
    phase: str = "idle"
    base: Head | None = None
    current: Head | None = None
    upload: Ref | None = None
    source: Head | None = None  # what is restored
    head: Head | None = None
    listed: frozenset[Ref | Head] = frozenset()
    roots: frozenset[Head] = frozenset()

    @property
    def name(self) -> str:
        return f"{'ABCD'[self.number]}{self.job}"


class State(NamedTuple):
    head: Head | None
    objects: frozenset[Ref]
    actors: tuple[Actor, ...]
    faults: int
    archives: frozenset[Head] = frozenset()
    wire: frozenset[Put] = frozenset()
    shown: frozenset[tuple[int, frozenset[Ref]]] = frozenset()
    """The heads that readers may have, above the floor: (rev, references)."""
    wrong: str = ""


Steps = Iterator[tuple[str, State]]


class Garbage:
    """`programs`: each actor's jobs; `faults`: how many swaps may be in doubt; `without`: a rule that is left out."""

    def __init__(self, programs: tuple[tuple[str, ...], ...], faults: int, without: str = "") -> None:
        assert not without or without in RULES, without
        self._programs, self._without = programs, without
        refs = frozenset({Ref(0, "x", 1, frozenset({"x"})), Ref(0, "y", 2, frozenset({"y"}), log=True)})
        head = Head(1, "X", "y", 2, refs=refs, past=frozenset({"x", "y"}))
        actors = tuple(map(Actor, range(len(programs))))
        self.initial = State(head, head.refs, actors, faults, shown=frozenset({(1, head.refs)}))

    def _has(self, rule: str) -> bool:
        assert rule in RULES, rule
        return rule != self._without

    # --- what may happen next --------------------------------------------------------------------------------

    def steps(self, state: State) -> Steps:
        for actor in state.actors:
            if actor.job < len(self._programs[actor.number]):
                for what, after in getattr(self, f"_{actor.phase}")(state, actor):
                    yield f"{actor.name} {self._kind(actor)}: {what}", self._judged(after)
        for put in sorted(state.wire, key=lambda put: put.job):
            after = self._arrives(state._replace(wire=state.wire - {put}), put)
            if after is not None:
                yield f"store: the delayed PUT {put.head} of {put.job} is applied", self._judged(after)

    def _idle(self, state: State, actor: Actor) -> Steps:
        """The head that the job starts from is read; for a restore an archive, too (history.open_at)."""
        kind, head = self._kind(actor), state.head
        live = head is not None and not head.deleted
        if live == (kind == "create") and not (kind == "collect" and head is not None):
            return
        read = actor._replace(base=head, current=head, phase="make")
        if kind == "restore":
            for archive in sorted(state.archives, key=lambda archive: archive.rev):
                if head is not None and (head.floor < archive.rev < head.rev or archive in head.snapshots):
                    yield f"reads {head} and {archive}", _with(state, read._replace(source=archive))
        else:
            uploads = kind in ("commit", "cut", "bulk") or (kind == "fold" and head is not None and _shows(head.refs))
            phase = {"collect": "list", "name": "keep"}.get(kind, "upload" if uploads else "make")
            yield f"reads {head}", _with(state, read._replace(phase=phase))

    def _upload(self, state: State, actor: Actor) -> Steps:
        """uploads.py: named after the head that was read. A fold merges the bytes of all that it read."""
        base, kind = actor.base, self._kind(actor)
        assert base is not None
        if kind == "fold":
            upload = Ref(base.rev, actor.name, base.seq, _shows(base.refs))
        else:
            holds = frozenset() if kind == "cut" else frozenset({actor.name})
            upload = Ref(base.rev, actor.name, base.seq + 1, holds, log=kind != "bulk", cut=kind == "cut")
        if kind == "fold" and not base.refs <= state.objects:  # TooOld
            yield "misses an object, and gives up", _next(state, actor)
        elif self._has("objects are stored before the swap"):
            yield f"uploads {upload}", _with(self._stores(state, upload), actor._replace(upload=upload, phase="make"))
        else:
            yield f"makes {upload}", _with(state, actor._replace(upload=upload, phase="make"))

    def _keep(self, state: State, actor: Actor) -> Steps:
        """history.keep: an archive of its own."""
        assert actor.base is not None
        kept = actor.base._replace(nonce=f"{actor.name} kept")
        after = state._replace(archives=state.archives | {kept})
        yield f"archives rev {kept.rev}", _with(after, actor._replace(source=kept, phase="make"))

    def _make(self, state: State, actor: Actor) -> Steps:
        """`swap` asks for the new head, and archives the one that it replaces if that loses a reference."""
        if actor.current is not None and (refusal := self._refusal(actor, actor.current)):
            yield f"{refusal}, so gives up", _next(self._cleans(state, actor), actor)
            return
        for head in self._heads(actor):
            old = actor.current
            drops = old is not None and not (old.refs <= head.refs and old.snapshots <= head.snapshots)
            archives = drops and self._has("a head is archived before its references are dropped")
            yield f"makes {head}", _with(state, actor._replace(head=head, phase="archive" if archives else "put"))

    def _archive(self, state: State, actor: Actor) -> Steps:
        assert actor.current is not None
        after = state._replace(archives=state.archives | {actor.current})
        yield f"archives rev {actor.current.rev}", _with(after, actor._replace(phase="put"))

    def _put(self, state: State, actor: Actor) -> Steps:
        """One swap: applied; refused, so it starts again from what is there; or in doubt, and on its way."""
        assert actor.head is not None
        put = Put(actor.current, actor.head, actor.name)
        applied = self._arrives(state, put)
        if applied is None:
            again = actor._replace(phase="make", current=state.head, head=None)
            yield f"swap; 412, {state.head} is there", _with(state, again) if state.head else _next(state, actor)
            return
        if self._kind(actor) == "collect":
            yield "swap; 200", _with(applied, actor._replace(phase="roots", base=actor.head))
        elif self._has("objects are stored before the swap") or actor.upload is None:
            yield "swap; 200", _next(applied, actor)
        else:
            yield "swap; 200, and then uploads", _next(self._stores(applied, actor.upload), actor)
        if state.faults:
            late = state._replace(faults=state.faults - 1, wire=state.wire | {put})
            yield "swap, on its way; time-out", _next(self._cleans(late, actor), actor)

    # --- gc.collect ------------------------------------------------------------------------------------------

    def _list(self, state: State, actor: Actor) -> Steps:
        """What may be garbage; then the floor is raised, if the retention says so."""
        base = actor.base
        assert base is not None
        listed: frozenset[Ref | Head] = state.objects | state.archives
        actor = actor._replace(listed=listed, roots=state.archives)
        yield f"lists {_names(listed)}", _with(state, actor._replace(phase="roots"))
        if not base.deleted:
            for floor in range(base.floor + 1, base.rev):
                if self._has("the floor is raised by a swap"):
                    raised = actor._replace(head=base._replace(floor=floor), phase="raise")
                else:
                    raised = actor._replace(base=base._replace(floor=floor), phase="roots")
                yield f"lists {_names(listed)}, and wants the floor at {floor}", _with(state, raised)

    def _raise(self, state: State, actor: Actor) -> Steps:
        assert actor.head is not None
        floor = actor.head.floor
        yield f"raises the floor to {floor}", _with(state, actor._replace(phase="make", source=actor.head, head=None))

    def _roots(self, state: State, actor: Actor) -> Steps:
        """history.roots: a LIST of the archives after the head was read or swapped in."""
        roots = state.archives if self._has("roots are listed after the floor was raised") else actor.roots
        yield f"lists archives {_names(roots)}", _with(state, actor._replace(phase="mark", roots=roots))

    def _mark(self, state: State, actor: Actor) -> Steps:
        """Reads the roots; what is unreachable and old enough is dead."""
        base = actor.base
        assert base is not None
        roots = {r for r in actor.roots if base.floor < r.rev < base.rev}
        if not self._has("archives above the floor are roots"):
            roots = set()
        if self._has("named snapshots are roots"):
            roots |= base.snapshots
        if not roots <= state.archives:
            yield "misses an archive, and gives up", _next(state, actor)
            return
        needed = base.refs.union(*(root.refs for root in roots))
        above = base.rev if not self._has("only what is not above the floor is deleted") else base.floor
        dead = frozenset(e for e in actor.listed if e.rev <= above and e not in needed and e not in roots)
        swept = actor._replace(phase="sweep", listed=dead, roots=frozenset())
        yield f"needs {_names(needed)}; dead: {_names(dead)}", _with(state, swept) if dead else _next(state, actor)

    def _sweep(self, state: State, actor: Actor) -> Steps:
        """Deletes one of them. (In what order is the store's business, and some may fail.)"""
        for entry in sorted(actor.listed, key=str):
            left = actor._replace(listed=actor.listed - {entry})
            after = state._replace(objects=state.objects - {entry}, archives=state.archives - {entry})  # type: ignore[operator]
            yield f"deletes {_names({entry})}", _with(after, left) if left.listed else _next(after, actor)

    # --- the rules -------------------------------------------------------------------------------------------

    def _refusal(self, actor: Actor, replaced: Head) -> str:
        """`_require_may_replace`, and what the callers' `make` refuses."""
        kind, base, upload = self._kind(actor), actor.base, actor.upload
        assert base is not None
        if kind == "create":
            return "" if replaced.deleted else "somebody created it first"
        if replaced.deleted:
            return "deleted"
        if replaced.database != base.database and (kind != "fold" or self._has("a fold needs its base's database")):
            return "another database"
        if kind in ("commit", "cut", "bulk", "restore") and replaced.commit != base.commit:
            return "somebody committed first"
        if upload is not None and upload.rev <= replaced.floor:
            whose = "a fold's" if kind == "fold" else "a commit's"
            return "its upload may be garbage" if self._has(f"{whose} uploads are above the floor") else ""
        if kind == "fold" and not _log(base.refs) <= replaced.refs:
            return "others folded" if self._has("a fold finds the segments that it read") else ""
        source = actor.source
        if kind == "name" and source is not None and source.rev <= replaced.floor:
            return "took too long" if self._has("a snapshot is named above the floor") else ""
        named = [snapshot.rev for snapshot in replaced.snapshots]
        if kind == "restore" and source is not None and source.rev <= replaced.floor and source.rev not in named:
            return "took too long" if self._has("what is restored is above the floor") else ""
        return ""

    def _heads(self, actor: Actor) -> Iterator[Head]:
        kind, me, old = self._kind(actor), actor.name, actor.current
        if old is None:
            yield Head(1, me, me, 1, nonce=me)
            return
        new, base = old._replace(rev=old.rev + 1, nonce=me), actor.base
        upload = frozenset({actor.upload}) if actor.upload else frozenset()
        shown = frozenset().union(*(ref.holds for ref in upload))
        if kind in ("commit", "cut"):
            past = old.past | shown if kind == "commit" else shown
            yield new._replace(commit=me, seq=old.seq + 1, refs=old.refs | upload, past=past)
        elif kind == "bulk":  # every byte anew
            yield new._replace(commit=me, seq=old.seq + 1, refs=_log(old.refs) | upload, past=shown)
        elif kind == "fold" and base is not None:  # the log up to base.seq goes; the newer block wins
            newer = frozenset(ref for ref in old.refs if ref.seq > base.seq)
            if not self._has("a fold leaves newer blocks alone"):
                newer = _log(newer)
            yield new._replace(refs=newer if newer - _log(newer) else newer | upload)
        elif kind == "restore" and actor.source is not None:  # in place: nothing is copied
            refs, past = actor.source.refs, actor.source.past
            yield new._replace(database=me, commit=me, seq=old.seq + 1, refs=refs, past=past)
        elif kind == "delete":
            none = frozenset[Any]()
            yield new._replace(deleted=True, refs=none, past=none, snapshots=none, floor=old.rev)
        elif kind == "create":
            yield new._replace(database=me, commit=me, seq=old.seq + 1, deleted=False)
        elif kind == "name":
            yield new._replace(snapshots=old.snapshots | {actor.source})
        elif kind == "forget":
            yield new._replace(snapshots=frozenset())
        elif kind == "collect" and actor.source is not None:
            yield new._replace(floor=max(old.floor, actor.source.floor))

    # --- the store, and the properties -----------------------------------------------------------------------

    def _kind(self, actor: Actor) -> str:
        return self._programs[actor.number][actor.job]

    def _stores(self, state: State, upload: Ref) -> State:
        """A PUT without a condition: it would overwrite what has the same name."""
        again = self._has("names are never used again")
        kept = frozenset(old for old in state.objects if again or old.rev != upload.rev)
        return state._replace(objects=kept | {upload})

    def _cleans(self, state: State, actor: Actor) -> State:
        """A fold that believes to have failed. It deletes nothing."""
        if self._has("nobody but a collector deletes uploads") or self._kind(actor) != "fold" or not actor.upload:
            return state
        return state._replace(objects=state.objects - {actor.upload})

    def _arrives(self, state: State, put: Put) -> State | None:
        """The store compares and swaps; None: 412."""
        old, new = state.head, put.head
        if old != put.condition:
            return None
        wrong = ""
        if old is not None and (new.rev != old.rev + 1 or new.floor < old.floor):
            wrong = f"{put.job}: rev or floor do not go on (I1)"
        if _shows(new.refs) != new.past:
            wrong = f"{put.job}: the head shows other commits than it has (I3, I4)"
        gone = new.deleted and not self._has("deletion leaves a tombstone")
        wire = frozenset(other for other in state.wire if other.condition == new)  # a head never comes back
        shown = frozenset(row for row in state.shown | {(new.rev, new.refs)} if new.floor < row[0])
        return state._replace(head=None if gone else new, wire=wire, shown=shown, wrong=wrong)

    def _judged(self, state: State) -> State:
        head = state.head
        if state.wrong or head is None:
            return state
        if not head.refs <= state.objects:
            return state._replace(
                wrong=f"the head needs {_names(head.refs - state.objects)}, which is missing (I2, I5)"
            )
        if not head.snapshots <= state.archives:
            return state._replace(wrong="an archive that has a name is missing (I5)")
        for root in state.archives:
            if (head.floor < root.rev or root in head.snapshots) and not root.refs <= state.objects:
                return state._replace(wrong=f"root {root.rev} needs {_names(root.refs - state.objects)} (I5)")
        for rev, refs in state.shown:
            if not refs <= state.objects:
                missing = _names(refs - state.objects)
                return state._replace(wrong=f"a reader of rev {rev} misses {missing}; the floor is {head.floor} (I4)")
        return state


def _log(refs: frozenset[Ref]) -> frozenset[Ref]:
    return frozenset(ref for ref in refs if ref.log)


def _shows(refs: frozenset[Ref]) -> frozenset[str]:
    """What a reader sees (snapshot.py): the block, and what is newer in the log over it."""
    shows, complete_to = frozenset[str](), 0
    for ref in sorted(refs, key=lambda ref: (ref.log, ref.seq)):
        if not ref.log:
            shows, complete_to = ref.holds, ref.seq
        elif ref.seq > complete_to:
            shows = frozenset() if ref.cut else shows | ref.holds
    return shows


def _with(state: State, actor: Actor) -> State:
    return state._replace(actors=tuple(actor if old.number == actor.number else old for old in state.actors))


def _next(state: State, actor: Actor) -> State:
    return _with(state, Actor(actor.number, actor.job + 1))


def _names(entries: frozenset[Ref | Head] | frozenset[Ref] | frozenset[Head] | set[Ref | Head]) -> str:
    return ", ".join(sorted(str(e) if isinstance(e, Ref) else f"archive {e.rev}" for e in entries)) or "nothing"
