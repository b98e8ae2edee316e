"""Helpers for tests of the in-process face: buckets, connections, and connections in other processes.

As a program, `python tests/inprocess.py URL BUCKET NAME` is such a process: a statement a line in, a JSON line out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import apsw
from mounting import PATIENCE_S, Client, Place

import s3blockfs

#: Options of another machine: they differ from the defaults in nothing that matters, so it shares no engine with us.
ELSEWHERE = {"refresh_s": 0.0, "cache_size": 1 << 26}

#: What a connection waits for another one that writes, in milliseconds. Its lease outlives its transaction by 0.5 s.
PATIENCE_MS = int(PATIENCE_S * 1000)


def bucket_of(place: Place) -> Any:
    """The boto3 resource that a user would bring."""
    import boto3

    session = boto3.Session(place.access_key, place.secret_key, region_name="us-east-1")
    return session.resource("s3", endpoint_url=place.url).Bucket(place.bucket)


def key(place: Place, name: str = "a.sqlite") -> str:
    return f"{place.prefix}/{name}"


def connect(place: Place, name: str = "a.sqlite", **options: Any) -> apsw.Connection:
    """Options are those of `s3blockfs.connect`."""
    connection = s3blockfs.connect(bucket=bucket_of(place), name=key(place, name), **options)
    connection.set_busy_timeout(PATIENCE_MS)
    return connection


def rows(connection: apsw.Connection, statement: str = "SELECT * FROM t") -> list[Any]:
    return list(connection.execute(statement))


def elsewhere(place: Place, statement: str = "SELECT * FROM t", name: str = "a.sqlite") -> list[Any]:
    """What another machine sees, after it found the database sound."""
    connection = connect(place, name, **ELSEWHERE)
    try:
        assert rows(connection, "PRAGMA integrity_check") == [("ok",)]
        return rows(connection, statement)
    finally:
        connection.close()


class OtherProcess(Client):
    """A connection in a process of its own."""

    def __init__(self, place: Place, name: str = "a.sqlite") -> None:
        line = [sys.executable, __file__, place.url, place.bucket, key(place, name)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=place.environment)


def main() -> Iterator[dict[str, Any]]:
    url, bucket, name = sys.argv[1:]
    database = s3blockfs.connect(bucket=bucket, name=name, endpoint_url=url, refresh_s=0.0, lease_s=2.0)
    for line in sys.stdin:
        try:
            yield {"rows": list(database.execute(json.loads(line)))}
        except apsw.Error as error:
            yield {"error": f"{type(error).__name__} {type(error.__cause__).__name__} {error}"}
    database.close()


if __name__ == "__main__":
    for answer in main():
        print(json.dumps(answer), flush=True)
