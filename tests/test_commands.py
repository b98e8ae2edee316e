"""Commands about one database, on the in-memory store, once on a real one; and the figures for Prometheus."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commanding import commanded, run
from engine import Call
from mounting import PATIENCE_S, Place, command, mounted, sqlite
from prometheus_client import REGISTRY
from scenes import Scene, state, store_down

from s3blockfs import metrics
from s3blockfs.errors import CommitLost, DatabaseGone, StoreRefused
from s3blockfs.format.head import Head, Lease, NamedSnapshot


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """`a.db` in state 1; commands find it in any bucket."""
    with commanded(monkeypatch) as world:
        yield Scene(world)


def change(scene: Scene, **fields: Any) -> Head:
    """Somebody swaps these fields of the head."""
    heads = scene.world.heads(faulty=False)
    version = heads.read()
    assert version is not None
    return heads.swap(version, lambda head: replace(head, **fields)).head


def lease_of(scene: Scene) -> Lease | None:
    version = scene.world.heads(faulty=False).read()
    assert version is not None
    return version.head.lease


# --- info --------------------------------------------------------------------------------------------------


def test_info_tells_what_the_head_says(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    head = change(scene, lease=Lease("host:1", "n", 10), snapshots=(NamedSnapshot("monday", "k"),), floor=1)
    code, shown = run(capsys, "info", "bucket/a.db", "--json")
    facts = json.loads(shown)
    assert code == 0
    wanted = {"name": "a.db", "prefix": "a.db", "id": head.id.hex(), "size_bytes": 3 * 4096, "block_size": 65536}
    wanted |= {"seq": head.seq, "rev": head.rev, "commit": head.commit.hex(), "writer": head.writer, "floor": 1}
    wanted |= {"lease": "host:1", "snapshots": ["monday"], "tail_commits": len(head.tail.commits), "segments": 0}
    assert {name: facts[name] for name in wanted} == wanted
    assert facts["committed"].endswith("+00:00")
    line = len(scene.world.heads(faulty=False).read().body.split(b"\n")[0]) + 1  # type: ignore[union-attr]
    assert facts["head_bytes"] == line + facts["map_bytes"] + facts["tail_bytes"] + 8
    assert [c.site for c in scene.world.store.calls if c.operation != "GET"] == []


def test_info_for_people_has_a_line_for_each_fact(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = run(capsys, "info", "bucket/a.db")
    facts = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert code == 0
    assert (facts["size_bytes"], facts["lease"], facts["snapshots"]) == ("12288", "-", "-")
    assert facts.keys() == json.loads(run(capsys, "info", "bucket/a.db", "--json")[1]).keys()


@pytest.mark.parametrize("arguments", [["info"], ["rm"], ["lease", "show"], ["lease", "break"]])
def test_what_is_not_there_or_cannot_be_asked(
    scene: Scene, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code, shown = run(capsys, *arguments, "bucket/other.db")
    assert (code, shown) == (3, "s3blockfs: memory://store/other.db: no such database\n")
    store_down(scene.world)
    assert run(capsys, *arguments, "bucket/a.db") == (5, "s3blockfs: the store is down\n")
    scene.world.store.rule = None
    assert run(capsys, "rm", "bucket/a.db") == (0, "")
    assert run(capsys, *arguments, "bucket/a.db")[0] == 3


# --- rm ----------------------------------------------------------------------------------------------------


def test_rm_deletes_and_says_nothing(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.machine.create("b.db", exclusive=True)
    scene.machine.create("c.db", exclusive=True)
    assert run(capsys, "rm", "bucket/a.db", "s3://bucket/b.db") == (0, "")
    assert [name for name, _ in scene.world.machine().listing("")] == ["c.db"]


def test_rm_stops_at_the_first_that_cannot_be_deleted(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = run(capsys, "rm", "bucket/none.db", "bucket/a.db")
    assert (code, "none.db" in shown) == (3, True)
    assert scene.published(1)


def test_rm_does_not_delete_what_somebody_made_anew(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            scene.world.store.rule = None
            other = scene.world.machine(faulty=False)
            other.remove("a.db")
            other.create("a.db", exclusive=True)

    scene.world.store.rule = rule
    code, shown = run(capsys, "rm", "bucket/a.db")
    assert (code, "deleted or replaced by" in shown) == (3, True)
    assert scene.world.content() == b""


# --- lease -------------------------------------------------------------------------------------------------


def test_a_lease_is_shown_and_broken(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    shown = '{"owner": null, "seconds": null}\n'
    assert run(capsys, "lease", "show", "bucket/a.db", "--json") == (0, shown)
    before = change(scene, lease=Lease("host:1", "n", 10))
    assert run(capsys, "lease", "show", "bucket/a.db") == (0, "owner           host:1\nseconds         10\n")
    assert lease_of(scene) == before.lease
    assert run(capsys, "lease", "break", "bucket/a.db", "--json") == (0, shown)
    assert lease_of(scene) is None
    assert scene.published(1)
    swaps = scene.swaps()
    assert run(capsys, "lease", "break", "bucket/a.db", "--json") == (0, shown)
    assert scene.swaps() == swaps, "nothing was to be done"


def test_a_commit_that_comes_first_keeps_what_it_wrote_and_loses_its_lease(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    change(scene, lease=Lease("host:1", "n", 10))

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            scene.world.store.rule = None
            scene.commit_elsewhere(2)

    scene.world.store.rule = rule
    assert run(capsys, "lease", "break", "bucket/a.db")[0] == 0
    assert lease_of(scene) is None
    assert scene.published(2)


def test_the_lease_of_another_database_of_that_name_is_not_broken(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    change(scene, lease=Lease("host:1", "n", 10))

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            scene.world.store.rule = None
            other = scene.world.machine(faulty=False)
            other.remove("a.db")
            other.create("a.db", exclusive=True)
            change(scene, lease=Lease("host:2", "n", 10))

    scene.world.store.rule = rule
    code, shown = run(capsys, "lease", "break", "bucket/a.db")
    assert (code, "deleted or replaced by" in shown) == (DatabaseGone.exit_code, True)
    assert lease_of(scene) == Lease("host:2", "n", 10)


# --- all of them for real ----------------------------------------------------------------------------------


@pytest.mark.s3
def test_commands_with_a_real_store(place: Place) -> None:
    """None of them takes a missing database or a folder for one."""
    where = ("--endpoint-url", place.url)
    assert command(place, "info", f"{place.target}/a.db", *where).returncode == 3
    place.put("sub/object", b"")
    assert command(place, "rm", f"{place.target}/sub", *where).returncode == 3
    assert command(place, "lease", "show", f"{place.target}/a.db", *where).returncode == 3


@pytest.mark.mount
def test_commands_beside_a_mount(place: Place, tmp_path: Path) -> None:
    where = ("--endpoint-url", place.url)
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(a)")
        facts = json.loads(command(place, "info", f"s3://{place.target}/a.db", "--json", *where).stdout)
        assert (facts["name"], facts["size_bytes"]) == ("a.db", (mount / "a.db").stat().st_size)
        assert facts["prefix"] == f"{place.prefix}/a.db"
        assert command(place, "lease", "show", f"{place.target}/a.db", *where).returncode == 0
        done = command(place, "rm", f"{place.target}/a.db", *where)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not (mount / "a.db").exists()


# --- figures -----------------------------------------------------------------------------------------------


def figure(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"s3blockfs_{name}_total", labels) or 0.0


def test_requests_are_counted_by_outcome() -> None:
    def answer(status: int) -> None:
        error = Exception("no")
        error.response = {"ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
        raise error

    assert metrics.request("counted", lambda: 5) == 5
    for status in (412, 412, 503):
        with pytest.raises(Exception, match="no"):
            metrics.request("counted", lambda status=status: answer(status))  # type: ignore[misc]
    with pytest.raises(TimeoutError):
        metrics.request("counted", lambda: (_ for _ in ()).throw(TimeoutError()))
    counted = {outcome: figure("requests", site="counted", outcome=outcome) for outcome in ("ok", "412", "503")}
    assert counted == {"ok": 1, "412": 2, "503": 1}
    assert figure("requests", site="counted", outcome="TimeoutError") == 1


def test_commits_and_their_failures_are_counted(scene: Scene) -> None:
    before = figure("commits"), figure("failed_commits")
    scene.database.write(0, state(2))
    scene.database.close_handle(0)
    assert (figure("commits"), figure("failed_commits")) == (before[0] + 1, before[1])
    scene.database.write(0, state(3))
    scene.commit_elsewhere(9)
    with pytest.raises(CommitLost):
        scene.database.close_handle(0)
    assert (figure("commits"), figure("failed_commits")) == (before[0] + 2, before[1] + 1)  # 9 counts as well


def test_a_commit_that_is_refused_counts_as_failed(scene: Scene) -> None:
    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            raise StoreRefused("no")

    before = figure("failed_commits")
    scene.database.write(0, state(2))
    scene.world.store.rule = rule
    with pytest.raises(StoreRefused):
        scene.database.close_handle(0)
    assert figure("failed_commits") == before + 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.mount
def test_a_mount_answers_prometheus(place: Place, tmp_path: Path) -> None:
    port = free_port()
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(a)", "INSERT INTO t VALUES (randomblob(1000000))")
    with mounted(place, tmp_path, "--metrics", f"127.0.0.1:{port}") as mount:
        assert sqlite(mount / "a.db", "SELECT total(length(hex(a))) FROM t") == "2000000.0"
        sqlite(mount / "a.db", "INSERT INTO t VALUES (1)")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("s3blockfs_")]
    figures = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
    assert figures["s3blockfs_commits_total"] == 1
    assert figures["s3blockfs_failed_commits_total"] == 0
    assert figures['s3blockfs_requests_total{outcome="ok",site="swap"}'] >= 1  # a lease takes one, too
    assert figures["s3blockfs_sent_bytes_total"] > 0
    assert figures["s3blockfs_received_bytes_total"] > 1_000_000
    assert figures["s3blockfs_cache_misses_total"] > 0


@pytest.mark.mount
def test_a_port_for_figures_that_is_taken(place: Place, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        arguments = (place.target, str(tmp_path / "mnt"), "--endpoint-url", place.url, "--metrics", address)
        done = command(place, "mount", *arguments)
    assert done.returncode == 2
    assert done.stderr == f"s3blockfs: --metrics {address}: Address already in use; choose another port\n"
