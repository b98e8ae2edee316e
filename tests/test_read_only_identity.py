"""An S3 identity that may read and list, and nothing else: a real one, on a server of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import apsw
import pytest
from inprocess import bucket_of, connect, key, rows
from mounting import Place, mounted, sqlite
from servers import seaweed_with

from s3blockfs.vfs import S3VFS

pytestmark = pytest.mark.mount
READER = {
    "name": "reader",
    "credentials": [{"accessKey": "READER", "secretKey": "r" * 40}],
    "actions": ["Read", "List"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Place]]:
    """One database as its owner sees it, and as the reader does."""
    with seaweed_with(tmp_path_factory.mktemp("readers"), [READER]) as endpoint:
        owner = Place(endpoint.url, endpoint.access_key, endpoint.secret_key, "shared", "dbs")
        owner.create_bucket()
        db = connect(owner)
        db.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
        db.close()
        yield owner, replace(owner, access_key="READER", secret_key="r" * 40)


def test_in_process(places: tuple[Place, Place]) -> None:
    owner, reader = places
    db = connect(reader)
    assert rows(db) == [(1,)]
    with pytest.raises(apsw.ReadOnlyError, match="access denied"):
        db.execute("INSERT INTO t VALUES (2)")
    vfs = S3VFS(bucket_of(reader), 64 * 1024)  # what `connect` uses: the same engine
    assert vfs.xAccess(key(reader), apsw.SQLITE_ACCESS_EXISTS) and vfs.xAccess(key(reader), apsw.SQLITE_ACCESS_READ)
    assert not vfs.xAccess(key(reader), apsw.SQLITE_ACCESS_READWRITE)
    assert rows(db) == rows(connect(owner)) == [(1,)]
    assert S3VFS(bucket_of(owner), 64 * 1024).xAccess(key(owner), apsw.SQLITE_ACCESS_READWRITE)
    with pytest.raises(apsw.CantOpenError):
        connect(reader, "new.sqlite")


def test_on_a_mount(places: tuple[Place, Place], tmp_path: Path) -> None:
    _, reader = places
    with mounted(reader, tmp_path) as mount:
        assert sqlite(mount / "a.sqlite", "SELECT * FROM t").strip() == "1"
        said = sqlite(mount / "a.sqlite", "INSERT INTO t VALUES (2)", check=False)
        assert "I/O error" in said or "readonly" in said or "unable to open" in said, said
        assert sqlite(mount / "a.sqlite", "SELECT count(*) FROM t").strip() == "1"
