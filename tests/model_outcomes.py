"""A small model of head.py: swaps whose requests arrive late, twice or not at all, and what their callers are told.

Each actor runs a program of jobs; a job is one call of `HeadFile.swap`, cut into the requests that it makes. Others
may act between any two of them, and nobody has to act at all: so everybody may crash, or stall for ever, at any point.
What each step stands for is said beside it. The ETag of a head is the head itself: two are equal if their bytes are.

Properties, looked at whenever a swap applies and whenever somebody is told something: rev and seq count, floor never
falls (I1); success is told only of what is in the head's past, loss only of what is not and never will be (I3); a
commit applies only onto the state that its transaction read, a removal only to the database that it was meant for, and
to a tombstone nothing but a creation. (A creation or restore that another one replaced before its caller could look
may be told to have failed: it is not there. A commit may not.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

#: Each of these can be left out.
RULES = frozenset({
    "a 412 is no loss",
    "a 412 is no success",
    "look before a repetition",
    "repeat the same bytes",
    "a no-op before giving up",
    "the no-op is a new head",
    "commits are told by their ids",
    "commits are looked up in the log",
    "commits are looked up in the archives",
    "swaps are told by their nonces",
    "a commit needs its base's commit",
    "a swap needs its base's database",
    "a new database has a new id",
    "a tombstone is replaced by creations only",
    "deletion leaves a tombstone",
    "seq goes on",
    "an archive below the floor proves nothing",
})  # fmt: skip

CREATES = ("create", "restore")


class Head(NamedTuple):
    database: str
    rev: int
    seq: int
    commit: str
    nonce: str
    floor: int = 0
    deleted: bool = False
    log: tuple[tuple[int, str], ...] = ()
    """What tail and segments tell: (seq, commit id)."""
    made_by: str = "X"
    """Which database it really is; for the properties only."""

    def __str__(self) -> str:
        more = f" log {','.join(commit for _, commit in self.log)}" if self.log else ""
        return f"[rev {self.rev} {'tombstone of ' if self.deleted else ''}{self.database} commit {self.commit}{more}]"


class Put(NamedTuple):
    """A conditional PUT."""

    condition: Head | None
    head: Head
    job: str
    kind: str
    read: tuple[str, str]
    """Database (what it really is) and commit that the job started from."""


class Actor(NamedTuple):
    number: int
    job: int = 0
    phase: str = "idle"
    base: Head | None = None
    current: Head | None = None  # `doubt.base` once there is a `head`
    head: Head | None = None  # `doubt.head`
    in_doubt: bool = False
    seen: Head | None = None

    @property
    def name(self) -> str:
        return f"{'ABC'[self.number]}{self.job}"


class State(NamedTuple):
    head: Head | None
    last: Head
    """The newest head there was; for the properties only, like `applied` and `lost`."""
    archives: frozenset[Head]
    wire: frozenset[Put]
    actors: tuple[Actor, ...]
    faults: int
    applied: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    wrong: str = ""


Steps = Iterator[tuple[str, State]]


class Outcomes:
    """`programs`: each actor's jobs; `faults`: how many requests may go wrong; `without`: a rule that is left out."""

    def __init__(self, programs: tuple[tuple[str, ...], ...], faults: int, without: str = "") -> None:
        assert not without or without in RULES, without
        self._programs, self._without = programs, without
        first = Head("X", 1, 1, "x", "x", log=((1, "x"),))
        actors = tuple(map(Actor, range(len(programs))))
        self.initial = State(first, first, frozenset(), frozenset(), actors, faults)

    def _has(self, rule: str) -> bool:
        assert rule in RULES, rule
        return rule != self._without

    # --- what may happen next --------------------------------------------------------------------------------

    def steps(self, state: State) -> Steps:
        for actor in state.actors:
            if actor.job < len(self._programs[actor.number]):
                for what, after in getattr(self, f"_{actor.phase}")(state, actor):
                    yield f"{actor.name} {self._kind(actor)}: {what}", after
        for put in sorted(state.wire, key=lambda put: put.job):
            after = self._arrives(state._replace(wire=state.wire - {put}), put)
            if after is not None:
                yield f"store: the delayed PUT {put.head} of {put.job} arrives and is applied", after
        floor = state.last.floor  # gc.collect: anybody who has seen this head or an older one, at any speed
        for archive in sorted(archive for archive in state.archives if archive.rev <= floor):
            yield f"collector: deletes archive {archive.rev}", state._replace(archives=state.archives - {archive})

    def _idle(self, state: State, actor: Actor) -> Steps:
        """The head that the job starts from is read."""
        live = state.head is not None and not state.head.deleted
        if live != (self._kind(actor) == "create"):
            yield f"reads {state.head}", _with(state, actor, phase="make", base=state.head, current=state.head)

    def _make(self, state: State, actor: Actor) -> Steps:
        """`swap`: a new head for the one that it replaces; does that have to be archived first?"""
        old, kind = actor.current, self._kind(actor)
        for head in self._heads(actor):
            drops = old is not None and (kind in ("delete", "restore") or not set(old.log) <= set(head.log))
            phase = "archive" if drops and not (old and old.deleted) else "put"
            yield f"makes {head}", _with(state, actor, phase=phase, head=head)

    def _archive(self, state: State, actor: Actor) -> Steps:
        """`swap`: the head that is going to be replaced, once more."""
        assert actor.current is not None
        after = state._replace(archives=state.archives | {actor.current})
        yield f"archives rev {actor.current.rev}", _with(after, actor, phase="put")

    def _put(self, state: State, actor: Actor) -> Steps:
        """`swap`: `_put`, and the answers that it may get."""
        assert actor.head is not None
        read = (actor.base.made_by, actor.base.commit) if actor.base else ("", "")
        put = Put(actor.current, actor.head, actor.name, self._kind(actor), read)
        applied = self._arrives(state, put)
        blindly = actor.in_doubt and not self._has("look before a repetition")

        def refused(state: State, what: str) -> tuple[str, State]:
            """A 412."""
            if not self._has("a 412 is no success"):
                return self._wins(state, actor, what)
            if blindly or not self._has("a 412 is no loss"):
                return self._loses(state, actor, what)
            return what, _with(state, actor, phase="look", in_doubt=True)

        if applied is None:
            yield refused(state, "PUT; 412")
        else:
            yield self._wins(applied, actor, "PUT; 200")
        if state.faults:
            fault = state._replace(faults=state.faults - 1)
            if applied is not None:
                yield refused(applied._replace(faults=fault.faults), "PUT, applied; 412, for a repetition of it")
            yield "PUT, on its way; time-out", _with(self._sends(fault, put), actor, phase="look", in_doubt=True)
            if actor.in_doubt:
                yield "PUT; 403", _with(fault, actor, phase="look")
            else:
                yield self._loses(fault, actor, "PUT; 403")

    def _look(self, state: State, actor: Actor) -> Steps:
        """`_look` in `swap`: read the head until it answers."""
        if state.faults:
            yield _doubts(state._replace(faults=state.faults - 1), actor, "GET head; no answer")
        if not self._has("look before a repetition"):
            yield "repeats the PUT at once", _with(state, actor, phase="put")
        else:
            yield from self._settle(state, actor)

    def _settle(self, state: State, actor: Actor) -> Steps:
        """`_look` in `settle`: the same."""
        actor = actor._replace(seen=state.head)
        applied = self._is_past(actor)
        if applied is None:
            phase = "list" if actor.phase == "look" else "settle_list"
            yield f"GET head {state.head}; does not tell", _with(state, actor, phase=phase)
        else:
            yield from self._decides(state, actor, applied, f"GET head {state.head}")

    def _list(self, state: State, actor: Actor) -> Steps:
        """`_commit_at`: the archives; then the head once more, for its floor."""
        found, what = self._commit_at(actor, state), f"LIST archives {sorted(known.rev for known in state.archives)}"
        if found == "?" and actor.phase == "settle_list":  # State._settle goes on: nobody can ever tell
            yield f"{what}; no record -> UNKNOWN for good", _next(state, actor)
        elif found == "?":
            yield _doubts(state, actor, f"{what}; no record")
        else:
            yield from self._decides(state, actor, actor.head is not None and found == actor.head.commit, what)

    _settle_list = _list

    def _decides(self, state: State, actor: Actor, applied: bool, what: str) -> Steps:
        """`swap` and `settle`: it is known whether the swap in doubt is in the past of the head that was seen."""
        again = actor._replace(phase="make", current=actor.seen, head=None, in_doubt=False, seen=None)
        if applied:
            yield self._wins(state, actor, f"{what}; mine")
        elif actor.phase.startswith("settle"):
            if actor.seen != actor.current:
                yield self._loses(state, actor, f"{what}; its base is replaced")
            elif not self._has("a no-op before giving up"):
                yield self._loses(state, actor, f"{what}; not there")
            else:
                yield f"{what}; not there", _with(state, actor, phase="put" if actor.seen is None else "no_op")
        elif actor.seen == actor.current:
            yield f"{what}; no time left", _with(state, actor, phase="settle", seen=None)
            if self._has("repeat the same bytes"):
                yield f"{what}; not there, the same again", _with(state, actor, phase="put", seen=None)
            else:
                yield f"{what}; not there, once more", _with(state, again)
        elif refusal := self._refusal(actor):
            yield self._loses(state, actor, f"{what}; {refusal}")
        else:
            yield f"{what}; only other swaps, so on from there", _with(state, again)

    def _no_op(self, state: State, actor: Actor) -> Steps:
        """`settle`: a head with nothing changed, after which the delayed PUT can never apply."""
        assert actor.current is not None
        head = actor.current
        if self._has("the no-op is a new head"):
            head = head._replace(rev=head.rev + 1, nonce=f"{actor.name} no-op")
        put = Put(actor.current, head, actor.name, "no-op", (head.made_by, head.commit))
        applied = self._arrives(state, put)
        if applied is None:
            yield "PUT no-op; 412", _with(state, actor, phase="settle", seen=None)
        else:
            yield self._loses(applied, actor, f"PUT no-op {head}; 200")
        if state.faults:
            sent = self._sends(state._replace(faults=state.faults - 1), put)
            yield _doubts(sent, actor, f"PUT no-op {head}, on its way; time-out")

    def _unknown(self, state: State, actor: Actor) -> Steps:
        """`State._settle`, in the background; the database answers nothing until then."""
        yield "tries to settle", _with(state, actor, phase="settle")

    # --- the rules of head.py ----------------------------------------------------------------------------------

    def _heads(self, actor: Actor) -> Iterator[Head]:
        """What the callers' `make` gives for the head that is being replaced."""
        kind, me, old = self._kind(actor), actor.name, actor.current
        made = me if self._has("a new database has a new id") else "X"
        if old is None:
            yield Head(made, 1, 1, me, f"{me}@0", log=((1, me),), made_by=me)
            return
        new, seq = old._replace(rev=old.rev + 1, nonce=f"{me}@{old.rev}"), old.seq + 1
        if kind == "commit":
            yield new._replace(seq=seq, commit=me, log=(*old.log, (seq, me)))
        elif kind in CREATES:  # catalog._create, transfer.put_state
            seq = seq if self._has("seq goes on") else 1
            yield new._replace(database=made, seq=seq, commit=me, deleted=False, log=((seq, me),), made_by=me)
        elif kind == "delete":  # transfer.bury
            yield new._replace(deleted=True, floor=old.rev, log=())
        elif kind == "fold":  # fold.fold: the records go with their segments
            yield new._replace(log=())
        elif kind == "lease":
            yield new
        elif kind == "floor":  # gc._raise_floor, for any retention
            yield from (new._replace(floor=floor) for floor in range(old.floor + 1, old.rev))

    def _is_past(self, actor: Actor) -> bool | None:
        """`_is_past_of`; None: the archives have to be asked."""
        base, mine, seen = actor.current, actor.head, actor.seen
        assert mine is not None
        if seen is None:
            return False
        if base is None or base.database != mine.database:
            return seen.database == mine.database
        if not self._has("swaps are told by their nonces") and mine.commit == base.commit:
            return seen.rev == mine.rev
        if seen.nonce == mine.nonce or mine.commit == base.commit or seen.seq < mine.seq:
            return seen.nonce == mine.nonce
        if not self._has("commits are told by their ids"):
            return True
        if seen.database == mine.database:
            if seen.seq == mine.seq:
                return seen.commit == mine.commit
            if not self._has("commits are looked up in the log"):
                return False
            if (record := dict(seen.log).get(mine.seq)) is not None:
                return record == mine.commit
        return None if self._has("commits are looked up in the archives") else False

    def _commit_at(self, actor: Actor, state: State) -> str | None:
        """`_commit_at`, from the archives on: the commit with the seq of mine, None: there was none, "?": unknown."""
        mine, newest, ended = actor.head, actor.seen, -1
        assert mine is not None and newest is not None
        for known in sorted(known for known in state.archives if known.rev >= mine.rev - 1):
            if known.database == mine.database:
                record = known.commit if known.seq == mine.seq else dict(known.log).get(mine.seq)
                if known.seq >= mine.seq and record is not None:
                    return record
                if known.seq < mine.seq:
                    ended = known.rev
        floor = state.last.floor if self._has("an archive below the floor proves nothing") else 0
        return None if newest.database != mine.database and ended >= floor else "?"

    def _refusal(self, actor: Actor) -> str:
        """`_require_may_replace`: why the head that was seen may not be replaced by this job."""
        seen, base, kind = actor.seen, actor.base, self._kind(actor)
        if seen is None:
            return "gone"
        if kind == "create":  # there was a tombstone, or nothing
            return "" if seen.deleted else "somebody created it first"
        assert base is not None
        if self._has("a swap needs its base's database") and seen.database != base.database:
            return "another database"
        if seen.deleted and self._has("a tombstone is replaced by creations only"):
            return "deleted"
        if (
            kind in ("commit", "restore")
            and self._has("a commit needs its base's commit")
            and seen.commit != base.commit
        ):
            return "somebody committed first"
        return ""

    # --- requests, and what callers are told -------------------------------------------------------------------

    def _kind(self, actor: Actor) -> str:
        return self._programs[actor.number][actor.job]

    def _sends(self, state: State, put: Put) -> State:
        """Delayed. (Under the real rules no head comes back, so a condition that does not hold never will.)"""
        never = not self._without and put.condition != state.head
        return state if never else state._replace(wire=state.wire | {put})

    def _arrives(self, state: State, put: Put) -> State | None:
        """The store compares and swaps; None: 412."""
        if state.head != put.condition:
            return None
        new = None if put.kind == "delete" and not self._has("deletion leaves a tombstone") else put.head
        applied = state.applied if put.kind == "no-op" else state.applied | {put.job}
        after = state._replace(head=new, last=put.head, applied=applied, wrong=_breaks(state, put))
        return after if self._without else after._replace(wire=frozenset(p for p in state.wire if p.condition == new))

    def _wins(self, state: State, actor: Actor, what: str) -> tuple[str, State]:
        wrong = state.wrong
        if actor.name not in state.applied:
            wrong = wrong or f"success was told of {actor.name}, which did not apply (I3)"
        return f"{what} -> SUCCESS", _next(state._replace(wrong=wrong), actor)

    def _loses(self, state: State, actor: Actor, what: str) -> tuple[str, State]:
        kind, wrong, there = self._kind(actor), state.wrong, state.head
        if kind not in ("commit", *CREATES):  # others are made again when they are due; see `_breaks` for removals
            return f"{what} -> given up", _next(state, actor)
        is_there = there is not None and not there.deleted and there.made_by == actor.name
        if actor.name in state.applied and (kind == "commit" or is_there):
            wrong = wrong or f"loss was told of {actor.name}, which applied (I3)"
        return f"{what} -> LOST", _next(state._replace(lost=state.lost | {actor.name}, wrong=wrong), actor)


def _doubts(state: State, actor: Actor, what: str) -> tuple[str, State]:
    """`Unsettled`."""
    return f"{what} -> UNKNOWN", _with(state, actor, phase="unknown", seen=None)


def _with(state: State, actor: Actor, **changes: object) -> State:
    changed = actor._replace(**changes) if changes else actor  # type: ignore[arg-type]
    return state._replace(actors=tuple(changed if old.number == actor.number else old for old in state.actors))


def _next(state: State, actor: Actor) -> State:
    return _with(state, Actor(actor.number, actor.job + 1))


def _breaks(state: State, put: Put) -> str:
    """Which property is broken when this swap is applied."""
    old, new = state.last, put.head
    if put.kind != "no-op" and put.job in state.lost:
        return f"{put.job} applied after its loss was told (I3)"
    if put.kind == "no-op" and new == old:
        return ""  # the same bytes once more
    if new.rev != old.rev + 1 or new.floor < old.floor or new.seq != old.seq + (new.commit != old.commit):
        return f"rev, seq or floor do not go on: {old.rev},{old.seq},{old.floor}: {new.rev},{new.seq},{new.floor} (I1)"
    if put.kind in ("no-op", "create"):
        return "" if put.kind == "no-op" or old.deleted else f"{put.job} created a database over another one"
    if old.deleted:
        return f"{put.job} replaced a tombstone"
    if put.read[0] != old.made_by:
        return f"{put.job} was meant for the database of {put.read[0]}, and changed that of {old.made_by}"
    if put.kind in ("commit", "restore") and put.read[1] != old.commit:
        return f"{put.job} was made on commit {put.read[1]}, and applied on {old.commit}"
    return ""
