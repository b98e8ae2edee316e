"""The tail: recent commits carried inside the head, so that a small commit is one PUT.

A chunk is compressed with its previous version in this tail as zlib dictionary (a one-row commit changes 8-14 KiB of
pages but about 1 KiB of information), so appending costs the new commit only; a tail is decoded from its start."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from s3blockfs.errors import DamagedObject
from s3blockfs.format.data import Commit, inflate

CHUNK_BYTES = 4096

#: Bounds on a tail that a decoder accepts; writers roll it into a segment long before.
MAX_RAW_BYTES = 64 * 1024 * 1024
MAX_COMMITS = 16384

_RECORD = struct.Struct(">Q16sQQQI")  # seq, commit id, time in ms, size in bytes, cut in bytes, chunks
_CHUNK = struct.Struct(">QHHB")  # offset, raw length, stored length, codec
_RAW, _ZLIB, _DELTA = 0, 1, 2

_Latest = dict[tuple[int, int], tuple[int, bytes]]  # (offset, length) -> the last version of that chunk, and its seq


class LogCommit(NamedTuple):
    """A commit with its bytes: (file offset, data) chunks, disjoint, each inside one CHUNK_BYTES-aligned piece."""

    record: Commit
    chunks: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Tail:
    """Immutable; `append` and `after` return new ones. Of each chunk only the last version is kept unpacked: those of
    224 commits of a row each, 136 KB when encoded, would be 2.9 MB, the last ones are 139 KB."""

    records: tuple[Commit, ...] = ()
    encoded_bytes: int = 0
    raw_bytes: int = 0
    parts: tuple[bytes, ...] = field(default=(), compare=False, repr=False)  # `append` shares them, and copies none
    latest: Mapping[tuple[int, int], tuple[int, bytes]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, commits: Iterable[LogCommit]) -> Tail:
        return cls().append(*commits)

    @property
    def commits(self) -> tuple[LogCommit, ...]:
        """With all their bytes, unpacked anew each time, which takes milliseconds."""
        return tuple(_unpacked(b"".join(self.parts), "a tail in memory"))

    def append(self, *commits: LogCommit) -> Tail:
        latest = dict(self.latest)
        parts = [_encode(commit, latest) for commit in commits]
        encoded_bytes = self.encoded_bytes + sum(map(len, parts))
        raw_bytes = self.raw_bytes + sum(len(data) for commit in commits for _, data in commit.chunks)
        records = (*self.records, *(commit.record for commit in commits))
        return Tail(records, encoded_bytes, raw_bytes, (*self.parts, *parts), latest)

    def after(self, seq: int) -> Tail:
        """Without the commits up to and including `seq`, which a segment holds now."""
        return Tail.of(commit for commit in self.commits if commit.record.seq > seq)

    @classmethod
    def decode(cls, encoded: bytes, name: str) -> Tail:
        """Raises DamagedObject; unpacks at most MAX_RAW_BYTES in MAX_COMMITS commits."""
        latest: _Latest = {}
        records: list[Commit] = []
        raw_bytes = 0
        for record, chunks in _unpacked(encoded, name):
            records.append(record)
            latest.update(((offset, len(data)), (record.seq, data)) for offset, data in chunks)
            raw_bytes += sum(len(data) for _, data in chunks)
        return cls(tuple(records), len(encoded), raw_bytes, (encoded,), latest)


def _unpacked(encoded: bytes, name: str) -> Iterator[LogCommit]:
    latest: dict[tuple[int, int], bytes] = {}
    pos = raw_bytes = commits = 0
    try:
        while pos < len(encoded):
            *record, n_chunks = _RECORD.unpack_from(encoded, pos)
            pos += _RECORD.size
            chunks = []
            for _ in range(n_chunks):
                offset, raw, stored, codec = _CHUNK.unpack_from(encoded, pos)
                pos += _CHUNK.size + stored
                data = _decode_chunk(encoded[pos - stored : pos], raw, codec, latest.get((offset, raw)), name)
                latest[offset, raw] = data
                chunks.append((offset, data))
                raw_bytes += max(raw, 64)  # an empty one takes memory, too
                if raw_bytes > MAX_RAW_BYTES:
                    raise DamagedObject(f"{name}: the tail unpacks to more than {MAX_RAW_BYTES} bytes")
            yield LogCommit(Commit(*record), tuple(chunks))
            commits += 1
            if commits > MAX_COMMITS:
                raise DamagedObject(f"{name}: more than {MAX_COMMITS} commits in the tail")
    except struct.error as error:
        raise DamagedObject(f"{name}: the tail ends in mid-record") from error


def split_chunks(offset: int, data: bytes, block_size: int) -> Iterable[tuple[int, bytes]]:
    """Cut at CHUNK_BYTES boundaries of the file and at block boundaries."""
    pos = 0
    while pos < len(data):
        here = offset + pos
        step = min(CHUNK_BYTES - here % CHUNK_BYTES, block_size - here % block_size)
        yield here, data[pos : pos + step]
        pos += step


def _encode(commit: LogCommit, latest: _Latest) -> bytes:
    parts = [_RECORD.pack(*commit.record, len(commit.chunks))]
    for offset, data in commit.chunks:
        if (previous := latest.get((offset, len(data)))) is None:
            codec, stored = _ZLIB, zlib.compress(data, 6)
        else:
            packer = zlib.compressobj(6, zdict=previous[1])
            codec, stored = _DELTA, packer.compress(data) + packer.flush()
        if len(stored) >= len(data):
            codec, stored = _RAW, data
        parts += (_CHUNK.pack(offset, len(data), len(stored), codec), stored)
        latest[offset, len(data)] = commit.record.seq, data
    return b"".join(parts)


def _decode_chunk(stored: bytes, raw: int, codec: int, previous: bytes | None, name: str) -> bytes:
    if codec > _DELTA or (codec == _DELTA and previous is None):
        raise DamagedObject(f"{name}: unknown chunk codec {codec} in the tail")
    data = stored
    if codec != _RAW and raw <= CHUNK_BYTES:
        data = inflate(stored, raw, name, zdict=(previous or b"") if codec == _DELTA else b"")
    if len(data) != raw or raw > CHUNK_BYTES:
        raise DamagedObject(f"{name}: a chunk of another length than declared in the tail")
    return data
