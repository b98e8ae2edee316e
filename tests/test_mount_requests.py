"""What a mount asks of S3, counted by a proxy outside of it: requests are what S3 costs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from mounting import Client, Place, mounted, numbers, shell, sqlite
from proxy import FaultProxy

pytestmark = pytest.mark.mount

ROWS = 24_000


def puts(proxy: FaultProxy) -> int:
    return sum(count for (method, _), count in proxy.counts().items() if method in ("PUT", "POST"))


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", file=sys.stderr)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of 100 MB."""
    path = tmp_path_factory.mktemp("large") / "large.db"
    sqlite(path, "CREATE TABLE t(id INTEGER PRIMARY KEY, key TEXT UNIQUE, data)")
    sqlite(path, f"INSERT INTO t SELECT i, 'key ' || (i * 7919 % {ROWS}), randomblob(4100) FROM ({numbers(ROWS)})")
    assert path.stat().st_size > 100_000_000
    return path


def test_one_row_transactions_cost_one_put_each(
    place: Place, tmp_path: Path, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 one-row transactions: at most 206 PUTs in all, from one open connection or one program after the other."""
    with mounted(place.via(proxy.url), tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(id INTEGER PRIMARY KEY, a, b)")
        proxy.reset()
        with Client(mount / "a.db") as client:
            for row in range(190):
                client(f"INSERT INTO t(a, b) VALUES ({row}, 'some text')")
        for row in range(10):
            sqlite(mount / "a.db", f"INSERT INTO t(a, b) VALUES ({row}, 'some text')")
        figures = proxy.counts()
    say(capsys, f"200 one-row transactions: {puts(proxy)} PUTs; {dict(figures)}")
    assert 200 <= puts(proxy) <= 206
    with mounted(place, tmp_path) as mount:
        assert sqlite(mount / "a.db", "SELECT count(*) FROM t") == "200"


def test_bulk_load_and_cold_read(
    place: Place, tmp_path: Path, proxy: FaultProxy, large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cp` of 100 MB: at most 40 PUTs. One row by key from a fresh mount: at most 6 requests, few bytes."""
    with mounted(place.via(proxy.url), tmp_path) as mount:
        sqlite(mount / "other.db", "CREATE TABLE t(a)")  # the store is known to be safe from here on
        proxy.reset()
        assert shell("cp", large, mount / "a.db").returncode == 0
        say(capsys, f"cp of {large.stat().st_size / 1e6:.0f} MB: {puts(proxy)} PUTs; {dict(proxy.counts())}")
        assert 25 <= puts(proxy) <= 40
    with mounted(place.via(proxy.url), tmp_path, refresh="1") as mount:
        proxy.reset()
        assert sqlite(mount / "a.db", "SELECT id, length(data) FROM t WHERE key = 'key 4711'").endswith("|4100")
        asked = [f"{request.method} {request.kind}" for request in proxy.requests]
        say(capsys, f"one row by key, cold: {len(asked)} requests, {proxy.received / 1024:.0f} KiB: {', '.join(asked)}")
        assert 2 <= len(asked) <= 6
        assert proxy.received < 4 << 20
        assert sqlite(mount / "a.db", "SELECT count(*), total(length(data)) FROM t") == f"{ROWS}|{ROWS * 4100}.0"
    with mounted(place, tmp_path) as mount:
        assert shell("cmp", large, mount / "a.db").returncode == 0


def test_idle_means_no_requests(
    place: Place, tmp_path: Path, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the last commit the lease is given back, one PUT for each database; then an open database asks nothing for
    as long as nobody uses it. In mid-transaction only its lease is renewed."""
    daemon = mounted(place.via(proxy.url), tmp_path, "--lease", "6")  # renewed every 2 s
    with daemon as mount, Client(mount / "a.db") as one, Client(mount / "b.db") as two:
        one("CREATE TABLE t(a)", "SELECT * FROM t")
        two("CREATE TABLE t(a)")
        sqlite(mount / "c.db", "CREATE TABLE t(a)")
        proxy.reset()
        time.sleep(2)  # nothing is waited for: that nothing more happens is what is tested
        given_back = proxy.counts()
        assert set(given_back) <= {("PUT", "head")}
        assert given_back["PUT", "head"] <= 3  # on a busy machine they were given back before
        proxy.reset()
        time.sleep(3)
        say(capsys, f"idle: {given_back.total()} leases given back, then {len(proxy.requests)} requests in 3 s")
        assert proxy.requests == []
        two("BEGIN IMMEDIATE", "INSERT INTO t VALUES (1)")
        proxy.reset()
        time.sleep(3.2)
        assert 1 <= proxy.counts()["PUT", "head"] <= 2
        assert len(proxy.requests) == proxy.counts()["PUT", "head"]
        proxy.reset()
        two("COMMIT")
        assert proxy.counts()["PUT", "head"] == 1
