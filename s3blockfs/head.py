"""The only writer of `P/head`: read, compare-and-swap, and the settling of unknown outcomes.

Every swap ends in one of these ways (docs/ARCHITECTURE.md):
(a) 200: applied.
(b) 412: somebody swapped in between, or this PUT was applied before and its answer lost, so a 412 alone proves nothing.
    A commit looks itself up by its id at its seq: found, it is done; another's commit there, it is lost; neither, it
    starts again from the new head; not to be had, the outcome is unknown. Other swaps simply start again.
(c) In doubt (409, 5xx, time-out, cut connection): read the head until it answers: mine is done; the old ETag means not
    applied *yet*: the same bytes are PUT again, or, to give up, a head with a fresh nonce and nothing else changed is
    swapped in, after which the delayed PUT can never apply.
(d) The store cannot be reached before the deadline while in doubt: Unsettled carries what `settle` needs later.
(e) 404 on If-Match: the database is gone.
Thread rule: any thread.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

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
from s3blockfs.format.head import Head
from s3blockfs.format.keys import NONCE_BYTES, archive_key, head_key
from s3blockfs.objectstore import ObjectStore, StoredObject
from s3blockfs.runtime import Runtime
from s3blockfs.snapshot import Version, fetch_index

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
        """Write a first head over a tombstone (`base`, which `make` gets) or nothing. Raises DatabaseExists."""
        return self._swap(base, make, None, False)

    def swap(
        self, base: Version, make: Callable[[Head], Head], *, commit: bytes | None = None, archives: bool = False
    ) -> Version:
        """Replace the head. Returns the one that holds the swap: for a commit possibly a later one.

        `make` gets the head that is being replaced and returns the new one (`rev` and `nonce` are set here) or raises;
        it is called again when another swap came first. With `commit` (the id of one) only heads with the database id
        and commit of `base` are replaced. A head that refers to something the new one does not is archived first; with
        `archives` any is. Raises CommitLost, DatabaseGone, Unsettled, and what a PUT raises (not applied)."""
        return self._swap(base, make, commit, archives)

    def settle(self, doubt: Doubt, again: bool = True) -> Version | None:
        """The end of an Unsettled swap: the head that holds it, or None: it was not applied and never will be.
        Raises Unsettled when that still cannot be told, DatabaseGone when the head vanished."""
        seen = self._read_definitely(doubt, self._runtime.monotonic())
        verdict = self._judge(doubt, seen)
        if verdict is not None:
            return verdict
        if seen is None and doubt.base is not None:
            raise self._gone()
        if seen is not None and (doubt.base is None or seen.etag != doubt.base.etag):
            return None  # another head replaced the one it was based on: its condition can never hold again
        try:
            if seen is None:  # a creation that may still land: nothing can be swapped in to stop it, so it is repeated
                return Version(doubt.head, self._put(None, doubt.body), doubt.body)
            stopper = replace(seen.head, rev=seen.head.rev + 1, nonce=self.nonce())
            self._put(seen.etag, codec.encode(stopper))
            return None
        except StoreError as error:
            if again and isinstance(error, PreconditionFailed):
                return self.settle(doubt, again=False)  # the head moved on meanwhile, so now it can be told
            raise self._unsettled(doubt) from error

    def _swap(self, base: Version | None, make: Callable[[Any], Head], commit: bytes | None, archives: bool) -> Version:
        deadline = self._runtime.monotonic() + self._config.transaction_deadline_s
        current = base
        pause = BACKOFF_FIRST_S
        while True:
            replaced = None if current is None else current.head
            head = replace(make(replaced), rev=1 if replaced is None else replaced.rev + 1, nonce=self.nonce())
            doubt = Doubt(current, head, codec.encode(head), commit)
            if current is not None and (archives or _drops(current.head, head)):
                self._store.put(archive_key(self.prefix, current.head.rev, self.nonce()), current.body, site="archive")
            seen = self._try(doubt, deadline)
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
            except (PreconditionFailed, ObjectNotFound, RequestInDoubt):
                in_doubt = True  # a 412 proves nothing, see (b)
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
        if doubt.commit is None or seen.etag == doubt.base.etag or seen.head.seq < doubt.head.seq:
            return None
        try:
            found = self._commit_at(doubt.head.seq, seen.head)
        except S3BlockFSError as error:  # also damage: it must not be taken for an answer
            raise self._unsettled(doubt) from error
        if found is None:
            raise self._unsettled(doubt)
        return seen if found == doubt.commit else None

    def _commit_at(self, seq: int, head: Head) -> bytes | None:
        """The id of the commit with this seq, from the tail, the segments, then the archives."""
        found = self._commit_in(head, seq)
        if found is None:
            for entry in self._store.list(f"{self.prefix}/archive/", site="settle"):
                body = self._store.get(entry.key, site="settle").body
                archived = codec.decode(body, f"{self._store.name}/{entry.key}")
                found = self._commit_in(archived, seq) if archived.seq >= seq else None
                if found is not None:
                    break
        return found

    def _commit_in(self, head: Head, seq: int) -> bytes | None:
        if head.seq == seq:
            return head.commit
        records = {commit.record.seq: commit.record.id for commit in head.tail.commits}
        for segment in head.segments:
            if seq not in records and segment.first_seq <= seq <= segment.last_seq:
                index = fetch_index(self._store, self.prefix, segment, "settle")
                records.update((record.seq, record.id) for record in index.commits)
        return records.get(seq)

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

    def _pause(self, pause: float) -> float:
        self._runtime.sleep(self._runtime.uniform(0, pause))
        return min(pause * 2, BACKOFF_MOST_S)

    def _gone(self) -> DatabaseGone:
        return DatabaseGone(f"{self._name}: the head has vanished; restore that object or remount")

    def _unsettled(self, doubt: Doubt) -> Unsettled:
        text = "the outcome of the last write is unknown; the database is closed until the store can tell"
        return Unsettled(f"{self._name}: {text}", doubt)


def _drops(old: Head, new: Head) -> bool:
    """Whether `new` does not refer to everything that `old` does. An extent counts as a whole: with a part of it gone,
    the old state cannot be read by way of the new head any more."""
    fields = attrgetter("extents", "leaves", "segments", "snapshots")
    return any(not set(before) <= set(after) for before, after in zip(fields(old), fields(new), strict=True))
