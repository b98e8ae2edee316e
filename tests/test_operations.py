"""docs/OPERATIONS.md: backups by copying a bucket, and upgrades under open databases, as the document tells them."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from inprocess import connect
from messages import all_messages
from mounting import Client, Place, SqlError, command, is_mounted, mounted, sqlite
from prometheus_client import REGISTRY, Counter

from s3blockfs import metrics

pytestmark = pytest.mark.mount

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "OPERATIONS.md").read_text()


# --- a copy of the bucket ------------------------------------------------------------------------------------


@pytest.fixture
def backup(mount_bucket: Place, place: Place) -> Place:
    """Another bucket."""
    other = Place(place.url, place.access_key, place.secret_key, f"backup-{place.prefix}", "databases")
    other.create_bucket()
    return other


def commit(place: Place, times: int) -> None:
    """Transactions of which each makes new objects, and whose logs are folded and archived."""
    database = connect(place)
    for _ in range(times):
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, data)")
            database.execute("INSERT INTO t(data) VALUES (randomblob(400000))")
    database.close()


def copy(place: Place, keys: list[str], target: Place) -> None:
    for key in keys:
        target.put(key, place.get(key))


def split(place: Place) -> tuple[list[str], list[str]]:
    """Heads, and all others."""
    keys = place.listing()
    return [key for key in keys if key.endswith("/head")], [key for key in keys if not key.endswith("/head")]


def run(place: Place, *arguments: str, code: int = 0) -> str:
    done = command(place, *arguments, "--endpoint-url", place.url)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_copy_that_reads_heads_first_is_a_backup(place: Place, backup: Place, tmp_path: Path) -> None:
    """Writers go on between the two steps, and fold; the copy is the state of the first one, whole."""
    commit(place, 5)
    heads, _ = split(place)
    bodies = {key: place.get(key) for key in heads}
    commit(place, 40)
    assert place.get("a.sqlite/head") != bodies["a.sqlite/head"]
    _, others = split(place)
    copy(place, others, backup)
    for key, body in bodies.items():
        backup.put(key, body)
    file, copied = tmp_path / "a.db", f"{backup.target}/a.sqlite"
    run(backup, "export", copied, str(file))
    assert sqlite(file, "PRAGMA integrity_check", "SELECT count(*) FROM t") == "ok\n5"
    # What the writers made meanwhile is there as well. A copy of the copy, or an export, is without it.
    for arguments in (["check", copied], ["gc", backup.target]):
        assert "older (rev " in run(backup, *arguments, code=6)
    run(backup, "cp", copied, f"{backup.target}/clean.sqlite")
    assert run(backup, "check", f"{backup.target}/clean.sqlite").endswith("clean.sqlite: ok\n")


def test_a_copy_that_takes_objects_first_is_none_and_older_heads_mend_it(
    place: Place, backup: Place, tmp_path: Path
) -> None:
    """So does any order that takes no care, and a replica that lags behind."""
    commit(place, 5)
    heads, others = split(place)
    older = {key: place.get(key) for key in heads}
    copy(place, others, backup)
    commit(place, 40)
    copy(place, heads, backup)
    file, copied = tmp_path / "a.db", f"{backup.target}/a.sqlite"
    assert "missing" in run(backup, "export", copied, str(file), code=6)
    assert not file.exists()
    assert "missing" in run(backup, "check", copied, code=6)
    for key, body in older.items():  # from the versions that the bucket keeps, say
        backup.put(key, body)
    assert run(backup, "check", copied).endswith("a.sqlite: ok\n")
    run(backup, "export", copied, str(file))
    assert sqlite(file, "PRAGMA integrity_check", "SELECT count(*) FROM t") == "ok\n5"


def test_a_deleted_database_comes_back_with_its_head(place: Place, tmp_path: Path) -> None:
    commit(place, 5)
    before = place.get("a.sqlite/head")
    run(place, "rm", f"{place.target}/a.sqlite")
    place.put("a.sqlite/head", before)
    run(place, "export", f"{place.target}/a.sqlite", str(tmp_path / "a.db"))
    assert sqlite(tmp_path / "a.db", "PRAGMA integrity_check", "SELECT count(*) FROM t") == "ok\n5"


# --- upgrades ------------------------------------------------------------------------------------------------


def fails(client: Client, statement: str) -> None:
    with pytest.raises(SqlError, match="SQLITE_IOERR"):
        client(statement)


def test_sigterm_under_open_databases(place: Place, tmp_path: Path) -> None:
    """A transaction that is open may end; connections then get I/O errors until they are opened again."""
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(a); INSERT INTO t VALUES (1)")
        with Client(mount / "a.db") as idle, Client(mount / "b.db") as writer:
            assert idle("SELECT a FROM t") == [[1]]
            writer("CREATE TABLE t(a)", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (2)")
            assert "in use" in command(place, "umount", str(mount.directory)).stderr  # which changes nothing
            mount.signal(signal.SIGTERM)
            writer("COMMIT")
            assert mount.wait() == 0
            assert not is_mounted(mount.directory)
            with mounted(place, tmp_path, root=mount.directory.parent) as again:
                assert sqlite(again / "b.db", "SELECT a FROM t") == "2"
                for client in (idle, writer):  # also with the next daemon in the same place
                    fails(client, "SELECT a FROM t")
                with Client(again / "a.db") as anew:
                    assert anew("INSERT INTO t VALUES (3)", "SELECT sum(a) FROM t") == [[4]]


def test_an_upgrade_without_a_pause(place: Place, tmp_path: Path) -> None:
    """Two daemons and a symbolic link that moves: old connections go on on the old mount until they are closed."""
    link, moved = tmp_path / "live", tmp_path / "live.new"
    with mounted(place, tmp_path) as old, mounted(place, tmp_path) as new:
        link.symlink_to(old.directory)
        with Client(link / "a.db") as before:
            before("PRAGMA busy_timeout=20000", "CREATE TABLE t(a)", "INSERT INTO t VALUES (1)")
            moved.symlink_to(new.directory)
            moved.replace(link)
            with Client(link / "a.db") as after:
                after("PRAGMA busy_timeout=20000", "INSERT INTO t VALUES (2)")
                before("INSERT INTO t VALUES (3)")
                assert before("SELECT sum(a) FROM t") == after("SELECT sum(a) FROM t") == [[6]]
            assert command(place, "umount", str(old.directory)).returncode == 7
        assert command(place, "umount", str(old.directory)).returncode == 0
        assert sqlite(link / "a.db", "SELECT sum(a) FROM t") == "6"


# --- the document itself -------------------------------------------------------------------------------------


def entries() -> list[str]:
    """The messages in the first cells of the section on troubleshooting."""
    section = DOCUMENT.partition("## Troubleshooting\n")[2]
    cells = re.findall(r"^\| (`.*?`) \| ", section, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`(.*?)`", cell)]


def explains(entry: str, message: str) -> bool:
    at = 0
    for piece in entry.split("..."):
        at = message.find(piece.strip(), at)
        if at < 0:
            return False
    return True


def test_every_message_is_explained_and_every_explanation_has_a_message() -> None:
    messages, explained = all_messages(), entries()
    assert len(messages) > 200 and len(explained) > 100
    assert {m for m in messages if not any(explains(entry, m) for entry in explained)} == set()
    assert {entry for entry in explained if not any(explains(entry, m) for m in messages)} == set()


def test_every_figure_is_in_the_document_and_is_one() -> None:
    counters = {f"{name}_total" for sample in REGISTRY.collect() if (name := sample.name).startswith("s3blockfs_")}
    assert len(counters) == len([each for each in vars(metrics).values() if isinstance(each, Counter)])
    assert set(re.findall(r"`(s3blockfs_\w+)`", DOCUMENT)) == counters
