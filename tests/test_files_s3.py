"""`s3blockfs.open` on a real S3, and on an object of many gigabytes; requests counted outside of the program."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from inprocess import bucket_of, connect, key
from mounting import Place, shell
from proxy import Fault, FaultProxy, Request
from sparse import ZEROS, SparseFile, serving

import s3blockfs
from s3blockfs import errors, files

pytestmark = pytest.mark.s3

MIB = 1 << 20


def opened(place: Place, name: str, mode: str = "rb", **options: Any) -> Any:
    return s3blockfs.open(f"s3://{place.bucket}/{key(place, name)}", mode, bucket=bucket_of(place), **options)


def unfinished(place: Place) -> list[Any]:
    found = place._client.list_multipart_uploads(Bucket=place.bucket, Prefix=place.prefix)
    uploads: list[Any] = found.get("Uploads", [])
    return uploads


def ranges(proxy: FaultProxy) -> list[tuple[int, int]]:
    """First and last byte of each GET, sorted."""
    asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["range"]) for request in proxy.requests]
    return sorted((int(match[1]), int(match[2])) for match in asked if match)


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", file=sys.stderr)


# --- archives ----------------------------------------------------------------------------------------------


def test_an_archive_in_place(place: Place, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]) -> None:
    """Listing takes at most 4 requests; a member that is read brings little of the others along."""
    members = {f"{number}.bin": os.urandom(MIB) for number in range(24)}
    with opened(place, "a.zip", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    assert unfinished(place) == []
    proxy.reset()
    with opened(place.via(proxy.url), "a.zip") as file, zipfile.ZipFile(file) as archive:
        assert archive.namelist() == list(members)
        listing, received = len(proxy.requests), proxy.received
        assert listing <= 4 and received < 256 * 1024
        assert archive.read("12.bin") == members["12.bin"]
        more = proxy.received - received
        reading = len(proxy.requests) - listing
        say(capsys, f"24 MiB ZIP: {listing} requests to list; {reading}, {more >> 10} KiB to read a member of 1 MiB")
        assert reading <= 12 and more < 3 * MIB
        info = archive.getinfo("12.bin")
        begin, end = info.header_offset, info.header_offset + MIB
        read = [each for each in ranges(proxy)[1:] if each[0] < archive.start_dir - 128 * 1024]
        assert all(begin - files.BLOCK_BYTES < first and last < end + 2 * MIB for first, last in read)
        assert archive.testzip() is None


def test_a_zip64_of_several_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Members are listed by at most 4 requests, and one of them is streamed without the others."""
    path = tmp_path / "large.zip"
    wanted = os.urandom(3 * MIB)
    with SparseFile(path, "wb") as raw, zipfile.ZipFile(raw, "w") as archive:  # type: ignore[type-var]
        for name, count in (("first", 260), ("second", 60)):
            with archive.open(name, "w", force_zip64=True) as member:
                for _ in range(count):
                    member.write(ZEROS)
            archive.writestr(f"behind the {name}", wanted if name == "first" else b"the end")
    assert path.stat().st_size > 5 << 30 and path.stat().st_blocks * 512 < 64 * MIB
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "unchecked")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serving(path) as url, FaultProxy(url) as proxy:
        opening = s3blockfs.open("s3://any/large.zip", endpoint_url=proxy.url)
        with opening as file, zipfile.ZipFile(file) as archive:
            assert archive.namelist() == ["first", "behind the first", "second", "behind the second"]
            listing, received = len(proxy.requests), proxy.received
            assert listing <= 4 and received < 300_000
            assert archive.read("behind the first") == wanted
            reading, more = len(proxy.requests) - listing, proxy.received - received
            with archive.open("second") as member:
                assert member.read(5 * MIB) == bytes(5 * MIB)
        say(capsys, f"5.4 GB ZIP64: {listing} requests to list; {reading}, {more >> 10} KiB to read a member of 3 MiB")
        assert more < 8 * MIB and reading < 20
        assert proxy.received < 40 * MIB


# --- writing -----------------------------------------------------------------------------------------------


def test_parts_go_up_while_writing(place: Place, proxy: FaultProxy) -> None:
    body = os.urandom(20 * MIB)
    with opened(place.via(proxy.url), "new.bin", "wb") as file:
        for at in range(0, len(body), MIB):
            file.write(body[at : at + MIB])
        assert unfinished(place) and place.listing() == []
    assert unfinished(place) == [] and place.get("new.bin") == body
    methods = [request.method for request in proxy.requests if request.method != "GET"]
    assert sorted(methods) == ["POST", "POST", "PUT", "PUT", "PUT"]
    with opened(place, "new.bin") as file:
        assert file.read() == body


@pytest.mark.parametrize(
    "fault", [Fault(cut=True, apply=True), Fault(cut=True), Fault(status=503)], ids=["applied", "cut", "busy"]
)
def test_a_completion_whose_answer_is_lost_is_asked_for_again(place: Place, proxy: FaultProxy, fault: Fault) -> None:
    left = [1]

    def rule(request: Request) -> Fault | None:
        if request.method == "POST" and "uploadId=" in request.path and left:
            left.pop()
            return fault
        return None

    proxy.rule = rule
    body = os.urandom(9 * MIB)
    with opened(place.via(proxy.url), "new.bin", "wb") as file:
        file.write(body)
    assert left == [] and place.get("new.bin") == body and unfinished(place) == []


def test_a_completion_that_nobody_can_tell_of(place: Place, proxy: FaultProxy) -> None:
    """The answer is lost, and then there is no such upload any more: applied, or taken away by somebody else."""
    faults = [Fault(status=404, code="NoSuchUpload"), Fault(cut=True, apply=True)]

    def rule(request: Request) -> Fault | None:
        return faults.pop() if request.method == "POST" and "uploadId=" in request.path else None

    proxy.rule = rule
    file = opened(place.via(proxy.url), "new.bin", "wb")
    file.write(bytes(9 * MIB))
    with pytest.raises(errors.OutcomeUnknown, match="does not say whether it was stored"):
        file.close()
    assert faults == [] and file.closed and place.get("new.bin") == bytes(9 * MIB)


def test_parts_that_the_store_does_not_take(place: Place, proxy: FaultProxy) -> None:
    file = opened(place.via(proxy.url), "new.bin", "wb", transaction_deadline_s=1.0)
    file.write(os.urandom(9 * MIB))
    proxy.rule = lambda request: Fault(status=503) if request.method == "PUT" else None
    with pytest.raises(errors.StoreUnavailable):
        file.write(os.urandom(60 * MIB))
    assert file.closed and place.listing() == [] and unfinished(place) == []


def test_an_exception_leaves_no_parts(place: Place) -> None:
    with pytest.raises(KeyboardInterrupt), opened(place, "new.bin", "wb") as file:
        file.write(os.urandom(30 * MIB))
        raise KeyboardInterrupt
    assert place.listing() == [] and unfinished(place) == []


def test_the_end_of_python_leaves_no_parts(place: Place) -> None:
    """With credentials and endpoint from where the AWS tools look for them, too."""
    script = f"""
import s3blockfs
done = s3blockfs.open("s3://{place.bucket}/{key(place, "done")}", "w")
print("closed", file=done)
done.close()
left = s3blockfs.open("s3://{place.bucket}/{key(place, "left")}", "wb")
left.write(bytes(20 << 20))
"""
    environment = place.environment | {"AWS_ENDPOINT_URL": place.url}
    done = shell(sys.executable, "-c", script, env=environment)
    assert done.returncode == 0 and "was never closed" in done.stderr, done.stderr
    assert place.listing() == ["done"] and unfinished(place) == [] and place.get("done") == b"closed\n"


def test_a_database_is_a_file(place: Place) -> None:
    db = connect(place, "app.sqlite")
    db.execute("CREATE TABLE t(x); INSERT INTO t VALUES (randomblob(300000))")
    with opened(place, "app.sqlite") as file:
        data = file.read()
        assert data.startswith(b"SQLite format 3\0") and len(data) > 300_000
        db.execute("DELETE FROM t; VACUUM")
        file.seek(0)
        assert file.read() == data
    db.close()
