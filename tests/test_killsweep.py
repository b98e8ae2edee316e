"""A sample of the kill sweep (`scripts/killsweep` runs all of it), and proof that it can fail."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest
from killing.runner import run, tasks
from killing.sweep import STATES, Failure, Sweep
from mounting import Place

pytestmark = pytest.mark.mount

POINTS = 50


@pytest.mark.timeout(600)
def test_a_sample(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every script once to its end, then some kills: what was acknowledged is there, nothing is torn."""
    seed = random.SystemRandom().randrange(1 << 32)
    began = time.monotonic()
    said: list[str] = []
    result = run(place, tmp_path, tasks(seed=seed), seed, POINTS, jobs=3, report=said.append)
    count, spent = sum(result.points.values()), time.monotonic() - began
    with capsys.disabled():
        print(
            f"\n{count} of {POINTS} kill points in {spent:.0f} s; all: scripts/killsweep --seed {seed}", file=sys.stderr
        )
    assert not result.failures, "\n".join([f"seed {seed}", *said])
    assert count > POINTS / 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mutant", "task", "way", "first"),
    [
        ("acknowledges_early", "insert process", "before", 4),
        pytest.param("acknowledges_early", "update mount", "before", 4, marks=pytest.mark.long),
        pytest.param("acknowledges_early", "wal mount", "before", 8, marks=pytest.mark.long),
        pytest.param("never_looks_back", "update process", "dropped", 4, marks=pytest.mark.long),
        pytest.param("buries_first", "command-mv command", "before", 4, marks=pytest.mark.long),
        pytest.param("clears_first", "adopt command", "after", 12, marks=pytest.mark.long),
    ],
)
def test_a_broken_engine_is_caught(place: Place, tmp_path: Path, mutant: str, task: str, way: str, first: int) -> None:
    """At one of the requests from the `first` on; those before only read."""
    found = next(task for task in tasks(only=task, states=len(STATES)) if task.state.block_size == 65536)
    with (
        Sweep(place, tmp_path, mutant=mutant) as sweep,
        pytest.raises(Failure, match=r"holds|have changed|failed after"),
    ):
        for k in range(first, first + 20):
            assert any(sweep.kill(point, thorough=False) for point in found.points(k) if point.way == way)
