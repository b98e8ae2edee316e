"""A cache on disk of immutable frames, shared by the processes of one machine; it survives them, and their SIGKILL.

One sparse file for each data object, which holds at their own places the frames that were fetched, as they came. What
is not there, half written, or of somebody else's making does not verify, and is fetched again: so no process needs a
lock, a list of what is there, or a clean end. Objects without checksums of ours are not kept.

Nothing here ever fails a read, nor holds one up: files are written by I/O threads, few at a time, or not at all.
Threads: any. `_lock` is never held during I/O."""

import errno
import hashlib
import logging
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

from s3blockfs.errors import UsageError
from s3blockfs.runtime import Runtime

log = logging.getLogger(__name__)

WRITES = 4  # at a time, of up to 8 MiB each; what comes while a slow disk is busy is not kept
LOOKS = 64  # the folder is looked through each time that this part of its size was written
FULL = 0.9  # what is left when the files used longest ago were deleted
TOUCH_S = 60.0  # how exact "used" is


class DiskCache:
    """Below `folder`, which is made if it is missing. Raises UsageError when it cannot be used."""

    def __init__(self, folder: str, most_bytes: int, runtime: Runtime) -> None:
        self._most_bytes, self._runtime = most_bytes, runtime
        self._folder = Path(folder).absolute()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._folder.stat()
        except OSError as error:
            raise UsageError(f"--cache-dir {folder}: {error.strerror}; name a folder of your own") from error
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise UsageError(f"--cache-dir {folder}: others may look into it; chmod 700 it, or name a new folder")
        self._lock = threading.Lock()
        self._writing, self._broken = 0, False
        self._left_bytes = 0  # to be written until the next look through the folder; the first write looks
        self._touched_s: dict[str, float] = {}

    def read(self, key: str, start: int, length: int) -> bytes:
        """What lies there, unverified; fewer bytes, or none, when it is not there."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            self._touch(path)
            return os.pread(descriptor, length, start)
        except OSError as error:
            self._complain(error)
            return b""
        finally:
            os.close(descriptor)

    def write(self, key: str, start: int, data: bytes) -> None:
        """Keep it soon, if the disk keeps up."""
        with self._lock:
            if self._broken or self._writing == WRITES:
                return
            self._writing += 1
        try:
            self._runtime.submit(lambda: self._write(key, start, data))
        except RuntimeError:  # no more threads
            with self._lock:
                self._writing -= 1

    def _write(self, key: str, start: int, data: bytes) -> None:
        try:
            with self._lock:
                self._left_bytes -= len(data)
                is_due = self._left_bytes < 0
                if is_due:
                    self._left_bytes = self._most_bytes // LOOKS
            if is_due:
                self._make_room()
            path = self._path(key)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o600)
            try:
                os.pwrite(descriptor, data, start)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._complain(error)
        finally:
            with self._lock:
                self._writing -= 1

    def _make_room(self) -> None:
        """Delete files, those used longest ago first. Other processes may be at it, too."""
        files = []
        for entry in (each for folder in self._folder.glob("??") for each in os.scandir(folder)):
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                files.append((found.st_mtime, found.st_blocks * 512, entry.path))
        used = sum(size for _, size, _ in files)
        if used <= self._most_bytes * (1 - 1 / LOOKS):
            return
        for _, size, path in sorted(files):
            if used <= self._most_bytes * FULL:
                break
            with suppress(FileNotFoundError):
                Path(path).unlink()
            used -= size

    def _touch(self, path: Path) -> None:
        now = self._runtime.monotonic()
        with self._lock:
            if now - self._touched_s.get(path.name, float("-inf")) < TOUCH_S:
                return
            if len(self._touched_s) > 10_000:
                self._touched_s.clear()
            self._touched_s[path.name] = now
        with suppress(FileNotFoundError):
            os.utime(path)

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        return self._folder / name[:2] / name[2:]

    def _complain(self, error: OSError) -> None:
        """Once; what is there is still read."""
        if error.errno != errno.ENOENT and not self._broken:
            self._broken = True
            log.warning("--cache-dir %s: %s; nothing more is kept in it", self._folder, error.strerror)
