"""W19: W1 to W8 on a mount, with blocks of 4 KiB to 1 MiB under pages of 4 and of 64 KiB; one table of all that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from bench import rows
from bench.contestants import Ground, Measured, OnMount
from bench.workloads import BIG, WORKLOADS

KIB = 1024
BLOCKS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB)
PAGES = (4 * KIB, 64 * KIB)
SWEPT = ("W1", "W2", "W3", "W4", "W5", "W6", "W7", "W8")
#: What a column shows, of all that a workload yields.
SHOWN = {"W1": "", "W3": ", one transaction"}


def sweep(ground: Ground) -> Iterator[str]:
    """The lines of the table."""
    yield "| block, page | " + " | ".join(SWEPT) + " |"
    yield "| --- " * (len(SWEPT) + 1) + "|"
    for block, page in product(BLOCKS, PAGES):
        file = ground.folder / f"page-{page}.sqlite"
        if not file.exists():
            rows.make(file, ground.rows, page)
        place = ground.place.inside(f"sweep/{block}/{page}")
        mount = OnMount(replace(ground, place=place, file=file, page_size=page), "--block-size", str(block))
        with ground.preparing():
            mount.seed(BIG)
        cells = [_cell(mount, name) for name in SWEPT]
        print(f"W19 {block} {page}", *cells, sep=" | ", file=sys.stderr, flush=True)
        yield f"| {block // KIB}, {page // KIB} KiB | " + " | ".join(cells) + " |"


def _cell(mount: OnMount, name: str) -> str:
    found = dict(WORKLOADS[name](mount, 0))
    return _told(found[SHOWN.get(name, "")])


def _told(measured: Measured) -> str:
    """Seconds; requests; MB both ways."""
    figures = measured.figures
    moved = (figures.up + figures.down) / 1e6
    return f"{measured.seconds:.2f} s, {len(figures.asked)}, {moved:.1f} MB"
