"""import and export: what goes in comes out, whole or not at all; cp and mv."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from commanding import commanded, run
from engine import Call, World
from mounting import PATIENCE_S, Place, command
from proxy import Fault, FaultProxy
from scenes import Scene, same, state

from s3blockfs import backup
from s3blockfs.database import Database
from s3blockfs.dirty import Dirty
from s3blockfs.errors import StoreRefused, StoreUnavailable

ROWS = 3000


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with commanded(monkeypatch) as made:
        yield made


@pytest.fixture
def scene(world: World) -> Scene:
    """`a.db` in state 1."""
    return Scene(world)


def make(path: Path, *pragmas: str, rows: int = ROWS) -> sqlite3.Connection:
    """About a megabyte; the connection stays open."""
    connection = sqlite3.connect(path)
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")
    with connection:
        connection.execute("CREATE TABLE t(a INTEGER PRIMARY KEY, b)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", ((n, os.urandom(300)) for n in range(rows)))
    return connection


def names(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir()]


def content(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute("SELECT * FROM t").fetchall()


def stored(world: World, name: str, folder: Path) -> list[Any]:
    copy = folder / "stored"
    copy.write_bytes(world.content(name))
    return content(copy)


def fail_data(call: Call, when: str) -> None:
    if call.operation == "PUT" and call.site not in ("swap", "mark-deleted", "archive") and when == "before":
        raise StoreRefused("no more objects")


# --- import ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pragmas", [("journal_mode=WAL", "page_size=1024"), ("page_size=16384",), ("page_size=512",)])
def test_a_database_that_is_in_use_is_imported_as_committed(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path, pragmas: tuple[str, ...]
) -> None:
    with closing(make(tmp_path / "a", *reversed(pragmas))) as owner:
        expected = owner.execute("SELECT * FROM t").fetchall()
        owner.execute("INSERT INTO t VALUES (-1, 'uncommitted')")
        beside = {each: (tmp_path / each).stat().st_size for each in names(tmp_path)}
        assert run(capsys, "import", tmp_path / "a", "bucket/a.db") == (0, "")
        assert {each: (tmp_path / each).stat().st_size for each in names(tmp_path)} == beside
    assert stored(world, "a.db", tmp_path) == expected
    page = int(pragmas[-1].partition("=")[2])
    assert int.from_bytes(world.content("a.db")[16:18], "big") == page
    version = world.heads(faulty=False).read()
    assert version is not None
    assert (version.head.seq, version.head.name) == (2, "a.db"), "one commit after the creation"


def test_a_hot_journal_beside_the_file_counts(world: World, capsys: Any, tmp_path: Path) -> None:
    with closing(make(tmp_path / "a", "cache_size=5")) as owner:
        expected = owner.execute("SELECT * FROM t").fetchall()
        owner.execute("UPDATE t SET b = 'other'")  # spills into the file
        for suffix in ("", "-journal"):
            (tmp_path / f"dead{suffix}").write_bytes((tmp_path / f"a{suffix}").read_bytes())
    assert run(capsys, "import", tmp_path / "dead", "bucket/a.db") == (0, "")
    assert stored(world, "a.db", tmp_path) == expected


def test_bytes_from_stdin(scene: Scene, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make(tmp_path / "a").close()
    data = (tmp_path / "a").read_bytes()

    def give(sent: bytes, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
        return run(capsys, "import", "-", *arguments)

    assert give(data, "bucket/new.db") == (0, "")
    assert scene.world.content("new.db") == data, "also the change counter"
    for wrong in (data[:-4096], data[:50], b"", b"text\n" * 100_000):
        for arguments in (("bucket/a.db", "--force"), ("bucket/b.db",)):
            code, shown = give(wrong, *arguments)
            assert (code, shown.startswith("s3blockfs: -: "), "nothing was imported" in shown) == (2, True, True)
    assert scene.published(1)
    assert [name for name, _ in scene.world.machine().listing("")] == ["a.db", "new.db"]
    assert give(data, "bucket/b.db")[0] == 0, "a name can be used after a failure"


def test_what_is_no_database_is_not_imported(world: World, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("SQLite format 4\n" * 1000)
    (tmp_path / "empty").touch()
    (tmp_path / "damaged").write_bytes(state(1)[:100] + bytes(8000))
    codes = {each: run(capsys, "import", tmp_path / each, "bucket/a.db")[0] for each in names(tmp_path)}
    assert codes == {"text": 2, "empty": 2, "damaged": 2}
    code, shown = run(capsys, "import", tmp_path / "none", "bucket/a.db")
    assert (code, shown) == (1, f"s3blockfs: {tmp_path}/none: No such file or directory\n")
    assert run(capsys, "import", tmp_path, "bucket/a.db")[0] == 1
    assert list(world.machine().listing("")) == []


def test_a_locked_file_is_waited_for_and_then_refused(
    world: World, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "PATIENCE_MS", 100)
    make(tmp_path / "a").close()
    holder = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN EXCLUSIVE'); print(1); input()"
    line = [sys.executable, "-uc", holder, str(tmp_path / "a")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"1\n"
        code, shown = run(capsys, "import", tmp_path / "a", "bucket/a.db")
        assert (code, shown) == (7, f"s3blockfs: {tmp_path}/a: database is locked\n")
        owner.communicate(b"\n")
    assert run(capsys, "import", tmp_path / "a", "bucket/a.db")[0] == 0


def test_an_existing_database_is_replaced_only_by_force_and_by_one_commit(
    scene: Scene, capsys: Any, tmp_path: Path
) -> None:
    make(tmp_path / "a", "page_size=8192").close()
    code, shown = run(capsys, "import", tmp_path / "a", "bucket/a.db")
    assert (code, "overwrite it with --force" in shown) == (7, True)
    assert scene.published(1)
    before = scene.database.version.head
    assert run(capsys, "import", tmp_path / "a", "bucket/a.db", "--force") == (0, "")
    assert stored(scene.world, "a.db", tmp_path) == content(tmp_path / "a")
    after = scene.world.heads(faulty=False).read()
    assert after is not None and before.counter is not None
    assert (after.head.id, after.head.seq, after.head.counter) == (before.id, before.seq + 1, before.counter + 1)


@pytest.mark.parametrize("name", ["a.db", "new.db"])
def test_an_import_that_fails_leaves_what_was_there(scene: Scene, capsys: Any, tmp_path: Path, name: str) -> None:
    make(tmp_path / "a").close()
    scene.world.store.rule = fail_data
    code, shown = run(capsys, "import", tmp_path / "a", f"bucket/{name}", "--force")
    assert (code, shown.endswith("s3blockfs: no more objects\n")) == (5, True)
    scene.world.store.rule = None
    assert scene.published(1)
    assert [name for name, _ in scene.world.machine().listing("")] == ["a.db"]


def test_a_failure_amid_the_copy_keeps_its_kind(
    scene: Scene, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It comes through SQLite, which has only an I/O error for it."""
    make(tmp_path / "a").close()
    monkeypatch.setattr("s3blockfs.backup.GATHER_BYTES", 0)
    write = Database.write

    def failing(self: Database, offset: int, data: bytes) -> None:
        if offset:
            raise StoreUnavailable("gone")
        write(self, offset, data)

    monkeypatch.setattr(Database, "write", failing)
    assert run(capsys, "import", tmp_path / "a", "bucket/a.db", "--force") == (5, "s3blockfs: gone\n")
    assert scene.published(1)


@pytest.mark.parametrize("which", ["first", "last"])
def test_what_was_stored_otherwise_is_seen(
    world: World, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, which: str
) -> None:
    """What is read again is compared with what came from the file, and not only checksums with what was sent."""
    make(tmp_path / "a").close()
    last, sent = (tmp_path / "a").stat().st_size - 1, Dirty.block

    def block(self: Dirty, number: int) -> bytes:
        data = sent(self, number)
        wrong = number == (0 if which == "first" else last // len(sent(self, 0)))
        return data[:-1] + bytes([data[-1] ^ 1]) if wrong else data

    monkeypatch.setattr(Dirty, "block", block)
    code, shown = run(capsys, "import", tmp_path / "a", "bucket/a.db")
    assert (code, "is not what was read from" in shown) == (6, True)


def test_an_import_loses_to_a_commit_that_comes_first(scene: Scene, capsys: Any, tmp_path: Path) -> None:
    make(tmp_path / "a").close()

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "before":
            scene.world.store.rule = None
            scene.commit_elsewhere(9)

    scene.world.store.rule = rule
    code, shown = run(capsys, "import", tmp_path / "a", "bucket/a.db", "--force")
    assert (code, "committed first" in shown) == (7, True)
    assert scene.published(9)


def test_what_was_stored_is_read_again(scene: Scene, capsys: Any, tmp_path: Path) -> None:
    make(tmp_path / "a").close()
    inner = scene.world.store.inner

    def rule(call: Call, when: str) -> None:
        if call.site == "swap" and when == "after":
            keys = [listed.key for listed in inner.list("a.db/data/")]
            damaged = bytearray(inner.get(keys[0]).body)
            damaged[5000] ^= 1
            inner.put(keys[0], bytes(damaged))

    scene.world.store.rule = rule
    code, shown = run(capsys, "import", tmp_path / "a", "bucket/a.db", "--force")
    assert (code, "checksum mismatch" in shown) == (6, True)


# --- export ------------------------------------------------------------------------------------------------


def test_export_writes_the_committed_bytes(scene: Scene, capsys: Any, tmp_path: Path) -> None:
    scene.database.write(0, b"uncommitted")
    assert run(capsys, "export", "bucket/a.db", tmp_path / "out") == (0, "")
    assert (tmp_path / "out").read_bytes() == scene.world.content()
    assert names(tmp_path) == ["out"]
    code, shown = run(capsys, "export", "bucket/a.db", tmp_path / "out")
    assert (code, "overwrite it with --force" in shown) == (7, True)
    scene.commit_elsewhere(2, pages=40)
    assert run(capsys, "export", "bucket/a.db", tmp_path / "out", "--force") == (0, "")
    assert same((tmp_path / "out").read_bytes(), state(2, pages=40))
    assert run(capsys, "export", "bucket/none.db", tmp_path / "other")[0] == 3
    assert names(tmp_path) == ["out"]


def test_a_database_copied_here_in_wal_mode_leaves_in_rollback_mode(scene: Scene, capsys: Any, tmp_path: Path) -> None:
    scene.database.write(18, b"\2\2")
    scene.database.close_handle(0)
    assert run(capsys, "export", "bucket/a.db", tmp_path / "out") == (0, "")
    assert (tmp_path / "out").read_bytes()[18:20] == b"\1\1"


def test_export_to_stdout(scene: Scene, capsysbinary: Any) -> None:
    scene.commit_elsewhere(3, pages=2000)
    code = run(capsysbinary, "export", "bucket/a.db", "-")
    assert code == (0, scene.world.content())  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("suffix", ["-journal", "-wal"])
def test_side_files_of_an_old_target_are_not_played_into_the_new_one(
    scene: Scene, capsys: Any, tmp_path: Path, suffix: str
) -> None:
    side = tmp_path / f"out{suffix}"
    side.write_bytes(b"hot")
    code, shown = run(capsys, "export", "bucket/a.db", tmp_path / "out")
    assert (code, f"{side}: exists" in shown) == (7, True)
    assert names(tmp_path) == [side.name]
    assert run(capsys, "export", "bucket/a.db", tmp_path / "out", "--force") == (0, "")
    assert names(tmp_path) == ["out"]


def test_a_target_that_appears_meanwhile_is_kept(scene: Scene, capsys: Any, tmp_path: Path) -> None:
    def rule(call: Call, when: str) -> None:
        (tmp_path / "out").write_text("another program's")

    scene.world.store.rule = rule
    assert run(capsys, "export", "bucket/a.db", tmp_path / "out")[0] == 7
    assert (tmp_path / "out").read_text() == "another program's"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_an_export_that_fails_leaves_what_was_there(
    scene: Scene, capsys: Any, tmp_path: Path, force: tuple[str, ...]
) -> None:
    scene.commit_elsewhere(3, pages=2000)
    if force:
        (tmp_path / "out").write_text("old")

    def rule(call: Call, when: str) -> None:
        if call.site == "block" and scene.world.store.count("GET", "block") > 1:
            raise StoreUnavailable("gone")

    scene.world.store.rule = rule
    assert run(capsys, "export", "bucket/a.db", tmp_path / "out", *force) == (5, "s3blockfs: gone\n")
    assert names(tmp_path) == ["out"] * len(force)
    assert not force or (tmp_path / "out").read_text() == "old"
    assert run(capsys, "export", "bucket/a.db", tmp_path / "none" / "out")[0] == 1


# --- cp and mv ---------------------------------------------------------------------------------------------


def test_a_copy_and_a_new_name(scene: Scene, capsys: Any) -> None:
    assert run(capsys, "cp", "bucket/a.db", "s3://bucket/x/y/b.db") == (0, "")
    assert run(capsys, "mv", "bucket/x/y/b.db", "bucket/x/c.db") == (0, "")
    assert same(scene.world.content("x/c.db"), state(1)) and scene.published(1)
    assert [name for name, _ in scene.world.machine().listing("x")] == ["c.db", "y"]
    assert run(capsys, "mv", "bucket/x", "bucket/z") == (0, "")
    assert same(scene.world.content("z/c.db"), state(1))


@pytest.mark.parametrize("verb", ["cp", "mv"])
def test_what_is_there_is_overwritten_only_by_force(scene: Scene, capsys: Any, verb: str) -> None:
    other = scene.machine.create("b.db", exclusive=True)
    other.write(0, state(5))
    other.close_handle(0)
    code, shown = run(capsys, verb, "bucket/a.db", "bucket/b.db")
    assert (code, shown) == (7, "s3blockfs: memory://store/b.db: exists\n")
    assert same(scene.world.content("b.db"), state(5)) and scene.published(1)
    assert run(capsys, verb, "bucket/a.db", "bucket/b.db", "--force") == (0, "")
    assert same(scene.world.content("b.db"), state(1))
    assert run(capsys, verb, "bucket/none.db", "bucket/c.db")[0] == 3
    code, shown = run(capsys, verb, "bucket/b.db", "other/b.db")
    assert (code, "s3blockfs export s3://bucket/b.db - | s3blockfs import - s3://other/b.db" in shown) == (2, True)


# --- all of them for real ----------------------------------------------------------------------------------


@pytest.mark.s3
def test_files_in_and_out_of_a_real_store(place: Place, tmp_path: Path) -> None:
    where = ("--endpoint-url", place.url)
    with closing(make(tmp_path / "a", "journal_mode=WAL", rows=20_000)) as owner:
        expected = owner.execute("SELECT * FROM t").fetchall()
        done = command(place, "import", str(tmp_path / "a"), f"{place.target}/a.db", *where)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for verb, old, new in (("cp", "a.db", "deep/b.db"), ("mv", "deep/b.db", "c.db")):
        done = command(place, verb, f"{place.target}/{old}", f"{place.target}/{new}", *where)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    listed = command(place, "ls", "--json", place.target, *where).stdout
    assert [json.loads(line)["name"] for line in listed.splitlines()] == ["a.db", "c.db", "deep"]
    done = command(place, "export", f"{place.target}/c.db", str(tmp_path / "c"), *where)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert content(tmp_path / "c") == expected
    line = f"{sys.executable} -m s3blockfs"
    pipe = (
        f"{line} export {place.target}/a.db - {' '.join(where)} | {line} import - {place.target}/d.db {' '.join(where)}"
    )
    subprocess.run(["bash", "-c", f"set -o pipefail; {pipe}"], env=place.environment, timeout=PATIENCE_S, check=True)
    command(place, "export", f"{place.target}/d.db", str(tmp_path / "d"), *where)
    assert content(tmp_path / "d") == expected


@pytest.mark.s3
def test_what_import_and_export_ask_for(place: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    """Each object once: stored, read again, exported; and the head once before what it leads to."""
    make(tmp_path / "a", rows=30_000).close()
    size, where = (tmp_path / "a").stat().st_size, ("--endpoint-url", proxy.url)
    for verb, *files in (("import", "a", ""), ("export", "", "b")):
        proxy.reset()
        paths = [str(tmp_path / file) if file else f"{place.target}/a.db" for file in files]
        done = command(place, verb, *paths, *where)
        assert done.returncode == 0, done.stderr
        data = [request for request in proxy.requests if "/data/" in request.path]
        gets, puts = (sum(request.method == method for request in data) for method in ("GET", "PUT"))
        assert (gets, puts) == (-(-size // (4 << 20)), gets if verb == "import" else 0)
        heads = sum(request.path.endswith("a.db/head") and request.method == "GET" for request in proxy.requests)
        assert heads == (3 if verb == "import" else 1)  # two before it is created


@pytest.mark.s3
def test_an_export_that_is_killed_leaves_no_target(place: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    make(tmp_path / "a", rows=60_000).close()
    imported = command(place, "import", str(tmp_path / "a"), f"{place.target}/a.db", "--endpoint-url", place.url)
    assert imported.returncode == 0, imported.stderr
    proxy.rule = lambda request: Fault(delay_s=0.3) if request.kind == "data" else None
    target = tmp_path / "out" / "a"
    target.parent.mkdir()
    line = [sys.executable, "-m", "s3blockfs", "export", f"{place.target}/a.db", str(target)]
    line += ["--endpoint-url", proxy.url, "--readahead-size", "0"]
    process = subprocess.Popen(line, env=place.environment)
    until = time.monotonic() + PATIENCE_S
    while not any(each.stat().st_size for each in target.parent.iterdir()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait(PATIENCE_S)
    assert not target.exists()
    done = command(place, "export", f"{place.target}/a.db", str(target), "--endpoint-url", place.url)
    assert done.returncode == 0 and target.read_bytes()[:16] == b"SQLite format 3\0"


@pytest.mark.s3
def test_a_bar_is_for_terminals(place: Place, tmp_path: Path) -> None:
    make(tmp_path / "a").close()
    terminal, theirs = os.openpty()
    line = [sys.executable, "-m", "s3blockfs", "import", str(tmp_path / "a"), f"{place.target}/a.db"]
    process = subprocess.Popen([*line, "--endpoint-url", place.url], env=place.environment, stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # EIO: nobody has the other end any more
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert process.wait(PATIENCE_S) == 0
    assert b"[####" in shown and b"100%" in shown
