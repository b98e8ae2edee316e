"""The probe for conditional PUTs: on a store that honours them, on stores that do not, and with every step in doubt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from memorystore import MemoryStore

from s3blockfs import capabilities
from s3blockfs.errors import ObjectNotFound, PreconditionFailed, ReadOnly, RequestInDoubt, StoreUnavailable
from s3blockfs.objectstore import StoredObject
from s3blockfs.runtime import Runtime

KEY = "team/.s3blockfs/store"
STEPS = ("probe.create", "probe.again", "probe.wrong", "probe.right")


class Hasty(Runtime):
    """Notes waits and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


class Watched(MemoryStore):
    """Notes the site of every request."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.sites: list[str] = []

    def get(self, key: str, *, site: str, **more: Any) -> StoredObject:
        self.sites.append(site)
        return super().get(key, site=site, **more)

    def put(self, key: str, body: bytes, *, site: str, **more: Any) -> str:
        self.sites.append(site)
        return super().put(key, body, site=site, **more)


class IgnoresAll(Watched):
    """What SeaweedFS before 4.16 did: every conditional PUT applies."""

    ignored: tuple[str, ...] = ("if_match", "if_absent")

    def put(self, key: str, body: bytes, *, site: str, **more: Any) -> str:
        return super().put(key, body, site=site, **{k: v for k, v in more.items() if k not in self.ignored})


class IgnoresIfMatch(IgnoresAll):
    ignored = ("if_match",)


class NeverMatches(Watched):
    """Compares If-Match with something else than the ETag it hands out."""

    def put(self, key: str, body: bytes, *, site: str, **more: Any) -> str:
        if more.get("if_match"):
            self.sites.append(site)
            raise PreconditionFailed("never")
        return super().put(key, body, site=site, **more)


class InDoubt(Watched):
    """One request, at `site`, has an unknown outcome; `applied` says whether the store carried it out."""

    def __init__(self, runtime: Runtime, site: str, *, applied: bool) -> None:
        super().__init__(runtime)
        self.doubtful: str | None = site
        self.applied = applied

    def put(self, key: str, body: bytes, *, site: str, **more: Any) -> str:
        if site != self.doubtful:
            return super().put(key, body, site=site, **more)
        self.doubtful = None
        try:
            if self.applied:
                super().put(key, body, site=site, **more)
        except PreconditionFailed:
            pass  # the answer was lost, whatever it was
        raise RequestInDoubt(f"{site}: connection cut")


@pytest.fixture
def runtime() -> Iterator[Hasty]:
    hasty = Hasty()
    yield hasty
    hasty.close()


def state(store: MemoryStore, key: str = KEY) -> str:
    return str(json.loads(store.get(key, site="test").body)["state"])


def test_first_write_takes_four_puts_and_later_mounts_one_get(runtime: Hasty) -> None:
    store = Watched(runtime)
    capabilities.ensure_safe(store, "team", runtime)
    assert store.sites == ["probe.get", *STEPS]
    assert state(store) == "safe"
    store.sites.clear()
    capabilities.ensure_safe(store, "team", runtime)
    assert store.sites == ["probe.get"]


def test_a_whole_bucket_has_no_leading_slash(runtime: Hasty) -> None:
    store = Watched(runtime)
    capabilities.ensure_safe(store, "", runtime)
    assert [entry.key for entry in store.list("", site="test")] == [".s3blockfs/store"]


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [(IgnoresAll, "ignores If-None-Match"), (IgnoresIfMatch, "ignores If-Match"), (NeverMatches, "refuses If-Match")],
)
def test_unsafe_stores_are_read_only_every_time(runtime: Hasty, kind: type[Watched], complaint: str) -> None:
    store = kind(runtime)
    for _ in range(2):
        store.sites.clear()
        with pytest.raises(ReadOnly, match=f"{complaint}.*SeaweedFS >= 4.16.*--only-writer"):
            capabilities.ensure_safe(store, "team", runtime)
        assert sum(site != "probe.get" for site in store.sites) <= 4
    assert state(store) == "probing"
    assert complaint in str(capabilities.probe(store, "team", runtime))


def test_a_store_that_was_upgraded_becomes_safe_by_itself(runtime: Hasty) -> None:
    store = IgnoresAll(runtime)
    with pytest.raises(ReadOnly):
        capabilities.ensure_safe(store, "team", runtime)
    store.ignored = ()
    capabilities.ensure_safe(store, "team", runtime)
    assert state(store) == "safe"


@pytest.mark.parametrize("left", [b'{"state": "probing"}', b"", b"\xff\xfe", b"[]", b'"safe"'])
def test_what_a_dead_prober_or_a_stranger_left_is_probed(runtime: Hasty, left: bytes) -> None:
    store = Watched(runtime)
    store.put(KEY, left, site="test")
    store.sites.clear()
    capabilities.ensure_safe(store, "team", runtime)
    assert store.sites == ["probe.get", *STEPS[1:]]
    assert state(store) == "safe"


@pytest.mark.parametrize("site", STEPS)
def test_another_prober_that_is_faster_does_no_harm(runtime: Hasty, site: str) -> None:
    class Overtaken(Watched):
        overtaken = False

        def put(self, key: str, body: bytes, *, site: str, **more: Any) -> str:
            if site == wanted and not self.overtaken:
                self.overtaken = True
                capabilities.ensure_safe(self, "team", runtime)
            return super().put(key, body, site=site, **more)

    wanted = site
    store = Overtaken(runtime)
    capabilities.ensure_safe(store, "team", runtime)
    assert store.overtaken
    assert state(store) == "safe"


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("site", STEPS)
def test_every_step_may_be_in_doubt(runtime: Hasty, site: str, applied: bool) -> None:
    store = InDoubt(runtime, site, applied=applied)
    capabilities.ensure_safe(store, "team", runtime)
    assert store.doubtful is None
    assert state(store) == "safe"


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("site", STEPS[:3])
def test_doubt_does_not_make_an_unsafe_store_look_safe(runtime: Hasty, site: str, applied: bool) -> None:
    class Both(InDoubt, IgnoresIfMatch):
        pass

    store = Both(runtime, site, applied=applied)
    with pytest.raises(ReadOnly):
        capabilities.ensure_safe(store, "team", runtime)
    assert store.doubtful is None
    assert state(store) == "probing"


def test_endless_doubt_ends_and_says_so(runtime: Hasty) -> None:
    class Dark(Watched):
        def put(self, key: str, body: bytes, *, site: str, **more: Any) -> str:
            self.sites.append(site)
            raise RequestInDoubt("timed out")

    store = Dark(runtime)
    with pytest.raises(StoreUnavailable, match=r"timed out.*try again"):
        capabilities.ensure_safe(store, "team", runtime)
    assert len(store.sites) == 2 * capabilities.ATTEMPTS
    assert 1 < sum(runtime.waits) < 6


@pytest.mark.parametrize("kind", [Watched, IgnoresAll])
def test_many_probers_at_once_agree(runtime: Hasty, kind: type[Watched]) -> None:
    store = kind(runtime)

    def verdict(_: int) -> str:
        try:
            capabilities.ensure_safe(store, "team", runtime)
        except ReadOnly:
            return "unsafe"
        return "safe"

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(verdict, range(64))) == {"safe" if kind is Watched else "unsafe"}


@pytest.mark.parametrize("kind", [Watched, IgnoresAll, IgnoresIfMatch])
def test_the_doctors_probe_leaves_nothing_and_trusts_no_memory(runtime: Hasty, kind: type[Watched]) -> None:
    store = kind(runtime)
    store.put(KEY, b'{"state": "safe"}', site="test")
    assert (capabilities.probe(store, "team", runtime) is None) == (kind is Watched)
    assert [entry.key for entry in store.list("", site="test")] == [KEY]


def test_the_doctors_probe_cleans_up_after_a_failure(runtime: Hasty) -> None:
    class Breaks(Watched):
        def put(self, key: str, body: bytes, *, site: str, **more: Any) -> str:
            if site == "probe.wrong":
                raise StoreUnavailable("gone")
            return super().put(key, body, site=site, **more)

    store = Breaks(runtime)
    with pytest.raises(StoreUnavailable):
        capabilities.probe(store, "team", runtime)
    assert list(store.list("", site="test")) == []
    with pytest.raises(ObjectNotFound):
        store.get(KEY, site="test")
