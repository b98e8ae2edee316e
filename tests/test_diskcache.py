"""The cache on disk: shared, bounded, never believed, and never in the way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import ManualRuntime
from memorystore import MemoryStore
from mounting import Place, mounted, numbers, sqlite
from proxy import FaultProxy
from test_cache import BLOCK, WAIT_S, Store, World, content

from s3blockfs.cache import BlockCache
from s3blockfs.diskcache import DiskCache
from s3blockfs.errors import UsageError
from s3blockfs.format.data import FrameAddress

MIB = 1 << 20
OBJECTS = 6


class Machine(World):
    """A store whose blocks are kept in a folder; `restart` forgets what is in memory."""

    def __init__(self, folder: Path, most_bytes: int = 64 * MIB) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        super().__init__(ManualRuntime())
        self.objects = [self.object(number) for number in range(1, OBJECTS + 1)]
        self.restart()

    def restart(self) -> None:
        self.runtime.close()  # what was to be written is
        self.runtime = ManualRuntime()
        disk = DiskCache(str(self.folder), self.most_bytes, self.runtime)
        self.cache = BlockCache(self.store, self.runtime, 1 << 20, WAIT_S, disk=disk)
        self.store.gets.clear()

    def read(self, *numbers: int) -> int:
        """Checks all frames of these objects; how many GETs that took."""
        before = len(self.store.gets)
        for number in numbers or range(1, OBJECTS + 1):
            assert self.cache.fetch("P", self.objects[number - 1]) == [content(number, slot) for slot in range(8)]
        return len(self.store.gets) - before

    @property
    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a cache that keeps all it is given, however busy the machine is."""
    monkeypatch.setattr("s3blockfs.diskcache.WRITES", OBJECTS)
    return tmp_path / "cache"


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    made = Machine(folder)
    yield made
    made.runtime.close()


def test_what_was_fetched_is_there_after_a_restart(machine: Machine) -> None:
    assert machine.read() == OBJECTS
    machine.restart()
    missed: list[int] = []
    machine.cache.fetch("P", machine.objects[0], missed.append)
    assert missed == []  # what comes from the disk is no reason to fetch ahead
    assert machine.read() == 0
    assert len(machine.files) == OBJECTS
    assert all(path.stat().st_mode & 0o77 == 0 for path in [machine.folder, *machine.folder.rglob("*")])


def test_of_a_range_that_is_partly_there_only_the_rest_is_fetched(machine: Machine) -> None:
    slots = machine.objects[0]
    machine.cache.fetch("P", slots[:5])
    machine.restart()
    assert machine.cache.fetch("P", slots) == [content(1, slot) for slot in range(8)]
    assert machine.store.gets == [(slots[0].ref.key("P"), slots[5].pos, slots[7].end - slots[5].pos)]


@pytest.mark.parametrize("damage", ["flip", "cut", "zeros", "garbage", "another", "empty", "longer", "folder", "link"])
def test_a_damaged_file_is_fetched_again(damage: str, machine: Machine) -> None:
    """Whatever is in it; afterwards it is sound again where it is still a file."""
    machine.read()
    machine.restart()
    rng = random.Random(1)
    bodies = {path: path.read_bytes() for path in machine.files}
    aside = machine.folder.parent / "aside"
    aside.mkdir()
    for at, (path, body) in enumerate(bodies.items()):
        other = list(bodies.values())[at - 1]
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage == "link":
            (aside / path.name).write_bytes(body)  # sound, and not to be read or written by way of a link
            os.utime(aside / path.name, (1, 1))
            path.symlink_to(aside / path.name)
        else:
            middle = len(body) // 2
            path.write_bytes(
                {
                    "flip": body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :],
                    "cut": body[:middle],
                    "zeros": bytes(len(body)),
                    "garbage": rng.randbytes(len(body)),
                    "another": other,
                    "empty": b"",
                    "longer": body + rng.randbytes(1000),
                }[damage]
            )
    assert machine.read() == (0 if damage == "longer" else OBJECTS)
    machine.restart()
    if damage in ("folder", "link"):
        assert machine.read() == OBJECTS
    else:
        assert machine.read() == 0
    machine.restart()
    assert {path.stat().st_mtime for path in aside.iterdir()} <= {1}


def test_damage_in_the_store_is_an_error_each_time(machine: Machine) -> None:
    """It is kept like anything else, and never shown."""
    bad = machine.objects[0][3]
    machine.damage(bad, bad.end - 1)
    for _ in range(2):
        with pytest.raises(Exception, match="checksum mismatch"):
            machine.read(1)
        machine.restart()
    machine.damage(bad, bad.end - 1)  # mended
    machine.read(1)


def test_its_size_is_bounded_and_the_least_used_goes_first(folder: Path) -> None:
    machine = Machine(folder)
    machine.read(1)
    machine.restart()
    size = machine.files[0].stat().st_blocks * 512
    machine.most_bytes = 4 * size
    machine.restart()
    for number in (1, 2, 1, 3, 1, 4, 5, 6):
        machine.read(number)
        machine.restart()
        used = sum(path.stat().st_blocks * 512 for path in machine.files)
        assert used <= machine.most_bytes + size
        for path in machine.files:  # as if a while passed
            os.utime(path, (path.stat().st_atime - 100, path.stat().st_mtime - 100))
    assert 0 < len(machine.files) < OBJECTS
    assert [machine.read(number) for number in (1, 4, 5, 6)] == [0, 0, 0, 0]  # 1 was read again and again
    machine.runtime.close()


def test_a_disk_that_fails_is_in_nobodys_way(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning; everything is read all the same."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert machine.read() == OBJECTS
    machine.restart()
    assert machine.read() == OBJECTS
    assert 1 <= sum("No space left" in record.getMessage() for record in caplog.records) <= 2
    caplog.clear()


def test_a_slow_disk_holds_nobody_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads go on while writes hang, and only few of these are under way, with what they hold in memory."""
    begun, go = machine.hold()
    begun.clear()
    machine.store.on_get = lambda key: None
    real = os.pwrite

    def slow(*arguments: object) -> int:
        begun.set()
        assert go.wait(WAIT_S)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("s3blockfs.diskcache.WRITES", 2)
    monkeypatch.setattr(os, "pwrite", slow)
    assert machine.read() == OBJECTS
    assert begun.wait(WAIT_S)
    go.set()
    machine.restart()
    assert len(machine.files) == 2


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_folder_that_others_may_look_into_is_refused(folder: Path, mode: int) -> None:
    """It holds the content of databases, and who can write there could forge it."""
    folder.mkdir()
    folder.chmod(mode)
    runtime = ManualRuntime()
    with pytest.raises(UsageError, match="others may look into it"):
        DiskCache(str(folder), MIB, runtime)
    (folder / "file").touch()
    with pytest.raises(UsageError, match="name a folder of your own"):
        DiskCache(str(folder / "file" / "below"), MIB, runtime)
    runtime.close()


WORKER = """
import random, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_diskcache import Machine
machine, rng = Machine(Path(sys.argv[1]), most_bytes=int(sys.argv[2])), random.Random()
for step in range(int(sys.argv[3])):
    machine.read(rng.randrange(1, 7))
    if step == 20:
        print("begun", flush=True)
    if step % 5 == 0:
        machine.restart()
machine.runtime.close()
print("done")
"""


def test_processes_share_a_folder(folder: Path) -> None:
    """They write, read and delete the same files; one is killed in the middle. Every byte is right."""
    line = [sys.executable, "-c", WORKER, str(folder), str(40_000)]
    steps = [str(10**9), "300", "300", "300"]
    processes = [subprocess.Popen([*line, each, *sys.path], stdout=subprocess.PIPE, text=True) for each in steps]
    try:
        assert processes[0].stdout is not None
        assert processes[0].stdout.readline() == "begun\n"
        processes[0].send_signal(signal.SIGKILL)
        assert [process.communicate(timeout=WAIT_S)[0] for process in processes[1:]] == ["begun\ndone\n"] * 3
        assert processes[0].wait() == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    machine = Machine(folder)
    machine.read()
    machine.runtime.close()


def test_plain_objects_are_not_kept(machine: Machine) -> None:
    """They have no checksums of ours: what a file says of them could not be verified."""
    from s3blockfs.objectfile import _Block, _Ref

    MemoryStore.put(machine.store, "P", b"x" * BLOCK, site="t")
    etag = MemoryStore.get(machine.store, "P", site="t").etag
    address: FrameAddress = _Block(_Ref(0, b"", etag.encode()), 0, BLOCK, 0, BLOCK)
    assert machine.cache.fetch("P", [address]) == [b"x" * BLOCK]
    machine.restart()
    assert machine.files == []


@pytest.mark.mount
def test_a_mount_that_was_killed_finds_it_again(place: Place, tmp_path: Path, proxy: FaultProxy) -> None:
    """Nothing but the head is asked for, and what was committed meanwhile; the same for one beside it."""
    options = ("--cache-dir", str(tmp_path / "cache"), "--cache-dir-size", "64M")
    count = "SELECT count(*), total(length(data)) FROM t"
    with mounted(place, tmp_path) as mount:
        sqlite(mount / "a.db", "CREATE TABLE t(data)", f"INSERT INTO t SELECT zeroblob(4000) FROM ({numbers(3000)})")
    with mounted(place.via(proxy.url), tmp_path, *options) as mount:
        assert sqlite(mount / "a.db", count) == "3000|12000000.0"
        assert proxy.counts()["GET", "data"] > 3
        gets = 2
        for _ in range(5):  # what a busy disk did not keep it keeps at the next read
            with mounted(place.via(proxy.url), tmp_path, *options) as beside:
                proxy.reset()
                assert sqlite(beside / "a.db", count) == "3000|12000000.0"
            if (gets := proxy.counts()["GET", "data"]) <= 1:
                break
        assert gets <= 1
        mount.kill()
    with mounted(place.via(proxy.url), tmp_path, *options, refresh="1") as mount:
        proxy.reset()
        assert sqlite(mount / "a.db", count) == "3000|12000000.0"
        assert proxy.counts()["GET", "data"] <= 1  # what was being written when it was killed
        sqlite(mount / "a.db", "INSERT INTO t VALUES (zeroblob(10))")
        assert sqlite(mount / "a.db", count) == "3001|12000010.0"


__all__ = ["Store"]
