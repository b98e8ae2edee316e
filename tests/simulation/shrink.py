"""Makes a failing run short: fewer actors, faults and rounds, as long as something still goes wrong in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from simulation.world import ACTORS, Plan, Run, simulate

SEEDS = 25  # other seeds that a smaller plan is tried with, because it happens at other moments now


def kind_of(run: Run) -> str:
    """What went wrong, without the particulars."""
    text = str(run.failure)
    return f"{type(run.failure).__name__} {text.split(':', 1)[0][:2]}"


def shrink(run: Run, most_tries: int = 400) -> Run:
    """The shortest failing run that was found."""
    best, tries = run, 0
    while tries < most_tries:
        for plan in _smaller(best.plan):
            tries += 1
            found = simulate(plan)
            if found.failure is not None and kind_of(found) == kind_of(run) and found.steps < best.steps:
                best = found
                break
            if tries >= most_tries:
                return best
        else:
            return best
    return best


def _smaller(plan: Plan) -> Iterator[Plan]:
    for seed in [plan.seed, *range(plan.seed * 1000 + 1, plan.seed * 1000 + SEEDS)]:
        for rounds in {1, plan.rounds // 2, plan.rounds - 1} - {0, plan.rounds}:
            yield replace(plan, seed=seed, rounds=rounds)
        for actor in plan.actors:
            if len(plan.actors) > 1:
                yield replace(plan, seed=seed, actors=tuple(a for a in ACTORS if a in plan.actors and a != actor))
        for fault in plan.faults:
            yield replace(plan, seed=seed, faults=tuple(f for f in plan.faults if f != fault))


def text_of(run: Run, last: int = 0) -> str:
    """The trace for people: time, who, what; all of it, or its last lines."""
    lines = [f"{time_s:10.3f}  {who:28}  {what}" for time_s, who, what in run.trace[-last:]]
    plan = run.plan
    what = (
        f"--seed {plan.seed} --actors {','.join(plan.actors)} --faults {','.join(plan.faults)} --rounds {plan.rounds}"
    )
    outcome = (
        f"{type(run.failure).__name__}: {run.failure}" if run.failure else f"simulate: ok, 1 seeds, {run.steps} steps"
    )
    return "\n".join([*lines, outcome, f"again: scripts/simulate {what}"])
