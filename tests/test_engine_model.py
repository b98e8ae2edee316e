"""The engine against a bytearray: seeded random writes, cuts, commits, reopenings, with every block size and every
way in which a commit can be stored."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine import catalog, new_store

from s3blockfs import commit, uploads
from s3blockfs.format import data, extents


def _shrink_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes reach every branch with little data: segments, block objects, rolls, leaves."""
    monkeypatch.setattr(commit, "SMALL_COMMIT_BYTES", 8192)
    monkeypatch.setattr(commit, "ROLL_BYTES", 6000)
    monkeypatch.setattr(commit, "FULL_TAIL_BYTES", 9000)
    for module in (commit, data, uploads):
        monkeypatch.setattr(module, "OBJECT_BYTES", 32768)
    monkeypatch.setattr(extents, "LEAF_EXTENTS", 4)
    monkeypatch.setattr("s3blockfs.blockmap.LEAF_EXTENTS", 4)
    monkeypatch.setattr("s3blockfs.blockmap.INLINE_MAP_BYTES", 150)


@pytest.mark.parametrize("block_size", [512, 4095, 4096, 4097, 16384, 65536])
@pytest.mark.parametrize("seed", range(4))
def test_reads_equal_a_byte_array(block_size: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _shrink_limits(monkeypatch)
    rng = random.Random(f"{block_size}-{seed}")
    store, runtime = new_store(seed)
    machine = catalog(store, runtime, block_size=block_size)
    database = machine.create("a.bin", exclusive=True)
    committed = bytearray()
    model = bytearray()

    def check(target: Any, expected: bytearray) -> None:
        assert target.size == len(expected)
        assert target.read(0, len(expected) + 10) == expected
        for _ in range(5):
            low = rng.randrange(0, len(expected) + 100)
            length = rng.randrange(0, 20000)
            assert target.read(low, length) == expected[low : low + length]

    for _ in range(120):
        action = rng.random()
        if action < 0.5:
            offset = rng.choice([rng.randrange(0, len(model) + 1), rng.randrange(0, len(model) + 50_000)])
            length = rng.choice([1, 100, 4096, rng.randrange(1, 70_000)])
            if offset + length > 400_000:
                continue
            content = rng.choice([bytes([rng.randrange(256)]) * length, rng.randbytes(length)])
            database.write(offset, content)
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = content
        elif action < 0.6:
            size = rng.randrange(0, min(400_000, len(model) * 2 + 1))
            database.truncate(size)
            del model[size:]
            model.extend(bytes(size - len(model)))
        elif action < 0.85:
            database.close_handle(0)
            committed = bytearray(model)
        elif action < 0.93:
            machine.release(database)  # forgets what is not committed
            machine.close()
            machine = catalog(store, runtime, block_size=block_size)
            database = machine.open("a.bin")
            model = bytearray(committed)
        check(database, model)
    other = catalog(store, runtime)
    check(other.open("a.bin"), committed)
    machine.close()
    other.close()
