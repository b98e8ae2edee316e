"""What was measured, row by row: medians, ratios to the floor of the same run, targets met or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.contestants import Measured


@dataclass
class Line:
    """A row of the table: one workload of one contestant. Times are medians, counts the most there were."""

    workload: str
    who: str
    runs: list[Measured] = field(default_factory=list)
    failed: str = ""
    """Why there is no figure, or not more."""
    ratio: float | None = None

    def _most(self, of: Callable[[Measured], float]) -> float:
        return max(map(of, self.runs))

    @property
    def seconds(self) -> float:
        return median(run.seconds for run in self.runs)

    @property
    def cpu(self) -> float:
        return median(run.cpu for run in self.runs)

    @property
    def gets(self) -> int:
        return int(self._most(lambda run: run.figures.gets))

    @property
    def puts(self) -> int:
        return int(self._most(lambda run: run.figures.puts))

    @property
    def lists(self) -> int:
        return int(self._most(lambda run: run.figures.lists))

    @property
    def requests(self) -> int:
        return int(self._most(lambda run: len(run.figures.asked)))

    @property
    def trips(self) -> int:
        return int(self._most(lambda run: run.figures.trips))

    @property
    def down(self) -> float:
        """In MB, like `up`."""
        return self._most(lambda run: run.figures.down) / 1e6

    @property
    def up(self) -> float:
        return self._most(lambda run: run.figures.up) / 1e6

    @property
    def dollars(self) -> float:
        return self._most(lambda run: run.figures.dollars)

    def note(self, name: str) -> float:
        return median(run.notes[name] for run in self.runs)


@dataclass(frozen=True)
class Target:
    """Of the line with this workload and contestant."""

    workload: str
    who: str
    text: str
    value: Callable[[Line, Lines], float | None]
    """None: not measured in this run."""
    holds: Callable[[float], bool]
    show: str = "{:,.0f}"

    def verdict(self, lines: Lines) -> tuple[bool | None, str]:
        value = self.value(lines.of(self.workload, self.who), lines) if lines.has(self.workload, self.who) else None
        if value is None:
            return None, "not measured"
        met = self.holds(value)
        return met, ("yes: " if met else "**no**: ") + self.show.format(value)


class Lines:
    """All rows, in the order in which they came up."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], Line] = {}

    def __iter__(self) -> Any:
        return iter(sorted(self._lines.values(), key=lambda line: int(line.workload[1:])))

    def of(self, workload: str, who: str) -> Line:
        return self._lines.setdefault((workload, who), Line(workload, who))

    def add(self, workload: str, who: str, measured: Measured) -> None:
        self.of(workload, who).runs.append(measured)

    def fail(self, workload: str, who: str, why: str) -> None:
        """Say it at each line of this contestant, or at one that is made for it."""
        ways = [line for line in self if line.workload == workload and line.who.partition(",")[0] == who]
        for line in ways or [self.of(workload, who)]:
            line.failed = why

    def has(self, workload: str, who: str) -> bool:
        return bool((line := self._lines.get((workload, who))) and line.runs)

    def ratio(self, workload: str, who: str, floor: str) -> float | None:
        if not (self.has(workload, who) and self.has(workload, floor)):
            return None
        return self.of(workload, who).seconds / self.of(workload, floor).seconds


# --- targets --------------------------------------------------------------------------------------------------


def most(workload: str, who: str, what: str, limit: float, text: str, show: str = "{:,.0f}") -> Target:
    """At most so much of a figure of the line (or of a note of its runs)."""

    def value(line: Line, _: Lines) -> float | None:
        if hasattr(Line, what):
            return float(getattr(line, what))
        return line.note(what) if all(what in run.notes for run in line.runs) else None

    return Target(workload, who, text, value, lambda found: found <= limit, show)


def least(workload: str, who: str, what: str, limit: float, text: str, show: str = "{:,.2f}") -> Target:
    return Target(workload, who, text, most(workload, who, what, 0, "").value, lambda found: found >= limit, show)


def against(workload: str, who: str, floor: str, limit: float, text: str) -> Target:
    """At most so many times as long as another one."""
    value = lambda _, lines: lines.ratio(workload, who, floor)  # noqa: E731
    return Target(workload, who, text, value, lambda found: found <= limit, "{:.2f}x")


# --- Markdown -------------------------------------------------------------------------------------------------

HEAD = ("", "", "time, s", "to floor", "GET", "PUT", "LIST", "trips", "MB down", "MB up", "CPU, s", "$ for 1,000")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value else "0"


def _cells(line: Line) -> list[str]:
    if not line.runs:
        return [line.failed or "not measured", *[""] * 9]
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    counts = (f"{count:,}" for count in (line.gets, line.puts, line.lists, line.trips))
    amounts = map(_number, (line.down, line.up, line.cpu, 1000 * line.dollars))
    time = _number(line.seconds)
    return [time + (f" ({line.failed})" if line.failed else ""), ratio, *counts, *amounts]


def markdown(lines: Lines, targets: Iterable[Target]) -> list[str]:
    """The table; the targets of a line are in its last two columns."""
    table = ["| " + " | ".join((*HEAD, "target", "met?")) + " |", "| --- " * (len(HEAD) + 2) + "|"]
    verdicts = [(target, target.verdict(lines)) for target in targets]
    before = ""
    for line in lines:
        own = [
            (target.text, said)
            for target, (_, said) in verdicts
            if (target.workload, target.who) == (line.workload, line.who)
        ]
        texts, said = "<br>".join(text for text, _ in own), "<br>".join(verdict for _, verdict in own)
        name = line.workload if line.workload != before else ""
        before = line.workload
        table.append("| " + " | ".join((name, line.who, *_cells(line), texts, said)) + " |")
    return table


def as_json(lines: Lines, targets: Iterable[Target]) -> list[dict[str, Any]]:
    figures = ("gets", "puts", "lists", "requests", "trips", "down", "up", "cpu", "dollars", "seconds", "ratio")
    told = []
    for line in lines:
        one: dict[str, Any] = {"workload": line.workload, "who": line.who, "failed": line.failed}
        if line.runs:
            one |= {name: getattr(line, name) for name in figures}
            one |= {"all": [run.seconds for run in line.runs], "notes": [run.notes for run in line.runs]}
        told.append(one)
    for target in targets:
        met, said = target.verdict(lines)
        told.append({"workload": target.workload, "who": target.who, "target": target.text, "met": met, "said": said})
    return told
