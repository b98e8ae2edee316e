"""What s3blockfs, its floors and its peers need for the same work: requests, bytes, time, CPU and money.

A real SeaweedFS, and between it and everybody a proxy of ours that holds each request back (wire.py). Every answer is
checked. Times are medians of interleaved repetitions, as ratios to the floor of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import apsw
import boto3
from mounting import Place
from servers import seaweed

from bench.contestants import Contestant, Ground, InProcess, Local, OnMount, RawS3, S3BlockFS, WholeFile, make_ground
from bench.large import LARGE
from bench.large import takes_part as large_takes_part
from bench.peers import Mounted, S3Vfs, about, peers
from bench.sweep import sweep
from bench.table import Lines, as_json, markdown
from bench.targets import TARGETS, floor_of
from bench.wire import Wire
from bench.worker import Failed, TooSlow
from bench.workloads import BIG, WORKLOADS, has_option, local_kind
from bench.workloads import takes_part as small_takes_part

#: A contestant that needs longer than this is not asked again.
PATIENT_S = 10.0


#: What takes long enough to be asked for by its name.
ON_DEMAND = ("W17",)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def contestants(ground: Ground, with_peers: bool) -> list[Contestant]:
    found: list[Contestant] = [OnMount(ground), InProcess(ground)]
    if has_option("--exclusive"):
        found.append(OnMount(ground, "--exclusive"))
    found += [Local(ground), RawS3(ground), WholeFile(ground)]
    return found + (peers(ground) if with_peers else [])


def measure(name: str, taking: list[Contestant], repeat: int, lines: Lines) -> None:
    """One workload, by all, in turn."""
    large = name in LARGE
    workload, takes_part = (LARGE[name], large_takes_part) if large else (WORKLOADS[name], small_takes_part)
    taking = [on for on in taking if takes_part(name, on)]
    repeat = 1 if large else repeat
    for turn in range(repeat):
        for on in list(taking):
            spent = 0.0
            try:
                for way, measured in workload(on, turn):
                    lines.add(name, f"{on}{way}", measured)
                    spent += measured.seconds
                    say(f"{name} {turn + 1}/{repeat} {on}{way}: {measured.seconds:.3f} s")
            except (TooSlow, Failed) as error:
                if isinstance(error, Failed) and isinstance(on, S3BlockFS):
                    raise  # an answer that is wrong, or none: there is nothing to compare
                lines.fail(name, str(on), str(error))
                taking.remove(on)
                say(f"{name} {on}: {error}")
            if spent > PATIENT_S and on in taking and turn + 1 < repeat:
                taking.remove(on)
                lines.fail(name, str(on), f"measured {turn + 1}x")
    for line in lines:
        if line.workload == name and line.runs:
            line.ratio = lines.ratio(name, line.who, floor_of(name, line.who))


def conditions(ground: Ground, given: argparse.Namespace) -> str:
    load, kind = os.getloadavg()[0], local_kind(ground.folder)
    link = f"a link of {given.link_mb_s:g} MB/s each way; " if given.link_mb_s else ""
    return (
        f"{ground.rows:,} rows, {ground.size / 1e6:.0f} MB; {given.delay_ms:g} ms before each answer; {link}"
        f"median of {given.repeat}; {os.cpu_count()} cores, load {load:.1f}; local file on {kind}; "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, APSW {apsw.apsw_version()}, "
        f"boto3 {boto3.__version__}."
    )


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("workloads", nargs="*", metavar="W1 ... W18", help="default: all but W17")
    parser.add_argument("--delay-ms", type=float, default=15.0, help="what each request takes longer")
    parser.add_argument(
        "--link-mb-s", type=float, default=0.0, metavar="N", help="bandwidth each way, of all connections together"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--limit-s", type=float, default=45.0, help="the most that one step may take")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure others as well")
    parser.add_argument(
        "--only", metavar="WORD", help="only contestants with this word in their names, such as `mount`"
    )
    parser.add_argument("--sweep", action="store_true", help="W19: block sizes and page sizes, instead of all others")
    parser.add_argument("--transactions", type=int, default=200, help="of W7")
    parser.add_argument("--databases", type=int, default=10_000, help="of W15")
    parser.add_argument("--commits", type=int, default=30_000, help="of W17")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    given = parser.parse_args(argv)
    known = [*WORKLOADS, *LARGE]
    given.workloads = given.workloads or [name for name in known if name not in ON_DEMAND]
    for name in given.workloads:
        if name not in known:
            parser.error(f"there is no workload {name}")
    return given


def run(given: argparse.Namespace) -> tuple[Lines, list[str]]:
    lines = Lines()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        with seaweed(folder / "s3") as endpoint, Wire(endpoint.url, given.delay_ms, given.link_mb_s) as wire:
            place = Place(endpoint.url, endpoint.access_key, endpoint.secret_key, "bench")
            place.create_bucket()
            ground = make_ground(place, wire, folder, given.rows, given.limit_s, given.delay_ms)
            ground.transactions, ground.databases = given.transactions, given.databases
            ground.commits = given.commits
            said = [conditions(ground, given)]
            if given.sweep:
                return lines, [*said, "", *sweep(ground)]
            with ground.preparing():
                taking = [on for on in contestants(ground, given.peers) if not given.only or given.only in on.name]
                for kind in {type(on).seed: on for on in taking}.values():
                    kind.seed(BIG)
            said += [f"* {about(on)}" for on in taking if isinstance(on, (Mounted, S3Vfs))]
            for workload in given.workloads:
                measure(workload, taking, given.repeat, lines)
    return lines, said


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up, like Ctrl-C
    given = arguments(argv)
    began = time.monotonic()
    lines, said = run(given)
    targets = [target for target in TARGETS if target.workload in given.workloads]
    if given.sweep:
        print(*said, sep="\n")
        return
    print(*said, "", *markdown(lines, targets), sep="\n")
    missed = [target for target in targets if target.verdict(lines)[0] is False]
    print(f"\nbench: {len(missed)} of {len(targets)} targets not met, {time.monotonic() - began:.0f} s")
    if given.json:
        told: dict[str, Any] = {"conditions": said, "figures": as_json(lines, targets)}
        given.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("bench: interrupted")
