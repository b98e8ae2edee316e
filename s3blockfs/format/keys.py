"""The object keys under a database's prefix `P`, and references to them. Names are never reused: `rev` is that of the
head on which the upload was based, the nonce is random. Fixed-width `[0-9a-z-]`: some stores list in another order."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import NamedTuple

from s3blockfs.errors import DamagedObject, UsageError

MAX_KEY_BYTES = 1024  # of UTF-8: Amazon S3 User Guide, "Naming Amazon S3 objects"
LONGEST_SUFFIX_BYTES = 48  # at most, behind a prefix: `/map/`, 6 + 16 + 16 digits and two `-` are 45
NONCE_BYTES = 8
HIDDEN_FOLDER = ".s3blockfs"  # under a mounted prefix: the probe's result and the marks of deleted databases

_DATED = re.compile(r"(?:data/|archive/|map/[0-9]{6,}-)([0-9a-f]{16})-[0-9a-f]{16}")
_REF = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})")


class ObjectRef(NamedTuple):
    """Names one immutable data object. `uid` seeds its checksums: it is its first nonce, and survives a server-side
    copy under a new name, so an object swapped with another one never verifies."""

    rev: int
    nonce: bytes
    uid: bytes

    @property
    def etag(self) -> str | None:
        """What every GET asks for; names of ours are used once, so there is nothing to ask."""
        return None

    def key(self, prefix: str) -> str:
        return f"{prefix}/data/{self.rev:016x}-{self.nonce.hex()}"

    def encode(self) -> str:
        return f"{self.rev:016x}-{self.nonce.hex()}-{self.uid.hex()}"

    @classmethod
    def decode(cls, text: object, name: str) -> ObjectRef:
        match = _REF.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise DamagedObject(f"{name}: not an object reference")
        return cls(int(match[1], 16), bytes.fromhex(match[2]), bytes.fromhex(match[3]))


def head_key(prefix: str) -> str:
    return f"{prefix}/head"


def map_key(prefix: str, leaf: int, rev: int, nonce: bytes) -> str:
    return f"{prefix}/map/{leaf:06d}-{rev:016x}-{nonce.hex()}"


def archive_key(prefix: str, rev: int, nonce: bytes) -> str:
    return f"{prefix}/archive/{rev:016x}-{nonce.hex()}"


def rev_of(prefix: str, key: str) -> int | None:
    """Of a listed key of a data object, a leaf or an archive; None for any other key."""
    match = _DATED.fullmatch(key.removeprefix(f"{prefix}/"))
    return int(match[1], 16) if match is not None and key.startswith(f"{prefix}/") else None


def deleted_mark_key(folder: str, name: str) -> str:
    """The mark that says "look at this head before listing it": written before a tombstone, never removed."""
    return join(folder, HIDDEN_FOLDER, "deleted", name)


def folder_mark_key(folder: str) -> str:
    """The mark of a folder that was made: keeps it while there is nothing in it."""
    return join(folder, HIDDEN_FOLDER, "folder")


def join(*parts: str) -> str:
    """Join key segments; empty ones (the root) vanish."""
    return "/".join(part for part in parts if part)


def is_prefix(prefix: str) -> bool:
    """Whether every key of a database or folder with this prefix is a legal, harmless key."""
    legal = all(is_file_name(part) and part != HIDDEN_FOLDER for part in prefix.split("/"))
    return legal and len(prefix.encode()) + LONGEST_SUFFIX_BYTES <= MAX_KEY_BYTES


def check_prefix(prefix: str) -> None:
    """Raise UsageError unless it is one."""
    if not is_prefix(prefix):
        raise UsageError(f"{prefix[:99]!r}: not usable as a database name, or too long")


def is_file_name(part: str) -> bool:
    """Whether a key segment can be shown as a file name: hostile buckets hold `..`, NUL and empty segments."""
    with suppress(UnicodeEncodeError):
        return 0 < len(part.encode()) <= 255 and part not in (".", "..") and {"\0", "/"}.isdisjoint(part)
    return False
