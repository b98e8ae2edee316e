"""S3 and the way to it. Requests of a node are delayed, reordered, lost, answered wrongly, applied late or twice.

A request that is under way reaches the store whether or not its sender still waits, or lives. What comes back follows
`objectstore.ObjectStore`: only what the real `S3Store` would tell from the answers on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any, Protocol

from memorystore import MemoryStore

from s3blockfs import errors
from s3blockfs.objectstore import Listed, StoredObject
from simulation.kernel import Kernel, Node

#: What may happen to a request on its way; see `Network._attempt`.
FAULTS = ("slow", "lost", "reply-lost", "late", "twice", "retried", "refused", "torn", "kill", "stop")

#: Codes that say nothing of whether the request was carried out, and those that do.
UNCLEAR = ("409", "500", "503", "412", "404")
CLEAR = ("403", "refused")

PAGE = 5  # entries of a LIST, keys of a DELETE


class Watcher(Protocol):
    """Is told of every change that the store carries out."""

    def stored(self, key: str, old: bytes | None, new: bytes) -> None: ...

    def deleted(self, key: str) -> None: ...


class SimulatedStore(MemoryStore):
    """The bucket: strongly consistent, as S3 is. Its clock may jump."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(self, "sim://store")  # type: ignore[arg-type]  # only its clock is used
        self._kernel = kernel
        self.jump_s = 0.0
        self.watcher: Watcher | None = None

    def monotonic(self) -> float:
        return 1_700_000_000 + self._kernel.now + self.jump_s

    def raw(self, key: str) -> bytes | None:
        found = self._objects.get(key)
        return None if found is None else found.body

    def names(self) -> list[str]:
        return sorted(self._objects)

    def put(self, key: str, body: bytes, **options: Any) -> str:
        old = self.raw(key)
        etag = super().put(key, body, **options)
        if self.watcher is not None:
            self.watcher.stored(key, old, bytes(body))
        return etag

    def delete(self, keys: Sequence[str], **_: Any) -> None:
        for key in keys:
            there = key in self._objects
            super().delete([key])
            if there and self.watcher is not None:
                self.watcher.deleted(key)


class Network:
    """How one node reaches the store."""

    def __init__(self, node: Node, store: SimulatedStore, weather: dict[str, float], seed: object) -> None:
        self.node, self.kernel, self.store = node, node.kernel, store
        self.weather = weather
        """How likely each fault is."""
        self.deadline_s = 5.0
        self.name = store.name
        self.requests = 0
        self.dies_at = 0
        """The number of the request at which this process dies; 0: none."""
        self._rng = Random(f"network-{seed}-{node.name}")

    # --- ObjectStore -----------------------------------------------------------------------------------

    def get(
        self, key: str, *, site: str, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> StoredObject:
        found = self._ask("GET", site, key, lambda: self.store.get(key, start=start, length=length, if_match=if_match))
        return found if site == "legacy" else self._torn(found)  # that layout has no checksums

    def get_if_changed(self, key: str, *, site: str, etag: str) -> StoredObject | None:
        found = self._ask("GET", site, key, lambda: self.store.get_if_changed(key, etag=etag))
        return None if found is None else self._torn(found)

    def put(
        self,
        key: str,
        body: bytes,
        *,
        site: str,
        if_match: str | None = None,
        if_absent: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        body, once = bytes(body), if_match is not None or if_absent
        apply = lambda: self.store.put(key, body, if_match=if_match, if_absent=if_absent)  # noqa: E731
        return self._ask("PUT", site, key, apply, once=once, timeout_s=timeout_s)

    def copy(self, source: str, target: str, *, site: str) -> None:
        self._ask("COPY", site, target, lambda: self.store.copy(source, target))

    def delete(self, keys: Sequence[str], *, site: str) -> None:
        for first in range(0, len(keys), PAGE):
            some = list(keys[first : first + PAGE])
            self._ask("DELETE", site, some[0], lambda some=some: self.store.delete(some))

    def list(self, prefix: str, *, site: str, delimiter: str = "", max_keys: int | None = None) -> Iterator[Listed]:
        """Page by page, each as of its own moment."""

        def pages() -> Iterator[Listed]:
            after = ""
            while True:
                page = self._ask("LIST", site, prefix, lambda after=after: self._page(prefix, delimiter, after))
                yield from page
                if len(page) < PAGE:
                    return
                after = page[-1].key

        return islice(pages(), max_keys)

    def server_time_s(self) -> float:
        return self.store.server_time_s()

    def _page(self, prefix: str, delimiter: str, after: str) -> list[Listed]:
        found = sorted(self.store.list(prefix, delimiter=delimiter), key=lambda entry: entry.key)
        return [entry for entry in found if entry.key > after][:PAGE]

    # --- one request -----------------------------------------------------------------------------------

    def _ask(
        self,
        method: str,
        site: str,
        key: str,
        apply: Callable[[], Any],
        *,
        once: bool = False,
        timeout_s: float | None = None,
    ) -> Any:
        """As `S3Store._run` does: what has no condition is repeated until the deadline."""
        deadline = self.kernel.now + (timeout_s or self.deadline_s)
        what = f"{method} {key} ({site})"
        while True:
            left_s = deadline - self.kernel.now
            result = self._attempt(what, method, key, apply, left_s if once else max(left_s / 2, 0.5))
            if not isinstance(result, errors.StoreError):
                return result
            passing = isinstance(result, (errors.RequestInDoubt, errors.StoreUnavailable))
            if once or not passing:
                raise result
            self.kernel.sleep(self._rng.uniform(0.05, 0.5))
            if self.kernel.now >= deadline:
                raise errors.StoreUnavailable(f"{what}: no usable answer")

    def _attempt(self, what: str, method: str, key: str, apply: Callable[[], Any], timeout_s: float) -> Any:
        """The answer, or the error that the answer (or its absence) stands for."""
        kernel, rng = self.kernel, self._rng
        kernel.check_alive(self.node)
        self.requests += 1
        fault = self._fault()
        once = method == "PUT" and key.endswith("/head")
        dies = fault == "kill" or self.requests == self.dies_at
        way_s, back_s = (rng.expovariate(1 / 0.02) for _ in range(2))
        if fault == "slow":
            way_s += rng.uniform(0, 2 * self.deadline_s)
        elif fault == "late":
            way_s += rng.uniform(1, 5) * self.deadline_s * rng.choice([1, 1, 3, 12])
        answer: list[Any] = []
        wakers: list[Callable[[], None]] = []

        def arrive(answers: bool = True) -> None:
            try:
                result: Any = apply()
                kernel.note(None, f"{what} of {self.node.name}: done")
            except errors.StoreError as error:
                result = error
                kernel.note(None, f"{what} of {self.node.name}: {type(error).__name__}")
            if answers:
                kernel.at(back_s, lambda: reply(result))

        def reply(result: Any) -> None:
            answer.append(result)
            for wake in wakers:
                wake()

        if fault == "refused":
            code = rng.choice(CLEAR + UNCLEAR)
            if code in UNCLEAR and method != "GET" and rng.random() < 0.5:
                kernel.at(way_s, lambda: arrive(answers=False))
            kernel.at(way_s + back_s, lambda: reply(_refusal(code, once, key, what)))
        elif fault == "torn" and method == "PUT":
            kernel.at(way_s + back_s, lambda: reply(errors.StoreUnavailable(f"{what}: damaged on its way")))
        elif fault == "retried":  # by something in between, which passes on the answer to the second one
            kernel.at(way_s, lambda: arrive(answers=False))
            kernel.at(way_s + rng.uniform(0, 1), arrive)
        elif fault != "lost":
            kernel.at(way_s, lambda: arrive(answers=fault != "reply-lost"))
        if fault == "twice":
            kernel.at(way_s + rng.uniform(0, 20 * self.deadline_s), lambda: arrive(answers=False))
        if fault is not None:
            kernel.note(self.node, f"{what}: {fault}")
        if dies and rng.random() < 0.5:
            self.node.kill()  # its request is on its way
        if fault == "stop":
            self.node.stop(rng.choice([3.0, 30.0, 600.0]))
        if not kernel.wait(wakers.append, timeout_s):
            return errors.RequestInDoubt(f"{what}: no answer")
        if dies:
            self.node.kill()
        return answer[0]

    def _fault(self) -> str | None:
        dice = self._rng.random()
        for fault, likely in self.weather.items():
            dice -= likely
            if dice < 0:
                return fault
        return None

    def _torn(self, found: StoredObject) -> StoredObject:
        """A length that is wrong is noticed by the client; a flipped bit is not."""
        if found.body and self._rng.random() < self.weather.get("torn", 0.0):
            body = bytearray(found.body)
            body[self._rng.randrange(len(body))] ^= 1 << self._rng.randrange(8)
            self.kernel.note(self.node, "a flipped bit in what was read")
            return replace(found, pieces=(bytes(body),))
        return found


def _refusal(code: str, once: bool, key: str, what: str) -> errors.StoreError:
    """What `S3Store` makes of it. A 404 for a head that is there would be a store that forgets; what it says of one
    that is replaced may be true a moment later."""
    if code == "403":
        return errors.AccessDenied(f"{what}: 403")
    if code == "refused":
        return errors.StoreUnavailable(f"{what}: connection refused")
    if code == "412" and once:
        return errors.PreconditionFailed(f"{what}: 412")
    if code == "404" and (once or "/data/" in key or "/map/" in key):
        return errors.ObjectNotFound(f"{what}: 404")
    return errors.RequestInDoubt(f"{what}: {code}")


__all__ = ["FAULTS", "Network", "SimulatedStore"]
