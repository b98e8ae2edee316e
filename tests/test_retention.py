"""A transaction that reads goes on with the state it began on, whatever is committed, folded and collected elsewhere;
when that state is older than the retention, with an error that says so. Never a mixture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import inprocess
import pytest
from mounting import Client, Mount, Place, SqlError, fresh_name, mounted, numbers, sqlite

from s3blockfs.catalog import Catalog
from s3blockfs.config import Config
from s3blockfs.errors import TooOld
from s3blockfs.fold import fold
from s3blockfs.gc import collect
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store

pytestmark = pytest.mark.mount

ALL = "SELECT min(n), max(n), count(*), sum(length(data)) FROM t"


@pytest.fixture(scope="module")
def writers(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Mount]]:
    place = mount_bucket.inside(fresh_name("retention"))
    with mounted(place, tmp_path_factory.mktemp("writers"), "--lease", "2") as mount:
        yield place, mount


Run = Callable[[str], Any]


@contextlib.contextmanager
def reader(place: Place, name: str, face: str, folder: Path) -> Iterator[tuple[Run, Run, Callable[[], str]]]:
    """A connection that runs statements, another one beside it, and what is said of the last error of the first. They
    have room for few blocks only."""
    if face == "process":
        options = {"refresh_s": 0.0, "cache_size": 1 << 17}
        with (
            closing(inprocess.connect(place, name, **options)) as connection,
            closing(inprocess.connect(place, name, **options)) as neighbour,
        ):
            errors: list[BaseException | None] = []

            def run(statement: str) -> list[list[Any]]:
                try:
                    return [list(row) for row in connection.execute(statement)]
                except apsw.IOError as error:
                    errors.append(error.__cause__)
                    raise

            def beside(statement: str) -> list[list[Any]]:
                return [list(row) for row in neighbour.execute(statement)]

            yield run, beside, lambda: f"{errors[-1]}" if isinstance(errors[-1], TooOld) else repr(errors)
    else:
        options = ["--cache-size", "128K", *(["--read-only"] if face == "read-only mount" else [])]
        with mounted(place, folder, *options) as mount, Client(mount / name) as client, Client(mount / name) as beside:
            yield client, beside, lambda: mount.log


@pytest.mark.parametrize(
    ("face", "mode"),
    [
        ("mount", "WAL"),
        ("process", "DELETE"),
        pytest.param("mount", "DELETE", marks=pytest.mark.long),
        pytest.param("process", "WAL", marks=pytest.mark.long),
        pytest.param("read-only mount", "DELETE", marks=pytest.mark.long),
        pytest.param("read-only mount", "WAL", marks=pytest.mark.long),
    ],
)
def test_a_transaction_keeps_its_state_within_the_retention(
    writers: tuple[Place, Mount], tmp_path: Path, face: str, mode: str
) -> None:
    place, elsewhere = writers
    name = fresh_name()
    sqlite(elsewhere / name, f"PRAGMA journal_mode={mode}", "CREATE TABLE t(i INTEGER PRIMARY KEY, n, data)")
    sqlite(elsewhere / name, f"INSERT INTO t SELECT i, 0, randomblob(9000) FROM ({numbers(100)})")
    runtime, keys = Runtime(), {"access_key": place.access_key, "secret_key": place.secret_key}
    with (
        closing(S3Store(place.bucket, runtime=runtime, endpoint_url=place.url, region="us-east-1", **keys)) as store,
        closing(Catalog(store, runtime, Config(), place.prefix)) as catalog,
        reader(place, name, face, tmp_path) as (read, beside, said),
        Client(elsewhere / name) as writer,
    ):
        source, heads = catalog.at(f"{place.prefix}/{name}")

        def commit(first: int, last: int) -> None:
            for n in range(first, last):
                writer("PRAGMA busy_timeout=20000", f"UPDATE t SET n = {n}, data = randomblob(9000 + {n})")

        def merge() -> None:
            """What a commit in the background does: nothing is left of the places that the reader knows."""
            before = heads.read()
            assert before is not None
            merged = fold(source, heads, Config(), before)
            assert merged is not None or not before.head.segments

        read("BEGIN")
        assert read("SELECT n FROM t WHERE i = 1") == [[0]]
        commit(1, 4)
        merge()
        collect(source, heads, 3600.0)
        commit(4, 6)
        states = [[0, 0, 100, 900_000]], [[5, 5, 100, 100 * 9005]]
        with contextlib.suppress(SqlError):  # on a mount a transaction that begins may have to wait for the others
            assert beside(ALL) == states[face == "process"]
        assert read(ALL) == states[0]
        read("ROLLBACK")
        assert read(ALL) == [[5, 5, 100, 100 * 9005]]

        commit(6, 7)
        read("BEGIN")
        assert read("SELECT n FROM t WHERE i = 1") == [[6]]
        commit(7, 10)
        merge()
        commit(10, 11)
        time.sleep(1.1)  # the store's clock counts seconds
        commit(11, 12)
        time.sleep(1.1)
        for _ in range(2):
            collect(source, heads, 0.0)
        with pytest.raises((SqlError, apsw.IOError)):
            print(read(ALL))
        assert "older than the retention; open a newer one" in said()
        with contextlib.suppress(SqlError, apsw.Error):
            read("ROLLBACK")
        assert read(ALL) == [[11, 11, 100, 100 * 9011]]
        assert read("PRAGMA integrity_check") == [["ok"]]
