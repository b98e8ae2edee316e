"""A database that is deleted and made anew under its name, while some still have the old one open."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from mounting import Client, Place, SqlError, fresh_name, numbers, shell, sqlite
from pairs import Pair, same_everywhere, two_mounts

pytestmark = pytest.mark.mount

READS_ALL = """
import sys
file = open(sys.argv[1], "rb", buffering=0)
print(len(file.read(100)), flush=True)
sys.stdin.readline()
try:
    while file.read(4096):
        pass
except OSError as error:
    print(error.errno)
"""


@pytest.fixture(scope="module")
def pair(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place, folder = mount_bucket.inside(fresh_name("next")), tmp_path_factory.mktemp("pair")
    with two_mounts(place, folder) as pair:
        yield pair


@pytest.mark.parametrize("elsewhere", [False, True])
def test_in_wal_mode_each_has_its_own_log(pair: Pair, elsewhere: bool) -> None:
    name = fresh_name()
    there = pair.elsewhere if elsewhere else pair.here
    wal = "PRAGMA journal_mode=WAL", "CREATE TABLE t(a)"
    with Client(pair.here / name) as old:
        old(*wal, "INSERT INTO t VALUES ('old')")
        assert shell("rm", there / name).returncode == 0
        with pytest.raises(SqlError) if elsewhere else contextlib.nullcontext():
            while elsewhere:
                time.sleep(0.1)  # the lease is given back
                old("SELECT * FROM t")
        sqlite(there / name, *wal, "INSERT INTO t VALUES ('new')")
        with Client(pair.here / name) as new:
            new("PRAGMA busy_timeout=5000", "PRAGMA synchronous=NORMAL")
            assert new("SELECT * FROM t") == [["new"]]
            new("INSERT INTO t VALUES ('more')")
            old.kill()
            assert new("SELECT * FROM t") == [["new"], ["more"]]
            new("INSERT INTO t VALUES ('last')")
    assert same_everywhere(pair, name, "SELECT group_concat(a) FROM t") == "new,more,last"


def test_who_reads_the_old_one_fills_no_pages_of_the_new_one(pair: Pair) -> None:
    name = fresh_name()
    fill = "CREATE TABLE t(a, b)", f"INSERT INTO t SELECT i, randomblob(1000) FROM ({numbers(2000)})"
    some = "SELECT hex(b) FROM t WHERE a = 1500"
    sqlite(pair.elsewhere / name, *fill)
    line = [sys.executable, "-c", READS_ALL, str(pair.here / name)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as old:
        assert old.stdout is not None and old.stdin is not None
        assert old.stdout.readline() == b"100\n"
        assert shell("rm", pair.elsewhere / name).returncode == 0
        sqlite(pair.here / name, "SELECT 1", check=False)
        sqlite(pair.elsewhere / name, *fill)
        with Client(pair.here / name) as new:
            assert new("SELECT count(*) FROM sqlite_schema") == [[1]]
            old.stdin.write(b"\n")
            old.stdin.close()
            assert old.stdout.read() == b"%d\n" % errno.ESTALE
            assert new("PRAGMA integrity_check") == [["ok"]]
            assert new(some)[0][0] == sqlite(pair.elsewhere / name, some)
