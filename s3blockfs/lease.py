"""The lease in the head: politeness between the writers of several machines, never safety. Two holders at once cost one
of them a lost commit, no data.

One `Lease` per database and process. Its *user* is who writes now (the database of a mount, or one connection);
others of this process get Busy without a request. It is taken by a swap at RESERVED, kept by each commit, and given
back soon after the last write lock. Who was refused for a while lines up in the lease itself, and gets it from there,
in turn: at the latest from the commit that ends the holder's tenure, which lines up for the next one by the same swap.

No wall clocks: somebody else's lease is taken over only after its nonce was seen unchanged for as long as it says, on a
clock that counts suspended time. Its holder draws a new nonce with each commit, and meanwhile in long transactions.

Threads: any. `_lock` is held during requests."""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import NamedTuple

from s3blockfs.config import Config
from s3blockfs.errors import Busy, DatabaseGone, S3BlockFSError
from s3blockfs.format import head as codec
from s3blockfs.format.head import Head
from s3blockfs.head import HeadFile
from s3blockfs.runtime import Runtime
from s3blockfs.snapshot import Version

log = logging.getLogger(__name__)

_NewLease = Callable[[codec.Lease | None], codec.Lease | None]

LINGER_S = 0.5  # how long the lease is kept after the last write transaction
TENURE_S = 2.0  # how long in a row while one other waits for it; with more in line, that time is theirs together
COMES_S = 2  # how long who is next may take to come for it
LONGEST_LINE = 16
CONTENDED_S = 60.0  # for so long after meeting another writer a head is looked at before the lease is taken
POLL_S = 0.1  # a lease of somebody else is looked at no more often, however often SQLite's busy handler asks
LONGEST_S = 600  # nobody's lease is respected for longer without a sign of life, whatever it says

#: How long to pause after such a time without a line, at most: whoever writes all the time wins every race for the
#: head, so others need a moment to line up; a longer one when commits take long. Half, and half as often, while nobody
#: else was met.
REST_S = 0.6

#: A writer of this process that asked in vain for so long goes before those that came later, unless nothing was seen of
#: it for GIVES_UP_S, or it came as far as asking for a write lock too long ago: perhaps it only reads by now.
PATIENT_S = 0.5
GIVES_UP_S = 2.0
READS_S = 15.0


class _Wait(NamedTuple):
    """For a write lock: the first and the last time it was asked for, and the last sign of life."""

    first_s: float
    last_s: float
    seen_s: float

    def goes_on(self, now: float) -> bool:
        return now - self.seen_s < GIVES_UP_S and now - self.last_s < READS_S


class Stale(Busy):
    """A write transaction cannot start on this state: there is a newer one."""


class Lease:
    """Who of this process writes to one database, and this process's lease on it."""

    def __init__(self, heads: HeadFile, runtime: Runtime, config: Config, writer: str) -> None:
        self.heads, self.writer, self._runtime = heads, writer, runtime
        self._lease_s, self._deadline_s = config.lease_s, config.request_deadline_s
        self._owner = f"{writer}:{runtime.token(4).hex()}"
        self._lock, self._line = threading.Lock(), threading.Lock()
        self._user: Hashable | None = None
        self._held = False
        self._burst = False  # a write lock was given up since the lease was taken
        self._session = False  # a commit happened under the write lock that is held: locking_mode=EXCLUSIVE
        self._taken_s = self._renewed_s = self._idle_s = self._began_s = self._rest_until_s = 0.0
        self._foreign = ("", 0.0)  # the nonce of somebody's lease, and when it was first seen
        self._contended_s = self._ask_again_s = -math.inf
        self._passed = ""  # the nonce of the lease that was passed on last
        self._refused_s = (-math.inf, -math.inf)  # the first and the last time in a row
        self._asking: dict[Hashable, _Wait] = {}  # by owner of a write lock

    @property
    def is_held(self) -> bool:
        """Whether `heads.latest` is the newest head, as far as politeness goes."""
        latest = self.heads.latest  # one that others put there, for the sake of a rename, say, holds no lease of ours
        fresh = self._runtime.monotonic() - self._renewed_s < self._lease_s
        return self._held and fresh and latest is not None and self._is_own(latest.head.lease)

    def ask(self, owner: Hashable) -> None:
        """Before a write lock is looked at: a pause for others to line up, if due. Busy: it is another's turn here."""
        if (rest_s := self._rest_until_s - self._runtime.monotonic()) > 0:  # not 0 s: that lets other programs run
            self._runtime.sleep(rest_s)
        now = self._runtime.monotonic()
        with self._line:
            asking = {other: wait for other, wait in self._asking.items() if wait.goes_on(now)}
            self._asking = {**asking, owner: _Wait(asking.get(owner, _Wait(now, now, now)).first_s, now, now)}
            mine = self._asking[owner]
        if any(wait.first_s < mine.first_s and wait.seen_s - wait.first_s >= PATIENT_S for wait in asking.values()):
            raise Busy(f"{self.heads.prefix}: another connection has waited for longer")

    def refused(self, owner: Hashable) -> None:
        """Any lock: who waits for a write lock is mostly refused at SHARED, while the others are in their commits."""
        with self._line:
            if (wait := self._asking.get(owner)) is not None:
                self._asking[owner] = wait._replace(seen_s=self._runtime.monotonic())

    def granted(self, owner: Hashable) -> None:
        """It has its write lock, and will be the last in line when it asks again."""
        with self._line:
            self._asking.pop(owner, None)

    def take(self, user: Hashable, base: Version) -> None:
        """A write transaction of `user` starts on the state of `base`, which is the newest one when this returns.
        Raises Stale, Busy, DatabaseGone, and what reading and swapping the head raise."""
        with self._lock:
            if self._user not in (None, user):
                raise Busy(f"{self.heads.prefix}: another connection of this process is writing")
            if self.is_held:
                self._require_same_state((self.heads.latest or base).head, base)
            else:
                self._acquire(base)
            self._user = user

    def is_lost(self, user: Hashable) -> bool:
        """Whether it was taken from `user`, as far as is known: not that it merely could not be renewed."""
        latest = self.heads.latest
        return self._user == user and not (self._held and latest is not None and self._is_own(latest.head.lease))

    def stays(self) -> None:
        """The next commit happens while a transaction is open that it does not end: it must not pass the lease on."""
        self._session = True

    def done(self, user: Hashable) -> None:
        """The write lock of `user` is gone."""
        if self._user == user:
            self._user, self._idle_s = None, self._runtime.monotonic()
            self._burst, self._session = True, False

    def kept(self, current: codec.Lease | None) -> codec.Lease | None:
        """What a commit writes in the place of `current`, the lease in the head that it replaces. Passed on in a burst
        of transactions only: a session with one write lock for all of them must keep others out till its end."""
        self._began_s = self._runtime.monotonic()
        taken_back = self._session and self._lease_s and (current is None or current.nonce == self._passed)
        if self._is_own(current) or taken_back:
            line = (current.owner, *current.waiting) if current else ()  # who has not come for it comes first
            over = len(line) > 1 and self._began_s - self._taken_s > TENURE_S / (len(line) - 1)
            if over and self._burst and not self._session:
                self._held = False
                return self._next(current, self._owner)  # it will want more: lining up later is a race with all others
            return self._for(self._owner, self._lease_s, line)
        return current

    def committed(self, head: Head) -> None:
        """A commit of this process applied; `head` is the newest one."""
        now = self._runtime.monotonic()
        # It counts from when it was sent: a process that was stopped before the answer came has lost it by now.
        self._held, self._renewed_s = self._is_own(head.lease), self._began_s
        since_s = max(self._taken_s, self._rest_until_s)
        alone = 2 if now - self._contended_s >= CONTENDED_S else 1  # so far: a newcomer may wait for longer, once
        if self._held and self._burst and not self._session and now - since_s > TENURE_S * alone:
            most_s = min(REST_S + 6 * (now - self._began_s), TENURE_S) / alone
            self._rest_until_s = now + self._runtime.uniform(most_s / 2, most_s)
        self._session = self._user is not None

    def tick(self) -> None:
        """Called every now and then: give the lease back, or renew it, on an I/O thread."""
        if self._is_due() and not self._lock.locked():  # else a slow store would soon have every thread waiting here
            with contextlib.suppress(RuntimeError):  # no more threads: the next tick tries again
                self._runtime.submit(lambda: self._give_back_or_renew() if self._is_due() else None)

    def give_back(self) -> None:
        """Now, if it is held and nobody is writing."""
        if self._held and self._user is None:
            self._give_back_or_renew()

    def _acquire(self, base: Version) -> None:
        now = self._runtime.monotonic()
        if now < self._ask_again_s:
            raise Busy(f"{self.heads.prefix}: somebody else is writing")

        def free(newest: Head) -> None:
            try:
                self._require_free(newest)
            except Busy:
                self._require_same_state(newest, base)  # who is behind, too, has to know that
                raise

        seen = (self.heads.latest or base).head.lease  # perhaps of long ago
        contended = now - self._contended_s < CONTENDED_S or not (seen is None or self._is_own(seen))
        if self._lease_s == 0 or contended:  # a blind swap would often fail
            version = self.heads.read_if_changed(base)
            newest = version.head
            try:
                free(newest)
            except Busy:
                self._line_up(version)
                raise
        if self._lease_s:
            newest = self._swap(base, free, self._new)
            self._held, self._burst, self._taken_s, self._idle_s = True, False, self._renewed_s, self._renewed_s
        # Only now: who is told Stale comes again at once, on the newest state, and finds the lease in its hand.
        self._require_same_state(newest, base)

    def _line_up(self, version: Version) -> None:
        """The lease in `version` was not to be had. Who comes again and again is to be the next."""

        def check(head: Head) -> None:
            if head is not version.head:  # one try: whoever commits all the time wins every race
                raise Busy(f"{self.heads.prefix}: somebody else is writing")

        line = version.head.lease.waiting if version.head.lease else ()
        first_s, last_s = self._refused_s
        if last_s - first_s >= LINGER_S and self._owner not in line and len(line) < LONGEST_LINE:
            self._swap(version, check, lambda lease: lease and lease._replace(waiting=(*line, self._owner)))

    def _give_back_or_renew(self) -> None:
        with self._lock:
            using = self._user is not None
            if not self._held or (latest := self.heads.latest) is None:
                return
            self._held = using  # given back as soon as that is sent: others may go on before the answer comes
            try:
                self._swap(latest, self._require_own, self._new if using else self._next)
            except DatabaseGone:
                self._held = False
            except S3BlockFSError as error:  # politeness only: others take it over after a while
                log.info("%s: the lease was not %s: %s", self.heads.prefix, "renewed" if using else "given back", error)

    def _swap(self, base: Version, check: Callable[[Head], None], new: _NewLease) -> Head:
        """Another lease, and nothing else changed. Returns the head with it."""

        def make(replaced: Head) -> Head:
            check(replaced)
            return replace(replaced, lease=new(replaced.lease))

        now = self._runtime.monotonic()
        head = self.heads.swap(base, make, deadline_s=self._deadline_s).head
        self._renewed_s = now
        return head

    def _new(self, replaced: codec.Lease | None) -> codec.Lease:
        return self._for(self._owner, self._lease_s, replaced.waiting if replaced else ())

    def _next(self, replaced: codec.Lease | None, *last: str) -> codec.Lease | None:
        """For whoever has waited longest, and `last` at the end of the line; None when nobody waits."""
        if replaced is None or not replaced.waiting:
            return None
        lease = self._for(replaced.waiting[0], COMES_S, (*replaced.waiting, *last))
        self._passed = lease.nonce
        return lease

    def _for(self, owner: str, seconds: float, waiting: Iterable[str]) -> codec.Lease:
        line = tuple(other for other in waiting if other != owner)
        return codec.Lease(owner, self._runtime.token(8).hex(), math.ceil(seconds), line)

    def _is_own(self, lease: codec.Lease | None) -> bool:
        return lease is not None and lease.owner == self._owner

    def _is_due(self) -> bool:
        since_s, most_s = (self._idle_s, LINGER_S) if self._user is None else (self._renewed_s, self._lease_s / 3)
        return self._held and self._runtime.monotonic() - since_s >= most_s

    def _require_same_state(self, head: Head, base: Version) -> None:
        if head.commit != base.head.commit or head.id != base.head.id:
            self._contended_s = self._runtime.monotonic()
            raise Stale(f"{self.heads.prefix}: changed elsewhere; read again")

    def _require_free(self, head: Head) -> None:
        lease = head.lease
        if lease is None or self._is_own(lease):
            return
        self._contended_s = now = self._runtime.monotonic()
        if lease.nonce != self._foreign[0]:
            self._foreign = (lease.nonce, now)
        if now - self._foreign[1] < min(lease.seconds, LONGEST_S):
            self._ask_again_s = now + POLL_S
            first_s, last_s = self._refused_s
            self._refused_s = first_s if now - last_s < COMES_S else now, now
            raise Busy(f"{self.heads.prefix}: {lease.owner} is writing")

    def _require_own(self, head: Head) -> None:
        if not self._is_own(head.lease):
            self._held = False
            raise Busy(f"{self.heads.prefix}: the lease was taken over")
