"""scripts/simulate: runs the engine on simulated machines until something goes wrong, or the time is over."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from random import SystemRandom
from typing import Any

from simulation import mutants

MUTANT_SEEDS = 600  # within so many runs each mutant has to be found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--hours", type=float, help="go on for so long")
    parser.add_argument("--seeds", type=int, default=100, help="how many runs (default 100)")
    parser.add_argument("--first", type=int, help="the first seed (default: random)")
    parser.add_argument("--seed", type=int, help="run this one alone, and print what happened")
    parser.add_argument("--actors", help="only these, separated by commas")
    parser.add_argument("--faults", help="only these")
    parser.add_argument("--rounds", type=int, help="how often each actor acts")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for a shorter run that fails")
    parser.add_argument("--mutant", choices=mutants.MUTANTS, help="put this fault into the engine")
    parser.add_argument("--mutants", type=int, metavar="N", help="see that N of the mutants are found (0: all)")
    return parser.parse_args()


def planned(options: argparse.Namespace, seed: int) -> Any:
    from simulation.world import ACTORS, Plan

    plan = Plan.of(seed)
    actors = tuple(actor for actor in ACTORS if actor in (options.actors or "").split(","))
    faults = plan.faults if options.faults is None else tuple(filter(None, options.faults.split(",")))
    return replace(plan, actors=actors or plan.actors, faults=faults, rounds=options.rounds or plan.rounds)


def one(options: argparse.Namespace) -> int:
    from simulation.shrink import text_of
    from simulation.world import simulate

    run = simulate(planned(options, options.seed))
    print(text_of(run))
    if run.failure is not None:
        traceback.print_exception(run.failure)
    return 0 if run.failure is None else 1


def many(options: argparse.Namespace) -> int:
    from simulation.shrink import shrink, text_of
    from simulation.world import simulate

    first = SystemRandom().randrange(10**9) if options.first is None else options.first
    end = None if options.hours is None else time.monotonic() + options.hours * 3600
    print(f"first seed {first}", flush=True)
    seeds = steps = commits = 0
    shown = time.monotonic()
    while time.monotonic() < end if end is not None else seeds < options.seeds:
        run = simulate(planned(options, first + seeds))
        seeds, steps, commits = seeds + 1, steps + run.steps, commits + run.commits
        if run.failure is not None:
            print(f"seed {run.plan.seed}: {run.failure}", flush=True)
            if not options.no_shrink:
                print(text_of(shrink(run)))
            return 1
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(f"{seeds} seeds, {steps} steps, {commits} commits", flush=True)
    print(f"simulate: ok, {seeds} seeds, {steps} steps")
    return 0


def hunt(options: argparse.Namespace) -> int:
    """Each in a process of its own, because the fault is put in while the engine is imported."""
    names = list(mutants.MUTANTS)
    first = SystemRandom().randrange(10**6) if options.first is None else options.first
    chosen = names if options.mutants == 0 else [names[(first + n) % len(names)] for n in range(options.mutants)]
    missed = []
    for name in chosen:
        line = [sys.executable, "-m", "simulation", "--mutant", name, "--no-shrink"]
        rare = mutants.MUTANTS[name]
        line += ["--actors", rare.actors] + (["--faults", rare.faults] if rare.faults else [])
        began = time.monotonic()
        done = subprocess.run(
            [*line, "--first", str(first), "--seeds", str(MUTANT_SEEDS)], capture_output=True, text=True, check=False
        )
        found = done.returncode == 1 and "\nseed " in done.stdout
        says = done.stdout.strip().splitlines()[-1] if found else "NOT FOUND " + (done.stdout + done.stderr)[-500:]
        print(f"{name}: {time.monotonic() - began:.0f} s, {says}", flush=True)
        missed += [] if found else [name]
    print(f"mutants: {len(chosen) - len(missed)} of {len(chosen)} found, first seed {first}")
    return 1 if missed else 0


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":  # the engine may iterate over sets
        os.execve(
            sys.executable, [sys.executable, "-m", "simulation", *sys.argv[1:]], os.environ | {"PYTHONHASHSEED": "0"}
        )
    options = arguments()
    if options.mutants is not None:
        return hunt(options)
    if options.mutant is not None:
        mutants.install(options.mutant)
    return many(options) if options.seed is None else one(options)


sys.exit(main())
