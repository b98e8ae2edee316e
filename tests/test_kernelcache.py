"""What the kernel cache keeps of databases."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
from engine import InlineRuntime, World

from s3blockfs import catalog
from s3blockfs.config import Config
from s3blockfs.fuse_binding import Operations
from s3blockfs.kernelcache import KernelCache


def test_a_database_that_was_closed_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of them would wait for Python to look for cycles, hundreds of megabytes."""
    monkeypatch.setattr(catalog, "IDLE_KEPT", 0)
    with World(InlineRuntime()) as world:
        machine, kernel = world.machine(), KernelCache(Operations(), Config())
        database = machine.create("a.db", exclusive=True)
        kernel.opened(database, SimpleNamespace(fh=1, flags=0, direct_io=0, keep_cache=0, lock_owner=0))
        database.write(0, bytes(4096))
        database.close_handle(0)
        kernel.closed(database)
        alive = weakref.ref(database)
        gc.collect()
        gc.disable()
        try:
            machine.release(database)
            del database
            assert alive() is None
        finally:
            gc.enable()
