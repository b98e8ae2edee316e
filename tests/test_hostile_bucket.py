"""Who may write below one prefix of a bucket can spoil that database, and nothing else: no other database, no file of
this machine, no terminal, no log; and crash nothing."""

from __future__ import annotations

import json
import logging
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commanding import commanded, run
from engine import Call, InlineRuntime, World, build_journal, sqlite_page
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import Place, mounted, shell, sqlite
from scenes import state

from s3blockfs import s3store, telemetry
from s3blockfs.errors import UNUSABLE, AccessDenied, DamagedObject, S3BlockFSError, StoreRefused
from s3blockfs.format import head as codec
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.head import Head, Lease, NamedSnapshot, Segment
from s3blockfs.format.keys import ObjectRef, is_prefix
from s3blockfs.journal import MAGIC
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store
from s3blockfs.sidefiles import is_side_file

GOOD = "good.db"
VICTIM = "victim.db"

#: Names that others may give to databases and folders.
NAMES = [
    "..", ".", "", "a\0b", "line\nbreak.db", "cr\rx.db", "\x1b[2J\x1b]0;title\x07.db", "\u202egpj.db", "é.db",
    "e\u0301.db", "\ud800.db", " ", "\u00a0", "n" * 255, "n" * 256, ".snapshots", ".s3blockfs", "x-journal", "x-wal",
    "x-shm", "x", "good.db-journal", "x-mj0123456AB", "head", "data", "map", "archive", "GOOD.DB", "-rf", "a\\b.db",
    "%2e%2e", "$(id).db", "victim.db", "\x7f", "\x85.db", "\u2028.db", "0000000000",
]  # fmt: skip

#: What may follow them.
ENDS = [
    "/head", "/head/", "/", "", "/data/0000000000000001-0000000000000001", "/archive/0000000000000001-0000000000000001",
    "/map/000000-0000000000000001-0000000000000001", "/0000000000", "-journal/0000000000", "/.s3blockfs/store",
    "/.s3blockfs/deleted/head", "/.s3blockfs/folder", "/x.db/head",
]  # fmt: skip


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """`good.db` and `victim.db`; commands find them in any bucket."""
    with commanded(monkeypatch) as world:
        stock(world)
        yield world


def stock(world: World) -> None:
    machine = world.machine(faulty=False)
    for number, name in enumerate((GOOD, VICTIM)):
        database = machine.create(name, exclusive=True)
        database.write(0, state(number, 100))  # 400 KB: in a data object
        database.close_handle(0)
        machine.release(database)


def objects(world: World, below: str = "") -> dict[str, bytes]:
    store = world.store.inner
    return {entry.key: store.get(entry.key).body for entry in store.list(below)}


def head_of(world: World, prefix: str = GOOD) -> Head:
    return codec.decode(world.store.inner.get(f"{prefix}/head").body, prefix)


def spoil(world: World, prefix: str = GOOD, **fields: Any) -> None:
    """Put a head with other fields there, valid in itself."""
    world.store.inner.put(f"{prefix}/head", codec.encode(replace(head_of(world, prefix), **fields)))


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


# --- keys --------------------------------------------------------------------------------------------------

parts = st.sampled_from(NAMES) | st.text(max_size=12)
keys = st.builds(
    lambda folders, end: "/".join(folders) + end, st.lists(parts, min_size=1, max_size=4), st.sampled_from(ENDS)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(keys, max_size=15), st.binary(max_size=8))
def test_whatever_keys_there_are(hostile: list[str], body: bytes) -> None:
    """The good database is shown and read, what is shown can be looked at, nothing is shown that is no file name."""
    with World(InlineRuntime()) as world:
        stock(world)
        good = objects(world, f"{GOOD}/")
        for key in hostile:
            if not key.startswith(f"{GOOD}/"):
                world.store.inner.put(key, body)
        machine = world.machine(faulty=False)
        assert GOOD in dict(machine.listing(""))
        folders = [("", 0)]
        for folder, depth in folders:
            for name, entry in machine.listing(folder):
                path = f"{folder}/{name}".lstrip("/")
                assert is_prefix(entry.prefix) and "/" not in name and name not in ("", ".", "..", ".s3blockfs")
                assert entry.prefix.startswith(folder)
                with suppress(*UNUSABLE):
                    machine.lookup(path)
                if entry.is_folder and depth < 5:
                    folders.append((path, depth + 1))
        assert world.content(GOOD) and objects(world, f"{GOOD}/") == good


def test_commands_on_the_worst_keys(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each says something printable and ends; none touches another database."""
    before = objects(world)
    for name in NAMES:
        for end in ENDS:
            if not name.startswith((GOOD, VICTIM)):
                world.store.inner.put(name + end, b"rubbish")
    for line in (["ls"], ["ls", "-l"], ["ls", "--json"]):
        code, said = run(capsys, *line, "bucket")
        assert (code, GOOD in said, printable(said)) == (0 if line == ["ls"] else 6, True, True), said
    code, said = run(capsys, "gc", "bucket")
    assert (code, printable(said)) == (6, True)
    assert {f"{GOOD}: deleted 0", f"{VICTIM}: deleted 0"} <= set(re.findall(r"^\S+: deleted 0", said, re.MULTILINE))
    for name in NAMES:
        for command in (["info"], ["history"], ["check"], ["gc"], ["cp", f"bucket/{GOOD}"], ["rm"]):
            code, said = (
                run(capsys, *command, "--", f"bucket/{name}")
                if len(command) == 1
                else (run(capsys, *command, f"bucket/{name}"))
            )
            assert printable(said), (command, name)
    assert objects(world, f"{GOOD}/") == {key: body for key, body in before.items() if key.startswith(f"{GOOD}/")}


@pytest.mark.parametrize("name", [name for name in NAMES if is_prefix(name) and not is_side_file(name)], ids=ascii)
def test_a_database_of_any_legal_name_can_be_used(world: World, capsys: pytest.CaptureFixture[str], name: str) -> None:
    if name != VICTIM:
        assert run(capsys, "cp", f"bucket/{GOOD}", f"bucket/{name}")[0] == 0
    code, said = run(capsys, "ls", "-l", "bucket")
    assert code == 0 and telemetry.printable(name) in said and printable(said)
    names = [json.loads(line)["name"] for line in run(capsys, "ls", "--json", "bucket")[1].splitlines()]
    assert name in names
    assert run(capsys, "rm", "--", f"bucket/{name}") == (0, "")
    assert world.content(GOOD)


@pytest.mark.parametrize("name", ["..", "../b.db", ".", "a//b.db", "a/../b.db", "/b.db", "a/", "nul\0.db"])
def test_export_leads_nowhere_else(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for key in (f"{name}/head", "b.db/head"):
        world.store.inner.put(key, objects(world)[f"{GOOD}/head"])
    assert run(capsys, "export", f"bucket/{name}", "out.db")[0] == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "in", folder]


def test_an_exported_file_is_private(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    assert run(capsys, "export", f"bucket/{GOOD}", there / "out.db")[0] == 0
    assert (there / "out.db").stat().st_mode & 0o777 == 0o600


# --- heads that point elsewhere ----------------------------------------------------------------------------

OUTSIDE = [
    "archive/0000000000000001-0000000000000001",
    f"{VICTIM}/archive/0000000000000001-0000000000000001",
    f"../{VICTIM}/head",
    "/etc/passwd",
    "a\0b",
    "",
    "x" * 4096,
]


@pytest.mark.parametrize("key", OUTSIDE, ids=lambda key: ascii(key)[:20])
def test_a_snapshot_outside_is_refused(world: World, capsys: pytest.CaptureFixture[str], key: str) -> None:
    """Not even asked for; and `gc` neither keeps nor deletes anything by it."""
    store = world.store
    for key_of_others in OUTSIDE[:2]:
        store.inner.put(key_of_others, store.inner.get(f"{VICTIM}/head").body)
    spoil(world, snapshots=(NamedSnapshot("monday", key),))
    before = objects(world, VICTIM)
    store.calls.clear()
    for line in (
        "snapshot list X",
        "history X",
        "restore X --to monday",
        "check X",
        "info X",
        "gc X",
        "cp X bucket/b.db",
    ):
        said = run(capsys, *line.replace("X", f"bucket/{GOOD}").split())[1]
        assert printable(said)
    code, said = run(capsys, "snapshot", "list", f"bucket/{GOOD}")
    assert code == 6 and "none of its own" in said
    asked = {part for call in store.calls for part in call.key.split(",")}
    assert not [part for part in asked if part.startswith(VICTIM) or part in OUTSIDE], asked
    assert objects(world, VICTIM) == before


def references(ref: ObjectRef) -> dict[str, dict[str, Any]]:
    """Heads that claim another database's object."""
    return {
        "extents": {"extents": (Extent(0, 1 << 30, ref, 0, 1),)},
        "leaves": {"leaves": (LeafRef(0, (1 << 63) - 1, ref.rev, ref.nonce, 0),), "extents": ()},
        "segments": {"segments": (Segment(ref, 1, 9, 1 << 40, (1 << 63) - 1, 1 << 20, 0),)},
        "floor": {"floor": (1 << 63) - 1},
        "floor and tombstone": {"floor": (1 << 63) - 1, "deleted": True},
    }


@pytest.mark.parametrize("kind", references(ObjectRef(0, bytes(8), bytes(8))))
def test_what_a_head_says_never_reaches_another_database(
    world: World, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Every command, gc, rename and copy foremost: what is asked for, written or deleted lies below the names given."""
    victim = head_of(world, VICTIM)
    spoil(world, **references(victim.extents[0].ref if victim.extents else victim.segments[0].ref)[kind])
    before = objects(world, f"{VICTIM}/")
    world.store.calls.clear()
    for line in (
        "check X",
        "history X",
        "gc X",
        "cp X bucket/b.db",
        "mv X bucket/c.db",
        "export X -",
        "gc bucket/c.db",
    ):
        run(capsys, *line.replace("X", f"bucket/{GOOD}").split())
    asked = {part for call in world.store.calls for part in call.key.split(",")}
    mine = re.compile(r"(good\.db|b\.db|c\.db)(-journal)?/|\.s3blockfs/|(good|b|c)\.db$")
    assert [part for part in asked if not mine.match(part)] == []
    assert objects(world, f"{VICTIM}/") == before


def test_gc_deletes_below_its_own_prefix_only(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where keys look as if they led out of it, to a store that would follow them."""
    dated = "0000000000000000-0000000000000001"
    dead = codec.encode(replace(head_of(world), deleted=True, floor=(1 << 63) - 1, extents=(), segments=()))
    store = world.store
    for prefix in (
        f"x/../{VICTIM}",
        f"./{VICTIM}",
        f"/{VICTIM}",
        f"{VICTIM}/",
        f"a//{VICTIM}",
        "own.db",
        f"{VICTIM}/data",
    ):
        store.inner.put(f"{prefix}/head", dead)
        for folder in ("data", "archive", f"../{VICTIM}/data", "data/data"):
            store.inner.put(f"{prefix}/{folder}/{dated}", b"")
    before = objects(world)
    run(capsys, "gc", "bucket")
    deleted = before.keys() - objects(world).keys()
    assert deleted == {
        f"{prefix}/{folder}/{dated}" for prefix in ("own.db", f"{VICTIM}/data") for folder in ("data", "archive")
    }


# --- heads with numbers ------------------------------------------------------------------------------------

NUMBERS: dict[str, dict[str, Any]] = {
    "size": {"size": 1 << 62},
    "negative size": {"size": -1},
    "block size 0": {"block_size": 0},
    "block size 1": {"block_size": 1},
    "block size": {"block_size": 1 << 40},
    "time": {"time_ms": 1 << 64},
    "rev": {"rev": 1 << 64},
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_out_of_range_are_damage(world: World, kind: str) -> None:
    spoil(world, **NUMBERS[kind])
    with pytest.raises(DamagedObject):
        head_of(world)
    with pytest.raises(DamagedObject):
        world.machine().lookup(GOOD)
    assert dict(world.machine().listing("")).keys() == {GOOD, VICTIM}


HUGE: dict[str, dict[str, Any]] = {
    "size": {"size": codec.MAX_DATABASE_BYTES},
    "time": {"time_ms": (1 << 63) - 1},
    "seq": {"seq": (1 << 63) - 1},
    "texts": {"writer": "\x1b[31m\nforged: line" * 99, "lease": Lease("\r\x1b]0;x\x07\n", "\n", (1 << 63) - 1)},
    "labels": {"snapshots": tuple(NamedSnapshot(f"\n{n}\x1b[0m", "k") for n in range(999))},
    "name": {"name": "../../\n\x1b[31m\0"},
}


@pytest.mark.parametrize("kind", HUGE)
def test_the_largest_numbers_and_odd_texts_crash_nothing(
    world: World, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """And looking at them allocates nothing in proportion."""
    spoil(world, **HUGE[kind])
    tracemalloc.start()
    try:
        for line in (
            "ls -l bucket",
            "ls --json bucket",
            "info X",
            "info --json X",
            "lease show X",
            "history X",
            "gc X",
        ):
            code, said = run(capsys, *line.replace("X", f"bucket/{GOOD}").split())
            assert printable(said) and "Traceback" not in said, said
            assert code in (0, 6), (line, said)
        machine = world.machine(faulty=False)
        database = machine.open(GOOD)
        assert len(database.read(database.size - 10, 100)) == 10
        machine.release(database)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert world.content(VICTIM)


def test_a_spoilt_head_does_not_hide_the_others(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for body in (b"", b"{}", b"rubbish", b'{"format": 9}\n'):
        world.store.inner.put(f"{GOOD}/head", body)
        for options in ([], ["-l"], ["--json"]):
            code, said = run(capsys, "ls", *options, "bucket")
            assert VICTIM in said and GOOD in said
            assert code == (6 if options else 0)


@pytest.mark.parametrize("name", [b"\xff\xfe-mj000000001", b"x" * 2000, b"../other-mj000000001", b"a\0b"], ids=repr)
def test_a_leftover_journal_names_a_super_journal_that_cannot_be(world: World, name: bytes) -> None:
    """That of a database of sqlite-s3vfs: it is not looked for, so it is gone, and the transaction was committed."""
    page = sqlite_page(1, 1)
    journal = build_journal(bytes(4096), 4096, "?")
    end = bytes(4) + name + len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big") + MAGIC
    journal = journal[: -len(bytes(4) + b"?") - 16] + end
    world.store.inner.put("old.bin/0000000000", page)
    for number in range(0, len(journal), 4096):
        world.store.inner.put(f"old.bin-journal/{number // 4096:010d}", journal[number : number + 4096])
    world.store.calls.clear()
    assert {"old.bin", GOOD} <= dict(world.machine().listing("")).keys()
    assert world.content("old.bin") == page
    asked = {call.key for call in world.store.calls if call.site == "legacy"}
    assert asked and all(key.startswith("old.bin") for key in asked | {"old.bin"}), asked


@pytest.mark.parametrize("error", [AccessDenied, StoreRefused, DamagedObject])
def test_a_head_that_may_not_be_read_does_not_hide_the_others(world: World, error: type[S3BlockFSError]) -> None:
    """Denied by a policy or a KMS key, or archived by a lifecycle rule."""
    world.store.inner.put("secret/head", b"x")

    def rule(call: Call, when: str) -> None:
        if call.key == "secret/head":
            raise error("not for you; ask")

    world.store.rule = rule
    machine = world.machine()
    assert dict(machine.listing("")).keys() == {GOOD, VICTIM, "secret"}
    with pytest.raises(error):
        machine.lookup("secret")


# --- logs and terminals ------------------------------------------------------------------------------------


def test_names_cannot_forge_lines_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    try:
        telemetry.setup_logging("debug", str(log))
        for name in NAMES:
            try:
                raise DamagedObject(f"s3://bucket/{name}/head: not the head of a database")
            except S3BlockFSError as error:
                logging.getLogger("s3blockfs.test").exception("read: %s", error)
    finally:
        telemetry.setup_logging()
    lines = log.read_text().splitlines()
    assert len(lines) == len(NAMES)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("text", [*NAMES, "plain", "größe 東京 😀"])
def test_printable_changes_only_what_is_not(text: str) -> None:
    shown = telemetry.printable(text)
    assert shown.isprintable() and isinstance(shown.encode(), bytes)
    assert (shown == text) == text.isprintable()


@pytest.fixture
def store(place: Place) -> Iterator[S3Store]:
    runtime = Runtime()
    keys = {"access_key": place.access_key, "secret_key": place.secret_key}
    with closing(S3Store(place.bucket, runtime=runtime, endpoint_url=place.url, region="us-east-1", **keys)) as store:
        yield store
    runtime.close()


@pytest.mark.s3
def test_a_giant_is_not_fetched(store: S3Store, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of it are; but not all of it, neither as a head nor when a range lies behind its end."""
    monkeypatch.setattr(s3store, "MOST_BYTES", 1000)
    for size, key in ((1000, "small"), (1001, "giant")):
        place.put(key, bytes(size))
    assert len(store.get(f"{place.prefix}/small", site="test").body) == 1000
    assert len(store.get(f"{place.prefix}/giant", site="test", start=500, length=100).body) == 100
    for where in ({}, {"start": 1 << 40, "length": 10}, {"start": 0}):
        with pytest.raises(DamagedObject, match="giant: larger than anything"):
            store.get(f"{place.prefix}/giant", site="test", **where)  # type: ignore[arg-type]
    with pytest.raises(DamagedObject, match="giant: larger than anything"):
        store.get_if_changed(f"{place.prefix}/giant", site="test", etag='"other"')


@pytest.mark.s3
@pytest.mark.parametrize(
    "name", ["a\rb", "a\r\nb", "a\x01b", "a\x1b[2Jb", "a&amp;b", "a]]><b", "a+b", "a%20b", "a\u2028b"], ids=ascii
)
def test_a_deletion_hits_this_name_and_no_other(store: S3Store, place: Place, name: str) -> None:
    """XML would turn a carriage return into a line feed, and cannot say most control characters."""
    others = ["a\nb", "a\n\nb", "ab", "a b", "a&b", "a%b"]
    for each in (name, *others):
        place.put(each, b"x")
    assert name in place.listing()
    store.delete([f"{place.prefix}/{name}"], site="test")
    assert sorted(place.listing()) == sorted(others)


# --- a real mount, a real store ----------------------------------------------------------------------------


@pytest.mark.mount
def test_a_mount_of_the_worst_names(place: Place, tmp_path: Path) -> None:
    """SeaweedFS takes no `.`, `..` and NUL. Others are shown or not; the mount lives and shows the good one."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / GOOD, "CREATE TABLE t(x)", "INSERT INTO t VALUES (1)")
    head = place.get(f"{GOOD}/head")
    deep = "/".join(["d" * 200] * 4)
    for name in [*NAMES, "x/below.db", "same/inner.db", "same", f"{deep}/{'e' * 120}"]:
        if (
            not {".", "..", "", "\0"} & set(name.split("/"))
            and "\0" not in name
            and name.isascii() | name.isprintable()
        ):
            with suppress(Exception):  # the store does not take it
                place.put(f"{name}/head", head)
    place.put("rubbish.db/head", b"\x1b[31m")
    with mounted(place, tmp_path) as mount:
        listed = shell("ls", "-A", mount.directory, text=False)
        assert GOOD.encode() in listed.stdout
        for line in (["ls", "-lA", mount.directory], ["find", mount.directory], ["ls", mount / ".snapshots"]):
            shell(*line, text=False)  # some entries are errors
        for path in ("..", ".s3blockfs", deep, f"{deep}/{'e' * 120}", "x-journal", "x-wal", ".snapshots/../good.db"):
            shell("stat", mount / path, text=False)
        assert shell("stat", "-c", "%F", mount / ".snapshots").stdout == "directory\n"
        assert sqlite(mount / GOOD, "PRAGMA integrity_check", "SELECT x FROM t") == "ok\n1"
        assert sqlite(mount / "line\nbreak.db", "SELECT x FROM t") == "1"
        for line in mount.log.splitlines():
            assert line.isprintable()
        assert "nobody foresaw" not in mount.log
