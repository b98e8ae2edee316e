"""`--read-only --direct-io`: connections of one process that overlap without a gap, each of which follows by itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mounting import PATIENCE_S, Client, Mount, Place, command, fresh_name, mounted, shell, sqlite
from pairs import size_of
from proxy import FaultProxy

pytestmark = pytest.mark.mount

REFRESH_S = 1.0


class Sides(NamedTuple):
    reading: Mount
    elsewhere: Mount
    proxy: FaultProxy


@pytest.fixture(scope="module")
def mounts(mount_bucket: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    place, folder = mount_bucket.inside(fresh_name("direct")), tmp_path_factory.mktemp("direct")
    options = ["--read-only", "--direct-io"]
    with (
        FaultProxy(place.url) as proxy,
        mounted(place.via(proxy.url), folder, *options, refresh=str(REFRESH_S)) as reading,
        mounted(place, folder) as elsewhere,
    ):
        yield Sides(reading, elsewhere, proxy)


#: Six threads, of which none ends its transaction before another has begun one, and two whose transactions are long.
#: Each state has its number in all of its rows, and as many rows as it should. Prints [(n, when the last transaction
#: that saw it began)] of the six, how many transactions there were, and [errors].
OVERLAPPING = """
import json, random, sqlite3, sys, threading, time
path, seconds = sys.argv[1], float(sys.argv[2])
changed, holding, seen, looks, errors = threading.Condition(), 0, {}, 0, []
until = time.monotonic() + seconds
def read(number):
    global holding, looks
    db = sqlite3.connect(path if number % 2 else f"file:{path}?mode=ro", uri=not number % 2, isolation_level=None)
    db.execute(f"PRAGMA cache_size={random.choice([1, 20, 2000])}")
    while time.monotonic() < until:
        try:
            began = time.monotonic()
            db.execute("BEGIN")
            [(n, many)] = db.execute("SELECT n, many FROM head")
            if number < 2:
                time.sleep(2)
            else:
                with changed:
                    seen[n] = max(began, seen.get(n, 0))
                    looks += 1
                    holding += 1
                    changed.notify_all()
                    changed.wait_for(lambda: holding > 1, 1)
                    holding -= 1
                time.sleep(random.random() / 20)
            rows = db.execute("SELECT min(n), max(n), count(*), sum(length(filler)) FROM t").fetchall()
            assert rows == [(n, n, many, 900 * many)], (n, many, rows)
            if number < 2:
                assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            db.execute("COMMIT")
        except Exception as error:
            errors.append(repr(error))
            if db.in_transaction:
                db.execute("ROLLBACK")
threads = [threading.Thread(target=read, args=[number]) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps([list(seen.items()), looks, errors]))
"""


def change(writer: Client, n: int) -> None:
    """The next state: now and then much larger, or cut off by VACUUM."""
    many = 400 if n % 4 == 1 else 40
    rows = f"WITH c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<{many}) SELECT i, {n}, randomblob(900) FROM c"
    for statement in ("BEGIN", "DELETE FROM t", f"INSERT INTO t {rows}", f"UPDATE head SET n = {n}, many = {many}"):
        writer(statement)
    writer("COMMIT")
    if n % 4 == 2:
        writer("VACUUM")


def made(mounts: Sides, mode: str = "DELETE") -> str:
    name = fresh_name()
    table = "CREATE TABLE t(i INTEGER PRIMARY KEY, n, filler)"
    sqlite(mounts.elsewhere / name, f"PRAGMA journal_mode={mode}", table, "CREATE TABLE head AS SELECT 0 n, 1 many")
    sqlite(mounts.elsewhere / name, "INSERT INTO t VALUES (1, 0, zeroblob(900))")
    return name


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
@pytest.mark.parametrize("seconds", [9, pytest.param(120, marks=pytest.mark.long)])
def test_threads_that_never_leave_a_gap(
    mounts: Sides, seconds: float, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """None keeps an old state, or mixes two, and one request an interval serves all."""
    name = made(mounts, mode)
    line = [sys.executable, "-c", OVERLAPPING, str(mounts.reading / name), str(seconds)]
    committed = [(time.monotonic(), 0)]
    mounts.proxy.reset()
    with (
        Client(mounts.elsewhere / name) as writer,
        subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            while process.poll() is None:
                change(writer, len(committed))
                committed.append((time.monotonic(), len(committed)))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.4)
            seen, looks, errors = json.loads(process.communicate(timeout=PATIENCE_S)[0])
        finally:
            process.kill()
    replaced = {n - 1: when for when, n in committed}
    ages = [max(at - replaced.get(n, at), 0.0) for n, at in seen]
    asked = mounts.proxy.counts()["GET", "head"]
    with capsys.disabled():
        text = f"{looks} transactions saw {len(seen)} of {len(committed)} states, the oldest {max(ages):.1f} s old"
        print(f"\n{text}; {asked} looks at the head", file=sys.stderr)
    assert errors == []
    assert looks > 10 * seconds
    assert max(ages) < REFRESH_S + 3
    assert len(seen) > seconds / 3
    assert asked <= (seconds + 5) / REFRESH_S


def test_a_descriptor_is_one_state(mounts: Sides) -> None:
    """Also for programs that are not SQLite; another descriptor has another one. A shorter one cuts nothing off."""
    name = made(mounts)
    with Client(mounts.elsewhere / name) as writer:
        change(writer, 1)
        large = shell("cat", mounts.elsewhere / name, text=False).stdout
        hold = "import os, sys; f = os.open(sys.argv[1], os.O_RDONLY); a = os.read(f, 5000); print(flush=True)"
        hold += "; input(); sys.stdout.buffer.write(a + os.read(f, 1 << 24))"
        line = [sys.executable, "-c", hold, mounts.reading / name]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            try:
                assert reader.stdout
                reader.stdout.readline()
                change(writer, 2)
                time.sleep(REFRESH_S + 0.1)
                with Client(mounts.reading / name) as other:
                    assert other("SELECT n FROM head") == [[2]]
                    small = shell("cat", mounts.reading / name, text=False).stdout
                    # Too short a file is damaged for SQLite, which looks at the size a moment after it chose the state.
                    assert size_of(mounts.reading / name) == len(large)
                    rest, _ = reader.communicate(b"\n", PATIENCE_S)
                    assert size_of(mounts.reading / name) == len(small)
            finally:
                reader.kill()
    assert rest == large
    assert small == shell("cat", mounts.elsewhere / name, text=False).stdout
    assert len(small) < len(large)


def test_first_transaction_shows_what_is_new(mounts: Sides) -> None:
    """Long after the file was opened, and much larger. Before it SQLite asks for the size, and reads no counter."""
    name = made(mounts)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Client(mounts.elsewhere / name))
        readers = [stack.enter_context(Client(mounts.reading / name)) for _ in range(3)]
        for n, reader in enumerate(readers, 1):
            assert reader("PRAGMA page_size") == [[4096]]  # opened now
            change(writer, 4 * n + 1)
            time.sleep(REFRESH_S + 0.1)
            assert reader("SELECT head.n, min(t.n), max(t.n), count(*) FROM head, t") == [[4 * n + 1] * 3 + [400]]


def test_mapped_into_memory(mounts: Sides) -> None:
    """The kernel refuses that, and SQLite reads instead."""
    name = made(mounts)
    with Client(mounts.elsewhere / name) as writer, Client(mounts.reading / name) as reader:
        reader("PRAGMA mmap_size=1000000")
        for n in range(1, 4):
            change(writer, n)
            time.sleep(REFRESH_S + 0.1)
            assert reader("SELECT head.n, min(t.n), max(t.n) FROM head, t") == [[n, n, n]]


def test_what_it_does_not_allow(mounts: Sides, mount_bucket: Place, tmp_path: Path) -> None:
    name = made(mounts)
    sql = "INSERT INTO t VALUES (1, 1, 1)"
    assert "readonly" in sqlite(mounts.reading / name, sql, check=False)
    refused = command(mount_bucket, "mount", mount_bucket.target, str(tmp_path), "--direct-io")
    assert refused.returncode == 2
    assert "add --read-only" in refused.stderr
