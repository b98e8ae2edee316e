"""The only writer of `P/head`: read, compare-and-swap, and the settling of unknown outcomes.

Every swap ends in one of these ways; the letters are those of docs/ARCHITECTURE.md:

(a) 200: applied.
(b) 412: somebody swapped in between. A commit looks itself up by its id at its seq (its own PUT may have been applied
    and its answer lost on the way, or duplicated by something on the way, so a 412 alone proves nothing): found, it is
    done; another's commit there, it is lost; neither, only other swaps came in between and it starts again from the new
    head; not to be had, the outcome is unknown. Swaps that are no commits simply start again.
(c) In doubt (409, 5xx, time-out, cut connection): read the head until it answers: mine is done; the old ETag means not
    applied *yet*: the same bytes are PUT again, or, to give up, a head with a fresh nonce and nothing else changed is
    swapped in, after which the delayed PUT can never apply.
(d) The store cannot be reached before the deadline while in doubt: OutcomeUnknown carries what `settle` needs later.
(e) 404 on If-Match: the database is gone.

Thread rule: stateless but for its collaborators; any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

from s3blockfs.config import Config
from s3blockfs.errors import (
    CommitLost,
    DatabaseExists,
    DatabaseGone,
    ObjectNotFound,
    OutcomeUnknown,
    PreconditionFailed,
    RequestInDoubt,
    S3BlockFSError,
    StoreError,
    StoreUnavailable,
)
from s3blockfs.format import head as codec
from s3blockfs.format.data import decode_index
from s3blockfs.format.head import Head
from s3blockfs.format.keys import NONCE_BYTES, archive_key, head_key
from s3blockfs.objectstore import ObjectStore, StoredObject
from s3blockfs.runtime import Runtime
from s3blockfs.snapshot import Version

#: First pause after a swap that was in doubt or raced, doubled up to the second one, each with full jitter.
BACKOFF_FIRST_S = 0.05
BACKOFF_MOST_S = 2.0


@dataclass(frozen=True, slots=True)
class Doubt:
    """A swap whose outcome is not known: what it was based on, what it wrote, and its commit id if it is a commit."""

    base: Version | None
    head: Head
    body: bytes
    commit: bytes | None


class Unsettled(OutcomeUnknown):
    """OutcomeUnknown with what `HeadFile.settle` needs."""

    def __init__(self, text: str, doubt: Doubt) -> None:
        super().__init__(text)
        self.doubt = doubt


class HeadFile:
    """The head of the database under `prefix`."""

    def __init__(self, store: ObjectStore, runtime: Runtime, config: Config, prefix: str) -> None:
        self._store = store
        self._runtime = runtime
        self._config = config
        self.prefix = prefix
        self._key = head_key(prefix)
        self._name = f"{store.name}/{self._key}"

    def read(self) -> Version | None:
        """The head, tombstones included; None when there is none."""
        try:
            return self._version(self._store.get(self._key, site="head"))
        except ObjectNotFound:
            return None

    def read_if_changed(self, known: Version) -> Version:
        """`known` itself when nothing changed (304). Raises DatabaseGone when the head has vanished."""
        try:
            found = self._store.get_if_changed(self._key, site="refresh", etag=known.etag)
        except ObjectNotFound:
            raise self._gone() from None
        return known if found is None else self._version(found)

    def nonce(self) -> bytes:
        return self._runtime.token(NONCE_BYTES)

    def create(self, base: Version | None, make: Callable[[Head | None], Head]) -> Version:
        """Write the first head of a database, over a tombstone (`base`, which `make` gets) or over nothing.

        Raises DatabaseExists when somebody else was first.
        """
        return self._swap(base, make, None, False, self._deadline())

    def swap(
        self, base: Version, make: Callable[[Head], Head], *, commit: bytes | None = None, archives: bool = False
    ) -> Version:
        """Replace the head. `make` gets the head that is being replaced and returns the new one, or raises.

        It is called again when another swap came in between; `rev` and `nonce` of what it returns are set here. With
        `commit` (the id of a commit) only heads with the same database id and commit as `base` are replaced. A head
        that refers to something the new one does not is archived first; with `archives` any is. Returns the head that
        holds the swap: for a commit possibly a later one. Raises CommitLost, DatabaseGone, Unsettled, AccessDenied,
        StoreUnavailable (not applied).
        """

        def make_from(replaced: Head | None) -> Head:
            assert replaced is not None
            return make(replaced)

        return self._swap(base, make_from, commit, archives, self._deadline())

    def settle(self, doubt: Doubt) -> Version | None:
        """The end of an Unsettled swap: the head that holds it, or None: it was not applied and never will be.

        Raises Unsettled when that still cannot be told, DatabaseGone when the head vanished.
        """
        seen = self._read_definitely(doubt, self._runtime.monotonic())
        verdict = self._judge(doubt, seen)
        if verdict is not None:
            return verdict
        if seen is not None and (doubt.base is None or seen.etag != doubt.base.etag):
            return None  # another head replaced the one it was based on: its condition can never hold again
        if seen is None and doubt.base is not None:
            raise self._gone()
        if seen is None:
            # A creation that may still land: nothing can be swapped in to stop it, so it is repeated instead.
            body, stopper = doubt.body, doubt.head
        else:
            stopper = replace(seen.head, rev=seen.head.rev + 1, nonce=self.nonce())
            body = codec.encode(stopper)
        try:
            etag = self._put(None if seen is None else seen.etag, body)
        except PreconditionFailed:
            return self.settle(doubt)  # the head moved on meanwhile, so now it can be told
        except StoreError as error:
            raise self._unsettled(doubt) from error
        return Version(stopper, etag, body) if seen is None else None

    def _swap(
        self,
        base: Version | None,
        make: Callable[[Head | None], Head],
        commit: bytes | None,
        archives: bool,
        deadline: float,
    ) -> Version:
        current = base
        pause = BACKOFF_FIRST_S
        while True:
            rev = 1 if current is None else current.head.rev + 1
            made = make(None if current is None else current.head)
            head = replace(made, rev=rev, nonce=self.nonce())
            body = codec.encode(head)
            doubt = Doubt(current, head, body, commit)
            if current is not None and (archives or _drops(current.head, head)):
                self._store.put(archive_key(self.prefix, current.head.rev, self.nonce()), current.body, site="archive")
            seen = self._try(doubt, deadline)
            if isinstance(seen, Version) and seen.head.nonce == head.nonce:
                return seen
            verdict = self._judge(doubt, seen)
            if verdict is not None:
                return verdict
            if seen is None:
                raise self._gone()
            if commit is not None:
                self._require_same_state(doubt, seen)
            elif (base is None or base.head.deleted) and not seen.head.deleted:
                raise DatabaseExists(f"{self._name}: somebody else created it first")
            current = seen
            if self._runtime.monotonic() > deadline:
                raise StoreUnavailable(f"{self._name}: other swaps came first until the deadline; try again")
            pause = self._pause(pause)

    def _try(self, doubt: Doubt, deadline: float) -> Version | None:
        """PUT until the outcome is definite: the head that was found afterwards (its own, if it was just applied)."""
        etag = None if doubt.base is None else doubt.base.etag
        pause = BACKOFF_FIRST_S
        in_doubt = False
        while True:
            try:
                return Version(doubt.head, self._put(etag, doubt.body), doubt.body)
            except (PreconditionFailed, ObjectNotFound):
                return self._read_definitely(doubt, deadline)
            except RequestInDoubt:
                in_doubt = True
            except StoreError as error:
                # This PUT was definitely not applied. An earlier one may have been.
                retry = isinstance(error, StoreUnavailable) and self._runtime.monotonic() + pause < deadline
                if not in_doubt and not retry:
                    raise
            if in_doubt:
                seen = self._read_definitely(doubt, deadline)
                if (None if seen is None else seen.etag) != etag:
                    return seen
            if self._runtime.monotonic() + pause > deadline:
                settled = self.settle(doubt)
                if settled is not None:
                    return settled
                raise StoreUnavailable(f"{self._name}: not written before the deadline; nothing was changed, try again")
            pause = self._pause(pause)

    def _judge(self, doubt: Doubt, seen: Version | None) -> Version | None:
        """`seen` if the swap in doubt is part of its past, None if it is not. Raises Unsettled when it cannot tell."""
        if seen is None:
            return None
        if seen.head.nonce == doubt.head.nonce:
            return seen
        if doubt.base is None or doubt.base.head.id != doubt.head.id:  # a creation
            return seen if seen.head.id == doubt.head.id else None
        if doubt.commit is None or seen.etag == doubt.base.etag:
            return None
        if seen.head.seq < doubt.head.seq:
            return None
        found = self._commit_at(doubt, seen)
        if found is None:
            raise self._unsettled(doubt)
        return seen if found == doubt.commit else None

    def _commit_at(self, doubt: Doubt, seen: Version) -> bytes | None:
        """The id of the commit at the seq of the one in doubt, from the tail, the segments, then the archives."""
        seq = doubt.head.seq
        try:
            found = self._commit_in(seen.head, seq)
            if found is not None:
                return found
            for entry in self._store.list(f"{self.prefix}/archive/", site="settle"):
                archived = codec.decode(
                    self._store.get(entry.key, site="settle").body, f"{self._store.name}/{entry.key}"
                )
                found = self._commit_in(archived, seq) if archived.seq >= seq else None
                if found is not None:
                    return found
        except S3BlockFSError as error:  # also damage: it must not be taken for an answer
            raise self._unsettled(doubt) from error
        return None

    def _commit_in(self, head: Head, seq: int) -> bytes | None:
        if head.seq == seq:
            return head.commit
        for commit in head.tail.commits:
            if commit.record.seq == seq:
                return commit.record.id
        for segment in head.segments:
            if segment.first_seq <= seq <= segment.last_seq:
                key = segment.ref.key(self.prefix)
                index = self._store.get(key, site="settle", start=segment.index_pos, length=segment.index_length).body
                rows = decode_index(index, segment.ref.uid, segment.index_crc, f"{self._store.name}/{key}").commits
                for record in rows:
                    if record.seq == seq:
                        return record.id
        return None

    def _require_same_state(self, doubt: Doubt, seen: Version) -> None:
        """A commit may only replace heads that show the state its transaction read."""
        assert doubt.base is not None
        if seen.head.deleted:
            raise DatabaseGone(f"{self._name}: deleted by {seen.head.writer or 'somebody else'}; nothing was committed")
        if (seen.head.id, seen.head.commit) != (doubt.base.head.id, doubt.base.head.commit):
            raise CommitLost(
                f"{self._name}: {seen.head.writer or 'another writer'} committed first (commit {seen.head.seq}); "
                "nothing of this transaction was kept, run it again"
            )

    def _read_definitely(self, doubt: Doubt, deadline: float) -> Version | None:
        """Read the head until it answers, at least once."""
        pause = BACKOFF_FIRST_S
        while True:
            try:
                return self.read()
            except S3BlockFSError as error:  # also a damaged head: the outcome is still unknown
                if self._runtime.monotonic() + pause > deadline:
                    raise self._unsettled(doubt) from error
            pause = self._pause(pause)

    def _put(self, etag: str | None, body: bytes) -> str:
        return self._store.put(self._key, body, site="swap", if_match=etag, if_absent=etag is None)

    def _version(self, found: StoredObject) -> Version:
        return Version(codec.decode(found.body, self._name), found.etag, found.body)

    def _deadline(self) -> float:
        return self._runtime.monotonic() + self._config.transaction_deadline_s

    def _pause(self, pause: float) -> float:
        self._runtime.sleep(self._runtime.uniform(0, pause))
        return min(pause * 2, BACKOFF_MOST_S)

    def _gone(self) -> DatabaseGone:
        return DatabaseGone(f"{self._name}: the head has vanished; restore that object or remount")

    def _unsettled(self, doubt: Doubt) -> Unsettled:
        return Unsettled(
            f"{self._name}: the store does not answer and the outcome of the last write is unknown; "
            "the database is closed until it answers",
            doubt,
        )


def _drops(old: Head, new: Head) -> bool:
    """Whether `new` does not refer to everything that `old` does. An extent counts as a whole: with a part of it gone,
    the old state cannot be read by way of the new head any more."""
    fields = attrgetter("extents", "leaves", "segments", "snapshots")
    return any(not set(before) <= set(after) for before, after in zip(fields(old), fields(new), strict=True))
