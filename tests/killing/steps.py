"""What is swept: scripts, what they start from, and which faces they are for.

A script calls `done` after everything that the application may count on from then on, so the reference (the same script
on files) knows the states before and after: a script that dies behind the n-th `done` leaves the n-th or the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from killing.folders import Folder

MOUNT, PROCESS, COMMAND = FACES = "mount", "process", "command"

#: How long what runs in the background may take at the end of a script: a lease is given back after 0.5 s.
PAUSE_S = 0.7
#: Commits in WAL mode with synchronous=NORMAL are published after 1 s.
GROUP_PAUSE_S = 1.5


@dataclass(frozen=True)
class Step:
    """`at_once`: a database that it creates is there as a whole or not at all, and never empty. `order`: databases that
    may change in this order only. `needs`: kinds of requests (see proxy.py) without which
    the script did not do what it is for. `client`: also with the client killed; a `cp` that is killed leaves half a
    file anywhere. `legacy`: what `prepare` makes is stored as sqlite-s3vfs does. `movable`: its objects may be copied
    to another prefix; a named snapshot knows its own. `firm`: what was acknowledged by one of these `done` stays; after
    others, in WAL mode with synchronous=NORMAL, the machine may take the newest along (default: each is firm)."""

    name: str
    script: Callable[[Folder], None]
    faces: tuple[str, ...]
    prepare: Callable[[Folder], None]
    at_once: bool = False
    order: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    client: bool = True
    legacy: bool = False
    movable: bool = True
    firm: tuple[int, ...] | None = None

    def oldest(self, done: int) -> int:
        """Of the states that may be there after so many `done`, when the daemon died."""
        return done if self.firm is None else max([number for number in self.firm if number <= done], default=0)


STEPS: list[Step] = []


def step(
    *faces: str, prepare: Callable[[Folder], None], **more: object
) -> Callable[[Callable[[Folder], None]], Callable[[Folder], None]]:
    def add(script: Callable[[Folder], None]) -> Callable[[Folder], None]:
        name = script.__name__.strip("_").replace("_", "-")
        STEPS.append(Step(name, script, faces, prepare, **more))  # type: ignore[arg-type]
        return script

    return add


# --- what scripts start from ------------------------------------------------------------------------------


def fill(folder: Folder, name: str, rows: int = 40, most: int = 1500) -> None:
    """A table with an index, rows of all sizes and gaps between them, and a second table."""
    rng = folder.state.rng(name)
    with folder.open(name) as run:
        run("BEGIN")
        run("CREATE TABLE t(id INTEGER PRIMARY KEY, n, data)")
        run("CREATE INDEX by_n ON t(n, data)")
        run("CREATE TABLE other(id INTEGER PRIMARY KEY, data)")
        for number in range(rows):
            run("INSERT INTO t VALUES (?, ?, ?)", (number, rng.randrange(1000), rng.randbytes(rng.randrange(most))))
            run("INSERT INTO other VALUES (?, ?)", (number, f"{name} {number}" * rng.randrange(40)))
        run("COMMIT")
        run("DELETE FROM t WHERE id % 5 = 1")


def nothing(folder: Folder) -> None:
    pass


def one(folder: Folder) -> None:
    fill(folder, "a.db")


def two(folder: Folder) -> None:
    fill(folder, "a.db")
    fill(folder, "b.db", 70)


def sparse(folder: Folder) -> None:
    """A database most of which is free."""
    fill(folder, "a.db", 120)
    with folder.open("a.db") as run:
        run("DELETE FROM t WHERE id % 3 > 0")


def logged(folder: Folder, commits: int = 22, rows: int = 200) -> None:
    """Enough large commits, each of them scattered, that a fold of their segments is due."""
    with folder.open("a.db") as run:
        run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)")
        run("BEGIN")
        for row in range(rows):
            run("INSERT INTO t VALUES (?, zeroblob(4000))", (row,))
        run("COMMIT")
        for number in range(commits):
            data = folder.state.rng(number).randbytes(4000)
            run("UPDATE t SET data = ? WHERE id % 3 = ?", (data, number % 3))


def littered(folder: Folder) -> None:
    """What replaced others is in objects of its own; archives and segments wait for a collector."""
    fill(folder, "b.db")
    folder.command("snapshot", "create", "b.db", "one")
    logged(folder)
    for _ in range(2):
        with folder.open("a.db") as run:
            run("VACUUM")
            run("DELETE FROM t WHERE id % 7 = 3")
        folder.command("snapshot", "create", "a.db", "one")
        folder.command("snapshot", "rm", "a.db", "one")
    folder.command("rm", "b.db")


def kept(folder: Folder) -> None:
    """A named snapshot, and changes since."""
    fill(folder, "a.db")
    folder.command("snapshot", "create", "a.db", "one")
    with folder.open("a.db") as run:
        run("UPDATE t SET n = n + 1")
        run("DROP TABLE other")


def large(folder: Folder) -> None:
    """Larger than what goes into the tail of a head, so there are objects to copy."""
    fill(folder, "a.db", 120, 3000)
    fill(folder, "b.db", 20)


# --- SQL --------------------------------------------------------------------------------------------------


@step(MOUNT, PROCESS, prepare=nothing)
def create(folder: Folder) -> None:
    """The first database of a store, whose conditional PUTs are probed."""
    with folder.open("a.db") as run:
        run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)")
        folder.done()
        run("INSERT INTO t VALUES (1, 'one'), (2, 'two')")
        folder.done()


@step(MOUNT, PROCESS, prepare=one)
def insert(folder: Folder) -> None:
    with folder.open("a.db") as run:
        for number in range(100, 103):
            run("INSERT INTO t VALUES (?, ?, ?)", (number, number, folder.state.rng(number).randbytes(900)))
            folder.done()
        folder.pause(PAUSE_S)
        run("INSERT INTO t VALUES (200, 200, NULL)")
        folder.done()


@step(MOUNT, PROCESS, prepare=one)
def update(folder: Folder) -> None:
    with folder.open("a.db") as run:
        run("UPDATE t SET n = n + 1000, data = zeroblob(600) WHERE id % 3 = 0")
        folder.done()
        run("BEGIN IMMEDIATE")
        run("UPDATE t SET n = -n")
        run("UPDATE other SET data = 'changed' WHERE id = 7")
        run("COMMIT")
        folder.done()


@step(MOUNT, PROCESS, prepare=one, needs=("data",))
def spill(folder: Folder) -> None:
    """A transaction of many statements that does not fit into SQLite's cache."""
    with folder.open("a.db") as run:
        run("PRAGMA cache_size=4")
        run("BEGIN")
        for number in range(100, 400):
            run("INSERT INTO t VALUES (?, ?, ?)", (number, number, folder.state.rng(number).randbytes(2500)))
        run("UPDATE t SET n = 0 WHERE id % 2 = 0")
        run("DELETE FROM other")
        run("COMMIT")
        folder.done()


@step(MOUNT, PROCESS, prepare=one)
def rollback(folder: Folder) -> None:
    """Nothing of a transaction that was rolled back after it had spilled may be seen, nor lost of the next."""
    with folder.open("a.db") as run:
        run("PRAGMA cache_size=4")
        run("BEGIN")
        for number in range(100, 250):
            run("INSERT INTO t VALUES (?, ?, ?)", (number, number, bytes(2500)))
        run("UPDATE t SET n = 0")
        run("ROLLBACK")
        folder.done()
        run("INSERT INTO t VALUES (500, 1, 'after it')")
        folder.done()


@step(MOUNT, PROCESS, prepare=sparse)
def vacuum(folder: Folder) -> None:
    with folder.open("a.db") as run:
        run("VACUUM")
        folder.done()
        run("PRAGMA user_version = 7")
        folder.done()


@step(MOUNT, PROCESS, prepare=two)
def drop(folder: Folder) -> None:
    with folder.open("b.db") as run:
        run("DROP TABLE t")
        folder.done()
        run("DROP TABLE other")
        folder.done()


@step(MOUNT, PROCESS, prepare=two)
def attach(folder: Folder) -> None:
    """One transaction over two databases: each is whole, and both are when COMMIT has returned."""
    with folder.open("a.db") as run:
        run("ATTACH ? AS b", (folder.path("b.db"),))
        run(f"PRAGMA b.journal_mode={folder.state.journal_mode}")
        for number in range(2):
            run("BEGIN")
            run("UPDATE main.t SET n = n + 1")
            run("UPDATE b.t SET n = n - 1")
            run("INSERT INTO b.other VALUES (?, 'from a')", (1000 + number,))
            run("COMMIT")
            folder.done()


# --- WAL --------------------------------------------------------------------------------------------------


def checkpoint(run: Callable[..., list[Any]], mode: str) -> None:
    """To SQLite, a lock that fails because the daemon is dead is one that others hold."""
    [[busy, *_]] = run(f"PRAGMA wal_checkpoint({mode})")
    if busy:
        raise RuntimeError("checkpoint: busy")


@step(MOUNT, prepare=one)
def wal(folder: Folder) -> None:
    """Every kind of checkpoint beside a reader; the log restarts, is truncated, and removed by the last close."""
    with folder.open("a.db") as run:
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        for number, mode in enumerate(("PASSIVE", "FULL", "RESTART", "TRUNCATE")):
            run("INSERT INTO t VALUES (?, 1, ?)", (300 + number, folder.state.rng(number).randbytes(3000)))
            folder.done()
            checkpoint(run, mode)
            run("UPDATE t SET n = n + 1")
            folder.done()
    with folder.open("a.db", create=False) as run:
        run("DELETE FROM t WHERE id % 2 = 0")
        folder.done()


@step(MOUNT, prepare=one, firm=(4, 6))
def wal_normal(folder: Folder) -> None:
    """COMMIT returns before the commit is in S3. A checkpoint waits for that. So does the last close, but SQLite
    tells nobody when it could not."""
    with folder.open("a.db") as run:
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=NORMAL")
        for number in range(3):
            run("INSERT INTO t VALUES (?, 1, ?)", (300 + number, folder.state.rng(number).randbytes(3000)))
            folder.done()
        checkpoint(run, "PASSIVE")
        folder.done()
        run("UPDATE t SET n = n + 1")
        folder.done()
        folder.pause(GROUP_PAUSE_S)
        checkpoint(run, "TRUNCATE")
        folder.done()
        run("DELETE FROM t WHERE id % 2 = 0")
    folder.done()


# --- files ------------------------------------------------------------------------------------------------


@step(MOUNT, prepare=two, client=False)
def cp_over(folder: Folder) -> None:
    folder.copy("a.db", "b.db")
    folder.done()
    folder.copy(folder.source, "a.db")
    folder.done()


@step(MOUNT, prepare=one, client=False)
def cp_new(folder: Folder) -> None:
    folder.copy("a.db", "c.db")
    folder.done()


@step(MOUNT, prepare=large, at_once=True, order=("c.db", "a.db"))
def rename(folder: Folder) -> None:
    folder.rename("a.db", "c.db")
    folder.done()


@step(MOUNT, prepare=large, at_once=True, order=("b.db", "a.db"))
def rename_over(folder: Folder) -> None:
    folder.rename("a.db", "b.db")
    folder.done()


@step(MOUNT, PROCESS, prepare=two)
def create_again(folder: Folder) -> None:
    """A database is deleted, and another one is made under its name."""
    folder.remove("a.db")
    folder.done()
    with folder.open("a.db") as run:
        run("CREATE TABLE again(id INTEGER PRIMARY KEY, data)")
        folder.done()
        run("INSERT INTO again VALUES (1, 'one')")
        folder.done()


@step(PROCESS, prepare=two)
def overwrite(folder: Folder) -> None:
    """By `deserialize_iter`."""
    folder.overwrite("b.db")
    folder.done()


# --- in the background ------------------------------------------------------------------------------------


@step(MOUNT, PROCESS, prepare=logged, needs=("archive",))
def fold(folder: Folder) -> None:
    """One is due when the database is opened, and goes on while others commit."""
    with folder.open("a.db") as run:
        for number in range(1000, 1003):
            run("INSERT INTO t VALUES (?, 'more')", (number,))
            folder.done()
        folder.pause(PAUSE_S)


@step(MOUNT, PROCESS, prepare=one, legacy=True, needs=("block",))
def convert(folder: Folder) -> None:
    """A store of sqlite-s3vfs, by its first write."""
    with folder.open("a.db") as run:
        run("UPDATE t SET n = n + 1 WHERE id = 2")
        folder.done()
        run("INSERT INTO other VALUES (1000, 'more')")
        folder.done()


# --- commands ---------------------------------------------------------------------------------------------


def command(*words: str, prepare: Callable[[Folder], None], name: str = "", **more: object) -> None:
    """A step that is one command."""

    def script(folder: Folder) -> None:
        folder.command(*(folder.source if word == "FILE" else word for word in words))
        folder.done()

    STEPS.append(Step(name or f"command-{words[0]}", script, (COMMAND,), prepare, **more))  # type: ignore[arg-type]


command("import", "FILE", "c.db", prepare=one, name="import")
command("import", "FILE", "a.db", "--force", prepare=one, name="import-over")
command("cp", "a.db", "c.db", prepare=large, at_once=True)
command("cp", "a.db", "b.db", "--force", prepare=large, name="command-cp-over")
command("mv", "a.db", "c.db", prepare=large, at_once=True, order=("c.db", "a.db"))
command("mv", "a.db", "b.db", "--force", prepare=large, order=("b.db", "a.db"), name="command-mv-over")
command("rm", "a.db", prepare=two)
command("restore", "a.db", "--to", "one", prepare=kept, movable=False)
command(
    "restore",
    "a.db",
    "--to",
    "one",
    "--as",
    "c.db",
    prepare=kept,
    at_once=True,
    movable=False,
    name="command-restore-as",
)
command("snapshot", "create", "a.db", "two", prepare=kept, movable=False, name="snapshot-create")
command("snapshot", "rm", "a.db", "one", prepare=kept, movable=False, name="snapshot-rm")
command("gc", ".", "--retain", "0", prepare=littered, name="gc", needs=("archive", "delete"))
command("adopt", "a.db", prepare=one, legacy=True, name="adopt", needs=("block",))
command(
    "export",
    "a.db",
    "c.db",
    "--layout",
    "sqlite-s3vfs",
    prepare=one,
    at_once=True,
    name="export-layout",
    needs=("block",),
)
