"""A sample of the soak (`scripts/soak --minutes N` runs for as long as is wanted)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from mounting import Place
from soak.runner import Soak, shown

pytestmark = pytest.mark.mount


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", [15, pytest.param(300, marks=pytest.mark.long)])
def test_a_sample(place: Place, tmp_path: Path, seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    """In every journal mode, by six processes on four machines, of which some are killed: one state at a time."""
    seed = random.SystemRandom().randrange(1 << 32)
    with capsys.disabled():
        soak = Soak(place, tmp_path, random.Random(seed), print)
        print(f"\nscripts/soak --seed {seed}")
        with shown(soak):
            soak.run(seconds, kill_every_s=6)
    assert all(soak.figures[f"{database} {what}"] for database in soak.databases for what in ("commits", "looks"))
