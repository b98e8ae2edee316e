"""Damage on a real S3, end to end: in process, through a mount, by the commands. More kinds: `test_bad_input.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw
import inprocess
import pytest
from mounting import Place, command, mounted, sqlite

ROWS = "WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<60) INSERT INTO t SELECT randomblob(9000) FROM n"


@pytest.fixture
def keys(place: Place) -> Iterator[dict[str, list[str]]]:
    """Of `a.db`, whose blocks were replaced by a bulk change: by kind."""
    connection = inprocess.connect(place, "a.db")
    for statement in ("CREATE TABLE t(a)", ROWS, "UPDATE t SET a = randomblob(9000)"):
        connection.execute(statement)
    connection.close()
    found = place.listing()
    yield {kind: [key for key in found if f"/{kind}" in key] for kind in ("head", "data/", "archive/")}


def read_in_process(place: Place, **options: object) -> str:
    """What is wrong."""
    try:
        connection = inprocess.connect(place, "a.db", **options)
        try:
            return "" if inprocess.rows(connection, "SELECT sum(length(a)) FROM t") == [(540_000,)] else "wrong rows"
        finally:
            connection.close()
    except (apsw.IOError, apsw.CantOpenError) as error:
        return f"{error} {error.__cause__} {error.__context__}"


@pytest.mark.parametrize("kind", ["head", "data/", "archive/"])
def test_errors_name_the_object(place: Place, tmp_path: Path, keys: dict[str, list[str]], kind: str) -> None:
    """Each is flipped and lost at once; all are listed by check; put back, all is well."""
    assert keys[kind] and read_in_process(place) == ""
    whole = {key: place.get(key) for key in keys[kind]}
    for key, body in whole.items():
        place.put(key, body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :])
    checked = command(place, "check", f"{place.target}/a.db", "--endpoint-url", place.url)
    assert checked.returncode == 6, checked.stdout + checked.stderr
    assert not [key for key in whole if key not in checked.stdout + checked.stderr]
    if kind == "archive/":  # the past only
        assert read_in_process(place) == ""
        assert any(key in read_in_process(place, at=3) for key in whole)
    else:
        assert any(key in read_in_process(place, **inprocess.ELSEWHERE) for key in whole)
        with mounted(place, tmp_path) as mount:
            assert "rror" in sqlite(mount / "a.db", "SELECT sum(length(a)) FROM t", check=False)
            assert any(key in mount.log for key in whole)
    for key in whole:
        place.delete(key)
    checked = command(place, "check", f"{place.target}/a.db", "--endpoint-url", place.url)
    assert checked.returncode == (3 if kind == "head" else 6), checked.stdout + checked.stderr
    for key, body in whole.items():
        place.put(key, body)
    checked = command(place, "check", f"{place.target}/a.db", "--endpoint-url", place.url)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert read_in_process(place) == ""
