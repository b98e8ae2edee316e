"""A bulk load, and reading all of it, takes no more memory if the database is large; test_large_files.py is longer."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from engine import InlineRuntime
from memorystore import MemoryStore

from s3blockfs import snapshot
from s3blockfs.catalog import Catalog
from s3blockfs.config import MIB, Config
from s3blockfs.dirty import UnlinkedFile, spill_folder
from s3blockfs.objectstore import StoredObject
from s3blockfs.snapshot import Snapshot

BLOCK = 4096
BYTES_A_BLOCK = 128  # noise; a table with an entry for each block takes 300 and more


class DiskStore(MemoryStore):
    """Keeps the bytes of data objects out of memory."""

    def __init__(self, runtime: InlineRuntime) -> None:
        super().__init__(runtime)
        self._file, self._end = UnlinkedFile(spill_folder(None)), 0
        self._places: dict[str, tuple[int, int]] = {}

    def put(self, key: str, body: bytes, **more: Any) -> str:
        if "/data/" not in key:
            return super().put(key, body, **more)
        self._file.write(self._end, body)
        self._places[key] = self._end, len(body)
        self._end += len(body)
        return '"data"'

    def get(self, key: str, *, start: int = 0, length: int | None = None, **more: Any) -> StoredObject:
        if (place := self._places.get(key)) is None:
            return super().get(key, start=start, length=length, **more)
        at, size = place
        return StoredObject((self._file.read(at + start, min(length or size, size - start)),), '"data"', 0.0, size)


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With caches that a small database fills, too."""
    monkeypatch.setattr(snapshot, "_PLACES_KEPT", 256)
    tracemalloc.start()
    yield
    tracemalloc.stop()


def peaks(size: int) -> tuple[int, int]:
    """In bytes, of writing a database by one commit, and of reading all of it by another process."""
    config, runtime = Config(block_size=BLOCK, cache_size=MIB, memory=4 * MIB), InlineRuntime()
    piece = random.Random(size).randbytes(MIB)
    store = DiskStore(runtime)
    with closing(runtime), closing(Catalog(store, runtime, config, "")) as writer:
        held = writer.create("a.db", exclusive=True)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for at in range(0, size, MIB):
            held.write(at, piece)
        held.close_handle(0)
        written = tracemalloc.get_traced_memory()[1] - before
        with closing(Catalog(store, runtime, config, "")) as reader:
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            state = Snapshot.load(reader.find("a.db")[0], held.version)
            at = 0
            for found in state.pieces(0):
                assert found == (piece * 5)[at % MIB : at % MIB + len(found)]
                at += len(found)
            assert at == size
            return written, tracemalloc.get_traced_memory()[1] - before


def test_a_large_database_takes_hardly_more_memory_than_a_small_one() -> None:
    _, small, large = (peaks(size) for size in (8 * MIB, 8 * MIB, 24 * MIB))  # the first one is for warming up
    more = [(b - a) / (16 * MIB // BLOCK) for a, b in zip(small, large, strict=True)]
    assert max(more) < BYTES_A_BLOCK, (small, large)
