"""Programs that use a database through SQLite: locks, journal, play-back and page cache as in SQLite's pager.

A client of a mount shares one Database with others of its node; one in process has its own.
"""

from __future__ import annotations

from random import Random

from engine import Process, build_journal
from greenlet import GreenletExit

from s3blockfs import errors, header
from s3blockfs.catalog import Catalog
from s3blockfs.database import Database
from s3blockfs.overlap import MountedDatabase
from simulation.kernel import Node, Violation
from simulation.oracle import Intent, Oracle, masked

#: What an application gets and goes on from. Anything else is a fault of the engine.
TOLD = (errors.S3BlockFSError, OSError)

MOST_PAGES = 14


def first_page(page: int, pages: int, counter: int, filler: int) -> bytes:
    start = bytearray(b"SQLite format 3\0" + page.to_bytes(2, "big") + b"\1\1" + bytes(80))
    start[24:28] = start[92:96] = counter.to_bytes(4, "big")
    start[28:32] = pages.to_bytes(4, "big")
    return bytes(start) + bytes([filler]) * (page - 100)


class Client:
    """One program with one database."""

    def __init__(
        self, node: Node, oracle: Oracle, catalog: Catalog, path: str, pid: int, rng: Random, *, in_process: bool
    ) -> None:
        self.node, self.kernel, self.oracle, self.catalog = node, node.kernel, oracle, catalog
        self.path, self.pid, self.rng, self.in_process = path, pid, rng, in_process
        self.fresh = False
        """Whether its catalog asks for the newest head at every transaction."""
        self._database: Database | None = None
        self._process: Process | None = None
        self._cached: bytes | None = None
        """SQLite's page cache: what it saw last; dropped only when the change counter is another one."""
        self.page = 512

    # --- open and close ---------------------------------------------------------------------------------

    @property
    def database(self) -> Database:
        """Opened, or created, when it is needed."""
        if self._database is None:
            prefix = self.path
            empty = Intent("create", self.node.name, prefix, lambda content: content == b"")
            with self.oracle.intending(empty, sure=False):
                empty.kind = "rollback"  # it may be there already
                if self.in_process:
                    self._database = self.catalog.connection(prefix, f"{prefix}#{self.pid}", create=True)
                else:
                    self._database = self.catalog.create(prefix, exclusive=False)
            self._process = Process(self.catalog, self._database, self.pid)
            self._cached = None
        return self._database

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            self._process = None
            self.catalog.release(database)

    # --- transactions -----------------------------------------------------------------------------------

    def look(self, pause_s: float = 0.0) -> bytes:
        """A read transaction: everything, some time later a part again."""
        database, promised = self.database, self.oracle.acknowledged[self.path]
        self.process.shared()
        try:
            content = self._see(database, promised)
            if pause_s:
                self._overlap(database, pause_s)
                start = self.rng.randrange(len(content) + 1)
                again = database.read(start, self.rng.randrange(3000))
                if again != content[start : start + len(again)] or (len(again) == 0) != (start == len(content)):
                    self._require_zero(again)
            return content
        finally:
            self.process.unlock()

    def _overlap(self, database: Database, seconds: float) -> None:
        """Other connections of this process begin and end, all with one SHARED, unless a journal seems to be hot."""
        for _ in range(8):
            self.kernel.sleep(seconds / 8)
            if isinstance(database, MountedDatabase) and database.pretended_journal is not None:
                try:
                    self.process.exclusive()
                except errors.Busy:
                    return
                raise Violation(f"I7: {self.path}: EXCLUSIVE for a journal that does not exist")

    def _require_zero(self, again: bytes) -> None:
        if again:
            raise Violation(f"I4: {self.path}: a reader saw two states in one transaction")

    def _see(self, database: Database, promised: int | None) -> bytes:
        """What this transaction sees, by way of its page cache; it has to be one committed state."""
        start = database.read(0, header.HEADER_BYTES)
        if self._cached is not None and start and header.is_database(start) and self._cached[24:28] == start[24:28]:
            content = self._cached
        else:
            content = database.read(0, database.size)
        fresh = self.fresh and not database.is_gone  # one that was unlinked here is shown as it was
        state = self.oracle.expect(self.path, database.version.head, promised if fresh else None)
        if state is None:
            if masked(content) not in [masked(known) for known in self.oracle.foreign[self.path]]:
                raise Violation(f"I4: {self.path}: a mix of what sqlite-s3vfs wrote")
        elif content != state.content:
            where = "SQLite's cache" if content is self._cached else "what was read"
            raise Violation(f"I4: {self.path}: {where} is not commit {state.seq}")
        # What sqlite-s3vfs writes during a conversion is lost (docs/SEMANTICS.md), and its counter is used again.
        self._cached = content if state is not None else None
        return content

    def transact(self) -> None:
        """A write transaction, or several under one lock, of some kind; it may end in any way."""
        rng, database = self.rng, self.database
        promised = self.oracle.acknowledged[self.path]
        self.process.shared()
        try:
            base = self._see(database, promised)
            self.process.reserved()
            journal = rng.random() < 0.8
            if not self._climb():
                return
            for number in range(rng.choice([1, 1, 1, 2, 3])):
                before = (database.version.head.id, database.version.head.commit)
                base = self._one(database, base, before, journal, bump=number == 0)
        except GreenletExit:
            raise
        except TOLD:
            self._cached = None
            raise
        finally:
            if not self.node.dead:
                self.process.unlock()

    def _climb(self) -> bool:
        for _ in range(8):
            try:
                self.process.exclusive()
                return True
            except errors.Busy:
                self.kernel.sleep(self.rng.uniform(0, 1))
        return False

    def _one(self, database: Database, base: bytes, before: tuple[bytes, bytes], journal: bool, bump: bool) -> bytes:
        rng, process = self.rng, self.process
        process.images = base
        if journal:
            side = self.catalog.side_files.create(process.journal_path)
            database.journal_begins()
            side.write(0, build_journal(base, self._page_of(base)))
        content = self._change(database, base, bump, shrink=journal)
        if rng.random() < 0.2:
            self.kernel.sleep(rng.choice([0.1, 3, 40]))
        end = rng.random()
        if end < 0.06:
            self._dies(database)
            raise errors.Busy("the program died")
        undone = end < 0.16
        if undone:
            process.play_back()
            content = base
        wanted = masked(content)
        kind = "rollback" if wanted == masked(base) else "commit"  # what changes nothing need not be published
        intent = Intent(kind, self.node.name, self.path, lambda found: masked(found) == wanted, before, leased=True)
        try:
            with self.oracle.intending(intent):
                if not journal:
                    database.sync(self.pid)
                elif not self.in_process and rng.random() < 0.8:  # else synchronous=OFF
                    database.sync(self.pid, commits=lambda name: True)
                if journal:
                    process.finalise()
        except TOLD:
            if rng.random() < 0.7:  # else it just lets go
                process.play_back()
                if journal:
                    process.finalise()
            raise
        seen = database.read(0, database.size)
        if masked(seen) != wanted:
            raise Violation(f"I4: {self.path}: after its own commit a writer sees something else")
        self._cached = seen
        return seen

    def _dies(self, database: Database) -> None:
        """What the kernel sends for a process that was killed: FLUSH, RELEASE and the end of its locks."""
        if not database.owner_closes(self.process):
            database.close_handle(self.pid)
        self.kernel.note(self.node, "a program died in mid-transaction")

    def overwrite(self) -> None:
        """As `cp` and `deserialize_iter` do: everything anew, without locks."""
        if not self.in_process:
            return
        database = self.database
        database.refresh(0)
        before = (database.version.head.id, database.version.head.commit)
        content = self._fresh(self.rng.randrange(1, MOST_PAGES))
        intent = Intent("commit", self.node.name, self.path, lambda found: masked(found) == masked(content), before)
        try:
            with self.oracle.intending(intent):
                database.truncate(0)
                for start in range(0, len(content), 900):
                    database.write(start, content[start : start + 900])
                if self.rng.random() < 0.5:  # long enough for a collector to come by
                    self.kernel.sleep(self.rng.uniform(0, 60))
                database.close_handle(self.pid)
        except TOLD:
            self.close()
            raise
        self._cached = None

    # --- content ----------------------------------------------------------------------------------------

    def _page_of(self, content: bytes) -> int:
        return header.page_size(content) if header.is_database(content) else self.page

    def _fresh(self, pages: int) -> bytes:
        filler = self.rng.randrange(3)
        rest = (bytes([self.rng.randrange(3)]) * self.page for _ in range(pages - 1))
        return first_page(self.page, pages, 1, filler) + b"".join(rest)

    def _change(self, database: Database, base: bytes, bump: bool, shrink: bool) -> bytes:
        """Write some pages, as the pager does: page 1 with its counter and the page count, others, growth, a cut (of
        which the engine is told by the header alone, before the journal goes; without a journal SQLite cuts later).
        Contents repeat. Returns what the file will hold."""
        rng = self.rng
        if not header.is_database(base):
            content = self._fresh(rng.randrange(1, 5))
            database.write(0, content)
            return content
        page = header.page_size(base)
        pages = max(1, len(base) // page)
        cut = rng.randrange(1, pages + 1) if shrink else pages
        target = rng.choice([pages, pages, max(pages, min(MOST_PAGES, pages + rng.randrange(1, 6))), cut])
        grown = base.ljust(target * page, b"\0")
        content = bytearray(grown[: max(target, pages) * page])
        writes = [rng.randrange(target) for _ in range(rng.choice([1, 1, 2, 5, target]))]
        writes += range(pages, target) if rng.random() < 0.7 else []  # else there are holes
        for number in sorted(set(writes) - {0}):
            data = bytes([rng.randrange(3)]) * page if rng.random() < 0.7 else rng.randbytes(page)
            content[number * page : (number + 1) * page] = data
            database.write(number * page, data)
        counter = (header.counter(base) + bump) & 0xFFFFFFFF
        start = first_page(page, target, counter, rng.randrange(3))
        content[:page] = start
        database.write(0, start)
        if target > pages and len(content) > database.size:
            database.truncate(len(content))
        return bytes(content[: target * page])
