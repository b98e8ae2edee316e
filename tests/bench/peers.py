"""Others that let SQLite use S3, with their own defaults where these suit a database; `settings` says where not.

juicefs keeps its metadata in a SQLite file on this machine, so a look at a file is no request, as it is one for the
others; on a second machine it would be one to a database server that somebody has to run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import boto3
from mounting import PATIENCE_S, is_mounted, shell

from bench.contestants import AsObject, Contestant, Ground, Session


def _program(name: str) -> str:
    """A package of the environment that runs us brings it along, or the system has it."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed"
    return found


class Mounted(Contestant):
    """A FUSE file system in the foreground, with an empty cache folder each time."""

    settings = ""

    def line(self, directory: Path, cache: Path) -> list[str]:
        raise NotImplementedError

    @property
    def environment(self) -> dict[str, str]:
        return self.ground.through.environment

    @contextlib.contextmanager
    def mounted(self) -> Iterator[tuple[Path, int]]:
        """Its directory, and the daemon."""
        with tempfile.TemporaryDirectory(dir=self.ground.folder, prefix="peer-") as name:
            directory, cache, log = (Path(name) / part for part in ("mnt", "cache", "log"))
            directory.mkdir()
            cache.mkdir()
            with log.open("wb") as file:
                process = subprocess.Popen(
                    self.line(directory, cache),
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            try:
                end = time.monotonic() + PATIENCE_S
                while not is_mounted(directory):
                    assert process.poll() is None and time.monotonic() < end, log.read_text()
                    time.sleep(0.01)
                yield directory, process.pid
                shell("fusermount", "-u", directory)
                process.wait(PATIENCE_S)
            finally:
                if is_mounted(directory):
                    shell("fusermount", "-u", "-z", directory)
                with contextlib.suppress(ProcessLookupError):  # all that it started is in its session
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.ground.wire.take()

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[Session]:
        with (
            self.mounted() as (directory, pid),
            self.ground.worker("file", path=str(directory / self.path(name))) as worker,
        ):
            yield Session(self.ground.wire, worker, [pid])

    def path(self, name: str) -> str:
        return name


class Rclone(Mounted, AsObject):
    name = "rclone mount"
    durable = False
    settings = "--vfs-cache-mode full; uploads after COMMIT has returned, so what writes is not measured"

    def line(self, directory: Path, cache: Path) -> list[str]:
        place = self.ground.through
        remote = f":s3,provider=Other,env_auth,force_path_style,endpoint='{place.url}':{place.bucket}/files"
        line = [_program("rclone"), "mount", remote, str(directory)]
        return [*line, "--vfs-cache-mode", "full", "--cache-dir", str(cache), "--config", os.devnull]


class S3fs(Mounted, AsObject):
    name = "s3fs mount"
    settings = "use_cache, parallel_count=16, multireq_max=20; journals are objects, too"

    def line(self, directory: Path, cache: Path) -> list[str]:
        place = self.ground.through
        options = f"url={place.url},use_path_request_style,endpoint=us-east-1,use_cache={cache},parallel_count=16"
        options += ",umask=0077,mp_umask=0077"
        return [_program("s3fs"), f"{place.bucket}:/files", str(directory), "-f", "-o", options]


class JuiceFS(Mounted):
    name = "juicefs mount"
    settings = "metadata in a SQLite file on this machine, blocks of 4 MiB, no write-back"

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
        self.meta = f"sqlite3://{ground.folder / 'juicefs.db'}"
        place = ground.through
        where = ["--storage", "s3", "--bucket", f"{place.url}/{place.bucket}", "--trash-days", "0"]
        keys = {"ACCESS_KEY": place.access_key, "SECRET_KEY": place.secret_key}
        done = shell(_program("juicefs"), "format", *where, self.meta, "juicefs", env=self.environment | keys)
        assert done.returncode == 0, done.stderr

    def line(self, directory: Path, cache: Path) -> list[str]:
        options = ["--no-usage-report", "--cache-dir", str(cache), "--backup-meta", "0", "--no-syslog"]
        return [_program("juicefs"), "mount", *options, self.meta, str(directory)]

    def seed(self, name: str) -> None:
        with self.mounted() as (directory, _):
            shutil.copyfile(self.ground.file, directory / name)

    @property
    def environment(self) -> dict[str, str]:
        """Not as root's daemon that restarts itself: one process, one number to measure."""
        return super().environment | {"JFS_NO_UMOUNT": "1"}


class S3Vfs(Contestant):
    """In process; it keeps nothing, so there is no warm database, and it reads a page by one GET."""

    name = "sqlite-s3vfs"
    settings = "pages and blocks of 64 KiB (with the 4 KiB of its default each request brings a sixteenth)"
    BLOCK = 65536

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[Session]:
        ground = self.ground
        where = {"url": ground.wire.url, "bucket": ground.place.bucket}
        with ground.worker("s3vfs", name=f"s3vfs/{name}", block_size=self.BLOCK, **where) as worker:
            yield Session(ground.wire, worker)

    def seed(self, name: str) -> None:
        import sqlite_s3vfs

        file = self.ground.folder / f"{uuid.uuid4().hex}.sqlite"
        shutil.copyfile(self.ground.file, file)
        database = sqlite3.connect(file)
        database.execute(f"PRAGMA page_size = {self.BLOCK}")
        database.execute("VACUUM")
        database.close()
        place = self.ground.place
        session = boto3.Session(place.access_key, place.secret_key, region_name="us-east-1")
        vfs = sqlite_s3vfs.S3VFS(session.resource("s3", endpoint_url=place.url).Bucket(place.bucket), self.BLOCK)
        with file.open("rb") as stream:
            vfs.deserialize_iter(f"s3vfs/{name}", iter(lambda: stream.read(1 << 20), b""))
        file.unlink()


def peers(ground: Ground) -> list[Contestant]:
    return [Rclone(ground), JuiceFS(ground), S3fs(ground), S3Vfs(ground)]


def about(on: Contestant) -> str:
    """Name, version, settings."""
    if isinstance(on, S3Vfs):
        return f"sqlite-s3vfs {version('sqlite-s3vfs')}: {on.settings}"
    if isinstance(on, S3fs):
        found = shell(_program("s3fs"), "--version").stdout.split("V")[1].split()[0]
        return f"s3fs {found}: {on.settings}"
    assert isinstance(on, Mounted)
    package = on.name.split()[0]
    return f"{package} {version(f'{package}-bin')}: {on.settings}"
