"""Which points there are, and running them side by side."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mounting import Place

from killing.folders import State
from killing.forks import Hung
from killing.steps import FACES, MOUNT, STEPS, Step
from killing.sweep import CLIENT_WAYS, STATES, WAYS, Failure, Point, Sweep

#: One in so many points is also looked at by `s3blockfs check`, before and after garbage was collected; twice as many
#: where objects come and go.
THOROUGH = 4

#: Nobody reads more than these.
MOST_FAILURES = 10


@dataclass
class Result:
    """`points` is how many had a k-th request; `whole` how many runs were not touched."""

    points: Counter[str] = field(default_factory=Counter)
    whole: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """All points of one script in one state."""

    step: Step
    face: str
    state: State

    def __str__(self) -> str:
        return f"{self.step.name} {self.face} {self.state}"

    def points(self, k: int) -> Iterator[Point]:
        for way in WAYS + (CLIENT_WAYS if self.face == MOUNT and self.step.client else ()):
            yield Point(self.step, self.face, self.state, k, way)


def tasks(faces: Sequence[str] = FACES, seed: int = 0, states: int = 1, only: str = "") -> list[Task]:
    """Each script in so many states, others with every seed. `only`: what their names, or points, start with."""
    found = []
    for number, step in enumerate(STEPS):
        for each in range(states):
            state = STATES[(number + seed + each) % len(STATES)]
            state = replace(state, seed=seed)
            found += [Task(step, face, state) for face in step.faces if face in faces]
    return [task for task in found if str(task).startswith(only) or only.startswith(str(task))]


def run(
    place: Place,
    directory: Path,
    todo: Sequence[Task],
    seed: int,
    most: int | None = None,
    jobs: int = 1,
    only: str = "",
    report: Callable[[str], None] = print,
) -> Result:
    """Run every script to its end, then with kills: at every request in every way, or a sample of so many points."""
    result = Result()
    requests: dict[Task, int] = {}
    lanes = _lanes(place, directory, jobs)

    def control(sweep: Sweep, task: Task) -> None:
        requests[task] = sweep.control(task.step, task.face, task.state)
        result.whole += 1

    def kill(sweep: Sweep, point: Point) -> None:
        chosen = random.Random(f"{seed} {point}").randrange(THOROUGH)
        fired = sweep.kill(point, thorough=chosen == 0 or (chosen == 1 and bool(point.step.needs)))
        result.points[point.way] += fired
        result.whole += not fired
        task = Task(point.step, point.face, point.state)
        if fired and complete and point.k >= requests[task]:  # other runs may take more requests
            points.append(replace(point, k=point.k + 1))
        elif not fired and reserve:
            points.append(reserve.pop())

    with lanes as sweeps:
        _side_by_side(sweeps, deque(todo), control, result, report)
        points = deque(point for task in requests for k in range(requests[task]) for point in task.points(k + 1))
        points = deque(point for point in points if str(point).startswith(only))
        complete = most is None or most >= len(points)
        reserve: list[Point] = []
        if not complete:
            mixed = random.Random(seed).sample(list(points), len(points))
            points, reserve = deque(mixed[:most]), mixed[most:]
        report(f"{len(requests)} scripts, {sum(requests.values())} requests, {len(points)} kill points")
        _side_by_side(sweeps, points, kill, result, report)
    return result


@contextlib.contextmanager
def _lanes(place: Place, directory: Path, jobs: int) -> Iterator[list[Sweep]]:
    with contextlib.ExitStack() as stack:
        sweeps = [stack.enter_context(Sweep(place, directory))]
        sweeps += [stack.enter_context(Sweep(place, directory, sweeps[0])) for _ in range(jobs - 1)]
        yield sweeps


def _side_by_side(
    sweeps: Sequence[Sweep],
    todo: deque[Task] | deque[Point],
    action: Callable[[Sweep, object], None],
    result: Result,
    report: Callable[[str], None],
) -> None:
    began, total = time.monotonic(), len(todo)
    told = began

    def work(sweep: Sweep) -> None:
        nonlocal told
        while len(result.failures) < MOST_FAILURES:
            try:
                item = todo.popleft()
            except IndexError:
                return
            try:
                action(sweep, item)
            except (Failure, Hung) as problem:
                result.failures.append(str(problem))
                report(f"FAILED: {problem}")
            if time.monotonic() > told + 30:
                told = time.monotonic()
                report(f"{total - len(todo)} of {total} in {told - began:.0f} s")

    broken: list[BaseException] = []

    def guarded(sweep: Sweep) -> None:
        try:
            work(sweep)
        except BaseException as error:  # noqa: BLE001  raised below
            todo.clear()
            broken.append(error)

    threads = [threading.Thread(target=guarded, args=(sweep,)) for sweep in sweeps]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C: what has begun is finished, so that nothing is left
        todo.clear()
        for thread in threads:
            thread.join()
        raise
    if broken:
        raise broken[0]
