"""Kill the daemon, its client, the process or the command at every request to S3 of every step; see killing/sweep.py.

As `scripts/killsweep` it brings its own SeaweedFS. The last line says how it ended.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from killing.runner import run, tasks
from killing.steps import COMMAND, MOUNT, PROCESS
from killing.sweep import STATES
from mounting import Place
from servers import seaweed

#: Commands run the engine in their own process.
FACES = {"mount": (MOUNT,), "process": (PROCESS, COMMAND), "both": (MOUNT, PROCESS, COMMAND)}


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="killsweep", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--points", type=int, help="a random sample of so many (default: every request, every way)")
    parser.add_argument("--seed", type=int, help="of content, states and sample")
    parser.add_argument("--face", choices=FACES, default="both", help="process: with the commands")
    parser.add_argument("--jobs", type=int, default=3, help="points under way at a time; most of one is waiting")
    parser.add_argument("--states", type=int, default=1, choices=range(1, len(STATES) + 1), help="of each step")
    parser.add_argument("--only", default="", metavar="STEP", help="a step, or a point as a failure names it")
    parser.add_argument("--mode", default="", metavar="JOURNAL_MODE", help="only with this one, such as WAL")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background; nothing is left then either
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    began = time.monotonic()
    todo = tasks(FACES[given.face], seed, len(STATES) if given.mode else given.states, given.only)
    todo = [task for task in todo if given.mode in ("", task.state.journal_mode)]
    if not todo:
        parser.error(f"no step {given.only!r}")
    with tempfile.TemporaryDirectory(prefix="killsweep-") as name:
        directory = Path(name)
        with seaweed(directory / "s3") as endpoint:
            place = Place(endpoint.url, endpoint.access_key, endpoint.secret_key, "killsweep")
            place.create_bucket()
            result = run(place, directory, todo, seed, given.points, given.jobs, given.only, say)
    mode = f"--mode {given.mode} " if given.mode else ""
    for failure in result.failures:
        say(f"replay: scripts/killsweep --seed {seed} --states {given.states} {mode}--only '{failure.split(': ')[0]}'")
    say(", ".join(f"{way}: {count}" for way, count in sorted(result.points.items())) + f", no kill: {result.whole}")
    count, spent = sum(result.points.values()), time.monotonic() - began
    how = f"FAILED at {len(result.failures)} of" if result.failures else "ok,"
    say(f"killsweep: {how} {count} kill points, seed {seed}, {spent:.0f} s")
    return 1 if result.failures or not count else 0


if __name__ == "__main__":
    sys.exit(main())
