"""Commands about the past and the health of a database: history, snapshot, restore, gc, check, adopt."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from commanding import commanded, run
from engine import Call, shrink_limits, sqlite_page
from inprocess import connect, rows
from mounting import Place, command
from scenes import Scene, same, state, store_down

from s3blockfs.config import HOUR_S
from s3blockfs.errors import RequestInDoubt
from s3blockfs.history import keep, open_at

PAST = ("history", "snapshot", "restore", "check")


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """`a.db` in state 1, commit 2; small limits, so that there are objects."""
    shrink_limits(monkeypatch)
    with commanded(monkeypatch) as world:
        yield Scene(world)


def commit(scene: Scene, number: int, after_s: float = 60) -> int:
    """State `number`, some time later; its commit's number."""
    scene.world.runtime.sleep(after_s)
    scene.commit_elsewhere(number, pages=40)
    return newest(scene)


def newest(scene: Scene, name: str = "a.db") -> int:
    version = scene.world.heads(name, faulty=False).read()
    assert version is not None
    return version.head.seq


def shows(scene: Scene, number: int, name: str = "a.db") -> bool:
    return same(scene.world.content(name), state(number, pages=40))


def lines(shown: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shown.splitlines()]


# --- history and restore -----------------------------------------------------------------------------------


def test_history_lists_what_can_be_restored(scene: Scene, capsys: Any) -> None:
    seqs = [commit(scene, number) for number in (2, 3)]
    code, shown = run(capsys, "history", "bucket/a.db", "--json")
    found = lines(shown)
    assert (code, [each["seq"] for each in found]) == (0, [*reversed(seqs), 2, 1])
    assert found[0]["size_bytes"] == 40 * 4096 and len(found[0]["commit"]) == 32
    assert [each["committed"][:20] for each in found[:2]] == ["1970-01-01T00:18:40+", "1970-01-01T00:17:40+"]
    code, shown = run(capsys, "history", "bucket/a.db")
    assert [line.split()[0] for line in shown.splitlines()] == [str(each["seq"]) for each in found]


def test_restore_to_a_commit_is_one_more_commit(scene: Scene, capsys: Any) -> None:
    second, _ = commit(scene, 2), commit(scene, 3)
    before = newest(scene)
    assert run(capsys, "restore", "bucket/a.db", "--to", second) == (0, "")
    assert shows(scene, 2) and newest(scene) == before + 1
    assert run(capsys, "restore", "bucket/a.db", "--to", before) == (0, "")
    assert shows(scene, 3), "undone"
    assert commit(scene, 4) == before + 3
    assert run(capsys, "restore", "bucket/a.db", "--to", 2) == (0, "")
    assert scene.published(1)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("90s", 2),
        ("1970-01-01T00:17:40", 2),
        ("1970-01-01T00:18:39.5Z", 2),
        ("1970-01-01T02:18:40+02:00", 3),
        ("59s", 3),
        ("1970-01-01 00:17:39", 1),
    ],
)
def test_restore_to_a_time_takes_the_last_commit_before(scene: Scene, capsys: Any, moment: str, number: int) -> None:
    commit(scene, 2), commit(scene, 3), commit(scene, 4)  # at 1060, 1120 and 1180 s
    assert run(capsys, "restore", "bucket/a.db", "--to", moment) == (0, "")
    assert scene.published(1) if number == 1 else shows(scene, number)


def test_restore_as_a_new_database_keeps_the_old_one(scene: Scene, capsys: Any) -> None:
    second, _ = commit(scene, 2), commit(scene, 3)
    assert run(capsys, "restore", "bucket/a.db", "--to", second, "--as", "bucket/old/b.db") == (0, "")
    assert shows(scene, 3) and shows(scene, 2, "old/b.db")
    code, shown = run(capsys, "restore", "bucket/a.db", "--to", 1, "--as", "bucket/old/b.db")
    assert (code, shown) == (7, "s3blockfs: memory://store/old/b.db: exists\n")
    assert run(capsys, "restore", "bucket/a.db", "--to", 1, "--as", "other/b.db")[0] == 2


@pytest.mark.parametrize(
    ("to", "code", "text"),
    [
        ("99", 3, "no commit 99 yet"),
        ("monday", 3, "no snapshot 'monday'"),
        ("1969-12-31", 3, "or before is kept"),
        ("9h", 3, "or before is kept"),
        ("9 o'clock", 2, "write a commit's number"),
        ("-5", 2, "write a commit's number"),
        ("a/b", 2, "no label"),
    ],
)
def test_a_state_that_is_not_there_changes_nothing(scene: Scene, capsys: Any, to: str, code: int, text: str) -> None:
    got, shown = run(capsys, "restore", "bucket/a.db", "--to", to)
    assert (got, text in shown) == (code, True)
    assert scene.published(1) and newest(scene) == 2


def test_a_restore_that_is_overtaken_changes_nothing(scene: Scene, capsys: Any) -> None:
    commit(scene, 2)

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            scene.world.store.rule = None
            scene.commit_elsewhere(9)

    scene.world.store.rule = rule
    assert run(capsys, "restore", "bucket/a.db", "--to", 2)[0] == 7
    assert scene.published(9)


# --- snapshot ----------------------------------------------------------------------------------------------


def test_a_named_snapshot_outlives_the_retention_until_it_is_let_go(scene: Scene, capsys: Any) -> None:
    second = commit(scene, 2)
    assert run(capsys, "snapshot", "create", "bucket/a.db", "monday") == (0, "")
    for number in range(3, 9):
        commit(scene, number, after_s=48 * HOUR_S)
        assert run(capsys, "gc", "bucket/a.db")[0] == 0
    assert second not in [each["seq"] for each in lines(run(capsys, "history", "bucket/a.db", "--json")[1])[:-1]]
    listed = run(capsys, "snapshot", "list", "bucket/a.db", "--json")[1]
    wanted = {"label": "monday", "seq": second, "committed": "1970-01-01T00:17:40+00:00", "size_bytes": 40 * 4096}
    assert lines(listed) == [wanted]
    assert run(capsys, "snapshot", "list", "bucket/a.db")[1].split()[-1] == "monday"
    assert run(capsys, "restore", "bucket/a.db", "--to", "monday", "--as", "bucket/b.db") == (0, "")
    assert shows(scene, 2, "b.db")
    assert run(capsys, "restore", "bucket/a.db", "--to", "monday") == (0, "")
    assert shows(scene, 2)
    assert run(capsys, "snapshot", "rm", "bucket/a.db", "monday") == (0, "")
    assert run(capsys, "snapshot", "list", "bucket/a.db") == (0, "")
    assert run(capsys, "snapshot", "rm", "bucket/a.db", "monday")[0] == 3
    assert shows(scene, 2)


def test_named_snapshots_are_not_lost_by_a_rename(scene: Scene, capsys: Any) -> None:
    assert run(capsys, "snapshot", "create", "bucket/a.db", "monday") == (0, "")
    code, shown = run(capsys, "mv", "bucket/a.db", "bucket/b.db")
    assert (code, "has snapshots, which would be lost" in shown) == (2, True)
    assert run(capsys, "mv", "bucket/a.db", "bucket/b.db", "--force") == (0, "")
    assert same(scene.world.content("b.db"), state(1))


def test_labels(scene: Scene, capsys: Any) -> None:
    assert run(capsys, "snapshot", "create", "bucket/a.db", "v1.0_final-2") == (0, "")
    code, shown = run(capsys, "snapshot", "create", "bucket/a.db", "v1.0_final-2")
    assert (code, "choose another" in shown) == (7, True)
    for wrong in ("10", "10m", "2026-01-01", "", "a b", "a" * 101):
        assert run(capsys, "snapshot", "create", "bucket/a.db", wrong)[0] == 2
    for arguments in (("create", "bucket/a.db"), ("list", "bucket/a.db", "v1"), ("rm", "bucket/a.db")):
        assert run(capsys, "snapshot", *arguments)[0] == 2


def test_a_snapshot_while_others_write_is_of_one_state(scene: Scene, capsys: Any) -> None:
    """And the answer to its own swap is lost: it is there once."""
    second = commit(scene, 2)
    done: list[str] = []

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when not in done:
            done.append(when)
            scene.commit_elsewhere(9)
            if when == "after":
                raise RequestInDoubt("cut")

    scene.world.store.rule = rule
    assert run(capsys, "snapshot", "create", "bucket/a.db", "monday") == (0, "")
    assert done == ["before", "after"]
    assert [each["seq"] for each in lines(run(capsys, "snapshot", "list", "bucket/a.db", "--json")[1])] == [second]
    assert scene.published(9)


# --- gc ----------------------------------------------------------------------------------------------------


def keys(scene: Scene, prefix: str = "a.db/") -> set[str]:
    return {listed.key for listed in scene.world.store.inner.list(prefix)}


def test_gc_deletes_what_is_older_than_the_retention(scene: Scene, capsys: Any) -> None:
    for number in range(2, 8):
        commit(scene, number)
    before = keys(scene)
    assert lines(run(capsys, "gc", "bucket/a.db", "--json")[1])[0]["deleted"] == 0
    assert before <= keys(scene)
    scene.world.runtime.sleep(2 * HOUR_S)
    commit(scene, 8)
    scene.world.runtime.sleep(2 * HOUR_S)
    commit(scene, 9)
    code, shown = run(capsys, "gc", "bucket", "--json", "--retain", "1h")
    (facts,) = lines(shown)
    assert (code, facts["prefix"]) == (0, "a.db")
    assert facts["deleted"] > 5 and facts["deleted_bytes"] > 0
    assert facts["kept"] >= len([key for key in keys(scene) if not key.endswith("/head")]) - 2
    assert not before <= keys(scene)
    assert shows(scene, 9)
    assert run(capsys, "gc", "bucket", "--retain", "59m")[0] == 2


def test_gc_of_a_folder_reaches_what_was_deleted_in_it(scene: Scene, capsys: Any) -> None:
    for name in ("x/one.db", "x/y/two.db", "other/three.db"):
        scene.machine.copy("a.db", name)
        database = scene.machine.open(name)
        database.write(0, state(5, pages=300))
        database.close_handle(0)
    scene.machine.remove("x/y/two.db")
    code, shown = run(capsys, "gc", "bucket/x", "--json")
    found = {each["prefix"]: each["deleted"] for each in lines(shown)}
    assert code == 0 and found.keys() == {"x/one.db", "x/y/two.db"}
    assert found["x/one.db"] == 0 and found["x/y/two.db"] > 1
    assert keys(scene, "x/y/two.db/") == {"x/y/two.db/head"}
    assert run(capsys, "gc", "bucket/x/y/two.db")[0] == 0
    assert run(capsys, "gc", "bucket/none")[0] == 3


def test_gc_goes_on_after_a_damaged_database(scene: Scene, capsys: Any) -> None:
    scene.machine.copy("a.db", "b.db")
    scene.world.store.inner.put("a.db/head", b"broken")
    code, shown = run(capsys, "gc", "bucket")
    assert (code, "a.db/head" in shown, "b.db" in shown) == (6, True, True)


# --- check -------------------------------------------------------------------------------------------------


def large(seed: int, pages: int = 40) -> bytes:
    return sqlite_page(seed, pages) + random.Random(seed).randbytes((pages - 1) * 4096)


@pytest.fixture
def sound(scene: Scene, tmp_path: Path) -> Scene:
    """`a.db` is a real SQLite database of some 80 blocks, with a past; `b` is a plain file."""
    with sqlite3.connect(tmp_path / "a") as connection:
        connection.execute("CREATE TABLE t(a)")
        connection.executemany("INSERT INTO t VALUES (?)", ((random.Random(n).randbytes(3000),) for n in range(1500)))
    connection.close()
    scene.database.refresh(0)
    scene.database.write(0, (tmp_path / "a").read_bytes())
    scene.database.close_handle(0)
    return scene


def test_what_is_sound_is_ok(sound: Scene, capsys: Any) -> None:
    plain = sound.machine.create("b", exclusive=True)
    plain.write(0, b"no database")
    plain.close_handle(0)
    sound.machine.create("empty.db", exclusive=True)
    shown = "s3://bucket/a.db: ok\ns3://bucket/b: ok\ns3://bucket/empty.db: ok\n"
    assert run(capsys, "check", "bucket/a.db", "bucket/b", "bucket/empty.db") == (0, shown)
    assert run(capsys, "check", "s3://bucket/a.db", "--json")[1] == '{"database": "s3://bucket/a.db", "findings": []}\n'


@pytest.mark.parametrize("how", ["missing", "damaged", "cut off", "another"])
def test_every_object_counts(sound: Scene, capsys: Any, how: str) -> None:
    """Whatever is lost is named; where the newest state needs it, with its pages."""
    inner = sound.world.store.inner
    data = sorted(keys(sound, "a.db/data/"))
    assert len(data) > 20
    for key in data[1::7]:
        body = inner.get(key).body
        broken = {
            "damaged": body[:5000] + bytes([body[5000] ^ 1]) + body[5001:],
            "cut off": body[:-1],
            "another": inner.get(next(other for other in data if other != key)).body,
        }
        inner.delete([key]) if how == "missing" else inner.put(key, broken[how])
        code, shown = run(capsys, "check", "bucket/a.db", "--json")
        found = json.loads(shown)["findings"]
        assert code == 6 and all(key in line for line in found), found
        assert any(line.startswith("pages ") for line in found) == (how != "cut off"), found
        inner.put(key, body)
    assert run(capsys, "check", "bucket/a.db")[0] == 0


def test_a_past_state_and_an_archive_count_as_well(sound: Scene, capsys: Any) -> None:
    inner, before = sound.world.store.inner, keys(sound, "a.db/data/")
    sound.commit_elsewhere(3, pages=2000)
    lost = [sorted(before)[-1], sorted(keys(sound, "a.db/archive/"))[-1]]
    for key in lost:
        body = inner.get(key).body
        inner.put(key, b"x" + body[1:])
        code, shown = run(capsys, "check", "bucket/a.db")
        assert (code, key in shown, "pages" in shown) == (6, True, False)
        inner.put(key, body)


def test_pages_that_are_whole_but_wrong(sound: Scene, capsys: Any) -> None:
    sound.database.write(20 * 4096, bytes(4096))
    sound.database.close_handle(0)
    code, shown = run(capsys, "check", "bucket/a.db")
    assert (code, shown) == (6, "s3://bucket/a.db: database disk image is malformed\n")


def test_a_collector_meanwhile_is_no_damage(sound: Scene, capsys: Any) -> None:
    sound.commit_elsewhere(3, pages=2000)
    sound.world.runtime.sleep(48 * HOUR_S)
    sound.commit_elsewhere(4, pages=2000)
    sound.world.runtime.sleep(48 * HOUR_S)
    sound.commit_elsewhere(5, pages=2000)
    happened = []

    def rule(call: Call, when: str) -> None:
        if call.site == "check" and not happened:
            sound.world.store.rule = None
            happened.append(run(capsys, "gc", "bucket/a.db", "--json")[1])

    sound.world.store.rule = rule
    code, shown = run(capsys, "check", "bucket/a.db")
    assert json.loads(happened[0])["deleted"] > 5
    assert code == 6 and "missing" not in shown and "ok" not in shown, "state 5 is no sound database, but all there"


@pytest.mark.parametrize("verb", [*PAST, "adopt", "gc"])
def test_what_is_not_there_or_cannot_be_asked(scene: Scene, capsys: Any, verb: str) -> None:
    more = {"snapshot": ("create",), "restore": ("--to", "1")}.get(verb, ())
    last = ("label",) if verb == "snapshot" else ()
    code, shown = run(capsys, verb, *more, "bucket/none.db", *last)
    assert (code, "none.db: no" in shown) == (3, True)
    store_down(scene.world)
    code, shown = run(capsys, verb, *more, "bucket/a.db", *last)
    assert (code, shown) == (5, "s3blockfs: the store is down\n")


def test_states_are_read_as_they_are_written(scene: Scene) -> None:
    source, heads, version = scene.machine.find("a.db")
    keep(source, heads, version, "v12")
    commit(scene, 2)
    shown = {text: open_at(source, heads, text).head.seq for text in ("1", "2", "v12", "0s", "30S")}
    assert shown == {"1": 1, "2": 2, "v12": 2, "0s": 3, "30S": 2}


# --- all of them for real ----------------------------------------------------------------------------------


@pytest.mark.s3
def test_a_dropped_table_comes_back(place: Place) -> None:
    where, database = ("--endpoint-url", place.url), f"{place.target}/a.sqlite"

    def done(*arguments: str) -> str:
        ended = command(place, *arguments, *where)
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
        return ended.stdout

    connection = connect(place, refresh_s=0.0)
    connection.execute("CREATE TABLE t(a); CREATE TABLE big(b)")
    connection.execute("INSERT INTO big VALUES (randomblob(2000000))")
    connection.execute("INSERT INTO t VALUES ('precious')")
    done("snapshot", "create", database, "before")
    seq = lines(done("history", database, "--json"))[0]["seq"]
    connection.execute("DROP TABLE t; DELETE FROM big; VACUUM")
    assert rows(connection, "SELECT name FROM sqlite_schema") == [("big",)]
    for to in (str(seq), "before"):
        done("restore", database, "--to", to)
        again = connect(place, refresh_s=0.0)
        assert rows(again) == rows(connection) == [("precious",)], "also for who has it open"
        again.execute("DROP TABLE t")
        again.close()
    done("restore", database, "--to", str(seq), "--as", f"{place.target}/b.sqlite")
    assert rows(connect(place, "b.sqlite")) == [("precious",)]
    assert done("check", database, f"{place.target}/b.sqlite").count(": ok\n") == 2
    assert [each["label"] for each in lines(done("snapshot", "list", database, "--json"))] == ["before"]
    assert lines(done("gc", place.target, "--json"))[0]["deleted"] == 0
    done("snapshot", "rm", database, "before")
    victim = sorted(key for key in place.listing() if key.startswith("b.sqlite/data/"))[0]
    place.delete(victim)
    ended = command(place, "check", f"{place.target}/b.sqlite", *where)
    assert (ended.returncode, victim in ended.stdout) == (6, True)


@pytest.mark.s3
def test_to_and_from_sqlite_s3vfs(place: Place, tmp_path: Path) -> None:
    """In its layout and back, with a server of one's own, between two buckets."""
    with sqlite3.connect(tmp_path / "a") as connection:
        connection.execute("CREATE TABLE t(a)")
        connection.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 500)
    connection.close()
    where = ("--local", str(tmp_path / "s3"))
    for arguments in (
        ("import", str(tmp_path / "a"), "one/a.db"),
        ("export", "--layout", "sqlite-s3vfs", "one/a.db", "two/old"),
        ("export", "two/old", str(tmp_path / "b")),
        ("check", "two/old"),
        ("adopt", "two/old", "--keep-legacy"),
        ("export", "two/old", str(tmp_path / "c")),
        ("adopt", "two/old"),
    ):
        ended = command(place, *arguments, *where)
        assert ended.returncode == 0, ended.stderr
    with closing(sqlite3.connect(tmp_path / "b")) as connection:
        assert connection.execute("SELECT count(*), total(length(a)) FROM t").fetchall() == [(500, 500_000.0)]
    assert (tmp_path / "c").read_bytes() == (tmp_path / "b").read_bytes()
    ended = command(place, "check", "two/old", *where)
    assert (ended.returncode, "keys of sqlite-s3vfs beside it count for nothing" in ended.stderr) == (0, True)
    again = command(place, "export", "--layout", "sqlite-s3vfs", "one/a.db", "two/old", *where)
    assert (again.returncode, "not empty" in again.stderr) == (7, True)
