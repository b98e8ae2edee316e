"""The benchmark itself (`scripts/bench`): a small run, an interrupted one, and that its counts and checks are right."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from bench import rows
from bench.wire import Asked, Figures, Wire
from bench.worker import Failed, Worker
from mounting import Place, daemons_of

pytestmark = pytest.mark.mount

TESTS = Path(__file__).resolve().parent
LINE = [sys.executable, "-m", "bench", "W1", "W7", "--no-peers", "--rows", "500", "--repeat", "1", "--delay-ms", "1"]
LINE += ["--transactions", "20"]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(TESTS), "TMPDIR": str(folder)}


def nothing_is_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert daemons_of(folder) == []


def test_a_small_run(tmp_path: Path) -> None:
    """Each of its lines has the requests that are known to be needed."""
    folder, file = tmp_path / "tmp", tmp_path / "figures.json"
    folder.mkdir()
    done = subprocess.run([*LINE, "--json", str(file)], env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())["figures"]
    lines = {(line["workload"], line["who"]): line for line in figures if "target" not in line}
    assert not any(line["failed"] for line in lines.values())
    assert (lines["W1", "boto3 alone"]["gets"], lines["W7", "boto3 alone"]["puts"]) == (1, 20)
    assert lines["W1", "whole file"]["down"] > 0.5 > lines["W1", "boto3 alone"]["down"]
    for who in ("s3blockfs mount", "s3blockfs in process"):
        assert 2 <= lines["W1", who]["requests"] <= 8
        assert (20 <= lines["W7", who]["puts"] <= 26) and lines["W7", who]["gets"] == 0
        assert f"| {who} |" in done.stdout
    verdicts = [line for line in figures if line.get("target") == "≤ 206 PUTs"]
    assert [line["met"] for line in verdicts] == [True, True]
    nothing_is_left(folder)


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(LINE, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("W1 1/1 s3blockfs mount")
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()  # also of a daemon that was about to start, until that has ended
    assert process.returncode == 1 and "bench: interrupted\n" in said
    nothing_is_left(tmp_path)


@pytest.fixture
def wire(place: Place) -> Iterator[Wire]:
    with Wire(place.url, 20) as running:
        yield running


def ended(wire: Wire) -> Figures:
    """A client has its answer a moment before the proxy knows that there is no more of it."""
    time.sleep(1.0)
    return wire.take()


def test_what_the_proxy_counts(place: Place, wire: Wire) -> None:
    """Requests, bytes, how many of them had to wait for each other, and the delay."""
    through = place.via(wire.url)
    through.put("a", bytes(300_000))
    assert len(through.get("a")) == 300_000
    assert through.listing() == ["a"]
    figures = ended(wire)
    assert (figures.puts, figures.gets, figures.lists, figures.trips) == (1, 1, 1, 3)
    assert 300_000 < figures.up < 305_000 and 300_000 < figures.down < 305_000
    assert all(one.ended - one.began >= 0.02 and one.status == 200 for one in figures.asked)
    assert figures.dollars == pytest.approx(2 * 5e-6 + 4e-7)
    wire.delay(500)  # longer than a busy machine takes to begin two at once
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(through.get, ["a"] * 3))
    figures = wire.take()
    assert figures.gets == 3 and figures.trips < 3
    assert wire.take().asked == []


def test_a_link_is_shared_by_all_connections(place: Place) -> None:
    """3 MB at 10 MB/s take 0.3 s, whoever asks for them, and so do 3 MB the other way."""
    place.put("a", bytes(1_000_000))
    with Wire(place.url, 0, link_mb_s=10) as wire, ThreadPoolExecutor(4) as pool:
        through = place.via(wire.url)
        assert through.get("a") == bytes(1_000_000)
        (alone,) = ended(wire).asked
        assert alone.ended - alone.began >= 0.1
        up = pool.submit(through.put, "b", bytes(3_000_000))
        assert [len(body) for body in pool.map(through.get, ["a"] * 3)] == [1_000_000] * 3
        up.result()
        asked = ended(wire).asked
    gets, (put,) = [one for one in asked if one.method == "GET"], [one for one in asked if one.method == "PUT"]
    assert max(one.last for one in gets) - min(one.began for one in gets) >= 0.3
    assert put.ended - put.began >= 0.3
    assert max(one.ended for one in asked) - min(one.began for one in asked) < 30, "a wait that adds up"
    assert place.get("b") == bytes(3_000_000)


def test_what_is_still_under_way_is_counted_once() -> None:
    first, rest = Asked("GET", "/b/k", "", 1.0, down=10), Asked("GET", "/b/k", "", 1.0, down=5, ended=2.0, rest=True)
    figures = Figures([first]) + Figures([rest])
    assert (figures.gets, figures.down, figures.trips) == (1, 15, 1)


@pytest.mark.parametrize(
    ("damage", "seen_by"),
    [
        ("UPDATE t SET data = zeroblob(1000) WHERE id = 7", ("verify", "points")),  # a scan is checked by its sums only
        ("DELETE FROM t WHERE id = 7", ("verify", "points", "scan")),
    ],
)
def test_a_wrong_answer_is_no_figure(tmp_path: Path, damage: str, seen_by: tuple[str, ...]) -> None:
    file = tmp_path / "rows.sqlite"
    rows.make(file, 50)
    arguments: dict[str, dict[str, Any]] = {"points": {"count": 500, "salt": ""}}
    with Worker(dict(os.environ), 30, kind="file", rows=50, page_size=4096, path=str(file)) as client:
        for step in seen_by:
            assert client(step, **arguments.get(step, {}))["seconds"] > 0
        with closing(sqlite3.connect(file)) as database, database:
            database.execute(damage)
        for step in seen_by:
            with pytest.raises(Failed, match="WrongAnswer"):
                client(step, **arguments.get(step, {}))
