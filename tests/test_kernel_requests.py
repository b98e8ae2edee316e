"""What a statement costs: requests of the kernel to the daemon, and of the daemon to S3. The table in
docs/ARCHITECTURE.md says it; and what the kernel remembers never hides what is there."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Client, Mount, Place, SqlError, mounted, numbers, shell, sqlite
from proxy import FaultProxy

pytestmark = pytest.mark.mount

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "ARCHITECTURE.md").read_text()
REFRESH_S = 1.0
TIMES = 10
FOREVER = "600"  # of a refresh interval: nothing that is remembered is forgotten during the test


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], tuple[int, int]]:
    """(mode, statement) -> (requests of the kernel, requests to S3), as documented."""
    rows = re.findall(r"^\| (\w[\w ,]+) \| (\w[\w -]+) \| (\d+) \| (\d+) \|", DOCUMENT, re.MULTILINE)
    return {(mode, statement): (int(kernel), int(s3)) for mode, statement, kernel, s3 in rows}


def cost(mount: Mount, proxy: FaultProxy, client: Client, *statements: str) -> tuple[float, float, Counter[str]]:
    """Of these statements when they are run again: requests of the kernel, requests to S3, the former by opcode."""
    client(*statements)
    proxy.reset()
    before = mount.kernel_requests()
    for _ in range(TIMES):
        client(*statements)
    asked = mount.kernel_requests() - before
    return asked.total() / TIMES, len(proxy.requests) / TIMES, asked


def statements(client: Client) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names as in the table, and how to run each."""
    yield "SELECT", ("SELECT length(x) FROM t WHERE id = 77",)
    client("BEGIN", "SELECT count(*) FROM t")
    yield "SELECT in a transaction", ("SELECT length(x) FROM t WHERE id = 77",)
    client("COMMIT")
    yield "one-row INSERT", ("INSERT INTO t(x) VALUES (1)",)


def prepare(client: Client, mode: str) -> None:
    assert client(f"PRAGMA journal_mode={mode}") == [[mode.lower()]]
    client("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    client(f"INSERT INTO t(x) SELECT randomblob(500) FROM ({numbers(2000)})", "SELECT sum(length(x)) FROM t")


@pytest.mark.parametrize("mode", ["DELETE", "PERSIST", "WAL", "DELETE, exclusive"])
def test_what_a_statement_costs(
    place: Place,
    tmp_path: Path,
    proxy: FaultProxy,
    capsys: pytest.CaptureFixture[str],
    table: dict[tuple[str, str], tuple[int, int]],
    mode: str,
) -> None:
    """As the table says, and no less: better figures are to be written down. SQLite's versions differ a bit."""
    options = ("--exclusive",) if "exclusive" in mode else ()
    with (
        mounted(place.via(proxy.url), tmp_path, *options, refresh=FOREVER, traced=True) as mount,
        Client(_path(mount, options)) as client,
    ):
        prepare(client, mode.partition(",")[0])
        for name, each in statements(client):
            kernel, s3, asked = cost(mount, proxy, client, *each)
            with capsys.disabled():
                print(f"\n{mode}: {name}: {kernel} requests of the kernel, {s3} to S3; {dict(asked)}", file=sys.stderr)
            assert kernel == pytest.approx(table[mode, name][0], rel=0.1, abs=0.2)
            assert s3 == table[mode, name][1]
            if name != "one-row INSERT":
                assert s3 == 0
                assert mode == "PERSIST" or "READ" not in asked
        client("SELECT 1")


def _path(mount: Mount, options: tuple[str, ...]) -> Path:
    """With `--exclusive` also folders are remembered."""
    if not options:
        return mount / "a.db"
    assert shell("mkdir", mount / "folder").returncode == 0
    return mount / "folder/a.db"


def test_made_elsewhere_it_appears_within_the_interval(place: Place, tmp_path: Path) -> None:
    """In spite of all the look-ups that found nothing, at any moment of the interval; a second time, too."""
    interval = str(REFRESH_S)
    with mounted(place, tmp_path, refresh=interval) as here, mounted(place, tmp_path, refresh=interval) as there:
        for name in ("a.db", "b.db", "a.db"):
            for _ in range(5):
                assert shell("test", "-e", here / name).returncode == 1
                time.sleep(0.15 if name == "a.db" else 0.05)
            sqlite(there / name, "CREATE TABLE IF NOT EXISTS t(a)")
            look_s = made_s = time.monotonic()
            while shell("test", "-e", here / name).returncode:
                assert look_s - made_s < REFRESH_S + 0.25
                time.sleep(0.02)
                look_s = time.monotonic()  # before it: how long the answer takes is the machine's business
            assert sqlite(here / name, "SELECT count(*) FROM t") == "0"
            assert shell("rm", there / name).returncode == 0
            look_s = gone_s = time.monotonic()
            while not shell("test", "-e", here / name).returncode:
                assert look_s - gone_s < REFRESH_S + 0.5
                time.sleep(0.02)
                look_s = time.monotonic()


def test_what_is_made_here_appears_at_once(place: Place, tmp_path: Path) -> None:
    with mounted(place, tmp_path, refresh=FOREVER) as mount:
        for name in ("a.db", "b.db", "folder", "folder/c.db", "a.db-journal"):
            assert shell("test", "-e", mount / name).returncode == 1
        sqlite(mount / "a.db", "CREATE TABLE t(a)")
        assert sqlite(mount / "a.db", "SELECT count(*) FROM t") == "0"
        assert shell("mv", mount / "a.db", mount / "b.db").returncode == 0
        assert sqlite(mount / "b.db", "SELECT count(*) FROM t") == "0"
        assert shell("test", "-e", mount / "a.db").returncode == 1
        assert shell("mkdir", mount / "folder").returncode == 0
        assert shell("test", "-e", mount / "folder/c.db").returncode == 1
        sqlite(mount / "folder/c.db", "CREATE TABLE t(a)")
        assert sqlite(mount / "folder/c.db", "SELECT count(*) FROM t") == "0"
        for _ in range(2):
            assert shell("rm", mount / "folder/c.db").returncode == 0
            assert shell("test", "-e", mount / "folder/c.db").returncode == 1
            sqlite(mount / "folder/c.db", "CREATE TABLE t(a)")
            assert sqlite(mount / "folder/c.db", "SELECT count(*) FROM t") == "0"


def test_a_journal_is_never_hidden(place: Place, tmp_path: Path) -> None:
    """A reader that lately found none sees the one that another process makes, in each mode, and that it is gone."""
    with mounted(place, tmp_path, refresh=FOREVER) as mount:
        with Client(mount / "a.db") as writer, Client(mount / "a.db") as reader:
            writer("CREATE TABLE t(a)")
            assert reader("SELECT count(*) FROM t") == [[0]]
            writer("PRAGMA cache_size=2", "BEGIN", f"INSERT INTO t SELECT randomblob(900) FROM ({numbers(300)})")
            assert shell("test", "-s", mount / "a.db-journal").returncode == 0
            writer("ROLLBACK")
            assert shell("test", "-e", mount / "a.db-journal").returncode == 1
            assert reader("SELECT count(*) FROM t") == [[0]]
            assert writer("PRAGMA journal_mode=WAL") == [["wal"]]
            writer("INSERT INTO t VALUES (1)")
            assert reader("SELECT count(*) FROM t") == [[1]]
            writer("BEGIN", "INSERT INTO t VALUES (2)")
            with pytest.raises(SqlError, match="locked"):
                reader("INSERT INTO t VALUES (3)")
            writer("COMMIT")
            assert reader("SELECT count(*) FROM t") == [[2]]
        with Client(mount / "a.db") as killed:
            assert killed("PRAGMA journal_mode=DELETE") == [["delete"]]
            killed("PRAGMA cache_size=2", "BEGIN", f"INSERT INTO t SELECT randomblob(900) FROM ({numbers(300)})")
            killed.kill()
        assert sqlite(mount / "a.db", "SELECT count(*) FROM t", "PRAGMA integrity_check") == "2\nok"


def test_a_file_that_grew_elsewhere_is_read_to_its_end(place: Place, tmp_path: Path) -> None:
    """By programs without locks, too, which ask for the size of what they opened: never a part of it."""
    interval = str(REFRESH_S)
    with mounted(place, tmp_path) as there, mounted(place, tmp_path, refresh=interval) as here:
        sqlite(there / "a.db", "CREATE TABLE t(a)")
        for _ in range(12):  # look-ups and opens at all moments of the interval
            sqlite(there / "a.db", f"INSERT INTO t SELECT randomblob(900) FROM ({numbers(200)})")
            copy = shell("cat", here / "a.db", text=False).stdout
            assert len(copy) == int.from_bytes(copy[28:32], "big") * 4096
            time.sleep(REFRESH_S / 6)
        time.sleep(REFRESH_S)
        assert shell("cmp", here / "a.db", there / "a.db").returncode == 0
        with Client(here / "a.db") as reader:  # and by a handle that stays open, both ways
            for change in (f"INSERT INTO t SELECT randomblob(900) FROM ({numbers(500)})", "DELETE FROM t", "VACUUM"):
                reader("SELECT count(*) FROM t")
                sqlite(there / "a.db", change)
                time.sleep(REFRESH_S)
                assert reader("PRAGMA integrity_check") == [["ok"]]
