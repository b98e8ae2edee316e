"""`ls -l` of many databases: whoever asks for names in the order in which they were listed gets them looked at ahead.

The kernel asks for the attributes of one name after the other, and each takes a round trip. Threads: any; `_lock` is
never held during a request."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from s3blockfs.errors import StoreError
from s3blockfs.format import head
from s3blockfs.format.keys import head_key
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import Runtime

AHEAD = 64  # at most; as many as there are I/O threads
IN_A_ROW = 3  # this many names asked for in order are no chance
START_BYTES = 8192  # of a head; its line of JSON is shorter unless much waits to be folded

Seen = tuple[int, int]  # size, time in ms
Look = tuple[float, "Future[Seen | None]"]  # when it began


class Glances:
    """Of the folder that was listed last."""

    def __init__(self, store: ObjectStore, runtime: Runtime, max_age_s: float) -> None:
        self._store, self._runtime, self._max_age_s = store, runtime, max_age_s
        self._lock = threading.Lock()
        self._names: Sequence[str] = ()
        self._places: dict[str, int] = {}
        self._looks: dict[str, Look] = {}
        self._next = self._hits = self._begun = self._ahead = 0

    def listed(self, prefixes: Sequence[str]) -> None:
        """Databases, in the order in which they were shown."""
        with self._lock:
            self._names, self._places, self._looks = prefixes, {each: at for at, each in enumerate(prefixes)}, {}
            self._next = self._hits = self._begun = self._ahead = 0

    def take(self, prefix: str) -> Seen | None:
        """What was seen of this database moments ago; None: look."""
        with self._lock:
            if (place := self._places.get(prefix)) is None or self._max_age_s == 0:
                return None
            if place != self._next - 1:  # the kernel asks for one name several times
                self._hits = self._hits + 1 if place == self._next else 0
                self._next = place + 1
                self._looks.pop(self._names[max(0, place - AHEAD)], None)
            if self._hits < IN_A_ROW:
                return None
            now = self._runtime.monotonic()
            began_s, look = self._looks.get(prefix, (now, None))
            is_fresh = now - began_s <= self._max_age_s  # those begun ahead get too old where the reader is slow
            self._ahead = min(AHEAD, self._ahead + 1) if is_fresh else max(1, self._ahead // 2)
            self._begun = max(self._begun, place + 1)
            with suppress(RuntimeError):  # no more threads
                for name in self._names[self._begun : place + 1 + self._ahead]:
                    self._looks[name] = now, self._runtime.submit(partial(self.look, name))
                    self._begun += 1
        return look.result() if look is not None and is_fresh else None

    def look(self, prefix: str) -> Seen | None:
        """By one small GET. None also for what is no database, or cannot be looked at."""
        with suppress(StoreError):  # whoever wants to know asks again
            return head.glance(self._store.get(head_key(prefix), site="glance", length=START_BYTES).body)
        return None
