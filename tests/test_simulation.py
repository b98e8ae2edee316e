"""The simulation of the engine (tests/simulation): some runs with new seeds, some mutants, and that a seed repeats."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation.mutants import MUTANTS, Mutant, mutated

TESTS = Path(__file__).parent


def simulate(*arguments: str, timeout_s: float = 900) -> str:
    """The command's output, whatever it ends with; PYTHONHASHSEED is its own matter."""
    line = [sys.executable, "-m", "simulation", *arguments]
    done = subprocess.run(
        line, cwd=TESTS, capture_output=True, text=True, timeout=timeout_s, check=False, env=os.environ
    )
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    return done.stdout


@pytest.mark.timeout(900)
def test_nothing_goes_wrong() -> None:
    assert "simulate: ok" in simulate("--seeds", "80").splitlines()[-1]


def test_a_seed_repeats() -> None:
    assert simulate("--seed", "11") == simulate("--seed", "11")


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_fit_the_source(mutant: Mutant) -> None:
    assert mutated(mutant) != mutated(mutant._replace(new=mutant.old))


@pytest.mark.timeout(900)
def test_some_mutants_are_found() -> None:
    """Others each time; `scripts/simulate --mutants 0` tries them all."""
    assert "mutants: 2 of 2 found" in simulate("--mutants", "2")


def test_a_failure_is_made_short() -> None:
    found = simulate("--mutant", "delete without a tombstone", "--first", "1", "--seeds", "100")
    again = found.splitlines()[-1]
    assert again.startswith("again: scripts/simulate --seed ")
    assert len(found.splitlines()) < 150
    options = again.split("scripts/simulate ")[1].replace("''", "").split(" ")
    assert "was deleted" in simulate("--mutant", "delete without a tombstone", *options)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_mutant_is_found() -> None:
    assert f"mutants: {len(MUTANTS)} of {len(MUTANTS)} found" in simulate("--mutants", "0", timeout_s=7000)


@pytest.mark.long
@pytest.mark.timeout(0)
def test_nothing_goes_wrong_for_long() -> None:
    """The last run begins before the hours are over, and takes seconds; a failure is made short for a while."""
    hours = os.environ.get("S3BLOCKFS_SIMULATE_HOURS", "0.5")
    said = simulate("--hours", hours, timeout_s=float(hours) * 3600 + 900)
    assert "simulate: ok" in said.splitlines()[-1]
