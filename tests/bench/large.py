"""W14 to W18: what is large, many, or goes on for long. Only s3blockfs; each is measured once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from mounting import Place, mounted

from bench.contestants import Contestant, Ground, InProcess, Measured, OnMount, RawS3
from bench.rows import WrongAnswer
from bench.wire import Asked, Figures
from bench.workloads import BIG, Runs, python

TERABYTE = 1 << 40
PAGES = 130
IDLE_S = 10.0
SETTLE_S = 2.0
KNOWN = 1000
THREADS = 16


def w14(on: Contestant, _: int) -> Runs:
    """Cold: open a database and read a row, once one of 1 MB, once one of 1 TB that is mostly holes. Both were made by
    the same two commits, of which the second is not folded yet."""
    for name, size in (("1 MB", 0), ("1 TB", TERABYTE)):
        file = f"{size}-of-{on.name.split()[-1]}.sqlite"
        with on.ground.preparing(), OnMount(on.ground).session(file) as session:
            session.do("sparse", size=size, pages=PAGES)
        with on.session(file) as session:
            before = session.memory
            measured = session.step("row_of_sparse")
            session.do("row_of_sparse")
            measured.notes["MB of memory"] = session.memory
            measured.notes["MB it grew"] = session.memory - before
        yield f", {name}", on.settled(measured)


def w15(on: Contestant, _: int) -> Runs:
    """List many databases, with and without a look at each."""
    ground = on.ground
    fleet = _fleet(ground, "fleet", ground.databases)
    ends = ["--endpoint-url", ground.wire.url]
    for way in ((), ("-l",)):
        said = ground.folder / "listing"
        measured = python(ground, "-m", "s3blockfs", "ls", *way, fleet.target, *ends, said=said)
        listed = said.read_text().splitlines()
        if [line.split()[-1] for line in listed] != [f"{number:05}.sqlite" for number in range(ground.databases)]:
            raise WrongAnswer(f"ls {' '.join(way)} does not list what is there")
        gets = [one for one in measured.figures.asked if one.method == "GET"]
        measured.notes["at once"] = at_once(gets)
        measured.notes["GETs without a range"] = sum(not one.range for one in gets)
        yield ": ls " + " ".join(way), measured


def w16(on: Contestant, _: int) -> Runs:
    """Cold: 16 threads, each with its own connection, read a sixteenth of the rows each, then some of all of them."""
    if isinstance(on, RawS3):
        with on.session(BIG) as session:
            yield "", session.step("raw", call="read", size=on.ground.size)
        return
    for threads in (1, THREADS):
        with on.session(BIG) as session:
            measured = session.step("threads", count=threads)
        measured = on.settled(measured)
        measured.notes["MB fetched twice"] = twice(measured.figures) / 1e6
        yield f", {threads} thread{'s' if threads > 1 else ''}", measured


def w17(on: Contestant, _: int) -> Runs:
    """Many small commits; see churn.py."""
    commits = on.ground.commits
    with on.ground.worker("engine", limit_s=commits / 5 + 60) as worker:
        said = worker("churn", commits=commits)
    yield "", Measured(said["seconds"], said["cpu"], notes=said["answer"])


def w18(on: Contestant, _: int) -> Runs:
    """A mount that has been asked for all names and attributes of 1,000 databases, and has some of them open."""
    ground = on.ground
    fleet = _fleet(ground, "known", KNOWN)
    with mounted(fleet.via(ground.wire.url), ground.folder, refresh="1") as mount:
        names = [f"{mount / f'{number:05}.sqlite'}" for number in range(KNOWN)]
        with ground.worker("file", path=names[0]) as worker:
            worker("look", folder=str(mount.directory), names=names, some=100)
            time.sleep(SETTLE_S)
            ground.wire.take()
            began = time.monotonic()
            time.sleep(IDLE_S)
            figures = ground.wire.take()
            yield "", Measured(time.monotonic() - began, figures=figures)


LARGE: dict[str, Callable[[Contestant, int], Runs]] = {"W14": w14, "W15": w15, "W16": w16, "W17": w17, "W18": w18}


def takes_part(workload: str, on: Contestant) -> bool:
    if workload == "W16":
        return type(on) is RawS3 or (type(on) is OnMount and not on.options)
    if workload == "W14":
        return type(on) is InProcess or (type(on) is OnMount and not on.options)
    if workload in ("W15", "W17"):
        return type(on) is InProcess
    return type(on) is OnMount and not on.options


# --- parts of them --------------------------------------------------------------------------------------------


def _fleet(ground: Ground, name: str, count: int) -> Place:
    """Small databases, each a copy of one object: what it holds says nothing of its name."""
    fleet = Place(ground.place.url, ground.place.access_key, ground.place.secret_key, name)
    fleet.create_bucket()
    with ground.preparing():
        with ground.worker("s3blockfs", url=ground.place.url, bucket=fleet.bucket, name="00000.sqlite") as worker:
            worker("table")
        time.sleep(SETTLE_S)  # until its lease is given back
        keys = [key for key in fleet.listing() if not key.startswith(".")]  # but for what is known of the bucket
        if keys != ["00000.sqlite/head"]:
            raise WrongAnswer(f"a small database is more than one object: {keys}")
        head = fleet.get(keys[0])
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: fleet.put(f"{number:05}.sqlite/head", head), range(1, count)))
    return fleet


def at_once(asked: list[Asked]) -> int:
    """The most requests that were under way at one time."""
    changes = sorted([(one.began, 1) for one in asked] + [(one.ended, -1) for one in asked])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def twice(figures: Figures) -> int:
    """How many bytes of immutable objects were fetched more than once."""
    extra = 0
    spans = sorted((one.key, *one.span) for one in figures.asked if one.range and not one.key.endswith("/head"))
    for _, found in groupby(spans, key=lambda span: span[0]):
        end = 0
        for _, first, last in found:
            extra += max(0, min(end, last) - first)
            end = max(end, last)
    return extra
