"""The storage format, held to docs/FORMAT.md byte for byte, and its decoders against everything else."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import golden as page
import pytest
from golden import (
    BLOCKS,
    COMMITS,
    EXTENTS,
    HEAD,
    HEAD_WITH_LEAVES,
    LEAVES,
    ODD,
    OTHER,
    REF,
    TAIL_COMMITS,
    UID,
    C,
    frame_bytes,
    golden,
    head_bytes,
    map_bytes,
    packed,
    tail_bytes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from s3blockfs.errors import DamagedObject, NewerFormat, NotSupported, UsageError
from s3blockfs.format import data, extents, head, keys, tail
from s3blockfs.format.data import BASE, LOG, Commit, FrameAddress, Index, IndexEntry, build, decode_object, slot_address
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.head import Archived, Head, Lease, NamedSnapshot, Segment
from s3blockfs.format.keys import ObjectRef
from s3blockfs.format.tail import LogCommit, Tail

FUZZ = settings(deadline=None, max_examples=300)
MANY = settings(deadline=None, max_examples=60)


@pytest.fixture
def fixed_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    def compressobj(level: int, zdict: bytes) -> SimpleNamespace:
        return SimpleNamespace(compress=lambda content: packed(content, level, zdict), flush=lambda: b"")

    stand_in = SimpleNamespace(**{**vars(zlib), "compress": packed, "compressobj": compressobj})
    for module in (data, tail):
        monkeypatch.setattr(module, "zlib", stand_in)


@dataclass(frozen=True)
class Kind:
    """`page` is what FORMAT.md says of `value`; `encode` and `decode` are the code's."""

    page: Callable[[], bytes]
    encode: Callable[[], bytes]
    decode: Callable[[bytes], Any]
    value: Any


def decode(body: bytes) -> Any:
    return decode_object(body, REF, "it")


SEGMENT_ENTRIES = (IndexEntry(16, 4096, 5, 1000, 19), IndexEntry(67, 0, 6, 256, 256))
BLOCK_ENTRIES = (IndexEntry(16, 1024, 5, 512, 512), IndexEntry(560, 1536, 5, 512, 512))
KINDS = {
    "segment": Kind(
        lambda: page.data_bytes(
            LOG, [frame_bytes(4096, 5, C, 1, packed(C)), frame_bytes(0, 6, ODD, 0, ODD)], SEGMENT_ENTRIES, COMMITS
        ),
        lambda: build(UID, LOG, [(4096, 5, C), (0, 6, ODD)], COMMITS).body,
        decode,
        (LOG, Index(COMMITS, SEGMENT_ENTRIES)),
    ),
    "block_object": Kind(
        lambda: page.data_bytes(BASE, [frame_bytes(*row, 0, row[2]) for row in BLOCKS], BLOCK_ENTRIES, ()),
        lambda: build(UID, BASE, BLOCKS).body,
        decode,
        (BASE, Index((), BLOCK_ENTRIES)),
    ),
    "map": Kind(map_bytes, lambda: extents.encode(EXTENTS), lambda body: extents.decode(body, "it"), EXTENTS),
    "tail": Kind(
        tail_bytes, lambda: b"".join(Tail.of(TAIL_COMMITS).parts), lambda b: Tail.decode(b, "it").commits, TAIL_COMMITS
    ),
    "head": Kind(page.full_head_bytes, lambda: head.encode(HEAD), lambda body: head.decode(body, "it"), HEAD),
    "head_with_leaves": Kind(
        page.head_with_leaves_bytes,
        lambda: head.encode(HEAD_WITH_LEAVES),
        lambda body: head.decode(body, "it"),
        HEAD_WITH_LEAVES,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("fixed_zlib")
def test_the_encoder_the_page_and_the_golden_bytes_agree(kind: str) -> None:
    """What is written today is what was written when the format was fixed."""
    assert KINDS[kind].page() == golden(kind)
    assert KINDS[kind].encode() == golden(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes_are_read(kind: str) -> None:
    """Whatever was stored once stays readable, with any build of zlib."""
    assert KINDS[kind].decode(golden(kind)) == KINDS[kind].value


def test_a_head_of_before_archives_were_counted_is_read() -> None:
    body = golden("head_without_archived")
    assert body == page.full_head_bytes(archived="")
    assert head.decode(body, "it") == replace(HEAD, archived=None)


def test_golden_frames_are_read_alone() -> None:
    """By a ranged GET of the place that the index, or arithmetic in the base role, gives."""
    body = golden("segment")
    for entry, raw in zip(SEGMENT_ENTRIES, (C, ODD), strict=True):
        address = FrameAddress(REF, entry.pos, entry.stored, entry.offset, entry.raw)
        assert data.decode_frame(body[entry.pos : address.end], address, "it") == raw
    for slot, (offset, _, raw) in enumerate(BLOCKS):
        address = slot_address(REF, slot, offset // 512, 512)
        assert data.decode_frame(golden("block_object")[address.pos : address.end], address, "it") == raw


def test_keys() -> None:
    """Fixed-width, lower-case, and the names that FORMAT.md lists."""
    nonce = REF.nonce
    assert keys.head_key("a/b") == "a/b/head"
    assert REF.key("P") == "P/data/0000000000001a2b-1112131415161718"
    assert keys.map_key("P", 7, 0x1A2B, nonce) == "P/map/000007-0000000000001a2b-1112131415161718"
    assert LEAVES[1].key("P") == "P/map/000007-0000000000001a2d-08090a0b0c0d0e0f"
    assert keys.archive_key("P", (1 << 64) - 1, nonce) == "P/archive/ffffffffffffffff-1112131415161718"
    assert keys.deleted_mark_key("F", "x.db") == "F/.s3blockfs/deleted/x.db"
    assert keys.deleted_mark_key("", "x.db") == ".s3blockfs/deleted/x.db"
    assert REF.encode() == "0000000000001a2b-1112131415161718-0102030405060708"
    assert ObjectRef.decode(REF.encode(), "it") == REF
    longest = max(len(k) for k in (keys.archive_key("", 0, nonce), REF.key(""), keys.map_key("", 0, 0, nonce)))
    assert longest <= keys.LONGEST_SUFFIX_BYTES


def test_the_rev_of_a_key() -> None:
    """That of each kind of object, and of nothing that only looks like one: what is collected is told by it."""
    nonce, rev = REF.nonce, REF.rev
    known = [REF.key("a/b"), keys.archive_key("a/b", rev, nonce), keys.map_key("a/b", 1234567, rev, nonce)]
    assert [keys.rev_of("a/b", key) for key in known] == [rev] * 3
    others = [keys.head_key("a/b"), *(key.upper() for key in known), *(f"{key}\n" for key in known), "", "a/b"]
    others += [f"{key}/x" for key in known] + [key.replace("a/b", "a") for key in known] + ["data/" + known[0]]
    assert all(keys.rev_of("a/b", key) is None for key in others)
    assert keys.rev_of("a/b", known[0].removeprefix("a/b/")) is None


@pytest.mark.parametrize("text", ["", "x", REF.encode() + "\n", REF.encode().upper(), " " + REF.encode()[1:], None, 5])
def test_other_references_are_damage(text: object) -> None:
    """A reference is one exact form; anything else never becomes a key."""
    with pytest.raises(DamagedObject):
        ObjectRef.decode(text, "it")


@pytest.mark.parametrize(
    "prefix",
    ["", "/", "a//b", "/a", "a/", ".", "a/..", "a\0b", "x" * 256, "é" * 128, "a/" * 488 + "a", "a\udcff", "\ud800/b"],
)
def test_prefixes_that_make_illegal_keys_are_refused(prefix: str) -> None:
    """With UsageError, whatever a program passes as a file name (bytes that are no UTF-8 among it)."""
    with pytest.raises(UsageError):
        keys.check_prefix(prefix)


@given(st.text())
@FUZZ
def test_a_prefix_that_is_accepted_makes_legal_keys(prefix: str) -> None:
    """Within S3's 1,024 bytes, and every part a file name."""
    try:
        keys.check_prefix(prefix)
    except UsageError:
        return
    assert len(keys.archive_key(prefix, 1, UID).encode()) <= keys.MAX_KEY_BYTES
    assert all(part not in ("", ".", "..") and "\0" not in part for part in prefix.split("/"))


# --- round trips ---------------------------------------------------------------------------------------

u64 = st.integers(0, (1 << 64) - 1)
u63 = st.integers(0, (1 << 63) - 1)
u32 = st.integers(0, (1 << 32) - 1)
eight = st.binary(min_size=8, max_size=8)
sixteen = st.binary(min_size=16, max_size=16)
refs = st.builds(ObjectRef, u64, eight, eight)
commits = st.builds(Commit, u64, sixteen, u64, u64, u64)
content = st.one_of(st.binary(min_size=1, max_size=300), st.builds(bytes, st.integers(1, 4096)))
chunks = st.lists(st.tuples(st.integers(0, 5).map(lambda n: n * 4096), content), max_size=4, unique_by=lambda c: c[0])
tails = st.lists(st.builds(LogCommit, commits, chunks.map(tuple)), max_size=6).map(Tail.of)


@st.composite
def maps(draw: st.DrawFn) -> tuple[Extent, ...]:
    known = draw(st.lists(refs, min_size=1, max_size=3))
    rows, end = [], 0
    for gap, blocks in draw(st.lists(st.tuples(u32, st.integers(1, (1 << 32) - 1)), max_size=8)):
        rows.append(Extent(end + gap, blocks, draw(st.sampled_from(known)), draw(u32), draw(u64)))
        end = rows[-1].end
    return tuple(rows)


heads = st.builds(
    Head,
    sixteen,
    rev=u63,
    seq=u63,
    commit=sixteen,
    size=st.integers(0, head.MAX_DATABASE_BYTES),
    block_size=st.integers(head.MIN_BLOCK_BYTES, head.MAX_BLOCK_BYTES),
    nonce=eight,
    writer=st.text(),
    time_ms=u63,
    floor=u63,
    archived=st.none() | st.builds(Archived, u63, eight),
    deleted=st.booleans(),
    name=st.none() | st.text(),
    counter=st.none() | u32,
    lease=st.none() | st.builds(Lease, st.text(), st.text(), u63, st.lists(st.text()).map(tuple)),
    segments=st.lists(st.builds(Segment, refs, u63, u63, u63, u63, u32, u32), max_size=3).map(tuple),
    snapshots=st.lists(st.builds(NamedSnapshot, st.text(), st.text()), max_size=3).map(tuple),
    leaves=st.lists(st.builds(LeafRef, u63, u32, u63, eight, u32), max_size=4, unique_by=lambda leaf: leaf.first).map(
        lambda rows: tuple(row._replace(first=row.first if i else 0) for i, row in enumerate(sorted(rows)))
    ),
    extents=maps(),
    tail=tails,
)


@given(heads)
@MANY
def test_heads_round_trip(value: Head) -> None:
    """With any values in any field, the same bytes again (an archive is made of them), the JSON on the first line."""
    body = head.encode(value)
    assert head.decode(body, "it") == value
    assert head.encode(head.decode(body, "it")) == body
    assert json.loads(body.split(b"\n")[0])["format"] == 1


@given(maps())
@MANY
def test_maps_round_trip(rows: tuple[Extent, ...]) -> None:
    """Any sorted, disjoint extents."""
    assert extents.decode(extents.encode(rows), "it") == rows


@given(st.lists(st.builds(LogCommit, commits, chunks.map(tuple)), max_size=8), st.integers(0, 8))
@MANY
def test_tails_round_trip(rows: list[LogCommit], kept: int) -> None:
    """Appending one by one, encoding at once and decoding agree, and so does what is left after a roll."""
    rows = [LogCommit(row.record._replace(seq=seq), row.chunks) for seq, row in enumerate(rows)]
    grown = Tail()
    for row in rows:
        grown = grown.append(row)
    encoded = b"".join(grown.parts)
    decoded, raw_bytes = Tail.decode(encoded, "it"), sum(len(part) for row in rows for _, part in row.chunks)
    assert grown == Tail.of(rows) == decoded and encoded == b"".join(Tail.of(rows).parts)
    assert (grown.encoded_bytes, grown.raw_bytes) == (len(encoded), raw_bytes)
    last = {(at, len(part)): (row.record.seq, part) for row in rows for at, part in row.chunks}
    assert grown.commits == decoded.commits == tuple(rows) and grown.latest == decoded.latest == last
    more = grown.append(TAIL_COMMITS[0])
    assert all(one is other for one, other in zip(grown.parts, more.parts, strict=False))
    assert grown.after(kept).commits == tuple(rows[kept + 1 :])
    assert decoded.append(TAIL_COMMITS[0]) == more


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=20_000), st.sampled_from([512, 4095, 4096, 4097, 65536]))
@MANY
def test_chunks_put_together_are_the_bytes(offset: int, raw: bytes, block_size: int) -> None:
    """Cut so that no chunk crosses a block or a 4 KiB boundary."""
    pos = offset
    for here, part in tail.split_chunks(offset, raw, block_size):
        assert here == pos and part == raw[pos - offset : pos - offset + len(part)]
        for unit in (block_size, tail.CHUNK_BYTES):
            assert here // unit == (here + len(part) - 1) // unit
        pos += len(part)
    assert pos == offset + len(raw)


@given(refs, st.lists(st.tuples(u64, u64, content), max_size=6), st.lists(commits, max_size=3))
@MANY
def test_segments_round_trip(ref: ObjectRef, frames: list[tuple[int, int, bytes]], records: list[Commit]) -> None:
    """Whole, and frame by frame at the places that the index gives."""
    built = build(ref.uid, LOG, frames, records)
    role, index = decode_object(built.body, ref, "it")
    assert (role, index) == (LOG, Index(tuple(records), built.entries))
    part = built.body[built.index_pos : built.index_pos + built.index_length]
    assert data.decode_index(part, ref.uid, built.index_crc, "it") == index
    for entry, (offset, seq, raw) in zip(index.extents, frames, strict=True):
        address = FrameAddress(ref, entry.pos, entry.stored, entry.offset, entry.raw)
        assert (entry.offset, entry.seq) == (offset, seq)
        assert data.decode_frame(built.body[entry.pos : address.end], address, "it") == raw


# --- everything else is refused ------------------------------------------------------------------------


def refused(decode: Callable[[], Any]) -> bool:
    """Whether it raises one of the two errors; any other exception fails the test."""
    try:
        decode()
    except (DamagedObject, NewerFormat) as error:
        assert str(error).startswith("it: "), "the text does not name the object"
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_and_flipped_bit_is_seen(kind: str) -> None:
    """And every byte too many. Only the padding bits of a compressed stream may differ, to no effect; a tail, which
    relies on the checksum of its head, may be another one."""
    body, it = golden(kind), KINDS[kind]
    for length in range(len(body)):
        assert refused(lambda length=length: it.decode(body[:length])) or kind == "tail"
    assert refused(lambda: it.decode(body + b"\0"))
    for at in range(len(body)):
        for bit in range(8):
            flipped = body[:at] + bytes([body[at] ^ 1 << bit]) + body[at + 1 :]
            if kind == "tail":
                refused(lambda flipped=flipped: it.decode(flipped))
            elif not refused(lambda flipped=flipped: it.decode(flipped)):
                assert kind == "map" and it.decode(flipped) == it.value


@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=300), st.integers(0, 1300), st.integers(0, 300))
@FUZZ
def test_random_bytes_are_refused(kind: str, noise: bytes, at: int, lost: int) -> None:
    """Alone, and in the place of bytes of a good object."""
    body, it = golden(kind), KINDS[kind]
    assert refused(lambda: it.decode(noise)) or (kind == "tail" and not noise)
    mixed = body[:at] + noise + body[at + lost :]
    assert refused(lambda: it.decode(mixed)) or kind == "tail" or it.decode(mixed) == it.value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["0" * 16, REF.encode()]),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
FIELDS: dict[str, Any] = json.loads(page.full_head_bytes().split(b"\n")[0])


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), json_values, min_size=1, max_size=3))
@FUZZ
def test_hostile_fields_with_a_good_checksum(changes: dict[str, Any]) -> None:
    """A head that says anything at all is decoded or refused."""
    refused(lambda: head.decode(head_bytes(json.dumps({**FIELDS, **changes}), map_bytes(), tail_bytes()), "it"))


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_needed_and_checked(field: str) -> None:
    """Fields that may be null excepted; nothing is guessed."""
    sections = map_bytes(), tail_bytes()
    rest = {name: value for name, value in FIELDS.items() if name != field}
    nullable = field in ("archived", "name", "counter", "lease")
    assert refused(lambda: head.decode(head_bytes(json.dumps(rest), *sections), "it")) != nullable
    for wrong in (-1, 1.5, True if field != "deleted" else 1, "x" * 5000, {}, [[]], 1 << 64):
        line = json.dumps({**FIELDS, field: wrong})
        assert refused(lambda line=line: head.decode(head_bytes(line, *sections), "it")), wrong


@pytest.mark.parametrize("firsts", [[5], [0, 9, 9], [0, 9, 5]])
def test_leaves_out_of_order_are_damage(firsts: list[int]) -> None:
    """Or a look-up would miss blocks and read zeros."""
    rows = [[first, number, 1, "00" * 8, 1] for number, first in enumerate(firsts)]
    assert refused(
        lambda: head.decode(head_bytes(json.dumps({**FIELDS, "leaves": rows}), map_bytes(), tail_bytes()), "it")
    )


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "1" * 100_000, "{}", "[]", "null", "", '{"format":1e999}', '{"format":true}']
)
def test_other_first_lines_are_no_head(line: str) -> None:
    """Deeply nested or endless ones too."""
    with pytest.raises(DamagedObject, match="not the head of a database"):
        head.decode(head_bytes(line, b"", b""), "it")


@given(st.binary(max_size=200), st.integers(0, 5), st.integers(0, 5))
@FUZZ
def test_hostile_content_of_compressed_sections(noise: bytes, first: int, second: int) -> None:
    """With good checksums, and counts that may or may not fit."""
    for body in (noise, struct.pack(">II", first, second) + noise):
        stream = zlib.compress(body)
        refused(lambda stream=stream: extents.decode(b"S3BM\x01" + stream, "it"))
        refused(lambda stream=stream: data.decode_index(stream, UID, zlib.crc32(UID + stream), "it"))


@pytest.mark.parametrize("rows", [[(5, 2, 0), (6, 1, 0)], [(5, 1, 0), (2, 1, 0)], [(5, 0, 0)], [(5, 1, 1)]])
def test_maps_that_are_no_maps_are_damage(rows: list[tuple[int, int, int]]) -> None:
    """Overlapping, unsorted or empty extents, and objects that are not listed."""
    body = struct.pack(">II", 1, len(rows)) + struct.pack(">Q8s8s", *REF)
    body += b"".join(struct.pack(">QIIIQ", first, blocks, number, 0, 1) for first, blocks, number in rows)
    assert refused(lambda: extents.decode(b"S3BM\x01" + packed(body), "it"))


def test_a_newer_version_is_refused_before_anything_else() -> None:
    """Whatever else has changed in it; the text says what to do."""
    newer = [
        lambda: head.decode(b'{"format":2,"layout":"other"}\nother sections', "it"),
        lambda: head.decode(b'{"format":7}', "it"),
        lambda: decode_object(b"S3BD\x02" + golden("segment")[5:], REF, "it"),
        lambda: extents.decode(b"S3BM\x02other", "it"),
    ]
    for decode in newer:
        with pytest.raises(NewerFormat, match="upgrade s3blockfs"):
            decode()
    frame = frame_bytes(0, 5, ODD, 2, ODD)
    with pytest.raises(NewerFormat, match="upgrade s3blockfs"):
        data.decode_frame(frame, FrameAddress(REF, 0, 256, 0, 256), "it")


@pytest.mark.parametrize("kind", ["segment", "block_object"])
def test_an_object_under_another_name_never_verifies(kind: str) -> None:
    """Neither whole nor its index nor one frame of it; nor does a frame in another place."""
    body, index = golden(kind), KINDS[kind].value[1]
    assert refused(lambda: decode_object(body, OTHER, "it"))
    assert not refused(lambda: decode_object(body, OTHER._replace(uid=UID), "it")), "a copy keeps its uid"
    position, length, crc = struct.unpack_from(">QII", body, len(body) - 40)
    part = body[position : position + length]
    assert data.decode_index(part, UID, crc, "it") == index
    assert refused(lambda: data.decode_index(part, OTHER.uid, crc, "it"))
    for entry in index.extents:
        good = FrameAddress(REF, entry.pos, entry.stored, entry.offset, entry.raw)
        frame = body[good.pos : good.end]
        assert not refused(lambda good=good, frame=frame: data.decode_frame(frame, good, "it"))
        for change in (
            {"ref": OTHER},
            {"offset": good.offset + 512},
            {"raw": good.raw + 1},
            {"stored": good.stored - 1},
        ):
            other = good._replace(**change)
            assert refused(lambda other=other, frame=frame: data.decode_frame(frame, other, "it"))


def test_bombs_do_not_unpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hostile bytes that would become 200 MB are refused with the declared size, or the bound, in memory."""
    bomb = zlib.compress(bytes(200_000_000), 9)
    frame = frame_bytes(0, 5, bytes(1000), 1, bomb)
    chunk = struct.pack(">Q16sQQQI", *COMMITS[0], 1) + struct.pack(">QHHB", 0, 4096, 60_000, 1) + bomb[:60_000]
    cases: list[tuple[int, Callable[[], Any]]] = [
        (4096, lambda: data.decode_frame(frame, FrameAddress(REF, 0, len(bomb), 0, 1000), "it")),
        (4096, lambda: Tail.decode(chunk, "it")),
        (4 << 20, lambda: extents.decode(b"S3BM\x01" + bomb, "it")),
        (data.MAX_FRAME_BYTES, lambda: data.decode_index(bomb, UID, zlib.crc32(UID + bomb), "it")),
    ]
    for bound, decode in cases:
        tracemalloc.start()
        try:
            assert refused(decode)
            assert tracemalloc.get_traced_memory()[1] < 3 * bound + 2 * len(bomb) + (1 << 20)
        finally:
            tracemalloc.stop()
    monkeypatch.setattr(tail, "MAX_RAW_BYTES", 8191)
    assert refused(lambda: Tail.decode(tail_bytes(), "it"))
    monkeypatch.setattr(tail, "MAX_RAW_BYTES", 1 << 20)
    monkeypatch.setattr(tail, "MAX_COMMITS", 1)
    assert refused(lambda: Tail.decode(tail_bytes(), "it"))
    monkeypatch.setattr(head, "MAX_HEAD_BYTES", 1000)
    assert refused(lambda: head.decode(golden("head"), "it"))


@pytest.mark.parametrize("bound", ["MAX_HEAD_BYTES", "MAX_LINE_BYTES"])
def test_a_head_that_could_not_be_read_is_not_written(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bounds of the decoder hold in the encoder: at the limit both work, a byte beyond it neither does."""
    body = head.encode(HEAD)
    size = len(body) if bound == "MAX_HEAD_BYTES" else body.index(b"\n") + 1
    monkeypatch.setattr(head, bound, size)
    assert head.decode(head.encode(HEAD), "it") == HEAD
    monkeypatch.setattr(head, bound, size - 2)
    assert refused(lambda: head.decode(body, "it"))
    with pytest.raises(NotSupported, match="nothing was changed"):
        head.encode(HEAD)


def test_an_endless_first_line_is_not_parsed() -> None:
    """JSON takes many times its size when it is parsed; whatever lies under the name of a head is refused in memory."""
    line = b"[" + b"[]," * (20 << 20) + b"[]]"
    tracemalloc.start()
    try:
        assert refused(lambda: head.decode(line, "it"))
        assert tracemalloc.get_traced_memory()[1] < 2 * len(line)
    finally:
        tracemalloc.stop()
