"""The uncommitted bytes of one database: an unlinked sparse file on this machine plus the set of ranges it holds.

Bytes lie in the spill file at their own offsets, and what follows each other is one range, so memory stays constant
however much is loaded; small transactions never leave the kernel's page cache. They live and die with this process:
nothing here ever needs recovery.

The caller serialises all calls. Invariants: ranges are sorted, disjoint, not adjacent and non-empty, and end at or
below `size`; bytes of the spill file outside the ranges are never read."""

import os
import tempfile
import weakref
from bisect import bisect_left
from collections.abc import Iterable

Range = tuple[int, int]


def spill_folder(configured: str | None) -> str:
    """A folder on a real disk: /tmp is often memory, and a bulk load can be larger than that."""
    return configured or os.environ.get("TMPDIR") or "/var/tmp"


def union(ranges: Iterable[Range]) -> list[Range]:
    """Sorted, those that touch joined."""
    result: list[Range] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1]:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


class UnlinkedFile:
    """A temporary file without a name; it lives as long as somebody refers to it."""

    def __init__(self, folder: str) -> None:
        file = tempfile.TemporaryFile(dir=folder, prefix="s3blockfs-", buffering=0)  # noqa: SIM115
        weakref.finalize(self, file.close).atexit = False  # connections that are open at exit still roll back
        self._descriptor = file.fileno()

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes at the end of the file."""
        data = b""
        while part := os.pread(self._descriptor, length - len(data), offset + len(data)):
            data += part
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError (ENOSPC) when the folder is full."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset, view = offset + written, view[written:]

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)


class Dirty:
    """Relative to a committed state of `committed_size` bytes, of which those from `cut` on are gone."""

    def __init__(self, folder: str, block_size: int, committed_size: int) -> None:
        self._folder, self._block_size, self._committed_size = folder, block_size, committed_size
        self._file: UnlinkedFile | None = None
        self._ranges: list[Range] = []
        self.size = self.cut = committed_size

    @property
    def held_bytes(self) -> int:
        """Of all ranges."""
        return sum(high - low for low, high in self._ranges)

    @property
    def is_dirty(self) -> bool:
        return bool(self._ranges) or self.size != self._committed_size or self.cut < self._committed_size

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError (ENOSPC) when the spill folder is full; nothing is recorded then."""
        if not data:
            return
        self._file = self._file or UnlinkedFile(self._folder)
        self._file.write(offset, data)
        end = offset + len(data)
        near = self._near(offset, end)
        touched = [*self._ranges[near], (offset, end)]
        self._ranges[near] = [(min(touched)[0], max(high for _, high in touched))]
        self.size = max(self.size, end)

    def truncate(self, size: int) -> None:
        """Raises OSError; nothing has changed then."""
        if size < self.size:
            if self._file is not None:
                self._file.truncate(size)
            self._ranges = self.ranges(0, size)
        self.size = size
        self.cut = min(self.cut, size)

    def ranges(self, start: int, end: int) -> list[Range]:
        """The dirty ranges inside start..end, in order."""
        inside = [(max(low, start), min(high, end)) for low, high in self._ranges[self._near(start, end)]]
        return [(low, high) for low, high in inside if low < high]

    def read(self, start: int, end: int) -> bytes:
        """Bytes of one dirty range (or of several with what lies between them undefined)."""
        data = self._file.read(start, end - start) if self._file is not None else b""
        return data.ljust(end - start, b"\0")  # behind the last write: a hole

    def block(self, number: int) -> bytes:
        """One that is full."""
        low = number * self._block_size
        return self.read(low, min(low + self._block_size, self.size))

    def is_full(self, first: int, end: int) -> bool:
        """Whether every byte of blocks first..end that lies inside the file is dirty."""
        low, high = first * self._block_size, min(end * self._block_size, self.size)
        return self.ranges(low, high) == [(low, high)]

    def close(self) -> None:
        self._file = None

    def _near(self, start: int, end: int) -> slice:
        """Which ranges overlap or touch start..end."""
        first, last = bisect_left(self._ranges, (start, 0)), bisect_left(self._ranges, (end + 1, 0))
        return slice(first - 1 if first and self._ranges[first - 1][1] >= start else first, last)
