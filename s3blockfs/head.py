"""The only writer of `P/head`: read, compare-and-swap, and the settling of unknown outcomes.

Every swap ends in one of the ways (a) to (e) of docs/ARCHITECTURE.md, "Outcomes of a swap". To keep in mind here: a
412 proves nothing, since this PUT may have been applied before and its answer lost; so a commit looks itself up by its
id at its seq. And a head that still has the old ETag after a doubt (409, 5xx, time-out, cut connection) means that the
PUT was not applied *yet*: to give up, a head with a fresh nonce and nothing else changed is swapped in first.
Thread rule: any thread. One HeadFile serves all users of a database in a process."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

from s3blockfs import errors
from s3blockfs.config import Config
from s3blockfs.errors import ObjectNotFound, PreconditionFailed, S3BlockFSError, StoreError, StoreUnavailable
from s3blockfs.format.head import Archived, Head, decode, encode
from s3blockfs.format.keys import NONCE_BYTES, archive_key, head_key
from s3blockfs.objectstore import ObjectStore, StoredObject
from s3blockfs.runtime import Runtime
from s3blockfs.snapshot import Version, fetch_index

#: First pause after a swap that was in doubt or raced, doubled up to the second one, each with full jitter.
BACKOFF_FIRST_S = 0.05
BACKOFF_MOST_S = 2.0


class Doubt(NamedTuple):
    """A swap whose outcome is not known: the head it replaces (None: there was none), and the new one."""

    base: Version | None
    head: Head


class Unsettled(errors.OutcomeUnknown):
    """OutcomeUnknown with what `HeadFile.settle` needs."""

    def __init__(self, name: str, doubt: Doubt) -> None:
        super().__init__(f"{name}: the outcome of the last write is unknown; closed until the store can tell")
        self.doubt = doubt


class HeadFile:
    """The head of the database under `prefix`."""

    def __init__(self, store: ObjectStore, runtime: Runtime, config: Config, prefix: str) -> None:
        self._store, self._runtime, self._config = store, runtime, config
        self._key = head_key(prefix)
        self._name = f"{store.name}/{self._key}"
        self._lock = threading.Lock()
        self.prefix = prefix
        self.latest: Version | None = None  # the newest head that was read or written here, tombstones included
        self.cut_off_s: float | None = None
        """When it could not be read; readers go by `latest` until it can be, which is tried in the background."""

    def read(self) -> Version | None:
        """The head, tombstones included; None when there is none."""
        return self.stored()

    def stored(self) -> Version | None:
        """The same, and nothing that only stands for a head (legacy.py)."""
        before = self.latest
        try:
            return self._seen(before, self._version(self._store.get(self._key, site="head")))
        except ObjectNotFound:
            return None

    def read_if_changed(self, known: Version) -> Version:
        """The head; `known` itself when that is it. Raises DatabaseGone when it has vanished."""
        before = self.latest
        held = before or known
        try:
            found = self._store.get_if_changed(self._key, site="refresh", etag=held.etag)
        except ObjectNotFound:
            raise self._gone() from None
        newest = self._seen(before, held if found is None else self._version(found))
        return known if newest.etag == known.etag else newest

    def swap(
        self,
        base: Version | None,
        make: Callable[[Any], Head],
        *,
        commit: bool = False,
        archives: bool = False,
        deadline_s: float | None = None,
    ) -> Version:
        """Replace the head. Returns the one that holds the swap: for a commit possibly a later one.

        `make` gets the head that is being replaced and returns the new one (`rev` and `nonce` are set here) or raises;
        it is called again when another swap came first. Only heads with the database id of `base` are replaced (else
        DatabaseGone), by a `commit` only those with its commit too (else CommitLost). With a tombstone or None as
        `base` only such are replaced (else DatabaseExists). A head that refers to something the new one does not is
        archived first; with `archives` any is. Raises Unsettled, and what a PUT raises (not applied)."""
        deadline = self._runtime.monotonic() + (deadline_s or self._config.transaction_deadline_s)
        pause = BACKOFF_FIRST_S
        doubt: Doubt | None = None
        current, latest = base, self.latest
        if base is not None and not base.head.deleted and latest is not None and latest.head.rev > base.head.rev:
            current = latest  # with our own lease in it, say: `base` would only meet a 412
            self._require_may_replace(latest.head, base, commit)
        while True:
            if doubt is None:
                old, in_doubt = None if current is None else current.head, False
                head, last = make(old), None if old is None else old.archived
                if current is not None and (archives or _drops(current.head, head)):
                    last = Archived(current.head.rev, current.head.nonce)
                    self._store.put(archive_key(self.prefix, *last), current.body, site="archive")
                rev = 1 if old is None else old.rev + 1
                doubt = Doubt(current, replace(head, rev=rev, nonce=self._nonce(), archived=last))
            try:
                return self._put(current, doubt.head)
            except (PreconditionFailed, ObjectNotFound, errors.RequestInDoubt):
                in_doubt = True  # a 412 proves nothing
            except StoreError as error:
                # This PUT was definitely not applied. An earlier one may have been.
                retry = isinstance(error, StoreUnavailable) and self._runtime.monotonic() + pause < deadline
                if not in_doubt and not retry:
                    raise
            if in_doubt:
                applied, seen = self._look(doubt, deadline)
                if applied is not None:
                    return applied
                if seen is not None and not _same(seen, current):
                    self._require_may_replace(seen.head, base, commit, creates=not doubt.head.deleted)
                    current, doubt = seen, None
            if self._runtime.monotonic() + pause > deadline:
                settled = None if doubt is None else self.settle(doubt)
                if settled is not None:
                    return settled
                raise StoreUnavailable(f"{self._name}: not written before the deadline; nothing was changed, try again")
            pause = self._pause(pause)

    def convert(self, version: Version) -> Version:
        """`version`, or what it is made into before anything is written to it (legacy.py)."""
        return version

    def settle(self, doubt: Doubt, again: bool = True) -> Version | None:
        """The end of an Unsettled swap: the head that holds it, or None: it was not applied and never will be.
        Raises Unsettled when that still cannot be told, DatabaseGone when the head vanished."""
        applied, seen = self._look(doubt, self._runtime.monotonic())
        if applied is not None or not _same(seen, doubt.base):
            return applied  # None: the head it was based on is replaced, so its condition can never hold again
        try:
            if seen is None:  # a creation that may still land: nothing can be swapped in to stop it, so it is repeated
                return self._put(None, doubt.head)
            self._put(seen, replace(seen.head, rev=seen.head.rev + 1, nonce=self._nonce()))
            return None
        except StoreError as error:
            if again and isinstance(error, PreconditionFailed):
                return self.settle(doubt, again=False)  # the head moved on meanwhile, so now it can be told
            raise Unsettled(self._name, doubt) from error

    def _require_may_replace(self, seen: Head, base: Version | None, commit: bool, creates: bool = False) -> None:
        """Raise unless a swap based on `base` may replace `seen`; one that `creates` if that or nothing was deleted."""
        writer = seen.writer or "somebody else"
        if base is None or (creates and base.head.deleted):
            if not seen.deleted:
                raise errors.DatabaseExists(f"{self._name}: {writer} created it first")
        elif commit and not seen.deleted and (seen.id, seen.commit) != (base.head.id, base.head.commit):
            text = f"{writer} committed first (commit {seen.seq}); nothing of this transaction was kept, run it again"
            raise errors.CommitLost(f"{self._name}: {text}")
        elif (seen.id, seen.deleted) != (base.head.id, base.head.deleted):
            raise errors.DatabaseGone(f"{self._name}: deleted or replaced by {writer}")

    def _look(self, doubt: Doubt, deadline: float) -> tuple[Version | None, Version | None]:
        """Read the head until it answers, at least once: (it, if the swap in doubt is in its past, and it anyway).
        Raises DatabaseGone when it vanished, Unsettled when it does not answer or cannot tell."""
        pause = BACKOFF_FIRST_S
        while True:
            try:
                seen = self.stored()
                break
            except S3BlockFSError as error:  # also a damaged head: the outcome is still unknown
                if self._runtime.monotonic() + pause > deadline:
                    raise Unsettled(self._name, doubt) from error
            pause = self._pause(pause)
        if seen is None and doubt.base is not None:
            raise self._gone()
        return (seen if seen is not None and self._is_past_of(seen.head, doubt) else None), seen

    def _is_past_of(self, seen: Head, doubt: Doubt) -> bool:
        """Whether the swap in doubt is in the past of `seen`. Raises Unsettled when it cannot tell."""
        base, mine = doubt.base, doubt.head
        try:
            if base is None or base.head.id != mine.id:  # a creation, a copy: id after id, and none comes back
                return seen.id == mine.id or (seen.id != (base and base.head.id) and self._was_there(mine))
            if seen.nonce == mine.nonce or mine.commit == base.head.commit or seen.seq < mine.seq:
                return seen.nonce == mine.nonce  # only a commit can be told from later heads, and only from later ones
            return self._commit_at(mine, seen) == mine.commit
        except S3BlockFSError as error:  # also damage: it must not be taken for an answer
            raise Unsettled(self._name, doubt) from error

    def _was_there(self, mine: Head) -> bool:
        """Whether the new id of `mine` was once that of the database: who takes over archives the last head with it.
        Raises TooOld when that cannot be told any more."""
        there = {known.rev: known.id for known in self._archived(mine.rev)}
        if mine.id in there.values():
            return True
        now = self.stored()  # only now: archives above this floor have been there all the time
        if mine.rev not in there and (now is None or now.head.floor >= mine.rev):
            raise errors.TooOld(f"{self._name}: no archive of rev {mine.rev} is kept")
        return False

    def _commit_at(self, mine: Head, newest: Head) -> bytes | None:
        """The id of the commit with the seq of `mine`, from `newest`, then the archives since. None when a successor
        took over before there was one: it archived the last head, which is kept above the floor; below that an archive
        may be one of those before, written late. Raises TooOld when the record is gone for good."""
        seq, last = mine.seq, -1
        for known in chain([newest], self._archived(mine.rev - 1)):
            if known.id != mine.id or known.seq < seq:
                last = known.rev if known.id == mine.id else last
                continue
            if known.seq == seq:
                return known.commit
            ids = {record.seq: record.id for record in known.tail.records}
            for segment in known.segments:
                if seq not in ids and segment.first_seq <= seq <= segment.last_seq:
                    index = fetch_index(self._store, self.prefix, segment, "settle")
                    ids.update((record.seq, record.id) for record in index.commits)
            if seq in ids:
                return ids[seq]
        if newest.id != mine.id and (now := self.stored()) is not None and last >= now.head.floor:
            return None
        raise errors.TooOld(f"{self._name}: no record of commit {seq} is kept")

    def _archived(self, rev: int) -> Iterator[Head]:
        """The archived heads from this rev on."""
        for entry in self._store.list(f"{self.prefix}/archive/", site="settle"):
            if entry.key >= archive_key(self.prefix, rev, b""):
                body = self._store.get(entry.key, site="settle").body
                yield decode(body, f"{self._store.name}/{entry.key}")

    def _put(self, replaced: Version | None, head: Head) -> Version:
        before, condition, body = self.latest, None if replaced is None else replaced.etag, encode(head)
        etag = self._store.put(self._key, body, site="swap", if_match=condition, if_absent=condition is None)
        made = Version(head, etag)
        self._seen(before, made)
        return made

    def _seen(self, before: Version | None, found: Version) -> Version:
        """Take in the outcome of a request that was sent when `before` was the latest; returns what is now. Of several
        at a time the one with the highest rev is the latest; but an operator may have put an older head back."""
        with self._lock:
            if self.latest is None or self.latest is before or found.head.rev > self.latest.head.rev:
                self.latest = found
            return self.latest

    def _version(self, found: StoredObject) -> Version:
        return Version(decode(found.body, self._name), found.etag)

    def _nonce(self) -> bytes:
        return self._runtime.token(NONCE_BYTES)

    def _pause(self, pause: float) -> float:
        self._runtime.sleep(self._runtime.uniform(0, pause))
        return min(pause * 2, BACKOFF_MOST_S)

    def _gone(self) -> errors.DatabaseGone:
        return errors.DatabaseGone(f"{self._name}: the head has vanished; restore that object or remount")


def _same(one: Version | None, other: Version | None) -> bool:
    return (one and one.etag) == (other and other.etag)


def _drops(old: Head, new: Head) -> bool:
    """Whether `new` does not refer to everything that `old` does. An extent counts as a whole: with a part of it gone,
    the old state cannot be read by way of the new head any more."""
    fields = attrgetter("extents", "leaves", "segments", "snapshots")
    return any(not set(before) <= set(after) for before, after in zip(fields(old), fields(new), strict=True))
