"""One object of each kind, and its bytes put together by hand as docs/FORMAT.md has them.

The `.bin` files here hold the same bytes. They never change: an accidental change of the format fails in
`test_formats.py`, and a deliberate one gets a new version and new files beside the old ones. Builds of zlib differ in
how they compress, so `packed` compresses the few payloads of these objects in a fixed way.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from s3blockfs.format.data import Commit, IndexEntry
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.head import Archived, Head, Lease, NamedSnapshot, Segment
from s3blockfs.format.keys import ObjectRef
from s3blockfs.format.tail import LogCommit, Tail

UID = bytes.fromhex("0102030405060708")
REF = ObjectRef(0x1A2B, bytes.fromhex("1112131415161718"), UID)
OTHER = ObjectRef(0x1A2C, bytes.fromhex("2122232425262728"), bytes.fromhex("2122232425262728"))
COMMITS = (
    Commit(5, bytes(range(16)), 1_700_000_000_123, 123_456, 4096),
    Commit(6, bytes(range(16, 32)), 1_700_000_000_456, 1 << 40, 123_456),
)
A, B, C = b"a" * 4096, b"a" * 4000 + b"b" * 96, b"c" * 1000
ODD = bytes(range(256))  # nothing makes it smaller
PACKED = {
    (A, b""): "789cedc1010d000000c2a0acef5fc21e0e28000000e0dd00efcb105b",
    (B, A): "78bbefcb105bedc1310d00000002a0aef60f610ae703000000007f192b020a10bb",
    (C, b""): "78014b4e1e05a321301a02c33d040040f082c8",
}


def packed(content: bytes, level: int = 0, zdict: bytes = b"") -> bytes:
    """A fixed zlib stream: of the payloads above a short one, of anything else a stored block."""
    if (content, zdict) in PACKED:
        return bytes.fromhex(PACKED[content, zdict])
    sizes = struct.pack("<HH", len(content), len(content) ^ 0xFFFF)
    return b"\x78\x01\x01" + sizes + content + zlib.adler32(content).to_bytes(4, "big")


# --- one object of each kind, and its bytes as FORMAT.md has them --------------------------------------

BLOCKS = ((1024, 5, b"x" * 512), (1536, 5, b"y" * 512))
EXTENTS = (Extent(0, 2, REF, 0, 5), Extent(2, 1, OTHER, 7, 6), Extent(1 << 33, 9, REF, 2, 5))
TAIL_COMMITS = (LogCommit(COMMITS[0], ((0, A), (8192, ODD))), LogCommit(COMMITS[1], ((0, B),)))
LEAVES = (LeafRef(0, 0, 0x1A2B, bytes(range(8)), 1), LeafRef(5000, 7, 0x1A2D, bytes(range(8, 16)), 0xFFFFFFFF))
HEAD_WITH_LEAVES = Head(b"i" * 16, 9, 3, b"c" * 16, 0, 65536, b"n" * 8, deleted=True, leaves=LEAVES)


def frame_bytes(offset: int, seq: int, raw: bytes, codec: int, stored: bytes) -> bytes:
    start = struct.pack(">QQIIB3x", offset, seq, len(raw), len(stored), codec)
    return start + zlib.crc32(UID + start + stored).to_bytes(4, "big") + stored


def data_bytes(role: int, frames: list[bytes], entries: Sequence[IndexEntry], commits: tuple[Commit, ...]) -> bytes:
    header = b"S3BD" + bytes([1, role, 0, 0]) + UID
    index = struct.pack(">II", len(commits), len(entries))
    index += b"".join(struct.pack(">Q16sQQQ", *c) for c in commits)
    index += b"".join(struct.pack(">QQQII", *e) for e in entries)
    index = packed(index)
    body = header + b"".join(frames)
    length = len(body) + len(index) + 48
    footer = UID + struct.pack(">QII", len(body), len(index), zlib.crc32(UID + index))
    footer += struct.pack(">IIQ4s", len(entries), len(commits), length, b"DB3S")
    return body + index + footer + zlib.crc32(header + footer).to_bytes(4, "big")


def map_bytes(rows: tuple[Extent, ...] = EXTENTS) -> bytes:
    refs = list(dict.fromkeys(row.ref for row in rows))
    body = struct.pack(">II", len(refs), len(rows)) + b"".join(struct.pack(">Q8s8s", *ref) for ref in refs)
    body += b"".join(struct.pack(">QIIIQ", e.first, e.blocks, refs.index(e.ref), e.slot, e.seq) for e in rows)
    return b"S3BM\x01" + packed(body)


def tail_bytes() -> bytes:
    a, b = packed(A), packed(B, 6, A)
    first = struct.pack(">Q16sQQQI", *COMMITS[0], 2)
    first += struct.pack(">QHHB", 0, 4096, len(a), 1) + a + struct.pack(">QHHB", 8192, 256, 256, 0) + ODD
    return first + struct.pack(">Q16sQQQI", *COMMITS[1], 1) + struct.pack(">QHHB", 0, 4096, len(b), 2) + b


def head_bytes(line: str, inline: bytes, tail_section: bytes) -> bytes:
    body = line.encode("ascii") + b"\n" + inline + tail_section
    return body + b"S3BH" + zlib.crc32(b"S3BH" + body).to_bytes(4, "big")


def full_head_bytes(archived: str = '"archived":[6700,"6172636869766564"],') -> bytes:
    """Heads that were made before there was this field read as if it were null."""
    inline, section = map_bytes(), tail_bytes()
    line = (
        '{"format":1,"id":"6465666768696a6b6c6d6e6f70717273","rev":6701,"seq":6,'
        '"commit":"101112131415161718191a1b1c1d1e1f","size_bytes":1099511627776,"block_size":512,'
        '"nonce":"6e6f6e63656e6f6e","writer":"host \\u00fc 1","time_ms":1700000000456,"floor":17,'
        f'{archived}"deleted":false,'
        '"name":"Kunden \\u00fc.db","counter":4294967295,"lease":["me","0011",10],'
        '"segments":[["0000000000001a2b-1112131415161718-0102030405060708",1,4,5000,4000,952,3735928559]],'
        '"snapshots":[["monday","0000000000001a00-aaaaaaaaaaaaaaaa"]],"leaves":[],'
        f'"map_bytes":{len(inline)},"tail_bytes":{len(section)}}}'
    )
    return head_bytes(line, inline, section)


def head_with_leaves_bytes() -> bytes:
    inline = map_bytes(())
    line = (
        f'{{"format":1,"id":"{"69" * 16}","rev":9,"seq":3,"commit":"{"63" * 16}","size_bytes":0,"block_size":65536,'
        f'"nonce":"{"6e" * 8}","writer":"","time_ms":0,"floor":0,"archived":null,"deleted":true,"name":null,'
        '"counter":null,"lease":null,"segments":[],"snapshots":[],"leaves":[[0,0,6699,"0001020304050607",1],'
        f'[5000,7,6701,"08090a0b0c0d0e0f",4294967295]],"map_bytes":{len(inline)},"tail_bytes":0}}'
    )
    return head_bytes(line, inline, b"")


HEAD = Head(
    id=bytes(range(100, 116)),
    rev=0x1A2D,
    seq=6,
    commit=COMMITS[1].id,
    size=1 << 40,
    block_size=512,
    nonce=b"noncenon",
    writer="host ü 1",
    time_ms=1_700_000_000_456,
    floor=17,
    archived=Archived(6700, b"archived"),
    name="Kunden ü.db",
    counter=0xFFFFFFFF,
    lease=Lease("me", "0011", 10),
    segments=(Segment(REF, 1, 4, 5000, 4000, 952, 0xDEADBEEF),),
    snapshots=(NamedSnapshot("monday", "0000000000001a00-aaaaaaaaaaaaaaaa"),),
    extents=EXTENTS,
    tail=Tail.decode(tail_bytes(), "it"),
)


def golden(kind: str) -> bytes:
    """The stored bytes."""
    return (Path(__file__).parent / f"{kind}.bin").read_bytes()
