"""Journals and other side files of databases, kept on this machine in unlinked temporary files.

They never go to S3: together with the uncommitted pages they live and die with this process, so after a crash there is
nothing to play back. Thread rule: any thread."""

import errno
import os

from s3blockfs.dirty import UnlinkedFile

#: Files that SQLite puts next to a database: https://sqlite.org/tempfiles.html. `-mjXXXXXXXXX` is a super-journal.
JOURNAL_SUFFIX, LOG_SUFFIX, INDEX_SUFFIX = "-journal", "-wal", "-shm"
SUFFIXES = (JOURNAL_SUFFIX, LOG_SUFFIX, INDEX_SUFFIX)


def is_side_file(name: str) -> bool:
    """Whether a file of this name stays on this machine."""
    if name.endswith(SUFFIXES):
        return True
    stem, _, rest = name.rpartition("-mj")
    return bool(stem) and len(rest) == 9 and all(c in "0123456789ABCDEF" for c in rest)


class SideFile(UnlinkedFile):
    """One file, which outlives its name while somebody refers to it."""

    def __init__(self, folder: str, path: str) -> None:
        super().__init__(folder)
        self.path, self.linked = path, True
        self.shown_as = f"/{path}"  # how a mount's kernel knows it

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    @property
    def modified_s(self) -> float:
        return os.fstat(self._descriptor).st_mtime


class SideFiles:
    """The side files of one mount or process, by path. Each call is one step on the dict, so it needs no lock."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files: dict[str, SideFile] = {}

    def get(self, path: str) -> SideFile | None:
        return self._files.get(path)

    def names_under(self, folder: str) -> list[str]:
        """Names in this folder ("" is the top), for listings."""
        parted = [path.rpartition("/") for path in list(self._files)]
        return [name for parent, _, name in parted if parent == folder]

    def create(self, path: str, exclusive: bool = False) -> SideFile:
        """The file, new or not. Raises FileExistsError when it exists and `exclusive`."""
        made = SideFile(self._folder, path)
        found = self._files.setdefault(path, made)
        if exclusive and found is not made:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        return found

    def pretended(self, path: str) -> SideFile:
        """A file that seems to be a hot journal; nobody finds it here under its name."""
        made = SideFile(self._folder, path)
        made.linked = False
        made.write(0, b"?")
        return made

    def remove(self, path: str) -> None:
        """Unlink it, if it is there."""
        if (found := self._files.pop(path, None)) is not None:
            found.linked = False

    def close(self) -> None:
        self._files.clear()
