"""Random file operations on a mount, and the same in a local folder: the same results and errno; at the end a second
machine sees the same tree. MODEL_SEED=7 repeats a run, MODEL_STEPS makes it longer; MODEL_SECONDS is for how long the
one for an hour goes on.

Left out is what SEMANTICS.md ("Files") says is different: names that were unlinked or renamed while open, links,
modes and times, names of folders that end like databases or were deleted databases."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mounting import SLACK_BYTES, SMALL, Place, Usage, mounted, shell, usage

STEPS = os.environ.get("MODEL_STEPS", "250")
SEEDS = [os.environ.get("MODEL_SEED") or str(n) for n in range(2)]

pytestmark = pytest.mark.mount


@pytest.mark.parametrize("seed", [*SEEDS, *(pytest.param(f"long {n}", marks=pytest.mark.long) for n in range(20))])
def test_as_in_a_local_folder(place: Place, tmp_path: Path, seed: str) -> None:
    print(f"MODEL_SEED={seed} MODEL_STEPS={STEPS}")
    (tmp_path / "local").mkdir()
    with mounted(place, tmp_path) as here, mounted(place, tmp_path) as there:
        same(tmp_path / "local", (here.directory, there.directory), seed, STEPS)


@pytest.mark.long
@pytest.mark.timeout(0)
def test_for_an_hour(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same files all the time; in the second half the daemons do not grow."""
    seed = os.environ.get("MODEL_SEED") or str(Random().randrange(1 << 32))
    lasts_s = float(os.environ.get("MODEL_SECONDS", "3600"))
    totals: Counter[str] = Counter()
    looks: list[tuple[Usage, Usage]] = []
    (tmp_path / "local").mkdir()
    with mounted(place, tmp_path, *SMALL) as here, mounted(place, tmp_path, *SMALL) as there:
        until = time.monotonic() + lasts_s
        while time.monotonic() < until or len(looks) < 5:
            told = same(tmp_path / "local", (here.directory, there.directory), f"{seed} {len(looks)}", "1000")
            totals.update({"rounds": 1, **told})
            looks.append((usage(here.process.pid), usage(there.process.pid)))
        with capsys.disabled():
            print(f"\nMODEL_SEED={seed}, {lasts_s:.0f} s: {dict(totals)}; {looks[4]} after 5 rounds,", *looks[9::10])
        for warm, last in zip(looks[len(looks) // 2], looks[-1], strict=True):
            assert last.descriptors <= warm.descriptors + 2
            assert last.memory_bytes <= warm.memory_bytes + 2 * SLACK_BYTES


def same(local: Path, folders: Sequence[Path], seed: str, steps: str) -> dict[str, int]:
    """First by the program that works in one folder, then by another that only looks. Returns what the first told."""
    told = []
    for folder in folders:
        line = sys.executable, __file__, seed, steps if folder == folders[0] else "0", local, folder
        done = shell(*line, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
        assert told[-1]["tree"] > 0
    return told[0]


# --- the program, in a process of its own: a test never opens a file on a mount itself ---------------------


class Sides:
    """The same handles and names in two folders."""

    def __init__(self, *folders: str) -> None:
        self.folders = folders
        self.handles: list[tuple[str, list[int]]] = []
        self.history: list[str] = []

    def do(self, text: str, act: Any) -> Any:
        """`act` gets the number of the side; both answers must be the same."""
        answers = []
        for side in range(len(self.folders)):
            try:
                answers.append(act(side))
            except OSError as error:
                answers.append(errno.errorcode[error.errno or 0])
        self.history.append(f"{text}: {str(answers[0])[:80]}")
        numbers = text.startswith("open") and all(isinstance(answer, int) for answer in answers)
        if answers[0] != answers[1] and not numbers:
            raise SystemExit("\n".join([*self.history[-40:], f"DIFFERENT: {answers[0]!r:.300} {answers[1]!r:.300}"]))
        return answers

    def path(self, side: int, name: str) -> Path:
        return Path(self.folders[side], name)

    def open(self, name: str, flags: int) -> None:
        opened = self.do(f"open {name} {flags:o}", lambda side: os.open(self.path(side, name), flags, 0o600))
        if isinstance(opened[0], int) and look(opened[0]) == "folder":  # what reads of one say differs everywhere
            self.do(f"close {name}", lambda side: os.close(opened[side]))
        elif isinstance(opened[0], int):
            self.handles.append((name, opened))

    def is_open(self, name: str) -> bool:
        return any(other == name or other.startswith(f"{name}/") for other, _ in self.handles)


def look(path: Path | int) -> Any:
    found = os.stat(path)  # noqa: PTH116  also of a descriptor
    return "folder" if stat.S_ISDIR(found.st_mode) else found.st_size


def tree(top: str) -> dict[str, str]:
    found = {}
    for folder, folders, files in os.walk(top):
        for name in folders:
            found[os.path.relpath(f"{folder}/{name}", top)] = "folder"
        for name in files:
            content = Path(folder, name).read_bytes()
            found[os.path.relpath(f"{folder}/{name}", top)] = f"{len(content)} {hashlib.md5(content).hexdigest()}"
    return found


def step(sides: Sides, rng: Random) -> None:
    place = rng.choice(["", "", "d0/", "d1/", "d0/d2/"])
    name, other = place + f"f{rng.randrange(4)}.db", rng.choice(["", "d0/", "d1/"]) + f"f{rng.randrange(4)}.db"
    folder = rng.choice(["d0", "d1", "d0/d2", "d1/d2"])
    if rng.random() < 0.1:
        name, other = rng.choice([(folder, name), (name, folder), (folder, rng.choice(["d0", "d1", "d1/d2"]))])
    both_kinds = name.endswith(".db") != other.endswith(".db")
    if both_kinds and not sides.path(0, other).exists():
        other = name  # a folder with a database's name, or the other way round, is refused
    at, length = rng.choice([0, 1, 4095, 65_536, rng.randrange(300_000)]), rng.choice([1, 100, 4096, 70_000])
    data = rng.randbytes(length)
    kind = rng.random()
    if sides.handles and kind < 0.6:
        number = rng.randrange(len(sides.handles))
        opened, fds = sides.handles[number]
        what = rng.choice(
            ["pwrite", "pwrite", "write", "append", "pread", "pread", "read", "cut", "sync", "size", "close"]
        )
        acts: dict[str, Any] = {
            "pwrite": lambda side: os.pwrite(fds[side], data, at),
            "write": lambda side: os.write(fds[side], data),
            "append": lambda side: (os.lseek(fds[side], 0, os.SEEK_END), os.write(fds[side], data)),
            "pread": lambda side: os.pread(fds[side], length, at),
            "read": lambda side: os.read(fds[side], length),
            "cut": lambda side: os.ftruncate(fds[side], at),
            "sync": lambda side: os.fsync(fds[side]),
            "size": lambda side: (look(fds[side]), os.lseek(fds[side], 0, os.SEEK_CUR)),
            "close": lambda side: os.close(fds[side]),
        }
        sides.do(f"{what} {opened} {at} {length}", acts[what])
        if what == "close":
            del sides.handles[number]
    elif kind < 0.8:
        flags = rng.choice([os.O_RDWR, os.O_RDONLY, os.O_WRONLY]) | rng.choice([0, os.O_CREAT, os.O_CREAT])
        flags |= rng.choice(
            [0, 0, 0, os.O_EXCL & -bool(flags & os.O_CREAT), os.O_TRUNC & -bool(flags & 3), os.O_APPEND]
        )
        if not name.endswith(".db") and not sides.path(0, name).exists():
            flags &= ~os.O_CREAT  # no folder could have the name after that
        sides.open(name, flags)
    elif kind < 0.9:
        if not sides.is_open(name) and not sides.is_open(other):
            what = rng.choice(["rename", "rename", "unlink", "truncate"])
            acts = {
                "rename": lambda side: sides.path(side, name).rename(sides.path(side, other)) and None,
                "unlink": lambda side: sides.path(side, name).unlink(),
                "truncate": lambda side: os.truncate(sides.path(side, name), at),
            }
            sides.do(f"{what} {name} {other} {at}", acts[what])
    elif kind < 0.96:
        if not sides.is_open(folder):
            what = rng.choice([Path.mkdir, Path.mkdir, Path.rmdir])
            sides.do(f"{what.__name__} {folder}", lambda side: what(sides.path(side, folder)))
    else:
        sides.do(f"stat {name}", lambda side: look(sides.path(side, name)))
        sides.do(f"listdir {folder}", lambda side: sorted(each.name for each in sides.path(side, folder).iterdir()))


def main() -> None:
    seed, steps, *folders = sys.argv[1:]
    sides, rng = Sides(*folders), Random(seed)
    for _ in range(int(steps)):
        step(sides, rng)
    while sides.handles:
        _, fds = sides.handles.pop()
        sides.do("close", lambda side, fds=fds: os.close(fds[side]))  # type: ignore[misc]
    found = sides.do("tree", lambda side: tree(folders[side]))
    errors = sum(line.rpartition(": ")[2].startswith("E") for line in sides.history)
    print(json.dumps({"steps": len(sides.history), "errors": errors, "tree": len(found[0])}))


if __name__ == "__main__":
    main()
