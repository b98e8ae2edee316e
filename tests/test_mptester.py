"""SQLite's own test of several processes, mptester: scripts/test builds it from the distribution's source package.

The scripts are SQLite's, as they are. Some need seconds of locks and crashes; with `--long` in every journal mode, with
and without `--sync` (synchronous=OFF), several times. MPTESTER_ROUNDS makes it more."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, Place, fresh_name, mounted, shell, sqlite

#: Where `make_mptester` of scripts/lib.sh puts it.
FOLDER = Path(sys.prefix) / "mptest"
MODES = "DELETE", "TRUNCATE", "PERSIST", "MEMORY", "OFF", "WAL"
ROUNDS = range(int(os.environ.get("MPTESTER_ROUNDS", "3")))
CLIENTS = range(1, 6)

pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (FOLDER / "mptester").exists(), reason="scripts/test builds mptester"),
]


def mptester(file: Path, script: Path, *options: str) -> tuple[list[str], int]:
    """What it complains of, without numbers of processes, and how many checks it made."""
    done = shell(FOLDER / "mptester", file, *options, script, timeout=600)
    said = done.stdout + done.stderr
    [(errors, checks)] = re.findall(r"^Summary: (\d+) errors out of (\d+) tests", said, re.MULTILINE)
    complaints = re.findall(r"^\d+\.(.*ERROR:.*)", said, re.MULTILINE)
    assert (done.returncode == 0) == (int(errors) == 0) == (not complaints), said[-5000:]
    return complaints, int(checks)


def script_in(mode: str, name: str, folder: Path) -> Path:
    """WAL is the file's own mode. The others belong to a connection, so each client is told at its beginning; one that
    crashes comes back with the usual one."""
    script = folder / f"{mode}-{name}.test"
    tell = f"PRAGMA journal_mode={mode};\n--match {mode.lower()}\n"
    tasks = [f"--task {client}\n{tell}--end\n" for client in CLIENTS]
    script.write_text("".join([tell, *tasks, f"--wait all\n--source {FOLDER / name}.test\n"]))
    return script


def examine(mount: Mount, place: Place, folder: Path, name: str, mode: str) -> None:
    """What its last round leaves is there for a machine that knows nothing but S3."""
    sums = "; ".join(f"SELECT count(*), sum(length(b)) FROM t{client}" for client in CLIENTS)
    asked = f"PRAGMA integrity_check; PRAGMA journal_mode; {sums}"
    with mounted(place, folder) as other:
        here, there = (sqlite(each / name, asked).splitlines() for each in (mount, other))
    assert here == there
    assert here[:2] == ["ok", "wal" if mode == "WAL" else "delete"]
    assert [line.split("|")[0] for line in here[2:]] == ["64"] * len(CLIENTS)


def cases() -> Iterator[Any]:
    for mode, script, sync in itertools.product(MODES, ("multiwrite01", "crash01"), ("", "--sync")):
        sample = script == "multiwrite01" and not sync and mode in ("DELETE", "WAL")
        yield pytest.param(mode, script, sync, marks=() if sample else pytest.mark.long)


@pytest.mark.parametrize(("mode", "script", "sync"), list(cases()))
def test_as_on_a_disk(
    place: Place, tmp_path: Path, mode: str, script: str, sync: str, request: pytest.FixtureRequest
) -> None:
    """Five processes write, read and, in crash01, die in mid-transaction. MEMORY and OFF leave a damaged file then on a
    disk (each of 10 runs on ext4, with and without `--sync`), and not here."""
    with mounted(place, tmp_path, refresh="1") as mount:
        for _ in ROUNDS if request.node.get_closest_marker("long") else range(1):
            name = fresh_name()
            complaints, checks = mptester(mount / name, script_in(mode, script, tmp_path), *sync.split())
            assert complaints == []
            assert checks >= {"multiwrite01": 81, "crash01": 94}[script]
            examine(mount, place, tmp_path, name, mode)


@pytest.mark.long
@pytest.mark.parametrize("sync", ["", "--sync"])
def test_journal_modes_mixed(place: Place, tmp_path: Path, sync: str) -> None:
    """config01: PERSIST, TRUNCATE, MEMORY, OFF and DELETE side by side, page sizes changed by VACUUM, mmap."""
    with mounted(place, tmp_path, refresh="1") as mount:
        for _ in ROUNDS:
            name = fresh_name()
            complaints, checks = mptester(mount / name, FOLDER / "config01.test", *sync.split())
            assert complaints == []
            assert checks >= 160
            examine(mount, place, tmp_path, name, "DELETE")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_page_sizes(place: Place, tmp_path: Path, mode: str) -> None:
    """config02: VACUUM and other page sizes, among others that write or crash. In WAL mode SQLite does not change them
    and four checks of the script fail, everywhere: so the same as on this machine's disk is asked for."""
    expected = mptester(tmp_path / "local.db", FOLDER / "config02.test", "--journalmode", mode)
    assert (expected[0] == []) == (mode == "DELETE")
    with mounted(place, tmp_path, refresh="1") as mount:
        name = fresh_name()
        assert mptester(mount / name, FOLDER / "config02.test", "--journalmode", mode, "--sync") == expected
        examine(mount, place, tmp_path, name, mode)
