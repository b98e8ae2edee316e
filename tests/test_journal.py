"""The journal's observer on journals that SQLite itself wrote.

Some are left by a process killed in mid-transaction, others seen by a VFS at the moment when they are finalised.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3blockfs import journal
from s3blockfs.dirty import Dirty, union
from s3blockfs.journal import is_hot, page_images, restores_committed, super_journal

PAGE_SIZES = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
ROWS = 3000

#: Runs statements on a database and is killed before it can clean up.
CHILD = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2:]:
    connection.execute(statement).fetchall()
os.kill(os.getpid(), signal.SIGKILL)
"""


def reader(data: bytes) -> journal.Reader:
    return lambda offset, length: data[offset : offset + length]


def rows_statement(count: int) -> str:
    return (
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < {count}) "
        "INSERT INTO t(id, x) SELECT i, hex(randomblob(50)) FROM n"
    )


def create(path: Path, page_size: int = 4096, rows: int = ROWS) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in (
            f"PRAGMA page_size={page_size}",
            "CREATE TABLE t (id INTEGER PRIMARY KEY, x)",
            "CREATE INDEX u ON t(x)",
            rows_statement(rows),
            "VACUUM",  # no free pages: those are not journalled when they are used again
        ):
            connection.execute(statement)


def killed(path: Path, *statements: str) -> bytes:
    """The journal that a process leaves when it is killed after these statements."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(path), *statements], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()
    return Path(f"{path}-journal").read_bytes()


def played_back(path: Path, hot: bytes) -> bytes:
    """The database file with the images put back, as SQLite does it: the file gets its old size again."""
    data = bytearray(path.read_bytes())
    page_size = int.from_bytes(hot[24:28], "big")
    for offset, image in page_images(reader(hot), len(hot)):
        data[offset : offset + len(image)] = image
    return bytes(data[: int.from_bytes(hot[16:20], "big") * page_size])


SPILL = ("PRAGMA cache_size=10", "BEGIN")
CHANGE = "UPDATE t SET x = hex(randomblob(50)) WHERE id % 3 = 0"
KILLS = {
    "cache spill": (*SPILL, CHANGE),
    "growing": (*SPILL, CHANGE, "INSERT INTO t(x) SELECT x || 'y' FROM t"),
    "deleting": (*SPILL, "DELETE FROM t WHERE id > 100"),
    "savepoints": (*SPILL, "SAVEPOINT a", CHANGE, "SAVEPOINT b", "DELETE FROM t WHERE id % 2", "ROLLBACK TO a", CHANGE),
    "synchronous off": ("PRAGMA synchronous=OFF", *SPILL, CHANGE),
    "synchronous normal": ("PRAGMA synchronous=NORMAL", *SPILL, CHANGE),
    "truncate": ("PRAGMA journal_mode=TRUNCATE", "UPDATE t SET x='1'", *SPILL, CHANGE),
    "persist, stale records": (
        "PRAGMA journal_mode=PERSIST",
        "UPDATE t SET x='1'",
        *SPILL,
        "DELETE FROM t WHERE id < 400",
    ),
    "persist, stale, unsynced": (
        "PRAGMA journal_mode=PERSIST",
        "PRAGMA synchronous=OFF",
        "UPDATE t SET x=x||'1'",
        *SPILL,
        "DELETE FROM t WHERE id < 400",
    ),
}


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
@pytest.mark.parametrize("kind", KILLS)
def test_images_restore_the_file_as_sqlite_does(kind: str, page_size: int, tmp_path: Path) -> None:
    """Byte for byte what the committed state was: what SQLite's own recovery makes of the same files."""
    path = tmp_path / "a.db"
    create(path, page_size, rows=400 * page_size // 512 if page_size < 65536 else 20_000)
    statements = KILLS[kind]
    hot = killed(path, *statements)
    left = path.read_bytes()
    restored = played_back(path, hot)
    assert is_hot(hot[:1])
    assert restored != left, "nothing was spilled: this tests nothing"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert path.read_bytes() == restored
    assert not Path(f"{path}-journal").exists() or not is_hot(Path(f"{path}-journal").read_bytes()[:1])


def test_the_journals_at_hand_are_of_every_shape(tmp_path: Path) -> None:
    """Several headers, and stale records of an earlier transaction behind the last one: or the test above is hollow."""
    create(tmp_path / "a.db")
    several = killed(tmp_path / "a.db", *KILLS["cache spill"])
    sector = int.from_bytes(several[20:24], "big")
    assert sum(several.startswith(journal.MAGIC, at) for at in range(0, len(several), sector)) > 1
    for number, kind in enumerate(("persist, stale records", "persist, stale, unsynced")):
        create(tmp_path / f"{number}.db")
        stale = killed(tmp_path / f"{number}.db", *KILLS[kind])
        used = sum(len(image) + 8 for _, image in page_images(reader(stale), len(stale)))
        assert 0 < used < len(stale) - 20 * 4104


def test_a_journal_that_was_never_synced_restores_nothing(tmp_path: Path) -> None:
    """Its header is still zero and the database untouched; SQLite does not play it back."""
    path = tmp_path / "a.db"
    create(path)
    before = path.read_bytes()
    cold = killed(path, "BEGIN", CHANGE)
    assert len(cold) > 4096 and not is_hot(cold[:1])
    assert list(page_images(reader(cold), len(cold))) == []
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 1, 27, 28, 511, 512, 513, 5000])
def test_a_truncated_journal_gives_the_images_that_are_whole(kept: int, tmp_path: Path) -> None:
    """Every prefix of the file gives a prefix of the images."""
    create(tmp_path / "a.db")
    hot = killed(tmp_path / "a.db", *KILLS["synchronous off"])
    images = list(page_images(reader(hot), len(hot)))
    part = list(page_images(reader(hot[:kept]), kept))
    assert part == images[: len(part)]
    assert len(part) == max(0, kept - int.from_bytes(hot[20:24], "big")) // 4104


@given(st.binary(max_size=2000), st.binary(max_size=3000))
@settings(deadline=None)
def test_any_bytes_are_read_without_harm(head: bytes, rest: bytes) -> None:
    """A journal is written by others; whatever it holds, nothing raises and nothing is invented."""
    for data in (head + rest, journal.MAGIC + head + rest, head + journal.MAGIC):
        list(page_images(reader(data), len(data)))
        super_journal(reader(data), len(data))
        assert not restores_committed(
            reader(data), len(data), between([(0, 10**9)]), lambda low, high: bytes(high - low)
        )


def between(rows: Sequence[tuple[int, int]]) -> Callable[[int, int], list[tuple[int, int]]]:
    """What `Dirty.ranges` of these dirty ranges gives."""
    return lambda start, end: union(
        (max(low, start), min(high, end)) for low, high in rows if low < end and high > start
    )


# --- watching SQLite finalise -------------------------------------------------------------------------


@dataclass
class Finalised:
    """A journal and what the transaction wrote, when SQLite finalises the journal."""

    journal: bytes
    ranges: list[tuple[int, int]]
    content: bytes

    def restores(self, ranges: Sequence[tuple[int, int]] | None = None, content: bytes | None = None) -> bool:
        rows, now = self.ranges if ranges is None else list(ranges), content or self.content
        return restores_committed(
            reader(self.journal), len(self.journal), between(rows), lambda low, high: now[low:high]
        )


class Watched(apsw.VFSFile):
    def __init__(self, recorder: Recorder, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._recorder = recorder
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._is_journal = bool(flags[0] & apsw.SQLITE_OPEN_MAIN_JOURNAL)
        if flags[0] & apsw.SQLITE_OPEN_MAIN_DB:
            recorder.dirty.setdefault(self._path, Dirty(recorder.folder, 4096, Path(self._path).stat().st_size))

    def xWrite(self, data: bytes, offset: int) -> None:
        if self._is_journal and offset == 0 and bytes(data) == bytes(28):
            self._recorder.finalised(self._path)
        if self._path in self._recorder.dirty:
            self._recorder.dirty[self._path].write(offset, bytes(data))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:
        if self._is_journal and size == 0:
            self._recorder.finalised(self._path)
        if self._path in self._recorder.dirty:
            self._recorder.dirty[self._path].truncate(size)
        super().xTruncate(size)


class Recorder(apsw.VFS):
    """The usual VFS, which keeps what the engine would see."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self.folder = str(folder)
        self.dirty: dict[str, Dirty] = {}
        self.seen: list[Finalised] = []
        self.super_journals: list[tuple[str, dict[str, bytes]]] = []
        super().__init__(self.name, base="")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        watched = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_MAIN_JOURNAL
        if name is None or not flags[0] & watched:
            return apsw.VFSFile("", name, flags)
        return Watched(self, name, flags)

    def xDelete(self, name: str, sync: bool) -> None:
        if name.endswith("-journal"):
            self.finalised(name)
        elif "-mj" in name:
            journals = {path: Path(f"{path}-journal") for path in self.dirty}
            self.super_journals.append((name, {path: j.read_bytes() for path, j in journals.items() if j.exists()}))
        super().xDelete(name, sync)

    def finalised(self, journal_path: str) -> None:
        path = journal_path.removesuffix("-journal")
        dirty = self.dirty[path]
        ranges = list(dirty.ranges(0, dirty.size))
        self.seen.append(Finalised(Path(journal_path).read_bytes(), ranges, Path(path).read_bytes()))
        dirty.close()
        self.dirty[path] = Dirty(self.folder, 4096, dirty.size)


@contextmanager
def watched(path: Path) -> Iterator[tuple[Recorder, Callable[[str], object]]]:
    """(what is seen, a function that runs one statement)."""
    recorder = Recorder(path.parent)
    connection = apsw.Connection(str(path), vfs=recorder.name)
    try:
        yield recorder, lambda statement: connection.execute(statement).fetchall()
    finally:
        connection.close()
        recorder.unregister()
        for dirty in recorder.dirty.values():
            dirty.close()


MODES = ["DELETE", "TRUNCATE", "PERSIST"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("page_size", "synchronous"), [*((size, "FULL") for size in PAGE_SIZES), (4096, "OFF"), (4096, "NORMAL")]
)
def test_a_rollback_is_told_from_a_commit(mode: str, synchronous: str, page_size: int, tmp_path: Path) -> None:
    """From the images alone: after a play-back every dirty byte is the committed one, after a COMMIT some are not."""
    path = tmp_path / "a.db"
    create(path, page_size, rows=300 if page_size < 2048 else 1000 if page_size < 32768 else 6000)
    with watched(path) as (recorder, run):
        run(f"PRAGMA journal_mode={mode}")
        run(f"PRAGMA synchronous={synchronous}")
        run("PRAGMA cache_size=5")
        run("UPDATE t SET x = x || 'stale records for PERSIST'")
        assert not recorder.seen.pop().restores()
        run("VACUUM")
        committed = path.read_bytes()
        recorder.seen.clear()
        run("BEGIN")
        run(CHANGE)
        run("INSERT INTO t(x) SELECT x || 'grown' FROM t WHERE id < 200")
        run("ROLLBACK")
        (seen,) = recorder.seen
        assert seen.ranges, "nothing was spilled: this tests nothing"
        assert seen.restores()
        assert seen.content == committed == path.read_bytes()
        recorder.seen.clear()
        run(CHANGE)
        assert not recorder.seen.pop().restores()


def test_a_free_page_that_was_used_is_a_change(tmp_path: Path) -> None:
    """SQLite does not journal a page of the free list when it uses it, so a ROLLBACK leaves other bytes there."""
    path = tmp_path / "a.db"
    create(path)
    with watched(path) as (recorder, run):
        run("DELETE FROM t WHERE id > 100")
        committed = path.read_bytes()
        recorder.seen.clear()
        run("PRAGMA cache_size=10")
        run("BEGIN")
        run("INSERT INTO t(x) SELECT hex(zeroblob(2000)) FROM t")
        run("ROLLBACK")
        (seen,) = recorder.seen
        assert seen.content != committed
        assert not seen.restores()


@pytest.fixture
def rolled_back(tmp_path: Path) -> Finalised:
    """A transaction with several segments in its journal, rolled back; some pages were not touched."""
    create(tmp_path / "a.db")
    with watched(tmp_path / "a.db") as (recorder, run):
        run("DROP INDEX u")
        run("VACUUM")
        recorder.seen.clear()
        run("PRAGMA cache_size=5")
        run("BEGIN")
        run("SAVEPOINT a")
        run("UPDATE t SET x = lower(x) WHERE id BETWEEN 500 AND 900")
        run("ROLLBACK TO a")
        run("PRAGMA user_version=7")
        run("UPDATE t SET x = lower(x) WHERE id BETWEEN 1500 AND 2000")
        run("ROLLBACK")
        (seen,) = recorder.seen
    assert seen.restores() and len(seen.ranges) > 1
    return seen


def test_one_other_byte_is_a_change(rolled_back: Finalised) -> None:
    """At the edges and in the middle of every dirty range, the two change counters apart."""
    for low, high in rolled_back.ranges:
        for at in {low, (low + high) // 2, high - 1}:
            changed = bytearray(rolled_back.content)
            changed[at] ^= 1
            assert not rolled_back.restores(content=bytes(changed)), at
    counters = bytearray(rolled_back.content)
    counters[24:28] = counters[92:96] = b"\xff\xff\xff\xff"
    page_one = [(0, 100)]
    assert rolled_back.restores(page_one) and rolled_back.restores(page_one, bytes(counters))
    for at in (23, 28, 91, 96):
        counters[at] ^= 1
        assert not rolled_back.restores(page_one, bytes(counters)), at
        counters[at] ^= 1


def test_dirty_bytes_without_an_image_are_a_change(rolled_back: Finalised) -> None:
    """Also when they lie before, between or behind the pages that have one, whatever they hold."""
    pages = {offset for offset, _ in page_images(reader(rolled_back.journal), len(rolled_back.journal))}
    size = len(rolled_back.content)
    without = [at for at in range(0, size, 4096) if at not in pages]
    assert without and pages
    for at in (without[0], without[len(without) // 2], without[-1]):
        assert not rolled_back.restores([(at, at + 1)])
        assert not rolled_back.restores([*rolled_back.ranges, (at + 4095, at + 4096)])
    some = min(pages)
    assert not rolled_back.restores([(size, size + 1)])
    assert rolled_back.restores([(some + 10, some + 20)])
    assert rolled_back.restores([])


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_restoring_equals_a_comparison_with_the_old_bytes(data: st.DataObject) -> None:
    """Whatever ranges are dirty, they need not agree with pages: true if and only if each byte has an image like it."""
    page = 512
    old = data.draw(st.binary(min_size=page * 6, max_size=page * 6))
    numbers = data.draw(st.permutations(range(1, 7)))[: data.draw(st.integers(0, 6))]
    body = b"".join(
        number.to_bytes(4, "big") + image + journal.checksum(7, image).to_bytes(4, "big")
        for number in numbers
        for image in [old[(number - 1) * page : number * page]]
    )
    fields = (len(numbers), 7, 6, 512, page)
    built = (journal.MAGIC + b"".join(f.to_bytes(4, "big") for f in fields)).ljust(512, b"\0") + body
    edges = sorted(data.draw(st.sets(st.integers(0, page * 6), max_size=12)))
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    now = bytearray(old)
    for at in data.draw(st.lists(st.integers(0, page * 6 - 1), max_size=2)):
        now[at] ^= 0xFF
    imaged = {at for n in numbers for at in range((n - 1) * page, n * page)}
    ignored = {*range(24, 28), *range(92, 96)}
    expected = all(
        at in imaged and (at in ignored or now[at] == old[at]) for low, high in ranges for at in range(low, high)
    )
    found = restores_committed(reader(built), len(built), between(ranges), lambda low, high: bytes(now[low:high]))
    assert found == expected


@pytest.mark.parametrize("folder", ["plain", "ümläut 数"])
@pytest.mark.parametrize("mode", MODES)
def test_the_super_journal_of_attached_databases(mode: str, folder: str, tmp_path: Path) -> None:
    """Every journal of the set names it until it is unlinked, also by a path with bytes above 127."""
    place = tmp_path / folder
    place.mkdir()
    for name in ("a.db", "b.db"):
        create(place / name, rows=50)
    with watched(place / "a.db") as (recorder, run):
        run(f"ATTACH '{place / 'b.db'}' AS b")
        run(f"PRAGMA journal_mode={mode}")
        for _ in range(2):  # PERSIST: the second time over the journals of the first
            run("BEGIN")
            run("UPDATE main.t SET x = x || '!'")
            run("UPDATE b.t SET x = x || '!' WHERE id = 1")
            run("COMMIT")
        run("UPDATE main.t SET x = 1")
        single = [super_journal(reader(seen.journal), len(seen.journal)) for seen in recorder.seen]
    assert len(recorder.super_journals) == 2
    for name, journals in recorder.super_journals:
        assert name.startswith(str(place / "a.db-mj"))
        assert sorted(journals) == [str(place / "a.db"), str(place / "b.db")]
        for content in journals.values():
            assert super_journal(reader(content), len(content)) == name
            assert len(list(page_images(reader(content), len(content)))) > 0
    assert single[-1] is None


def test_a_damaged_super_journal_name_is_none(tmp_path: Path) -> None:
    """A wrong length, checksum or magic: SQLite takes such a journal for one without a super-journal."""
    name = b"/somewhere/a.db-mj0123456789"
    built = b"\xee" * 600 + name + len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big") + journal.MAGIC
    assert super_journal(reader(built), len(built)) == name.decode()
    for at in range(len(built) - 16 - len(name), len(built)):
        damaged = bytearray(built)
        damaged[at] ^= 1
        assert super_journal(reader(bytes(damaged)), len(damaged)) is None, at
    for cut in range(1, len(name) + 16):
        assert super_journal(reader(built[:-cut]), len(built) - cut) is None
    assert super_journal(reader(journal.MAGIC), 8) is None
    assert super_journal(reader(b""), 0) is None
