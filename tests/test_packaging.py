"""The sdist and the wheel: built, looked at, and installed where nothing else is."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest
from mounting import PATIENCE_S, shell

import s3blockfs

ROOT = Path(__file__).resolve().parent.parent
NAME = f"s3blockfs-{s3blockfs.__version__}"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "S3BLOCKFS_", "PYTHON"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both; `build` makes the wheel from the sdist, so that the sdist is all it takes."""
    folder = tmp_path_factory.mktemp("dist")
    done = shell(sys.executable, "-m", "build", "--outdir", folder, ROOT, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(file.name for file in folder.iterdir()) == [f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"]
    return folder


def below(*folders: str) -> set[str]:
    """The files of this checkout, but for what Python leaves behind."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_the_sdist_holds_the_sources_the_tests_and_no_junk(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
        scripts = [member for member in archive.getmembers() if f"{NAME}/scripts/" in member.name]
    single = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"}
    made = {"PKG-INFO", ".gitignore"}  # hatchling's own
    assert names - made == below("s3blockfs", "tests", "scripts", "systemd", "docs") | single
    assert {"tests/test_packaging.py", "docs/OPERATIONS.md", "scripts/install"} <= names
    assert all(member.mode & 0o100 for member in scripts if not member.name.endswith((".sh", ".py")))


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        names = set(archive.namelist())
        info = f"{NAME}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info)} == below("s3blockfs")
    assert "s3blockfs/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert (metadata["Version"], metadata["License-Expression"]) == (s3blockfs.__version__, "Apache-2.0")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "s3blockfs = " in scripts and "mount.s3blockfs = " in scripts


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command of a new virtual environment with the wheel in it, far from the checkout; what it prints."""
    folder = tmp_path_factory.mktemp("installed")
    assert shell(sys.executable, "-m", "venv", folder / "venv", env=ENVIRONMENT).returncode == 0
    wheel = f"{built / NAME}-py3-none-any.whl[local]"
    line = [folder / "venv/bin/pip", "install", "-q", "--disable-pip-version-check", wheel]
    done = shell(*line, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr

    def run(command: str, *arguments: object) -> str:
        done = shell(folder / "venv/bin" / command, *map(str, arguments), env=ENVIRONMENT, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder  # type: ignore[attr-defined]
    return run


@pytest.mark.s3
def test_first_light_in_an_empty_environment(installed: Callable[..., str]) -> None:
    folder: Path = installed.folder  # type: ignore[attr-defined]
    assert installed("s3blockfs", "--version") == f"s3blockfs {s3blockfs.__version__}\n"
    where = installed("python", "-c", "import s3blockfs; print(s3blockfs.__file__, s3blockfs.connect.__name__)")
    assert where.startswith(str(folder / "venv")) and where.endswith(" connect\n")
    sqlite = sqlite3.connect(folder / "a.db")
    sqlite.executescript("CREATE TABLE t(a); INSERT INTO t VALUES (7)")
    sqlite.close()
    with subprocess.Popen(
        [folder / "venv/bin/s3blockfs", "serve", "s3"], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("S3 endpoint  http://127.0.0.1:")
            installed("s3blockfs", "import", "--local", "s3", "a.db", "bucket/a.db")
            assert installed("s3blockfs", "ls", "--local", "s3", "bucket") == "a.db\n"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(PATIENCE_S)
    assert server.returncode == 0
    installed("s3blockfs", "export", "--local", "s3", "bucket/a.db", "b.db")  # starts the server again
    sqlite = sqlite3.connect(folder / "b.db")
    assert sqlite.execute("SELECT a FROM t").fetchall() == [(7,)]
    sqlite.close()
