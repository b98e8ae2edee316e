"""The uncommitted bytes of one database: an unlinked sparse file on this machine plus the set of ranges it holds.

Bytes lie in the spill file at their own offsets, so memory stays constant however large a transaction is; small ones
never leave the kernel's page cache. They live and die with this process: nothing here ever needs recovery.

The caller serialises all calls. Invariants: ranges of a block are sorted, disjoint, not adjacent and non-empty, and end
at or below `size`; bytes of the spill file outside the ranges are never read.
"""

import os
import tempfile
from typing import IO

Range = tuple[int, int]


def spill_folder(configured: str | None) -> str:
    """A folder on a real disk: /tmp is often memory, and a bulk load can be larger than that."""
    return configured or os.environ.get("TMPDIR") or "/var/tmp"


class Dirty:
    """Relative to a committed state of `committed_size` bytes, of which those from `cut` on are gone."""

    def __init__(self, folder: str, block_size: int, committed_size: int) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._blocks: dict[int, list[Range]] = {}
        self._block_size = block_size
        self._committed_size = committed_size
        self.size = committed_size
        self.cut = committed_size

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
        file = self._open()
        view = memoryview(data)
        done, end = 0, offset + len(data)
        while done < len(view):
            done += os.pwrite(file, view[done:], offset + done)
        for block in range(offset // self._block_size, -(-end // self._block_size)):
            self._add(block, max(offset, block * self._block_size), min(end, (block + 1) * self._block_size))
        self.size = max(self.size, end)

    def truncate(self, size: int) -> None:
        """Raises OSError; nothing has changed then."""
        if size < self.size:
            if self._file is not None:
                os.ftruncate(self._file.fileno(), size)
            for block in [b for b in self._blocks if (b + 1) * self._block_size > size]:
                kept = [(low, min(high, size)) for low, high in self._blocks.pop(block) if low < size]
                if kept:
                    self._blocks[block] = kept
        self.size = size
        self.cut = min(self.cut, size)

    def ranges(self, start: int, end: int) -> list[Range]:
        """The dirty ranges inside start..end, in order, neighbours joined across blocks."""
        result: list[Range] = []
        for block in self._touched(start, end):
            for low, high in self._blocks[block]:
                low, high = max(low, start), min(high, end)
                if result and result[-1][1] == low < high:
                    result[-1] = (result[-1][0], high)
                elif low < high:
                    result.append((low, high))
        return result

    def read(self, start: int, end: int) -> bytes:
        """Bytes of one dirty range (or of several with what lies between them undefined)."""
        data = b""
        while len(data) < end - start:
            part = os.pread(self._open(), end - start - len(data), start + len(data))
            if not part:
                return data + bytes(end - start - len(data))  # behind the last write: a hole
            data += part
        return data

    def block(self, number: int) -> bytes:
        """One that is full."""
        low = number * self._block_size
        return self.read(low, min(low + self._block_size, self.size))

    def is_full(self, block: int) -> bool:
        """Whether every byte of the block that lies inside the file is dirty."""
        low = block * self._block_size
        return self._blocks.get(block) == [(low, min(low + self._block_size, self.size))]

    def is_whole(self, block: int) -> bool:
        """Whether the block is dirty over its full length."""
        low = block * self._block_size
        return self._blocks.get(block) == [(low, low + self._block_size)]

    def blocks(self) -> list[int]:
        return sorted(self._blocks)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="s3blockfs-spill-", buffering=0)  # noqa: SIM115
        return self._file.fileno()

    def _touched(self, start: int, end: int) -> list[int]:
        first, last = start // self._block_size, -(-end // self._block_size)
        if last - first < len(self._blocks):
            return [block for block in range(first, last) if block in self._blocks]
        return sorted(block for block in self._blocks if first <= block < last)

    def _add(self, block: int, low: int, high: int) -> None:
        rows = self._blocks.get(block, [])
        apart = [row for row in rows if row[1] < low or row[0] > high]
        touching = [row for row in rows if row[1] >= low and row[0] <= high] + [(low, high)]
        self._blocks[block] = sorted([*apart, (min(touching)[0], max(row[1] for row in touching))])
