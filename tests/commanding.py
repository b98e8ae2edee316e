"""Helpers for tests of commands on the in-memory store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engine import World

from s3blockfs.cli import main, options


@contextmanager
def commanded(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Whatever bucket a command names is the one of this world."""
    with World() as world:

        @contextmanager
        def opened(where: options.Target) -> Iterator[Any]:
            machine = world.machine(root=where.prefix)
            yield machine, world.store, world.runtime
            machine.close()

        monkeypatch.setattr(options, "opened", opened)
        yield world


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and what was printed, errors too."""
    code = main.main([str(each) for each in arguments])
    shown = capsys.readouterr()
    return code, shown.out + shown.err
