"""What local users of a database see: uncommitted bytes over a committed snapshot. Bytes only; no rules, no file locks.

Threads: `read` and the properties from any thread; whatever changes something is serialised by the caller. `_mutex`
protects single moments and is never held during a request to the store. `uploads` is set exactly while
something is to be published."""

import threading

from s3blockfs.config import Config
from s3blockfs.dirty import Dirty, spill_folder
from s3blockfs.prefetch import Readahead
from s3blockfs.snapshot import Snapshot, Source
from s3blockfs.uploads import Uploads


class View:
    """Starts clean, at `snapshot`."""

    def __init__(self, source: Source, config: Config, snapshot: Snapshot) -> None:
        self._mutex = threading.Lock()
        self._source, self._config, self.snapshot = source, config, snapshot
        self.dirty = self._new_dirty()
        self.uploads: Uploads | None = None
        self._clean: Snapshot | None = snapshot  # what is shown, unless something may lie over it

    @property
    def size(self) -> int:
        return self.dirty.size

    @property
    def is_dirty(self) -> bool:
        with self._mutex:
            return self.dirty.is_dirty

    def read(self, offset: int, length: int, readahead: Readahead | None = None) -> bytes:
        """Fewer bytes at the end of the file, none past it. Raises what reading the snapshot raises."""
        if (clean := self._clean) is not None:
            near = clean.near(offset, length)
            return committed(clean, offset, length, readahead) if near is None else near
        with self._mutex:
            snapshot, dirty = self.snapshot, self.dirty
            end = min(offset + length, dirty.size)
            if offset >= end:
                return b""
            base_end = min(end, dirty.cut)
            own = [(low, dirty.read(low, high)) for low, high in dirty.ranges(offset, end)]
        if len(own) == 1 and len(own[0][1]) == end - offset:
            return own[0][1]
        data = committed(snapshot, offset, base_end - offset, readahead) if base_end > offset else b""
        if not own and len(data) == end - offset:
            return data
        merged = bytearray(data.ljust(end - offset, b"\0"))
        for low, part in own:
            merged[low - offset : low - offset + len(part)] = part
        return bytes(merged)

    def write(self, offset: int, data: bytes, publish: bool = True) -> None:
        """Remember `data`, and start to upload what is complete. Raises OSError when the spill folder is full."""
        self._clean = None
        if not publish:
            with self._mutex:
                return self.dirty.write(offset, data)
        block_size = self.snapshot.head.block_size
        first, end = offset // block_size, -(-(offset + len(data)) // block_size)
        with self._mutex:
            uploads = self._begin()
            uploads.forget(first, end)
            self.dirty.write(offset, data)
        return uploads.stream(self.dirty, first, end)

    def truncate(self, size: int, publish: bool = True) -> None:
        self._clean = None
        with self._mutex:
            if not publish:
                return self.dirty.truncate(size)
            uploads = self._begin()
            # The block that the cut divides was perhaps uploaded with bytes that are no longer there.
            uploads.forget(size // self.snapshot.head.block_size, 1 << 62)
            self.dirty.truncate(size)
            if not self.dirty.is_dirty:
                self.uploads = None
            return None

    def drop(self) -> None:
        """Forget what is not committed."""
        self.move(self.snapshot)

    def move(self, snapshot: Snapshot) -> None:
        """Show another committed state, with nothing uncommitted over it."""
        with self._mutex:
            self.snapshot, self.uploads, self._clean = snapshot, None, snapshot
            self.dirty.close()
            self.dirty = self._new_dirty()

    def _begin(self) -> Uploads:
        if self.uploads is None:
            self.uploads = Uploads(self._source, self._config, self.snapshot.head, self.snapshot.head.seq + 1)
        return self.uploads

    def _new_dirty(self) -> Dirty:
        return Dirty(spill_folder(self._config.spill_dir), self.snapshot.head.block_size, self.snapshot.head.size)


def committed(snapshot: Snapshot, offset: int, length: int, readahead: Readahead | None) -> bytes:
    """Read, and fetch what a sequential reader will want."""
    if readahead is not None and (ahead := readahead.next_range(offset, length, snapshot.head.size)):
        snapshot.prefetch(*ahead)  # before this read waits, so that both are under way at once
    return snapshot.read(offset, length)
