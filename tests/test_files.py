"""`s3blockfs.open`: objects and databases as file objects."""

from __future__ import annotations

import gc
import io
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from engine import Call, World

import s3blockfs
from s3blockfs import errors, files
from s3blockfs.catalog import Catalog
from s3blockfs.objectfile import BLOCK_BYTES
from s3blockfs.vfs import S3VFS

URL = "s3://b/folder/data.bin"
KEY = "folder/data.bin"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Whatever bucket a URL names is the one of this world."""
    with World() as world:
        machine = world.machine()
        monkeypatch.setattr(files, "engine", lambda *_: machine)
        yield world


def noise(size: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(size)


# --- reading -----------------------------------------------------------------------------------------------


def test_reads_and_seeks_like_a_local_file(world: World, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    random, body = Random(seed), noise(3 * BLOCK_BYTES + 777)
    world.store.inner.put(KEY, body)
    local = tmp_path / "local"
    local.write_bytes(body)
    for buffering in (-1, 0, 1 << 20):
        with s3blockfs.open(URL, "rb", buffering) as ours, local.open("rb") as theirs:
            assert ours.seekable() and ours.readable() and not ours.writable() and ours.name == URL
            for _ in range(300):
                whence = random.choice((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END))
                offset = random.randrange(-len(body), len(body) * 2)
                outcomes = []
                for file in (ours, theirs):
                    try:
                        outcomes.append(file.seek(offset, whence))
                    except OSError:
                        outcomes.append("refused")
                assert outcomes[0] == outcomes[1]
                size = random.choice((1, 100, 9000, BLOCK_BYTES, 4 * BLOCK_BYTES))
                if buffering == 0:  # one system call, which may return less
                    data = ours.read(size)
                    assert data == theirs.read(len(data)) and (data or not theirs.read(1))
                    theirs.seek(ours.tell())
                else:
                    assert ours.read(size) == theirs.read(size)
                assert ours.tell() == theirs.tell()
            ours.seek(5)
            assert ours.read() == body[5:]
        with pytest.raises(ValueError):
            ours.read(1)


def test_text(world: World) -> None:
    world.store.inner.put(KEY, "ä\nö\r\nü".encode("latin-1"))
    with s3blockfs.open(URL, "r", encoding="latin-1") as file:
        assert list(file) == ["ä\n", "ö\n", "ü"]
    with pytest.raises(UnicodeDecodeError), s3blockfs.open(URL, "rt") as file:
        file.read()
    with s3blockfs.open(URL, "w") as file:
        print("später", file=file)
    assert world.store.inner.get(KEY).body == "später\n".encode()


def test_what_was_opened_is_what_is_read(world: World) -> None:
    body = noise(40 * BLOCK_BYTES)
    world.store.inner.put(KEY, body)
    with s3blockfs.open(URL) as file:
        assert file.read(10) == body[:10]
        world.store.inner.put(KEY, noise(40 * BLOCK_BYTES, 2))
        assert file.read(BLOCK_BYTES - 10) == body[10:BLOCK_BYTES]
        file.seek(9 * BLOCK_BYTES)
        with pytest.raises(errors.ObjectReplaced, match=r"data\.bin: replaced or deleted since .*; open it again"):
            file.read(1)
    with s3blockfs.open(URL) as file:
        assert file.read() == noise(40 * BLOCK_BYTES, 2)


def test_a_deleted_object_and_a_store_that_ignores_if_match(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    body = noise(4 * BLOCK_BYTES)
    world.store.inner.put(KEY, body)
    with s3blockfs.open(URL) as file:
        world.store.inner.delete([KEY])
        file.seek(BLOCK_BYTES)
        with pytest.raises(errors.ObjectReplaced):
            file.read(1)
    get = world.store.inner.get
    monkeypatch.setattr(world.store.inner, "get", lambda key, if_match=None, **more: get(key, **more))
    world.store.inner.put(KEY, body)
    with s3blockfs.open(URL) as file:
        world.store.inner.put(KEY, noise(4 * BLOCK_BYTES, 2))
        file.seek(BLOCK_BYTES)
        with pytest.raises(errors.ObjectReplaced):
            file.read(1)


def test_what_is_not_there_cannot_be_opened(world: World) -> None:
    for name in (URL, "s3://b/x.sqlite", "s3://b/a//b", "s3://b/x/"):
        with pytest.raises(errors.ObjectNotFound, match="no such object"):
            s3blockfs.open(name)


@pytest.mark.parametrize(
    ("url", "mode"),
    [("b/k", "rb"), ("s3://b", "rb"), ("s3://b/", "rb"), ("s3:///k", "rb"), (URL, "ab"), (URL, "r+b"), (URL, "x")],
)
def test_arguments_that_make_no_sense(world: World, url: str, mode: str) -> None:
    with pytest.raises(errors.UsageError, match=r"write s3://BUCKET/KEY"):
        s3blockfs.open(url, mode)
    assert world.store.calls == []


def test_odd_keys_and_empty_objects(world: World) -> None:
    for name in ("a//b", "x/", "ä ö.txt", ".."):
        world.store.inner.put(name, b"here")
        with s3blockfs.open(f"s3://b/{name}") as file:
            assert file.read() == b"here"
    with s3blockfs.open(URL, "wb"):
        pass
    with s3blockfs.open(URL) as file:
        assert (file.read(), file.read(1), file.seek(0, os.SEEK_END)) == (b"", b"", 0)


def test_opening_takes_one_request_and_a_point_read_one_more(world: World) -> None:
    body = noise(100 * BLOCK_BYTES)
    world.store.inner.put(KEY, body)
    with s3blockfs.open(URL) as file:
        assert file.read(100) == body[:100] and len(world.store.calls) == 1
        file.seek(50 * BLOCK_BYTES + 5)
        assert file.read(100) == body[50 * BLOCK_BYTES + 5 :][:100] and len(world.store.calls) == 2
        file.seek(0)
        assert file.read() == body
    assert len(world.store.calls) < 20  # whoever reads on gets more at a time
    with s3blockfs.open(URL, buffering=0) as file:
        file.seek(5)  # not the next block on account of 5 bytes
        assert len(file.read(BLOCK_BYTES)) == BLOCK_BYTES - 5
        file.seek(0)
        assert file.read() == body
    assert len(world.store.calls) < 21  # and the second time nothing but the look


@pytest.fixture
def database(world: World) -> Catalog:
    machine = world.machine()
    vfs = S3VFS.over(machine)
    vfs.deserialize_iter("app", [sqlite_file(1)])
    vfs.deserialize_iter("x.sqlite", [sqlite_file(2, wal=True)])
    return machine


def sqlite_file(value: int, wal: bool = False, rows: int = 1) -> bytes:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE t(x)")
        db.executemany("INSERT INTO t VALUES (?)", [(value,)] * rows)
        db.commit()
        data = bytearray(db.serialize())
    if wal:
        data[18:20] = b"\2\2"
    return bytes(data)


def test_a_database_is_read_as_the_file_that_it_is(world: World, database: Catalog) -> None:
    for name, value in (("app", 1), ("x.sqlite", 2)):
        with s3blockfs.open(f"s3://b/{name}") as file, closing(sqlite3.connect(":memory:")) as db:
            data = file.read()
            db.deserialize(data)
            assert db.execute("SELECT x FROM t").fetchall() == [(value,)]
            file.seek(18)
            assert file.read(2) == b"\1\1" == data[18:20]  # also when it is shown from its middle on
            file.seek(0)
            S3VFS.over(world.machine()).deserialize_iter(name, [sqlite_file(7)])
            assert file.read() == data  # of one state


def test_a_database_wins_where_names_look_like_one(world: World, database: Catalog) -> None:
    world.store.inner.put("x.sqlite", b"an object")
    world.store.inner.put("app", b"an object")
    with s3blockfs.open("s3://b/x.sqlite") as one, s3blockfs.open("s3://b/app") as other:
        assert (one.read(6), other.read()) == (b"SQLite", b"an object")
    database.remove("x.sqlite")
    with s3blockfs.open("s3://b/x.sqlite") as file:
        assert file.read() == b"an object"


def test_a_forked_child_cannot_use_it(world: World) -> None:
    world.store.inner.put(KEY, b"x" * 300_000)
    reader, writer = s3blockfs.open(URL), s3blockfs.open("s3://b/new", "wb")
    writer.write(b"the parent's")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for act in (lambda: reader.read(200_000), lambda: writer.write(b"x"), writer.close):
                with pytest.raises(errors.NotSupported, match="forked child"):
                    act()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    reader.close()
    writer.close()
    assert world.store.inner.get("new").body == b"the parent's"


# --- writing -----------------------------------------------------------------------------------------------


def sites(world: World) -> list[str]:
    return [call.operation for call in world.store.calls if call.site == "file"]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    monkeypatch.setattr(files, "PARTS_OF_ONE_SIZE", 5)


def test_small_files_are_one_put(world: World, small_parts: None) -> None:
    with s3blockfs.open(URL, "wb") as file:
        assert file.write(b"x" * 600) == 600 and file.write(bytearray(b"y" * 400)) == 400 and file.tell() == 1000
        assert not file.seekable() and not file.readable() and file.writable()
        with pytest.raises(io.UnsupportedOperation):
            file.read()
    assert sites(world) == ["PUT"] and world.store.inner.get(KEY).body == b"x" * 600 + b"y" * 400


def test_large_files_are_uploaded_while_they_are_written(world: World, small_parts: None) -> None:
    body = noise(50_500)
    with s3blockfs.open(URL, "wb") as file:
        for at in range(0, len(body), 700):
            file.write(body[at : at + 700])
            with pytest.raises(errors.ObjectNotFound):
                world.store.inner.get(KEY)
        assert "PART" in sites(world)
    assert world.store.inner.get(KEY).body == body
    # 5 parts of 1000 bytes, 5 of 2000, 5 of 3000, 5 of 4000, and what is left of 5000
    assert sites(world) == ["BEGIN", *["PART"] * 21, "COMPLETE"] and world.store.inner.uploads == {}
    with s3blockfs.open(URL, "wb") as file:
        file.write(body[::-1])
    assert world.store.inner.get(KEY).body == body[::-1]


class Stop(Exception):
    pass


@pytest.mark.parametrize("size", [10, 5000])
def test_an_exception_in_the_block_leaves_nothing(world: World, small_parts: None, size: int) -> None:
    for mode in ("wb", "w"):
        with pytest.raises(Stop), s3blockfs.open(URL, mode) as file:
            file.write(b"x" * size if mode == "wb" else "x" * size * 3)
            raise Stop
        assert file.closed and list(world.store.inner.list("")) == [] and world.store.inner.uploads == {}
        assert sites(world).count("BEGIN") == sites(world).count("ABORT")


@pytest.mark.parametrize("mode", ["wb", "w"])
def test_a_file_that_is_never_closed_leaves_nothing(
    world: World, small_parts: None, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = s3blockfs.open(URL, mode)
    file.write("x" * 20_000 if mode == "w" else b"x" * 20_000)
    del file
    gc.collect()
    assert list(world.store.inner.list("")) == [] and world.store.inner.uploads == {}
    assert "ABORT" in sites(world) and "was never closed, so nothing was stored" in caplog.text


@pytest.mark.parametrize("operation", ["PUT", "BEGIN", "PART", "COMPLETE"])
def test_a_refusal_leaves_nothing(world: World, small_parts: None, operation: str) -> None:
    def rule(call: Call, when: str) -> None:
        if call.operation == operation:
            raise errors.AccessDenied("no")

    world.store.rule = rule
    with pytest.raises(errors.AccessDenied), s3blockfs.open(URL, "wb") as file:
        file.write(b"x" * (100 if operation == "PUT" else 30_000))
        file.write(b"x" * 500)
    assert file.closed and list(world.store.inner.list("")) == [] and world.store.inner.uploads == {}
    file.close()


@pytest.mark.parametrize(("size", "operation"), [(10, "PUT"), (5000, "COMPLETE")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unknown_outcome_is_said(world: World, small_parts: None, size: int, operation: str, when: str) -> None:
    def rule(call: Call, moment: str) -> None:
        if (call.operation, moment) == (operation, when):
            raise (
                errors.RequestInDoubt("who knows") if operation == "COMPLETE" else errors.StoreUnavailable("no answer")
            )

    world.store.rule = rule
    file = s3blockfs.open(URL, "wb")
    file.write(b"x" * size)
    with pytest.raises(errors.OutcomeUnknown, match="does not say whether it was stored"):
        file.close()
    assert bool(list(world.store.inner.list(""))) == (when == "after")
    assert "ABORT" not in sites(world)  # it could tear what is being completed


def test_parts_that_cannot_be_aborted_are_reported(
    world: World, small_parts: None, caplog: pytest.LogCaptureFixture
) -> None:
    def rule(call: Call, when: str) -> None:
        if call.operation == "ABORT":
            raise errors.StoreUnavailable("away")

    world.store.rule = rule
    with pytest.raises(Stop), s3blockfs.open(URL, "wb") as file:
        file.write(b"x" * 5000)
        raise Stop
    assert "unfinished upload are left" in caplog.text


@pytest.mark.parametrize("name", ["app", "x.sqlite", "app/head", "x.sqlite/data/0-1", "app/map/1", "app/archive/1"])
def test_a_database_is_not_overwritten(world: World, database: Catalog, name: str) -> None:
    before = {entry.key: entry.etag for entry in world.store.inner.list("")}
    with pytest.raises(errors.UsageError, match="belongs to the database"):
        s3blockfs.open(f"s3://b/{name}", "wb")
    assert {entry.key: entry.etag for entry in world.store.inner.list("")} == before
    for free in ("app.bin", "app/notes.txt", "other/head"):
        with s3blockfs.open(f"s3://b/{free}", "wb") as file:
            file.write(b"ok")
        assert world.store.inner.get(free).body == b"ok"


def test_a_read_only_configuration_refuses(world: World) -> None:
    with pytest.raises(errors.ReadOnly):
        s3blockfs.open(URL, "wb", read_only=True)


def test_an_unfinished_file_at_the_end_of_python(world: World, small_parts: None) -> None:
    file = s3blockfs.open(URL, "wb")
    file.write(b"x" * 5000)
    files._abandon_all()
    assert file.closed and world.store.inner.uploads == {}
