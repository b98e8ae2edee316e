"""Exhaustive search of a small model: breadth first over every state that its rules allow, nothing random.

A model has an `initial` state and `steps`, which gives (what happens, the state afterwards) for everything that may
happen next. States are immutable, so two ways that lead to the same state meet there. A state whose `wrong` is not
empty breaks a property: the search ends, and the way to it is a shortest one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple, Protocol


class Model(Protocol):
    initial: Hashable

    def steps(self, state: Any) -> Iterator[tuple[str, Any]]: ...


class Explored(NamedTuple):
    """What a search has found. `wrong` is empty when every state was visited and all of them are right."""

    states: int
    steps: int
    depth: int
    wrong: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.wrong:
            return f"{self.states} states, {self.steps} steps, {self.depth} deep: all right"
        rows = [f"{number:3}. {what}" for number, what in enumerate(self.trace, 1)]
        return "\n".join([f"{self.wrong} (shortest trace; {self.states} states seen)", *rows])


def explore(model: Model) -> Explored:
    """All states, or those up to the first wrong one."""
    came_from: dict[Any, tuple[Any, str] | None] = {model.initial: None}
    level, depth, steps = [model.initial], 0, 0
    while level:
        following = []
        for state in level:
            for what, after in model.steps(state):
                steps += 1
                if after in came_from:
                    continue
                came_from[after] = state, what
                if after.wrong:
                    return Explored(len(came_from), steps, depth + 1, after.wrong, _trace(came_from, after))
                following.append(after)
        level = following
        depth += bool(level)
    return Explored(len(came_from), steps, depth)


def _trace(came_from: dict[Any, tuple[Any, str] | None], state: Any) -> tuple[str, ...]:
    rows = []
    while (before := came_from[state]) is not None:
        state, what = before
        rows.append(what)
    return tuple(reversed(rows))
