"""W1 to W11: what is done, by whom. The targets, and what a time is compared with, are in targets.py.

Rows that are asked for are compared with what they have to be, a scan of all of them is checked by its sums, and once
in a run byte by byte. What was written is read again by a client that has nothing cached.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mounting import PATIENCE_S, is_mounted, shell

from bench.contestants import Contestant, Ground, InProcess, Local, Measured, OnMount, RawS3, S3BlockFS, WholeFile
from bench.peers import S3Vfs
from bench.rows import WrongAnswer
from bench.worker import TESTS

#: A contestant's lines of one repetition: what to add to its name, and the figures.
Runs = Iterator[tuple[str, Measured]]

BIG = "big.sqlite"
WARM_ROWS, COLD_ROWS = 10_000, 100


def w1(on: Contestant, turn: int) -> Runs:
    """Cold: open, and read one row by its key."""
    with on.session(BIG) as session:
        if isinstance(on, RawS3):
            measured = session.step("raw", call="one", size=65536)
        else:
            measured = session.step("points", count=1, salt=f"W1 {turn}")
    yield "", on.settled(measured)
    if isinstance(on, OnMount):
        yield ", until it is ready", _mount(on.ground)
    if isinstance(on, InProcess):
        import_us = "import boto3, apsw, s3blockfs; s3blockfs.connect"
        yield ", import", python(on.ground, "-c", import_us)
    if isinstance(on, RawS3):
        yield ", import boto3, apsw", python(on.ground, "-c", "import boto3, apsw")


def w2(on: Contestant, turn: int) -> Runs:
    """Cold: 100 random rows, one after the other."""
    with on.session(BIG) as session:
        if isinstance(on, RawS3):
            size = on.ground.size
            measured = session.step("raw", call="pieces", size=65536, of=size, count=COLD_ROWS)
        else:
            measured = session.step("points", count=COLD_ROWS, salt=f"W2 {turn}")
    yield "", on.settled(measured)


def w3(on: Contestant, turn: int) -> Runs:
    """Warm: 10,000 random rows."""
    with on.session(BIG) as session:
        session.do("scan")
        todo: dict[str, Any] = {"count": WARM_ROWS, "salt": f"W3 {turn}"}
        yield ", one transaction", session.step("points", transaction=True, **todo)
        yield ", autocommit", session.step("points", **todo)


def w4(on: Contestant, turn: int) -> Runs:
    """Cold: every row."""
    with on.session(BIG) as session:
        if isinstance(on, RawS3):
            yield "", session.step("raw", call="read", size=on.ground.size)
            return
        yield "", session.step("scan")
        if turn == 0 and isinstance(on, S3BlockFS):
            session.do("verify")


def w5(on: Contestant, turn: int) -> Runs:
    """Warm: every row."""
    with on.session(BIG) as session:
        session.do("scan")
        yield "", session.step("scan")
        if turn == 0 and isinstance(on, S3BlockFS):
            session.do("verify")


def w6(on: Contestant, _: int) -> Runs:
    """One transaction that inserts all rows."""
    name = _fresh(on)
    with on.session(name) as session:
        if isinstance(on, WholeFile):
            measured = session.step("load", download=False, upload=True)
        else:
            measured = session.step("load")
    yield "", _overlap(on.settled(measured))
    _verify(on, name)


def w7(on: Contestant, _: int) -> Runs:
    """200 transactions that insert one row each, in a table of their own."""
    name = _fresh(on)
    with on.session(name) as session:
        if isinstance(on, RawS3):
            measured = session.step("raw", call="puts", size=4096, count=on.ground.transactions)
        else:
            session.do("table")
            measured = session.step("commits", count=on.ground.transactions)
    yield "", on.settled(measured)


def w8(on: Contestant, _: int) -> Runs:
    """Cold: one transaction that updates every 100th row, all over the table."""
    yield from _changed(on, "update", count=on.ground.rows // 100)


def w9(on: Contestant, _: int) -> Runs:
    """Cold: VACUUM."""
    yield from _changed(on, "vacuum")


def w10(on: Contestant, turn: int) -> Runs:
    """Cold: 1 % of the rows by a range of an index; they are all over the table."""
    with on.session(BIG) as session:
        measured = session.step("range", count=on.ground.rows // 100, salt=f"W10 {turn}")
    yield "", on.settled(measured)


def w11(on: Contestant, _: int) -> Runs:
    """Import and export of the file, each a process of its own from start to end."""
    ground, name = on.ground, _fresh(on)
    back = ground.folder / f"back-{name}"
    place, file = ground.through, ground.file
    if isinstance(on, RawS3):
        lines = [["bench.raw", what, place.url, place.bucket, name] for what in ("upload", "download")]
        lines = [[*lines[0], str(file)], [*lines[1], str(back)]]
    else:
        ends = ["--endpoint-url", place.url]
        target = f"{place.bucket}/{name}"
        lines = [["s3blockfs", "import", str(file), target, *ends], ["s3blockfs", "export", target, str(back), *ends]]
    for kind, line in zip((", import", ", export"), lines, strict=True):
        yield kind, python(ground, "-m", *line)
    if _content(back) != _content(file):
        raise WrongAnswer(f"{on}: what was exported is not what was imported")
    back.unlink()


WORKLOADS: dict[str, Callable[[Contestant, int], Runs]] = {
    "W1": w1, "W2": w2, "W3": w3, "W4": w4, "W5": w5, "W6": w6, "W7": w7, "W8": w8, "W9": w9, "W10": w10, "W11": w11
}  # fmt: skip


def takes_part(workload: str, on: Contestant) -> bool:
    """Whether there is anything to measure."""
    if isinstance(on, RawS3):
        return workload in ("W1", "W2", "W4", "W7", "W11")
    if isinstance(on, WholeFile):
        return workload in ("W1", "W2", "W4", "W6", "W8", "W9", "W10")
    if isinstance(on, Local):
        return workload in ("W3", "W5", "W6")
    if workload == "W11":
        return isinstance(on, InProcess)
    if workload in ("W3", "W5") and isinstance(on, S3Vfs):
        return False
    if isinstance(on, OnMount) and on.options:
        return workload in ("W3", "W7")
    return on.durable or workload not in ("W6", "W7", "W8", "W9")


# --- steps of them --------------------------------------------------------------------------------------------


def _fresh(on: Contestant) -> str:
    return f"{uuid.uuid4().hex[:12]}.sqlite"


def _verify(on: Contestant, name: str, **arguments: Any) -> None:
    """By a client that has nothing cached."""
    if not isinstance(on, WholeFile):
        with on.ground.preparing(), on.session(name) as session:
            session.do("verify", **arguments)


def _changed(on: Contestant, what: str, **arguments: Any) -> Runs:
    name = _fresh(on)
    with on.ground.preparing():
        on.seed(name)
    with on.session(name) as session:
        more = {"upload": True} if isinstance(on, WholeFile) else {}
        measured = session.step(what, **arguments, **more)
    yield "", on.settled(measured)
    _verify(on, name, updated=arguments.get("count", 0))


def _content(path: Path) -> bytes:
    """All but what SQLite's backup, which an import is, counts anew: changes to content and schema, its own version."""
    content = path.read_bytes()
    return content[:24] + content[28:40] + content[44:92] + content[100:]


def _overlap(measured: Measured) -> Measured:
    """What share of the bytes was on its way to S3 before COMMIT began."""
    if "commit" in measured.notes and measured.figures.up:
        early = sum(one.up for one in measured.figures.asked if one.began < measured.notes["commit"])
        measured.notes["sent before COMMIT"] = early / measured.figures.up
    return measured


def python(ground: Ground, *arguments: str, said: Path = Path(os.devnull)) -> Measured:
    """A Python process from start to end, which prints into a file."""
    environment = ground.through.environment | {"PYTHONPATH": str(TESTS)}
    ground.wire.take()
    began = time.monotonic()
    with said.open("wb") as file:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, cwd="/", stdout=file)
    try:
        _, status, used = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    assert process.returncode == 0, f"{arguments} ended with {process.returncode}"
    return Measured(seconds, used.ru_utime + used.ru_stime, ground.wire.take())


def _mount(ground: Ground) -> Measured:
    """The command from its start until it returns: the mount answers then."""
    place, folder = ground.through, ground.folder / uuid.uuid4().hex
    folder.mkdir()
    line = ["s3blockfs", "mount", place.target, str(folder), "--endpoint-url", place.url]
    try:
        measured = python(ground, "-m", *line)
        assert is_mounted(folder)
    finally:
        if is_mounted(folder):
            done = shell(sys.executable, "-m", "s3blockfs", "umount", folder, env=place.environment)
            assert done.returncode == 0, done.stderr
    ground.wire.take()
    return measured


def has_option(option: str) -> bool:
    """Whether this s3blockfs mounts with it."""
    done = shell(sys.executable, "-m", "s3blockfs", "mount", "--help", timeout=PATIENCE_S)
    return option in done.stdout


def local_kind(folder: Path) -> str:
    """The file system below a folder."""
    return shell("stat", "-f", "-c", "%T", folder).stdout.strip()
