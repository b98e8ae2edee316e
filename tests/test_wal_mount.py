"""WAL mode on a mount: real SQLite in processes of their own, what S3 holds, and what another machine sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Client, Place, fresh_name, sqlite
from pairs import Pair, two_mounts

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place, folder = mount_bucket.inside(fresh_name("wal")), tmp_path_factory.mktemp("pair")
    with two_mounts(place, folder) as pair:
        yield pair


@pytest.fixture
def pair(mounts: Pair) -> Iterator[Pair]:
    mounts.proxy.reset()
    yield mounts
    mounts.proxy.reset()


@pytest.fixture
def name() -> str:
    return fresh_name()


def create(path: Path, *statements: str) -> None:
    assert sqlite(path, "PRAGMA journal_mode=WAL", "CREATE TABLE t(a PRIMARY KEY, b)", *statements) == "wal"


def test_one_process_after_the_other(pair: Pair, name: str) -> None:
    """The last one that closes leaves no `-wal` and no `-shm`; the mode stays."""
    create(pair.here / name)
    for number in range(5):
        sqlite(pair.here / name, f"INSERT INTO t VALUES ({number}, randomblob(3000))")
        assert sqlite(pair.here / name, "PRAGMA journal_mode; SELECT count(*) FROM t") == f"wal\n{number + 1}"
        assert sqlite(pair.elsewhere / name, "SELECT count(*) FROM t; PRAGMA integrity_check") == f"{number + 1}\nok"
    assert [p for p in sqlite_files(pair.here / name)] == [name]


def sqlite_files(path: Path) -> list[str]:
    from mounting import shell

    return [each for each in shell("ls", path.parent).stdout.split() if each.startswith(path.name)]


def test_readers_beside_the_writer(pair: Pair, name: str) -> None:
    """A reader in a transaction keeps its state and does not hold the writer up; elsewhere each commit is seen."""
    create(pair.here / name)
    with Client(pair.here / name) as writer, Client(pair.here / name) as reader, Client(pair.elsewhere / name) as remote:
        writer("INSERT INTO t VALUES (0, 'zero')")
        reader("BEGIN")
        assert reader("SELECT count(*) FROM t") == [[1]]
        for number in range(1, 6):
            writer(f"INSERT INTO t VALUES ({number}, randomblob(9000))")
            assert reader("SELECT count(*) FROM t") == [[1]]
            assert remote("SELECT count(*) FROM t") == [[number + 1]]
        reader("COMMIT")
        assert reader("SELECT count(*) FROM t") == [[6]]
        assert remote("PRAGMA integrity_check") == [["ok"]]
