"""Two machines on one key prefix: two daemons that share nothing but the store, for the tests of SQLite on mounts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mounting import Mount, Place, mounted, shell, sqlite
from proxy import FaultProxy

from s3blockfs.format import head as codec


@dataclass
class Pair:
    """What `here` asks of the store goes through the proxy."""

    here: Mount
    elsewhere: Mount
    proxy: FaultProxy
    place: Place
    exclusive: bool = False

    def commits(self, name: str) -> int:
        """How many transactions of this database were ever published, by whomever."""
        return codec.decode(self.place.get(f"{name}/head"), name).seq


@contextlib.contextmanager
def two_mounts(place: Place, folder: Path, *options: str, exclusive: bool = False) -> Iterator[Pair]:
    """`exclusive`: `here` is mounted so, and remembers what it may."""
    more, refresh = (["--exclusive"], "60") if exclusive else ([], "0")
    with (
        FaultProxy(place.url) as proxy,
        mounted(place.via(proxy.url), folder, *options, *more, refresh=refresh) as here,
        mounted(place, folder, *options) as elsewhere,
    ):
        yield Pair(here, elsewhere, proxy, place, exclusive)


def statements(text: str) -> list[str]:
    return [part.strip() for part in text.split(";")]


def size_of(path: Path) -> int:
    return int(shell("stat", "-c", "%s", path).stdout)


def same_everywhere(pair: Pair, name: str, *queries: str) -> str:
    """Both mounts and a plain copy say the same, and the database is sound on each."""
    queries = ("PRAGMA integrity_check", *queries)
    said = {sqlite(mount / name, *queries) for mount in (pair.here, pair.elsewhere)}
    assert len(said) == 1
    assert size_of(pair.here / name) == size_of(pair.elsewhere / name)
    assert shell("cmp", pair.here / name, pair.elsewhere / name).returncode == 0
    first, _, rest = said.pop().partition("\n")
    assert first == "ok"
    return rest
