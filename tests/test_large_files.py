"""`import` and `export` of databases of many gigabytes take little more memory than those of a small one."""

from __future__ import annotations

import random
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mounting import Place, shell

MB = 1 << 20
SMALL_MB = 200
SLACK_MB = 60
IMPORT_SLACK_MB = 80  # it writes and reads: what glibc keeps of the buffers of both varies from run to run
FREE_GB = 20
SCRIPT = (
    "import resource, sys; from s3blockfs.cli.main import main; code = main(sys.argv[1:]);"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
)


def make(path: Path, size_mb: int, real_mb: int) -> None:
    """A database of so many pages, of which most belong to no table: the first ones are random, the others holes."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t(x)")
        db.execute("INSERT INTO t VALUES (7)")
        db.commit()
    with path.open("r+b") as file:
        for at in range(1, real_mb):
            file.seek(at * MB)
            file.write(random.Random(at).randbytes(MB))
        file.truncate(size_mb * MB)
        file.seek(28)
        file.write((size_mb * MB // 4096).to_bytes(4, "big"))


def peak_mb(place: Place, *line: str) -> float:
    """Of the command, with a cache that the small database fills, too."""
    options = ["--endpoint-url", place.url, "--cache-size", "64M"]
    done = shell(sys.executable, "-c", SCRIPT, *line, *options, env=place.environment, timeout=7200)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) / 1024


@pytest.mark.s3
@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("size_mb", "real_mb"), [(2000, 2000), (10_000, 100)], ids=["2 GB", "10 GB of holes"])
def test_memory_hardly_grows(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], size_mb: int, real_mb: int
) -> None:
    if shutil.disk_usage(tmp_path).free < 3 * size_mb * MB + (FREE_GB << 30):
        pytest.skip("not enough disk space")
    peaks = {}
    for mb, real in ((SMALL_MB, SMALL_MB), (size_mb, real_mb)):
        file, back, name = tmp_path / f"{mb}.sqlite", tmp_path / "back.sqlite", f"{place.target}/{mb}.sqlite"
        make(file, mb, real)
        peaks[mb] = peak_mb(place, "import", str(file), name), peak_mb(place, "export", name, str(back))
        with file.open("rb") as given, back.open("rb") as got:
            assert got.seek(0, 2) == mb * MB
            for at in [1, real - 1, *random.Random(mb).sample(range(1, mb), 50)]:
                given.seek(at * MB)
                got.seek(at * MB)
                assert got.read(MB) == given.read(MB), at
        file.unlink()
        back.unlink()
    with capsys.disabled():
        print(f"\npeaks in MB, of import and export: {peaks}")
    (small_import, small_export), (large_import, large_export) = peaks.values()
    assert large_import - small_import < IMPORT_SLACK_MB
    assert large_export - small_export < SLACK_MB
