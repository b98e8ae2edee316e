"""The policies of docs/SECURITY.md are enough, and no more than what crosses the wire; encryption as asked.

Two identities of SeaweedFS may use one prefix of a bucket only, one of them only read. Every request passes a proxy and
is held against the policy that the document gives to such a user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from commanding import run
from inprocess import ELSEWHERE, bucket_of, connect, key, rows
from mounting import Place, mounted, numbers, shell, sqlite
from proxy import Fault, FaultProxy, Request
from servers import seaweed_with

import s3blockfs
from s3blockfs.embedded import Endpoint
from s3blockfs.objectstore import StoredObject
from s3blockfs.s3store import S3Store

pytestmark = pytest.mark.mount

BUCKET, PREFIX = "shared", "team/dbs"
DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "SECURITY.md").read_text()
KMS = {"default_provider": "local", "providers": {"local": {"type": "local", "enableOnDemandCreate": True}}}
KEY_ID = "alias/of-the-team"


def identity(name: str, *actions: str) -> dict[str, Any]:
    keys = [{"accessKey": name.upper(), "secretKey": name[0] * 40}]
    return {"name": name, "credentials": keys, "actions": [f"{action}:{BUCKET}/{PREFIX}/*" for action in actions]}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    users = [identity("writer", "Read", "Write", "List"), identity("reader", "Read", "List")]
    with seaweed_with(tmp_path_factory.mktemp("permissions"), users, kms=KMS) as server:
        Place(server.url, server.access_key, server.secret_key, BUCKET).create_bucket()
        yield server


@pytest.fixture
def proxy(endpoint: Endpoint) -> Iterator[FaultProxy]:
    with FaultProxy(endpoint.url) as running:
        yield running


@pytest.fixture
def writer(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    return become(Place(proxy.url, "WRITER", "w" * 40, BUCKET, PREFIX), monkeypatch)


def become(user: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Commands in this process have this user's keys."""
    for name, value in (user.environment | {"S3BLOCKFS_ENDPOINT_URL": user.url}).items():
        monkeypatch.setenv(name, value)
    return user


# --- policies ----------------------------------------------------------------------------------------------

Statement = dict[str, Any]


def policies() -> dict[str, list[Statement]]:
    """Those of the document, by the id of their first statement."""
    found = [json.loads(block)["Statement"] for block in re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)]
    return {statements[0]["Sid"]: statements for statements in found}


def actions_of(statements: Iterable[Statement]) -> set[str]:
    return {action for statement in statements for action in statement["Action"]}


def needs(request: Request) -> list[tuple[str, str, str]]:
    """(action, resource, prefix that is listed) of a request, by the table "Actions, resources, and condition keys for
    Amazon S3". That of DeleteObjects names its keys in the body, which the store itself has checked."""
    url = urlsplit(request.path)
    query = parse_qs(url.query, keep_blank_values=True)
    bucket, _, name = unquote(url.path).lstrip("/").partition("/")
    assert bucket == BUCKET
    whole, one = f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/{name}"
    if "list-type" in query:
        return [("s3:ListBucket", whole, query["prefix"][0])]
    settings = {"lifecycle": "LifecycleConfiguration", "versioning": "BucketVersioning"}
    settings |= {"object-lock": "BucketObjectLockConfiguration"}
    for part, setting in settings.items():
        if part in query:
            return [(f"s3:Get{setting}", whole, "")]
    if "delete" in query:
        return [("s3:DeleteObject", f"{whole}/{PREFIX}/", "")]
    assert name and not query.keys() - {"x-id"}, request
    needed = [({"GET": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}[request.method], one, "")]
    if source := request.headers.get("x-amz-copy-source"):
        needed.append(("s3:GetObject", "arn:aws:s3:::" + unquote(source).lstrip("/"), ""))
    return needed


def allowed(need: tuple[str, str, str], statements: Iterable[Statement]) -> bool:
    action, resource, listed = need

    def matches(pattern: str, text: str) -> bool:
        return fnmatchcase(text, pattern.replace("BUCKET", BUCKET).replace("PREFIX", PREFIX))

    return any(
        action in statement["Action"]
        and matches(statement["Resource"], resource)
        and matches(statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", "*"), listed)
        for statement in statements
    )


def used(proxy: FaultProxy, statements: Iterable[Statement]) -> set[str]:
    """The actions of all requests; every one has to be allowed."""
    wanted = {need for request in proxy.requests for need in needs(request)}
    assert [need for need in sorted(wanted) if not allowed(need, statements)] == []
    return {action for action, _, _ in wanted}


def test_a_request_outside_is_noticed() -> None:
    """The test of the tests."""
    for statements in policies().values():
        inside, outside = f"arn:aws:s3:::{BUCKET}/{PREFIX}/a/head", f"arn:aws:s3:::{BUCKET}/team/a/head"
        assert allowed(("s3:GetObject", inside, ""), statements)
        assert not allowed(("s3:GetObject", outside, ""), statements)
        assert not allowed(("s3:DeleteBucket", f"arn:aws:s3:::{BUCKET}", ""), statements)
        assert not allowed(("s3:ListBucket", f"arn:aws:s3:::{BUCKET}", "team/dbs"), statements)


# --- lives -------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """300 KB: more than a commit puts into the head."""
    file = tmp_path / "local.db"
    sqlite(file, "CREATE TABLE t(x)", f"INSERT INTO t SELECT randomblob(1000) FROM ({numbers(300)})")
    return file


def test_the_life_of_a_database_needs_the_writers_policy(
    writer: Place,
    proxy: FaultProxy,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("s3blockfs.fold.DUE_SEGMENTS", 1)
    where = writer.target
    db = connect(writer)
    db.execute("CREATE TABLE t(x)")
    for _ in range(2):  # large and scattered: segments
        db.execute(f"INSERT INTO t SELECT randomblob(1000) FROM ({numbers(300)})")
    db.close()
    for line in (
        f"import {local} {where}/b.db",
        f"snapshot create {where}/b.db monday",
        f"cp {where}/b.db {where}/c.db",
        f"mv {where}/c.db {where}/in/d.db",
        f"restore {where}/b.db --to monday",
        f"restore {where}/b.db --to monday --as {where}/e.db",
        f"history {where}/b.db",
        f"snapshot list {where}/b.db",
        f"snapshot rm {where}/b.db monday",
        f"info {where}/b.db",
        f"lease break {where}/b.db",
        f"check {where}/b.db",
        f"export {where}/b.db {tmp_path}/out.db",
        f"export --layout sqlite-s3vfs {where}/in/d.db {where}/old",
        f"adopt {where}/old",
        f"ls -l {where}",
        f"gc {where}/a.sqlite",
        f"rm {where}/e.db {where}/old",
        f"gc {where}",
        f"gc {where}/in",
    ):
        code, said = run(capsys, *line.split())
        assert code == 0, f"{line}: {said}"
    with mounted(writer, tmp_path) as mount:
        assert sqlite(mount / "b.db", "INSERT INTO t VALUES (1)", "SELECT count(*) FROM t") == "301"
        for line in (["mkdir", mount / "f"], ["cp", local, mount / "f" / "g.db"], ["mv", mount / "f", mount / "h"]):
            assert shell(*line).returncode == 0
        assert shell("ls", mount / ".snapshots" / "b.db").returncode == 0
        for line in (["rm", mount / "h" / "g.db"], ["rmdir", mount / "h"]):
            assert shell(*line).returncode == 0
    assert used(proxy, policies()["Writer"]) == actions_of(policies()["Writer"])


def test_a_mount_below_the_prefix(writer: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    with mounted(writer.inside("x/y"), tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(x)")
    assert used(proxy, policies()["Writer"]) <= actions_of(policies()["Writer"])


def test_a_reader_needs_the_readers_policy(
    writer: Place,
    proxy: FaultProxy,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = f"{writer.target}/read"
    for line in (f"import {local} {where}/b.db", f"snapshot create {where}/b.db monday"):
        assert run(capsys, *line.split())[0] == 0
    reader = become(replace(writer, access_key="READER", secret_key="r" * 40, prefix=f"{PREFIX}/read"), monkeypatch)
    proxy.reset()
    for command in ("ls -l X", "info X/b.db", "history X/b.db", "check X/b.db", "export X/b.db FILE"):
        line = command.replace("X", where).replace("FILE", str(tmp_path / "out.db"))
        code, said = run(capsys, *line.split())
        assert code == 0, f"{line}: {said}"
    assert len(rows(connect(reader, "b.db"))) == len(rows(connect(reader, "b.db", at="monday"))) == 300
    with mounted(reader, tmp_path, "--read-only") as mount:
        assert sqlite(mount / "b.db", "SELECT count(*) FROM t") == "300"
        assert sqlite(mount / ".snapshots" / "b.db" / "monday.sqlite", "SELECT count(*) FROM t") == "300"
    assert used(proxy, policies()["Reader"]) == actions_of(policies()["Reader"])


def test_doctor_needs_what_the_document_says(
    writer: Place, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """Denied here: it says so, and goes on."""
    code, said = run(capsys, "doctor", writer.target)
    assert code == 1
    assert said.count("not allowed to get") == 3, said
    assert "ok  conditional PUTs" in said and "ok  credentials" in said
    (line,) = re.findall(r"`doctor` also.*\n((?:  `s3:.*\n)+)", DOCUMENT)
    settings = set(re.findall(r"`(s3:\w+)`", line))
    extra = [{"Action": sorted(settings), "Resource": "arn:aws:s3:::BUCKET"}]
    statements = [*policies()["Writer"], *extra]
    assert used(proxy, statements) == actions_of(statements)


def test_without_delete_only_garbage_stays(writer: Place, endpoint: Endpoint, local: Path) -> None:
    """What the document says of a policy without s3:DeleteObject: proven by a proxy that refuses those requests."""
    with FaultProxy(endpoint.url) as proxy:
        proxy.rule = lambda request: (
            Fault(status=403, code="AccessDenied")
            if "s3:DeleteObject" in {need[0] for need in needs(request)}
            else None
        )
        user = writer.via(proxy.url)
        db = connect(user, "kept.db")
        db.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
        db.close()
        assert rows(connect(user, "kept.db")) == [(1,)]
        assert not any("s3:DeleteObject" in {need[0] for need in needs(request)} for request in proxy.requests)


# --- encryption --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"sse_kms_key_id": KEY_ID}, ("aws:kms", KEY_ID)),
        ({"sse": "aws:kms", "sse_kms_key_id": KEY_ID}, ("aws:kms", KEY_ID)),
        ({"sse": "AES256"}, ("AES256", None)),
        ({}, (None, None)),
    ],
    ids=str,
)
def test_every_object_asks_for_the_encryption_that_is_configured(
    writer: Place,
    proxy: FaultProxy,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, str],
    asked: tuple[str | None, str | None],
) -> None:
    """On the wire, for PUTs and copies of every kind of object, by commands and in process."""
    for name, value in options.items():
        monkeypatch.setenv(f"S3BLOCKFS_{name.upper()}", value)
    where = f"{writer.target}/{abs(hash(str(options)))}"
    for line in (f"import {local} {where}/a.db", f"cp {where}/a.db {where}/b.db", f"rm {where}/b.db"):
        code, said = run(capsys, *line.split())
        assert code == 0, f"{line}: {said}"
    place = replace(writer, prefix=where.partition("/")[2])
    db = connect(place, "a.db", **options)
    db.execute("DELETE FROM t WHERE rowid > 10; INSERT INTO t VALUES (zeroblob(5000))")
    assert rows(db, "SELECT count(*) FROM t") == [(11,)]
    db.close()
    puts = [request for request in proxy.requests if request.method == "PUT"]
    assert {"head", "data", "archive", "other"} <= {request.kind for request in puts}
    assert any("x-amz-copy-source" in request.headers for request in puts)
    for request in puts:
        headers = (f"x-amz-server-side-encryption{more}" for more in ("", "-aws-kms-key-id"))
        assert tuple(request.headers.get(header) for header in headers) == asked, request.path
    assert not any("encryption" in name for r in proxy.requests if r.method != "PUT" for name in r.headers)


def test_a_store_encrypts_as_it_was_asked(writer: Place, endpoint: Endpoint) -> None:
    """What SeaweedFS says of an object afterwards; and it is read without saying anything about keys."""
    options = {"sse_kms_key_id": KEY_ID}
    db = s3blockfs.connect(bucket=bucket_of(writer), name=key(writer, "secret.db"), **options)
    db.execute("CREATE TABLE t(x); INSERT INTO t VALUES ('hidden')")
    db.close()
    answer = bucket_of(writer).Object(key(writer, "secret.db") + "/head").get()
    assert (answer["ServerSideEncryption"], answer["SSEKMSKeyId"]) == ("aws:kms", KEY_ID)
    assert rows(connect(writer, "secret.db")) == [("hidden",)]


def test_etags_need_not_be_digests(writer: Place, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SSE-KMS, S3's ETag is no MD5 and differs each time: the engine may compare them, no more."""

    def disguised(etag: str) -> str:
        return f'"kms-{etag[:0:-1]}' if etag else etag

    put, get, changed = S3Store.put, S3Store.get, S3Store.get_if_changed

    def new_put(self: S3Store, key: str, body: bytes, *, if_match: str | None = None, **more: Any) -> str:
        return disguised(put(self, key, body, if_match=if_match and undisguised(if_match), **more))

    def undisguised(etag: str) -> str:
        assert etag.startswith('"kms-'), etag
        return f'"{etag[:4:-1]}'

    def new_get(self: S3Store, key: str, *, if_match: str | None = None, **more: Any) -> StoredObject:
        found = get(self, key, if_match=if_match and undisguised(if_match), **more)
        return replace(found, etag=disguised(found.etag))

    def new_changed(self: S3Store, key: str, *, site: str, etag: str) -> StoredObject | None:
        found = changed(self, key, site=site, etag=undisguised(etag))
        return found and replace(found, etag=disguised(found.etag))

    monkeypatch.setattr(S3Store, "put", new_put)
    monkeypatch.setattr(S3Store, "get", new_get)
    monkeypatch.setattr(S3Store, "get_if_changed", new_changed)
    assert undisguised(disguised('"abc"')) == '"abc"'
    db, other = connect(writer, "etags.db", refresh_s=0.0), connect(writer, "etags.db", **ELSEWHERE)
    db.execute("CREATE TABLE t(x)")
    for connection in (db, other, db, other):
        connection.execute("INSERT INTO t VALUES (1)")
    assert rows(other, "SELECT count(*) FROM t") == rows(db, "SELECT count(*) FROM t") == [(4,)]
