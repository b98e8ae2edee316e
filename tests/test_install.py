"""`scripts/install` as a machine's administrator meets it, below a folder of its own ($DESTDIR), with real mounts."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Place, clean_up, is_mounted, shell, sqlite

pytestmark = pytest.mark.mount

ROOT = Path(__file__).resolve().parent.parent


def run(machine: Path, *arguments: str, checkout: Path = ROOT, code: int = 0) -> str:
    """What the script says."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("S3BLOCKFS_")} | {"DESTDIR": str(machine)}
    done = shell(checkout / "scripts/install", *arguments, env=environment, cwd="/", timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + re.sub(r"^(WARNING|.notice).*\n", "", done.stderr, flags=re.MULTILINE)


def files(machine: Path) -> list[str]:
    """What is there, but for the inside of environments."""
    found = (path.relative_to(machine) for path in machine.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(str(path) for path in found if "releases" not in path.parts)


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A checkout of the version after this one."""
    folder = tmp_path / "newer"
    for name in ("s3blockfs", "scripts", "systemd"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("pyproject.toml", "s3blockfs/__init__.py"):
        (folder / name).write_text((folder / name).read_text().replace('version = "0.1.0"', 'version = "0.2.0"'))
        (folder / name).write_text((folder / name).read_text().replace('version__ = "0.1.0"', 'version__ = "0.2.0"'))
    return folder


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    clean_up(path)


@pytest.mark.timeout(900)  # three times pip, on a machine that may be busy
def test_install_upgrade_and_uninstall(place: Place, tmp_path: Path, newer: Path, directory: Path) -> None:
    machine, unit = tmp_path / "machine", "etc/systemd/system/s3blockfs@.service"
    commands, helper = machine / "usr/local/bin", "mount.s3blockfs"
    linked = ["opt/s3blockfs/current", f"sbin/{helper}", f"usr/local/bin/{helper}", "usr/local/bin/s3blockfs"]
    try:
        assert run(machine) == "s3blockfs 0.1.0\n"
        assert files(machine) == sorted([unit, *linked])
        (release,) = (machine / "opt/s3blockfs/releases").iterdir()
        for path in (release, release / "bin/python", commands / "s3blockfs"):
            assert path.stat().st_mode & 0o005 == 0o005  # for every user
        assert (machine / "etc/s3blockfs").stat().st_mode & 0o777 == 0o700
        before = (release / "complete").stat()
        assert run(machine) == "s3blockfs 0.1.0\n"
        assert (release / "complete").stat() == before  # and nothing was done again

        options = ["-o", f"endpoint-url={place.url},spill-dir={tmp_path}"]
        mount = [machine / "sbin" / helper, f"s3://{place.target}", directory, *options]
        done = shell(*mount, env=place.environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        sqlite(directory / "a.db", "CREATE TABLE t(a); INSERT INTO t VALUES (7)")

        assert "is in use: unmount" in run(machine, "--uninstall", code=1)
        assert run(machine, checkout=newer) == "s3blockfs 0.2.0\n"
        assert release.exists()  # the mount runs from it, and goes on
        assert sqlite(directory / "a.db", "INSERT INTO t VALUES (8); SELECT sum(a) FROM t") == "15"
        assert shell(commands / "s3blockfs", "umount", directory).returncode == 0
        assert shell(*mount, env=place.environment).returncode == 0
        assert sqlite(directory / "a.db", "SELECT sum(a) FROM t") == "15"
        assert run(machine, checkout=newer) == "s3blockfs 0.2.0\n"
        assert not release.exists()  # nobody needs it any more
        assert shell(commands / "s3blockfs", "umount", directory).returncode == 0
    finally:
        if is_mounted(directory):
            shell("fusermount", "-u", "-z", directory)

    (machine / unit).write_text("[Service]\n# changed by hand\n")
    assert "was changed here and is left as it is" in run(machine, checkout=newer)
    assert run(machine, "--uninstall") == "s3blockfs: removed from /opt/s3blockfs\n"
    assert files(machine) == [unit]
    assert not (machine / "opt/s3blockfs").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    """Nothing is changed, and one line says why."""
    stranger = tmp_path / "usr/local/bin/s3blockfs"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("#!/bin/sh\n")
    assert run(tmp_path, code=1) == f"install: {stranger} is there, and not from /opt/s3blockfs; move it away\n"
    assert "write an absolute path" in run(tmp_path, "--prefix", "opt", code=1)
    assert "is unknown" in run(tmp_path, "--lokal", code=1)
    assert files(tmp_path) == ["usr/local/bin/s3blockfs"]
    assert run(tmp_path, "--uninstall", "--prefix", "/opt/x") == "s3blockfs: removed from /opt/x\n"
    assert stranger.read_text() == "#!/bin/sh\n"
