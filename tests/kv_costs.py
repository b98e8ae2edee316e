"""A key-value table as a database against one object for each row: requests, time and money for the same work.

As `scripts/kv_costs` it brings its own SeaweedFS. Requests are what a proxy outside of both counted. It also holds each
of them back for a while, as a network would; a SeaweedFS on the same machine is faster than any S3. Time is a ratio
of the same run. Prints the tables of docs/RECIPES.md.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import apsw
import boto3
from botocore.config import Config
from mounting import Place
from proxy import Fault, FaultProxy
from servers import seaweed

import s3blockfs

#: AWS, S3 Standard, us-east-1, July 2025: dollars for a request. LIST and POST cost what a PUT costs, HEAD what a GET
#: costs, deleting is free, also many objects with one POST.
PRICES = {"PUT": 5e-6, "POST": 5e-6, "list": 5e-6, "GET": 4e-7, "HEAD": 4e-7, "delete": 0.0, "DELETE": 0.0}

KEY = ("id", "year", "month", "day")
THREADS = 16
#: A lease is given back half a second after the last write; until then a step is not over.
LEASE_S = 1.0

Key = tuple[int, int, int, int]
Row = tuple[Key, bytes]
_serials = count(1)


def rows_of(table: int, draw: random.Random, days: int) -> list[Row]:
    """1,000 rows: 10 ids, 2 years, 5 months, 10 days."""
    keys = product(range(10 * table, 10 * table + 10), (2020, 2021), range(1, 6), range(1, days + 1))
    return [((i, year, month, day), draw.randbytes(200)) for i, year, month, day in keys]


class Objects:
    """`bucket/prefix/1/2020/01/01`, as people do it with boto3."""

    name = "one object for each row"

    def __init__(self, place: Place) -> None:
        self.bucket, self.prefix = place.bucket, f"{place.prefix}/objects/"
        config = Config(max_pool_connections=THREADS, retries={"mode": "standard"})
        session = boto3.Session(place.access_key, place.secret_key, region_name="us-east-1")
        self.client = session.client("s3", endpoint_url=place.url, config=config)

    def key(self, key: Key) -> str:
        return f"{self.prefix}{key[0]}/{key[1]:04}/{key[2]:02}/{key[3]:02}"

    def put(self, row: Row) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.key(row[0]), Body=row[1])

    def get(self, key: str) -> bytes:
        value: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return value

    def keys(self, prefix: str = "") -> Iterable[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        return (item["Key"] for page in pages for item in page.get("Contents", ()))

    def create(self) -> None:
        """Nothing to do."""

    def cold(self) -> None:
        """Nothing is cached anyway."""

    def insert_together(self, rows: list[Row]) -> int:
        with ThreadPoolExecutor(THREADS) as pool:
            return len(list(pool.map(self.put, rows)))

    def insert_singly(self, rows: list[Row]) -> int:
        return len([self.put(row) for row in rows])

    def read(self, keys: list[Key]) -> int:
        return sum(len(self.get(self.key(key))) for key in keys)

    def by_id(self, number: int) -> int:
        with ThreadPoolExecutor(THREADS) as pool:
            return sum(map(len, pool.map(self.get, self.keys(f"{number}/"))))

    def by_month(self, month: int) -> int:
        with ThreadPoolExecutor(THREADS) as pool:
            return sum(map(len, pool.map(self.get, (k for k in self.keys() if int(k.split("/")[-2]) == month))))

    def count(self) -> int:
        return sum(1 for _ in self.keys())

    def delete(self, key: Key) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.key(key))

    def delete_year(self, year: int) -> None:
        keys = [{"Key": key} for key in self.keys() if int(key.split("/")[-3]) == year]
        for first in range(0, len(keys), 1000):
            self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys[first : first + 1000]})

    def close(self) -> None:
        self.client.close()


class Table:
    """The same in a database of s3blockfs."""

    name = "s3blockfs"

    def __init__(self, place: Place, name: str = "kv.sqlite", without_rowid: bool = False) -> None:
        session = boto3.Session(place.access_key, place.secret_key, region_name="us-east-1")
        self.bucket = session.resource("s3", endpoint_url=place.url).Bucket(place.bucket)
        self.database, self.option = f"{place.prefix}/{name}", " WITHOUT ROWID" if without_rowid else ""
        self.db: apsw.Connection | None = None

    def cold(self) -> None:
        """A connection that shares no cache with any before: its options are its own."""
        self.close()
        self.db = s3blockfs.connect(bucket=self.bucket, name=self.database, cache_size=(64 << 20) + next(_serials))

    def create(self) -> None:
        self.cold()
        columns = ", ".join(f"{name} INTEGER NOT NULL" for name in KEY)
        self.run(f"CREATE TABLE kv ({columns}, value BLOB, PRIMARY KEY ({', '.join(KEY)})){self.option}")

    def run(self, statement: str, *values: Any) -> list[Any]:
        assert self.db is not None
        return list(self.db.execute(statement, values))

    def insert_together(self, rows: Iterable[Row]) -> int:
        assert self.db is not None
        with self.db:
            self.db.executemany("INSERT INTO kv VALUES (?, ?, ?, ?, ?)", ((*key, value) for key, value in rows))
        return self.db.total_changes()

    def insert_singly(self, rows: list[Row]) -> int:
        return len([self.run("INSERT INTO kv VALUES (?, ?, ?, ?, ?)", *key, value) for key, value in rows])

    def read(self, keys: list[Key]) -> int:
        where = " AND ".join(f"{name} = ?" for name in KEY)
        return sum(len(self.run(f"SELECT value FROM kv WHERE {where}", *key)[0][0]) for key in keys)

    def by_id(self, number: int) -> int:
        return sum(len(row[0]) for row in self.run("SELECT value FROM kv WHERE id = ?", number))

    def by_month(self, month: int) -> int:
        return sum(len(row[0]) for row in self.run("SELECT value FROM kv WHERE month = ?", month))

    def count(self) -> int:
        return int(self.run("SELECT count(*) FROM kv")[0][0])

    def delete(self, key: Key) -> None:
        self.run(f"DELETE FROM kv WHERE {' AND '.join(f'{name} = ?' for name in KEY)}", *key)

    def delete_year(self, year: int) -> None:
        self.run("DELETE FROM kv WHERE year = ?", year)

    def close(self) -> None:
        if self.db is not None:
            self.db.close()


Layout = Objects | Table
#: What is done, whether by somebody who has nothing cached, whether it writes.
Step = tuple[str, bool, bool, Callable[[Any], object]]


def steps(seed: int, days: int) -> list[Step]:
    draw = random.Random(seed)
    together, singly = rows_of(1, draw, days), rows_of(2, draw, days)
    keys = [key for key, _ in draw.sample(together, 100)]
    return [
        ("create the table", False, True, lambda on: on.create()),
        ("insert 1,000 rows together", False, True, lambda on: on.insert_together(together)),
        ("insert 1,000 rows one by one", False, True, lambda on: on.insert_singly(singly)),
        ("read one row, cold", True, False, lambda on: on.read(keys[:1])),
        ("read 100 rows, warm", False, False, lambda on: on.read(keys)),
        ("query `id = ?`, 100 rows, warm", False, False, lambda on: on.by_id(12)),
        ("query `month = ?`, 400 rows, cold", True, False, lambda on: on.by_month(3)),
        ("count 2,000 rows, cold", True, False, lambda on: on.count()),
        ("delete one row", False, True, lambda on: on.delete(keys[0])),
        ("delete `year = ?`, 1,000 rows", False, True, lambda on: on.delete_year(2021)),
    ]


def measured(
    on: Layout, todo: list[Step], proxy: FaultProxy, delay_s: float
) -> list[tuple[float, dict[str, int], object]]:
    """For each step: seconds, requests by what they cost, answer."""
    figures = []
    for _, cold, writes, step in todo:
        if cold:
            on.cold()
        proxy.reset()  # the rule as well
        proxy.rule = lambda request: Fault(delay_s=delay_s)
        began = time.monotonic()
        answer = step(on)
        spent = time.monotonic() - began
        if writes:
            time.sleep(LEASE_S)
        kinds = (r.kind if r.kind in ("list", "delete") else r.method for r in proxy.requests)
        figures.append((spent, dict(Counter(kinds)), answer))
    on.close()
    return figures


def money(asked: dict[str, int]) -> float:
    return sum(PRICES[kind] * number for kind, number in asked.items())


def named(asked: dict[str, int]) -> str:
    names = {"list": "LIST", "delete": "POST ?delete"}
    return ", ".join(f"{number:,} {names.get(kind, kind)}" for kind, number in sorted(asked.items())) or "none"


def compared(place: Place, seed: int, delay_s: float, days: int = 10) -> list[dict[str, Any]]:
    """A line for each step of the same work in both layouts; with fewer days there are fewer rows than it says."""
    todo = steps(seed, days)
    with FaultProxy(place.url) as proxy:
        through = place.via(proxy.url)
        layouts = [measured(on, todo, proxy, delay_s) for on in (Objects(through), Table(through))]
    lines = []
    for (what, *_), (spent, asked, found), (less, fewer, same) in zip(todo, *layouts, strict=True):
        lines.append({"what": what, "objects": asked, "table": fewer, "ratio": spent / less, "answers": (found, same)})
    return lines


def rowids(place: Place, rows: int, seed: int) -> list[str]:
    """WITHOUT ROWID or not, in figures."""
    lines = []
    draw = random.Random(seed)
    keys = list(product(range(rows // 1000), range(2020, 2030), range(1, 11), range(1, 11)))
    draw.shuffle(keys)
    for length, without in product((100, 4000), (False, True)):
        chosen = keys[: len(keys) * 100 // length] if length > 100 else keys
        with FaultProxy(place.url) as proxy:
            name = f"{length}{without}.sqlite"
            table = Table(place.via(proxy.url), name, without)
            table.create()
            table.insert_together((key, draw.randbytes(length)) for key in sorted(chosen))
            time.sleep(2 * LEASE_S)
            size = table.run("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")[0][0]
            figures = [f"{size / 1e6:.1f} MB"]
            for step in (partial(table.read, chosen[:1]), table.count):
                table.cold()
                table.run("SELECT 1 FROM sqlite_schema")
                proxy.reset()
                step()
                figures.append(f"{len(proxy.requests)} GET, {proxy.received / 1e6:.2f} MB")
            table.cold()
            table.run("SELECT count(*) FROM kv")
            proxy.reset()
            for key in draw.sample(chosen, 20):
                table.run("INSERT OR REPLACE INTO kv VALUES (?, ?, ?, ?, ?)", *key, draw.randbytes(length))
            figures.append(f"{proxy.sent / 20 / 1e3:.1f} kB")
            table.close()
        lines.append(f"| {'WITHOUT ROWID' if without else 'rowid'}, {len(chosen):,} × {length:,} bytes | ")
        lines[-1] += " | ".join(figures) + " |"
    return lines


def table_of(lines: list[dict[str, Any]]) -> list[str]:
    head = [
        "| | one object for each row | $ for 1,000 times | s3blockfs | $ for 1,000 times | time, objects : s3blockfs |"
    ]
    head.append("| --- | --- | --- | --- | --- | --- |")
    body = []
    for line in lines:
        parts = [line["what"]]
        for layout in ("objects", "table"):
            parts += [named(line[layout]), f"{1000 * money(line[layout]):.4g}"]
        parts.append(f"{float(format(line['ratio'], '.2g')):,g} : 1" if line["objects"] else "—")
        body.append("| " + " | ".join(parts) + " |")
    return head + body


def main() -> None:
    parser = argparse.ArgumentParser(prog="kv_costs", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seed", type=int, help="of keys and values")
    parser.add_argument("--rows", type=int, default=100_000, help="of the tables with and WITHOUT ROWID; 0: leave out")
    parser.add_argument("--delay", type=float, default=20, metavar="MS", help="what each request takes longer")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    with tempfile.TemporaryDirectory(prefix="kv-costs-") as name, seaweed(Path(name)) as endpoint:
        place = Place(endpoint.url, endpoint.access_key, endpoint.secret_key, "costs")
        place.create_bucket()
        lines = compared(place.inside("kv"), seed, given.delay / 1000)
        print(*table_of(lines), sep="\n")
        if any(found != same for found, same in (line["answers"] for line in lines[1:])):
            parser.exit(1, "kv_costs: FAILED, the layouts answer differently\n")
        if given.rows:
            print("\n| | size | one row, cold | count, cold | sent for each of 20 commits |\n" + "| --- " * 5 + "|")
            print(*rowids(place.inside("rowids"), given.rows, seed), sep="\n")
    print(f"\nkv_costs: ok, seed {seed}")


if __name__ == "__main__":
    main()
