"""The unit file as systemd itself judges it, and the messages that Type=notify waits for."""

from __future__ import annotations

import configparser
import re
import select
import shutil
import socket
import string
import subprocess
import sys
from pathlib import Path

import pytest
from mounting import PATIENCE_S, Place, clean_up, is_mounted, shell, sqlite

from s3blockfs import notify
from s3blockfs.errors import EnvironmentProblem

UNIT = Path(__file__).parent.parent / "systemd" / "s3blockfs@.service"


def complaints(unit: Path) -> str:
    """What `systemd-analyze verify` says about the unit; it exits 0 even when it ignores a line."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = Path(shutil.copy(UNIT, tmp_path))
    assert complaints(unit) == ""


@pytest.mark.parametrize("good", ["KillMode=mixed", "Type=notify", "ExecStart=/usr/bin/env"])
def test_systemd_would_notice_a_mistake(tmp_path: Path, good: str) -> None:
    unit = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert good in text
    unit.write_text(text.replace(good, good + "-mistake"))
    assert "s3blockfs@" in complaints(unit)


def test_nothing_puts_the_service_into_a_mount_namespace() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # keep the case of names
    unit.read(UNIT)
    service = dict(unit["Service"])
    hiding = ("Private", "Protect", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Root", "Temporary", "DynamicUser")
    assert [name for name in service if name.startswith((*hiding, "Mount", "NoNewPrivileges"))] == []
    assert int(service["TimeoutStopSec"]) >= 90
    assert service["EnvironmentFile"] == "/etc/s3blockfs/%i.env"


@pytest.mark.mount
def test_what_the_unit_runs_with_the_environment_file_of_the_example(place: Place, tmp_path: Path) -> None:
    """Start and stop, as systemd would do it: the lines of the unit, the variables of systemd/README.md."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    lines = re.findall(r"^    ((?:S3BLOCKFS|AWS)_\w+)=(.*)$", (UNIT.parent / "README.md").read_text(), re.MULTILINE)
    given = dict(lines)
    assert {"S3BLOCKFS_TARGET", "S3BLOCKFS_MOUNTPOINT", "AWS_SECRET_ACCESS_KEY"} <= given.keys()
    mine = {"S3BLOCKFS_TARGET": place.target, "S3BLOCKFS_MOUNTPOINT": str(directory)}
    mine |= {"AWS_ACCESS_KEY_ID": place.access_key, "AWS_SECRET_ACCESS_KEY": place.secret_key}
    there = {"S3BLOCKFS_ENDPOINT_URL": place.url, "S3BLOCKFS_SPILL_DIR": str(tmp_path), "AWS_REGION": "us-east-1"}
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
    service = dict(re.findall(r"^(Exec\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    start, stop = (string.Template(service[key]).substitute(mine).split() for key in ("ExecStart", "ExecStop"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        environment = given | mine | there | {"PATH": path, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        daemon = subprocess.Popen(start, env=environment)
        try:
            assert select.select([channel], [], [], PATIENCE_S)[0]
            assert channel.recv(4096).startswith(b"READY=1\n")
            assert sqlite(directory / "a.db", "CREATE TABLE t(a); INSERT INTO t VALUES (7); SELECT a FROM t") == "7"
            done = shell(*stop, env=environment)
            assert (done.returncode, done.stderr) == (0, "")
            assert daemon.wait(PATIENCE_S) == 0
            assert not is_mounted(directory)
        finally:
            daemon.kill()
            daemon.wait()
            clean_up(directory)
    assert "a.db/head" in place.listing()


@pytest.fixture(params=["file", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    request.addfinalizer(channel.close)
    channel.settimeout(10)
    if request.param == "file":
        channel.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    else:
        channel.bind("")  # Linux picks a free name in the abstract namespace
        monkeypatch.setenv("NOTIFY_SOCKET", channel.getsockname().decode().replace("\0", "@", 1))
    return channel


def test_readiness_reaches_systemd(listener: socket.socket) -> None:
    notify.ready("mounted on /srv\nfor all")
    assert listener.recv(4096) == b"READY=1\nSTATUS=mounted on /srv for all"


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(socket, "socket", None)  # any use of it would be a TypeError
    notify.ready("x")


def test_a_named_socket_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with pytest.raises(EnvironmentProblem, match="NOTIFY_SOCKET"):
        notify.ready("x")
