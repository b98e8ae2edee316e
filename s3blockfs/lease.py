"""The lease in the head: politeness between the writers of several machines, never safety. Two holders at once cost one
of them a lost commit, no data.

One `Lease` per database and process. Its *user* is who writes now (the database of a mount, or one connection);
others of this process get Busy without a request. It is taken by a swap at RESERVED, kept by each commit, and given
back soon after the last write lock, or by the commit itself after a long tenure, so that others get in.

No wall clocks: somebody else's lease is taken over only after its nonce was seen unchanged for as long as it says, on a
clock that counts suspended time. Its holder draws a new nonce with each commit, and meanwhile in long transactions.

Threads: any. `_lock` is held during requests."""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Hashable
from dataclasses import replace

from s3blockfs.config import Config
from s3blockfs.errors import Busy, S3BlockFSError
from s3blockfs.format import head as codec
from s3blockfs.format.head import Head
from s3blockfs.head import HeadFile
from s3blockfs.runtime import Runtime
from s3blockfs.snapshot import Version

log = logging.getLogger(__name__)

LINGER_S = 0.5  # how long the lease is kept after the last write transaction
TENURE_S = 2.0  # and how long in a row
REST_S = 0.3  # to stand back then, at most: who waits leaves no trace in the head, and looks once in POLL_S
CONTENDED_S = 60.0  # for so long after meeting another writer a head is looked at before the lease is taken
POLL_S = 0.1  # a lease of somebody else is looked at no more often, however often SQLite's busy handler asks
LONGEST_S = 600  # nobody's lease is respected for longer without a sign of life, whatever it says


class Stale(Busy):
    """A write transaction cannot start on this state: there is a newer one."""


class Lease:
    """Who of this process writes to one database, and this process's lease on it."""

    def __init__(self, heads: HeadFile, runtime: Runtime, config: Config, writer: str) -> None:
        self.heads, self._runtime = heads, runtime
        self._lease_s, self._deadline_s = config.lease_s, config.request_deadline_s
        self._owner = f"{writer}:{runtime.token(4).hex()}"
        self._lock = threading.Lock()
        self._user: Hashable | None = None
        self._held = False
        self._burst = False  # a write lock was given up since the lease was taken
        self._session = False  # a commit happened under the write lock that is held: locking_mode=EXCLUSIVE
        self._taken_s = self._renewed_s = self._idle_s = 0.0
        self._foreign = ("", 0.0)  # the nonce of somebody's lease, and when it was first seen
        self._contended_s = self._ask_again_s = self._rest_until_s = -math.inf

    @property
    def is_held(self) -> bool:
        """Whether `heads.latest` is the newest head, as far as politeness goes."""
        latest = self.heads.latest  # one that others put there, for the sake of a rename, say, holds no lease of ours
        fresh = self._runtime.monotonic() - self._renewed_s < self._lease_s
        return self._held and fresh and latest is not None and self._is_own(latest.head.lease)

    def rest(self) -> None:
        """Before a write transaction: after a long tenure let others in first."""
        if (left_s := self._rest_until_s - self._runtime.monotonic()) > 0:
            self._runtime.sleep(left_s)

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

    def done(self, user: Hashable) -> None:
        """The write lock of `user` is gone."""
        if self._user == user:
            self._user, self._idle_s = None, self._runtime.monotonic()
            self._burst, self._session = True, False

    def kept(self, current: codec.Lease | None) -> codec.Lease | None:
        """What a commit writes in the place of `current`, the lease in the head that it replaces. Given back in a burst
        of transactions only: a session with one write lock for all of them must keep others out till its end."""
        if self._is_own(current) or (current is None and self._session and self._lease_s):
            over = self._burst and not self._session and self._runtime.monotonic() - self._taken_s > TENURE_S
            return None if over else self._new()
        return current

    def committed(self, head: Head, sent_s: float) -> None:
        """A commit of this process, sent then, applied; `head` is the newest one."""
        was_held, self._held, self._renewed_s = self._held, self._is_own(head.lease), sent_s
        self._session = self._user is not None
        if was_held and not self._held:
            self._rest_until_s = self._runtime.monotonic() + self._runtime.uniform(REST_S / 2, REST_S)

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

        def check(newest: Head) -> None:
            self._require_same_state(newest, base)
            self._require_free(newest.lease)

        if self._lease_s == 0 or now - self._contended_s < CONTENDED_S:  # contended: a blind swap would often fail
            check(self.heads.read_if_changed(base).head)
        if self._lease_s:
            self._swap(base, check, self._new)
            self._held, self._burst, self._taken_s = True, False, self._renewed_s

    def _give_back_or_renew(self) -> None:
        with self._lock:
            using = self._user is not None
            latest = self.heads.latest
            if not self._held or latest is None:
                return
            try:
                self._swap(latest, self._require_own, self._new if using else lambda: None)
            except S3BlockFSError as error:  # politeness only: others take it over after a while
                log.info("%s: the lease was not %s: %s", self.heads.prefix, "renewed" if using else "given back", error)
            self._held &= using

    def _swap(self, base: Version, check: Callable[[Head], None], new: Callable[[], codec.Lease | None]) -> None:
        """Another lease, and nothing else changed."""

        def make(replaced: Head) -> Head:
            check(replaced)
            return replace(replaced, lease=new())

        now = self._runtime.monotonic()
        self.heads.swap(base, make, deadline_s=self._deadline_s)
        self._renewed_s = now

    def _new(self) -> codec.Lease:
        return codec.Lease(self._owner, self._runtime.token(8).hex(), math.ceil(self._lease_s))

    def _is_own(self, lease: codec.Lease | None) -> bool:
        return lease is not None and lease.owner == self._owner

    def _is_due(self) -> bool:
        since_s, most_s = (self._idle_s, LINGER_S) if self._user is None else (self._renewed_s, self._lease_s / 3)
        return self._held and self._runtime.monotonic() - since_s >= most_s

    def _require_same_state(self, head: Head, base: Version) -> None:
        if head.commit != base.head.commit or head.id != base.head.id:
            self._contended_s = self._runtime.monotonic()
            raise Stale(f"{self.heads.prefix}: changed elsewhere; read again")

    def _require_free(self, lease: codec.Lease | None) -> None:
        if lease is None or self._is_own(lease):
            return
        self._contended_s = now = self._runtime.monotonic()
        if lease.nonce != self._foreign[0]:
            self._foreign = (lease.nonce, now)
        if now - self._foreign[1] < min(lease.seconds, LONGEST_S):
            self._ask_again_s = now + POLL_S
            raise Busy(f"{self.heads.prefix}: {lease.owner} is writing")

    def _require_own(self, head: Head) -> None:
        if not self._is_own(head.lease):
            self._held = False
            raise Busy(f"{self.heads.prefix}: the lease was taken over")
