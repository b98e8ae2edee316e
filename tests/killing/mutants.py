"""Broken engines, which the sweep has to catch. Each breaks that of the process in which it is called."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from s3blockfs import catalog
from s3blockfs.format import head as codec
from s3blockfs.head import HeadFile
from s3blockfs.legacy import AnyHead
from s3blockfs.snapshot import Version
from s3blockfs.transfer import bury, put_state


def acknowledges_early() -> None:
    """COMMIT returns a moment before the head is written."""
    write, later = HeadFile._put, ThreadPoolExecutor(1)

    def put(heads: HeadFile, replaced: Version | None, head: Any) -> Version:
        def written() -> Version:
            time.sleep(0.05)
            return write(heads, replaced, head)

        later.submit(written)
        body = codec.encode(head)
        heads.latest = Version(head, f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
        return heads.latest

    HeadFile._put = put  # type: ignore[method-assign]


def never_looks_back() -> None:
    """A swap whose reply was lost is not looked for in the head's past."""
    HeadFile._is_past_of = lambda *_: False  # type: ignore[method-assign]


def buries_first() -> None:
    """A rename deletes the source before there is a target."""

    def rename(origin: Any, heads: Any, state: Any, place: Any, writer: str) -> tuple[Version, Version]:
        buried = bury(origin, heads, state.version, writer, same_commit=True)
        return buried, put_state(state, origin, place, writer)

    catalog.rename = rename


def clears_first() -> None:
    """A conversion deletes the old keys before there is a head."""
    convert, swap = AnyHead.convert, AnyHead.swap

    def remembers(heads: Any, version: Version, *more: Any, **options: Any) -> Version:
        heads.old = version.snapshot
        return convert(heads, version, *more, **options)

    def clears(heads: Any, base: Version | None, *more: Any, **options: Any) -> Version:
        if base is None and getattr(heads, "old", None) is not None:
            heads._clear(heads.old)
        return swap(heads, base, *more, **options)

    AnyHead.convert, AnyHead.swap = remembers, clears  # type: ignore[method-assign]
