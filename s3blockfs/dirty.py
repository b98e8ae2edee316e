"""The uncommitted bytes of one database: an unlinked sparse file on this machine plus the set of ranges it holds.

Bytes lie in the spill file at their own offsets, so memory stays constant however large a transaction is; small ones
never leave the kernel's page cache. They live and die with this process: nothing here ever needs recovery.

The caller serialises all calls. Invariants: ranges of a block are sorted, disjoint, not adjacent and non-empty, and end
at or below `size`; bytes of the spill file outside the ranges are never read."""

import os
import tempfile
import weakref
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
        self._blocks: dict[int, list[Range]] = {}
        self.size = self.cut = committed_size

    @property
    def held_bytes(self) -> int:
        """Of all ranges."""
        return sum(high - low for rows in self._blocks.values() for low, high in rows)

    @property
    def is_dirty(self) -> bool:
        return bool(self._blocks) or self.size != self._committed_size or self.cut < self._committed_size

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError (ENOSPC) when the spill folder is full; nothing is recorded then."""
        if not data:
            return
        self._file = self._file or UnlinkedFile(self._folder)
        self._file.write(offset, data)
        size, end = self._block_size, offset + len(data)
        for block in range(offset // size, -(-end // size)):
            new = low, high = max(offset, block * size), min(end, (block + 1) * size)
            rows = self._blocks.setdefault(block, [new])
            if rows[-1][1] == low:  # page after page
                rows[-1] = rows[-1][0], high
            elif rows[-1] != new:
                self._blocks[block] = union([*rows, new])
        self.size = max(self.size, end)

    def truncate(self, size: int) -> None:
        """Raises OSError; nothing has changed then."""
        if size < self.size:
            if self._file is not None:
                self._file.truncate(size)
            for block in [b for b in self._blocks if (b + 1) * self._block_size > size]:
                kept = [(low, min(high, size)) for low, high in self._blocks.pop(block) if low < size]
                if kept:
                    self._blocks[block] = kept
        self.size = size
        self.cut = min(self.cut, size)

    def ranges(self, start: int, end: int) -> list[Range]:
        """The dirty ranges inside start..end, in order, neighbours joined across blocks."""
        rows = (row for block in self._touched(start, end) for row in self._blocks[block])
        inside = ((max(low, start), min(high, end)) for low, high in rows)
        return union((low, high) for low, high in inside if low < high)

    def read(self, start: int, end: int) -> bytes:
        """Bytes of one dirty range (or of several with what lies between them undefined)."""
        data = self._file.read(start, end - start) if self._file is not None else b""
        return data.ljust(end - start, b"\0")  # behind the last write: a hole

    def block(self, number: int) -> bytes:
        """One that is full."""
        low = number * self._block_size
        return self.read(low, min(low + self._block_size, self.size))

    def is_full(self, block: int) -> bool:
        """Whether every byte of the block that lies inside the file is dirty."""
        low = block * self._block_size
        return self._blocks.get(block) == [(low, min(low + self._block_size, self.size))]

    def blocks(self) -> list[int]:
        return sorted(self._blocks)

    def close(self) -> None:
        self._file = None

    def _touched(self, start: int, end: int) -> list[int]:
        first, last = start // self._block_size, -(-end // self._block_size)
        if last - first < len(self._blocks):
            return [block for block in range(first, last) if block in self._blocks]
        return sorted(block for block in self._blocks if first <= block < last)
