"""Untrusted bytes: whatever a bucket or a journal holds, parsing and using it ends in a result or an error of ours,
soon and within a bounded memory. Checksums are right here, so that what lies behind them is reached.

FUZZ_EXAMPLES=10000 makes it a long run; hypothesis prints what fails, and replays it."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine import CONFIG, InlineRuntime, World
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from memorystore import MemoryStore

from s3blockfs import capabilities, header, journal
from s3blockfs.cache import BlockCache
from s3blockfs.check import findings
from s3blockfs.errors import DamagedObject, S3BlockFSError
from s3blockfs.fold import fold
from s3blockfs.format import data, extents, head, keys, tail
from s3blockfs.format.data import BASE, LOG, Commit, IndexEntry
from s3blockfs.format.extents import Extent, LeafRef
from s3blockfs.format.head import MIN_BLOCK_BYTES, Archived, Head, NamedSnapshot, Segment
from s3blockfs.format.keys import ObjectRef
from s3blockfs.format.tail import LogCommit, Tail
from s3blockfs.gc import collect
from s3blockfs.history import commits, open_at
from s3blockfs.legacy import AnyHead
from s3blockfs.objectstore import Listed
from s3blockfs.snapshot import Snapshot, Source, fetch_index

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
FUZZ = settings(
    deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), print_blob=True, derandomize=False
)

pytestmark = pytest.mark.timeout(300 if EXAMPLES <= 100 else 0)

#: What the parse of anything small may take: a mapping of 4 KiB pieces, zlib's window, JSON. And in CPU seconds.
MOST_BYTES = 96 * 1024 * 1024
MOST_S = 20.0

P = "a.db"
UID = b"uuuuuuuu"
REF = ObjectRef(5, UID, UID)
ids = st.sampled_from([b"i" * 16, b"j" * 16])
small = st.integers(0, 40)
edges = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1])
#: Mostly what could be, now and then what could not.
number = st.one_of(small, small, st.integers(0, 10_000), edges)
number32 = number.map(lambda value: min(value, 2**32 - 1))
refs = st.sampled_from(
    [REF, ObjectRef(5, b"missing!", UID), ObjectRef(2**64 - 1, UID, UID), ObjectRef(0, UID, b"otheruid")]
)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Nothing but our own errors, and in proportion."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with contextlib.suppress(S3BlockFSError):
            yield
        took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak} bytes"
    assert took < MOST_S, f"{took} s"


# --- a bucket in which everything verifies and nothing needs to make sense -------------------------------

chunks = st.lists(st.tuples(number, st.binary(min_size=0, max_size=60)), max_size=4).map(tuple)
records = st.builds(Commit, number, ids, number, number, number)
tails = st.lists(st.builds(LogCommit, records, chunks), max_size=4)
entries = st.lists(st.builds(IndexEntry, number, number, number, number32, number32), max_size=5)
rows = st.lists(st.builds(Extent, number, number32, refs, number32, number), max_size=4)


@st.composite
def segment_objects(draw: Any) -> tuple[bytes, Segment]:
    """Real frames, an index that says something else, and what a head says of it."""
    frames = draw(st.lists(st.tuples(small, small, st.binary(max_size=50)), max_size=3))
    built = data.build(UID, draw(st.sampled_from([LOG, BASE])), frames, ())
    body = built.body[: built.index_pos]
    told = [*built.entries, *draw(entries)]
    index = data.pack_tables(data._COMMIT, draw(st.lists(records, max_size=4)), data._EXTENT, told)
    crc = zlib.crc32(index, zlib.crc32(UID))
    footer = data._FOOTER.pack(UID, len(body), len(index), crc, len(told), 0, draw(number), b"DB3S", 0)[:-4]
    whole = body + index + footer + zlib.crc32(body[:16] + footer).to_bytes(4, "big")
    place = (len(body), len(index), crc) if draw(st.integers(0, 4)) else (draw(number), draw(number), crc)
    return whole, Segment(REF, draw(number), draw(number), len(whole), *place)


@st.composite
def buckets(draw: Any) -> tuple[Head, dict[str, bytes]]:
    body, segment = draw(segment_objects())
    objects = {REF.key(P): body}
    leaves = []
    for n, first in enumerate(sorted(draw(st.sets(number, max_size=3)))):
        encoded = extents.encode(sorted(draw(rows)))
        leaves.append(LeafRef(first if n else 0, n, 5, UID, zlib.crc32(encoded)))
        objects[leaves[-1].key(P)] = encoded
    return Head(
        id=draw(ids),
        rev=draw(number),
        seq=draw(number),
        commit=draw(ids),
        size=min(draw(number), 1 << 20 if draw(st.booleans()) else 1 << 48),
        block_size=max(MIN_BLOCK_BYTES, draw(st.sampled_from([512, 4096, 4095, 1 << 22]))),
        nonce=b"nnnnnnnn",
        floor=draw(number),
        archived=draw(st.none() | st.builds(Archived, number, st.just(b"nnnnnnnn"))),
        counter=draw(st.none() | number32),
        segments=tuple(replace_ref(segment, ref) for ref in draw(st.lists(refs, max_size=2))),
        snapshots=draw(st.sampled_from([(), (NamedSnapshot("x", f"{P}/archive/../../b"),), (NamedSnapshot("x", ""),)])),
        leaves=tuple(leaves),
        extents=tuple(sorted(draw(rows))),
        tail=Tail.of(draw(tails)),
    ), objects


def replace_ref(segment: Segment, ref: ObjectRef) -> Segment:
    return segment._replace(ref=ref)


@given(buckets(), buckets(), number, st.integers(0, 5000))
@FUZZ
def test_hostile_buckets(one: tuple[Head, dict[str, bytes]], old: Any, offset: int, length: int) -> None:
    """Opening, reading, looking back, checking, folding and collecting what a hostile writer put there."""
    made, objects = one
    with World(InlineRuntime()) as world:
        store = world.store.inner
        for key, body in {**old[1], **objects}.items():
            store.put(key, body)
        with contextlib.suppress(S3BlockFSError, struct.error):  # what cannot be encoded cannot be there
            past = old[0]
            store.put(keys.archive_key(P, past.rev, past.nonce), head.encode(past))
        store.put(f"{P}/head", head.encode(made))
        heads, mine = (
            world.heads(P, faulty=False),
            Source(store, BlockCache(store, world.runtime, 1 << 20, 5), world.runtime, P),
        )

        def snapshot() -> Snapshot:
            version = heads.read()
            assert version is not None
            return Snapshot.load(mine, version)

        def check() -> None:
            version = heads.read()
            assert version is not None
            if version.head.size <= 1 << 24:
                findings(mine, heads, version, lambda done, total: None)

        def write() -> None:
            database = world.machine(faulty=False).open(P)
            database.write(min(offset, 1 << 40), b"x" * 100)
            database.close_handle(0)

        looks: list[Callable[[], object]] = [
            lambda: snapshot().read(offset, length),
            lambda: snapshot().read(0, length),
            lambda: snapshot().prefetch(offset, offset + length),
            lambda: commits(mine, heads),
            lambda: open_at(mine, heads, made.seq),
            lambda: open_at(mine, heads, "x"),
            check,
            lambda: fold(mine, heads, CONFIG, snapshot().version),
            write,
            lambda: collect(mine, heads, 0),
        ]
        for look in looks:
            with bounded():
                look()


# --- parsers by themselves --------------------------------------------------------------------------------

FIELDS: dict[str, Any] = json.loads(head.encode(Head(b"i" * 16, 1, 1, b"c" * 16, 0, 512, b"n" * 8)).split(b"\n")[0])
LINES = [
    "[" * 100_000,
    '{"format":' + "[" * 100_000 + "}",
    '{"format":' + "9" * 100_000 + "}",
    '{"format":1,"rev":' + "9" * 5000 + "}",
    '{"format":1e400}',
    '{"format":NaN}',
    '{"format":1,"format":2}',
    '{"format":true}',
    '{"a":' * 50_000,
    "[" + "{}," * 1_000_000,
    '"' + "\\u0000" * 500_000,
    *(
        json.dumps({**FIELDS, name: value})
        for name in FIELDS
        for value in (
            float("nan"),
            float("inf"),
            -0.0,
            2**63,
            2**64,
            10**5000 if name == "x" else -1,
            "\ud800",
            [[]] * 9,
        )
    ),
]


@pytest.mark.parametrize("at", range(0, len(LINES), 20))
def test_hostile_first_lines(at: int) -> None:
    for line in LINES[at : at + 20]:
        body = line.encode("utf-8", "surrogatepass") + b"\n" + extents.encode(())
        with bounded():
            head.decode(body + head._TRAILER.pack(b"S3BH", zlib.crc32(body, zlib.crc32(b"S3BH"))), "it")


@given(st.lists(st.tuples(records, number32, st.lists(st.tuples(number, small, small, small, st.binary(max_size=40))))))
@FUZZ
def test_hostile_tails(commits: list[tuple[Commit, int, list[tuple[int, int, int, int, bytes]]]]) -> None:
    """Counts and lengths that lie."""
    body = b""
    for record, count, pieces in commits:
        body += tail._RECORD.pack(*record, count)
        body += b"".join(tail._CHUNK.pack(*piece[:3], piece[3] % 4) + piece[4] for piece in pieces)
    with bounded():
        Tail.decode(body, "it")


@pytest.mark.parametrize("size", [1 << 20, 64 << 20])
def test_bombs(size: int) -> None:
    """Few bytes that claim, or unpack to, very many."""
    bomb = zlib.compress(bytes(size), 9)
    chunk = tail._CHUNK.pack(0, 65535, min(len(bomb), 65535), 1) + bomb[:65535]
    for act in (
        lambda: Tail.decode(tail._RECORD.pack(1, b"i" * 16, 0, 0, 0, 2**32 - 1) + chunk * 3, "it"),
        lambda: Tail.decode((tail._RECORD.pack(1, b"i" * 16, 0, 0, 0, 0)) * 100_000, "it"),
        lambda: extents.decode(b"S3BM\x01" + bomb, "it"),
        lambda: extents.decode(b"S3BM\x01" + zlib.compress(struct.pack(">II", 2**32 - 1, 2**32 - 1)), "it"),
        lambda: data.decode_index(bomb, UID, zlib.crc32(bomb, zlib.crc32(UID)), "it"),
    ):
        with bounded(), pytest.raises(DamagedObject):
            act()


def test_a_tail_of_very_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be empty: five million of them fit into a head, and took 1.5 GB."""
    monkeypatch.setattr(tail, "MAX_RAW_BYTES", 1 << 19)
    body = tail._RECORD.pack(1, b"i" * 16, 0, 0, 0, 9999) + b"".join(tail._CHUNK.pack(n, 0, 0, 0) for n in range(9999))
    with pytest.raises(DamagedObject):
        Tail.decode(body, "it")


def test_a_frame_that_an_index_names_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the index, with which it is fetched. A small one can unpack to megabytes each time."""
    built = data.build(UID, LOG, [(0, 5, bytes(4096))])
    index = data.pack_tables(data._COMMIT, (), data._EXTENT, built.entries * 1000)
    place = built.index_pos, len(index), zlib.crc32(index, zlib.crc32(UID))
    unpacked: list[object] = []
    real = data.decode_frame
    monkeypatch.setattr(data, "decode_frame", lambda *frame: unpacked.append(frame) or real(*frame))
    with World(InlineRuntime()) as world:
        store = world.store.inner
        store.put(REF.key(P), built.body[: built.index_pos] + index)
        fetch_index(store, P, Segment(REF, 5, 5, 0, *place), "t", BlockCache(store, world.runtime, 1 << 20, 5))
    assert len(unpacked) == 1


@given(st.text() | st.from_regex(r"a/(data|archive|map)/[0-9a-f-]{0,50}"))
@FUZZ
def test_hostile_keys(key: str) -> None:
    with bounded():
        assert keys.rev_of("a", key) is None or key.startswith("a/")
        keys.is_file_name(key)
        keys.check_prefix(key)
    with bounded():
        ObjectRef.decode(key, "it")


@st.composite
def journals(draw: Any) -> bytes:
    """Headers with any numbers, records with any checksums, at any places."""
    body = b""
    for _ in range(draw(st.integers(0, 4))):
        sector, page = (
            draw(st.sampled_from([0, 32, 512, 4096, 65536, 5])),
            draw(st.sampled_from([0, 512, 1024, 65536, 7])),
        )
        fields = (draw(number32), 7, draw(number32), sector, page)
        body += journal._HEADER.pack(journal.MAGIC, *fields).ljust(min(sector, 4096), b"\0")
        for _ in range(draw(st.integers(0, 2))):
            image = draw(st.binary(max_size=9)).ljust(min(page, 1024), b"\1")
            check = journal.checksum(7, image) if draw(st.booleans()) else 0
            body += draw(number32).to_bytes(4, "big") + image + check.to_bytes(4, "big")
    name = draw(st.binary(max_size=20))
    if draw(st.booleans()):
        body += name + struct.pack(">II", draw(st.sampled_from([len(name), 0, 2**32 - 1])), sum(name)) + journal.MAGIC
    return body + draw(st.binary(max_size=40))


@given(journals(), st.booleans(), st.binary(max_size=200))
@FUZZ
def test_hostile_journals(body: bytes, hot: bool, first: bytes) -> None:
    def read(offset: int, length: int) -> bytes:
        return body[offset : offset + length]

    with bounded():
        journal.size_before(read, len(body))
        journal.super_journal(read, len(body))
        for count, _ in enumerate(journal.page_images(read, len(body), hot)):
            assert count <= len(body)
    with bounded():
        header.file_size(first), header.page_size(first), header.counter(first), header.sets_wal(3, first)
        header.counter_patches(first, 5), header.without_counter(20, first), header.in_rollback_mode(0, first)


class LyingStore(MemoryStore):
    """Lists other sizes and keys than it holds."""

    lies: tuple[Listed, ...] = ()

    def list(self, prefix: str, **options: Any) -> Iterator[Listed]:
        yield from (lie for lie in self.lies if lie.key.startswith(prefix))
        yield from super().list(prefix, **options)


listed = st.builds(
    lambda key, size: Listed(f"{P}{key}", False, size, '"e"', 0.0),
    st.one_of(
        st.integers(0, 3).map(lambda n: f"/{n:010d}"),
        st.integers(0, 3).map(lambda n: f"-journal/{n:010d}"),
        st.sampled_from(["/9999999999", "-journal/9999999999", "/00000000001", "/x", "/../head", "-journal/", "/\0"]),
    ),
    number,
)


@example([Listed(f"{P}-journal/9999999999", False, 2, '"e"', 0.0)], [b"ab", b"abcdefg"], b"", 0)
@example([], [b""], journal._HEADER.pack(journal.MAGIC, 0, 7, 1, 512, 512).ljust(512, b"\0"), 0)
@given(st.lists(listed, max_size=4), st.lists(st.binary(max_size=600), max_size=3), journals(), number)
@FUZZ
def test_hostile_stores_of_sqlite_s3vfs(lies: list[Listed], blocks: list[bytes], leftover: bytes, offset: int) -> None:
    """Keys and sizes of any kind, and a journal that says anything."""
    runtime = InlineRuntime()
    try:
        store = LyingStore(runtime)
        store.lies = tuple(lies)
        for n, block in enumerate(blocks):
            store.put(f"{P}/{n:010d}", block)
        store.put(f"{P}-journal/0000000000", leftover)
        source = Source(store, BlockCache(store, runtime, 1 << 20, 5), runtime, P)  # type: ignore[arg-type]

        def look() -> None:
            version = AnyHead(source, CONFIG).read()
            if version is not None:
                Snapshot.load(source, version).read(min(offset, 1 << 40), 1000)

        with bounded():
            look()
    finally:
        runtime.close()


@given(st.binary(max_size=100) | st.sampled_from([b'{"state": "safe"', b"\xff" * 50, b'{"state": ' * 20_000]))
@FUZZ
def test_hostile_probe_results(body: bytes) -> None:
    with World(InlineRuntime()) as world:
        world.store.inner.put(".s3blockfs/store", body)
        with bounded():
            capabilities.ensure_safe(world.store.inner, "", world.runtime)


def test_the_bounds_can_fail() -> None:
    with pytest.raises(AssertionError), bounded():
        bytes(MOST_BYTES + 1)
    with pytest.raises(KeyError), bounded():
        raise KeyError
