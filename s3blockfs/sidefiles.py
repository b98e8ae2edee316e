"""Journals and other side files of databases, kept on this machine in unlinked temporary files.

They never go to S3: together with the uncommitted pages they live and die with this process, so after a crash there is
nothing to play back. Thread rule: any thread."""

import errno
import os
import tempfile
import threading
from typing import IO

#: Files that SQLite puts next to a database: https://sqlite.org/tempfiles.html. `-mjXXXXXXXXX` is a super-journal.
JOURNAL_SUFFIX = "-journal"
SUFFIXES = (JOURNAL_SUFFIX, "-wal", "-shm")


def is_side_file(name: str) -> bool:
    """Whether a file of this name stays on this machine."""
    if name.endswith(SUFFIXES):
        return True
    stem, dash, rest = name.rpartition("-mj")
    return bool(stem and dash) and len(rest) == 9 and all(c in "0123456789ABCDEF" for c in rest)


class SideFile:
    """One file: bytes in an unlinked temporary file, which outlives its name while somebody has it open."""

    def __init__(self, folder: str, mode: int) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="s3blockfs-side-", buffering=0)  # noqa: SIM115
        self.mode = mode
        self.opened = 0
        """Open handles; `SideFiles` counts."""
        self.linked = True

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes at the end of the file."""
        return os.pread(self._file.fileno(), length, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError (ENOSPC) when the folder is full."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, offset)
            offset, view = offset + written, view[written:]

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)

    def close(self) -> None:
        self._file.close()


class SideFiles:
    """The side files of one mount or process, by path."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, SideFile] = {}

    def get(self, path: str) -> SideFile | None:
        with self._lock:
            return self._files.get(path)

    def names_under(self, folder: str) -> list[str]:
        """Names in this folder ("" is the top), for listings."""
        start = f"{folder}/" if folder else ""
        with self._lock:
            paths = list(self._files)
        return [p[len(start) :] for p in paths if p.startswith(start) and "/" not in p[len(start) :]]

    def create(self, path: str, mode: int, exclusive: bool) -> SideFile:
        """The file, opened. Raises FileExistsError when it exists and `exclusive`."""
        with self._lock:
            found = self._files.get(path)
            if found is None:
                found = self._files[path] = SideFile(self._folder, mode)
            elif exclusive:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            found.opened += 1
            return found

    def open(self, path: str) -> SideFile:
        """Raises FileNotFoundError."""
        with self._lock:
            found = self._files.get(path)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            found.opened += 1
            return found

    def release(self, file: SideFile) -> None:
        with self._lock:
            file.opened -= 1
            self._close_if_unused(file)

    def remove(self, path: str) -> bool:
        """Unlink it; False when there is none."""
        with self._lock:
            found = self._files.pop(path, None)
            if found is None:
                return False
            found.linked = False
            self._close_if_unused(found)
            return True

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _close_if_unused(self, file: SideFile) -> None:
        if not file.linked and file.opened == 0:
            file.close()
