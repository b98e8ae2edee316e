"""Databases of the real sqlite-s3vfs on a real S3 server, through a mount."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import apsw
import boto3
import pytest
import s3vfs
from mounting import Client, Place, Shared, SqlError, mounted, shell, sqlite
from s3vfs import CREATE, dump, fill, run

from s3blockfs import connect
from s3blockfs.vfs import S3VFS

pytestmark = [pytest.mark.s3, pytest.mark.mount]


def bucket_of(place: Place) -> Any:
    keys = {"aws_access_key_id": place.access_key, "aws_secret_access_key": place.secret_key}
    return boto3.resource("s3", endpoint_url=place.url, region_name="us-east-1", **keys).Bucket(place.bucket)


@pytest.mark.parametrize(
    ("block_size", "page_size"), [(4095, 4096), (4096, 4096), (4097, 512), (65536, 4096), (8192, 65536)]
)
def test_read_then_written(shared: Shared, tmp_path: Path, block_size: int, page_size: int) -> None:
    place, mount, other = shared
    bucket, prefix = bucket_of(place), f"{place.prefix}/old.db"
    run(bucket, prefix, f"PRAGMA page_size={page_size}", CREATE, fill(300), block_size=block_size)
    content = s3vfs.content(bucket, prefix)
    listed = place.listing()
    file = mount / "old.db"
    assert shell("ls", mount.directory).stdout.split() == ["old.db"]
    assert shell("stat", "-c", "%s", file).stdout.strip() == str(len(content))
    shell("cp", file, tmp_path / "copy", check=True)
    assert (tmp_path / "copy").read_bytes() == content
    assert sqlite(file, "PRAGMA integrity_check; SELECT count(*), sum(length(data)) FROM t") == "ok\n300|90000"
    assert set(place.listing()) - {".s3blockfs/store"} == set(listed)
    sqlite(file, "INSERT INTO t VALUES (1000, 'new')")
    assert sqlite(file, "PRAGMA integrity_check; SELECT count(*) FROM t") == "ok\n301"
    assert set(place.listing()).isdisjoint(listed)
    with pytest.raises(apsw.Error):
        run(bucket, prefix, "SELECT count(*) FROM t", block_size=block_size)
    assert sqlite(other / "old.db", "SELECT data FROM t WHERE id=1000") == "new"


def test_a_leftover_journal(place: Place, tmp_path: Path) -> None:
    """That library died after it wrote pages and before it deleted its journal."""
    bucket, prefix = bucket_of(place), f"{place.prefix}/old.db"
    run(bucket, prefix, CREATE, fill(100))
    content = s3vfs.content(bucket, prefix)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(apsw.Error, s3vfs.Died):

        def die(*_: object) -> None:
            raise s3vfs.Died

        patch.setattr("sqlite_s3vfs.S3VFS.xDelete", die)
        run(bucket, prefix, "UPDATE t SET data=randomblob(300)")
    assert s3vfs.content(bucket, prefix) != content
    listed = place.listing()
    assert "old.db-journal/0000000000" in listed
    with mounted(place, tmp_path, "--read-only") as mount:
        assert shell("ls", mount.directory).stdout.split() == ["old.db"]
        shell("cp", mount / "old.db", tmp_path / "copy", check=True)
        assert (tmp_path / "copy").read_bytes() == content
    assert place.listing() == listed
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "old.db", "UPDATE t SET data='x' WHERE id=1")
        assert sqlite(mount / "old.db", "PRAGMA integrity_check; SELECT count(*) FROM t") == "ok\n100"
    assert not any("-journal" in key for key in place.listing())


def test_that_library_writes_while_it_is_mounted(shared: Shared) -> None:
    """An open connection sees the old state, the new one, or an error."""
    place, mount, _ = shared
    bucket, prefix = bucket_of(place), f"{place.prefix}/old.db"
    run(bucket, prefix, CREATE, fill(200))
    with Client(mount / "old.db") as client:
        assert client("SELECT count(*) FROM t") == [[200]]
        for value in range(5):
            client("BEGIN")
            client("SELECT length(data) FROM t WHERE id=1")
            run(bucket, prefix, f"UPDATE t SET data={value}, id=id+1000")
            with contextlib.suppress(SqlError):
                assert client("SELECT count(*), count(DISTINCT data) FROM t")[0] in ([200, 200], [200, 1])
            with contextlib.suppress(SqlError):
                client("ROLLBACK")
            assert client("SELECT DISTINCT data FROM t") == [[value]]
        assert len(dump(s3vfs.content(bucket, prefix))) == 200


def test_exclusive(place: Place, tmp_path: Path) -> None:
    """`mount --exclusive` converts it when it is opened, also for reading; the lease is for what it is then."""
    bucket, prefix = bucket_of(place), f"{place.prefix}/old.db"
    run(bucket, prefix, CREATE, fill(200))
    content, listed = s3vfs.content(bucket, prefix), place.listing()
    with mounted(place, tmp_path, "--exclusive", refresh="60") as mount, mounted(place, tmp_path) as other:
        assert shell("stat", "-c", "%s", mount / "old.db").stdout.strip() == str(len(content))
        assert set(listed) <= set(place.listing())
        with Client(mount / "old.db") as client, Client(other / "old.db") as elsewhere:
            assert client("PRAGMA integrity_check") == [["ok"]]
            assert set(place.listing()).isdisjoint(listed)
            with pytest.raises(apsw.Error):
                run(bucket, prefix, "SELECT count(*) FROM t")
            shell("cp", other / "old.db", tmp_path / "copy", check=True)
            assert (tmp_path / "copy").read_bytes() == content
            with pytest.raises(SqlError, match="locked"):
                elsewhere("INSERT INTO t VALUES (1001, 'theirs')")
            client("INSERT INTO t VALUES (1000, 'new')")
            for each in (client, elsewhere):
                assert each("SELECT count(*), max(id) FROM t") == [[201, 1000]]
    with contextlib.closing(connect(bucket=bucket, name=prefix)) as again:
        assert list(again.execute("PRAGMA integrity_check")) == [("ok",)]


def test_removing_one(place: Place, tmp_path: Path) -> None:
    bucket = bucket_of(place)
    for name in ("a.db", "plain"):
        run(bucket, f"{place.prefix}/{name}", CREATE, fill(10))
    with mounted(place, tmp_path) as mount:
        assert shell("ls", mount.directory).stdout.split() == ["a.db", "plain.sqlite"]
        shell("rm", mount / "a.db", mount / "plain.sqlite", check=True)
        assert shell("ls", mount.directory).stdout == ""
    assert not any(key.endswith("0000000000") for key in place.listing())


@pytest.mark.parametrize("block_size", [4095, 4096, 65536])
def test_in_process(place: Place, block_size: int) -> None:
    """The class of the same name takes over what the original wrote, whatever block size it is given."""
    bucket, prefix = bucket_of(place), f"{place.prefix}/old/cool.sqlite"
    run(bucket, prefix, CREATE, fill(100), block_size=block_size)
    content = s3vfs.content(bucket, prefix)
    vfs = S3VFS(bucket=bucket, block_size=block_size)
    assert b"".join(vfs.serialize_iter(key_prefix=prefix)) == content
    connection, reader = (apsw.Connection(prefix, vfs=vfs.name) for _ in range(2))
    try:
        assert list(connection.execute("SELECT count(*) FROM t")) == [(100,)]
        reader.execute("BEGIN; SELECT * FROM t")
        assert any(key.endswith("/0000000000") for key in place.listing())
        connection.execute("INSERT INTO t VALUES (1000, 'new')")
        reader.execute("COMMIT")
        assert list(connection.execute("SELECT count(*) FROM t")) == [(101,)]
    finally:
        connection.close()
        reader.close()
    assert not any(key.endswith("/0000000000") for key in place.listing())
    with contextlib.closing(connect(bucket=bucket, name=prefix)) as again:
        assert list(again.execute("PRAGMA integrity_check")) == [("ok",)]
        assert list(again.execute("SELECT count(*) FROM t")) == [(101,)]
