"""One regression test per trap of the binding, on real mounts of a small in-memory file system (`memory_fs.py`)."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fcntl import F_RDLCK, F_UNLCK, F_WRLCK
from pathlib import Path
from typing import Any

import pytest
from memory_fs import EXCEPTIONS, Daemon, mount_line, until

from s3blockfs import mountpoint
from s3blockfs.errors import Busy, EnvironmentProblem, UsageError
from s3blockfs.fuse_binding import Operations, mount
from s3blockfs.locks import TO_END
from s3blockfs.mountpoint import clear_dead_mount, require, unmount

pytestmark = pytest.mark.mount


def close_dead(descriptor: int) -> None:
    """Close a file whose daemon is gone: the descriptor goes, the flush that close(2) makes fails."""
    with pytest.raises(OSError) as caught:
        os.close(descriptor)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)


@pytest.fixture
def client() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Run Python code in another process that says "ready" when it got as far as that."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "import fcntl, os, signal, sys, time\n" + code],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout and process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def daemon(tmp_path: Path, client: Any) -> Iterator[Callable[..., Daemon]]:
    """Start a daemon with the given arguments of `serve`. Stopped before the clients, which may wait for it."""
    started: list[Daemon] = []

    def start(**arguments: Any) -> Daemon:
        started.append(Daemon(tmp_path, **arguments))
        return started[-1].wait_mounted()

    yield start
    for each in started:
        each.stop()


@pytest.mark.parametrize("name", [name for name in EXCEPTIONS if name != "exit"])
@pytest.mark.parametrize("operation", ["write", "fsync", "flush"])
def test_an_exception_is_an_error_for_the_caller(daemon: Callable[..., Daemon], operation: str, name: str) -> None:
    running = daemon()
    running.set(**{operation: name})
    descriptor = os.open(running.mnt / "file", os.O_RDWR | os.O_CREAT)
    try:
        if operation != "flush":
            with pytest.raises(OSError) as caught:
                os.fsync(descriptor) if operation == "fsync" else os.write(descriptor, b"x")
    finally:
        if operation == "flush":
            with pytest.raises(OSError) as caught:
                os.close(descriptor)
        else:
            os.close(descriptor)
    assert caught.value.errno == EXCEPTIONS[name][1]
    assert running.stderr().count("Traceback") == (name == "bug")
    assert ("ERROR" in running.stderr()) == (EXCEPTIONS[name][1] == errno.EIO)
    assert running.mnt.is_dir()  # still alive


def test_an_exit_inside_a_callback_ends_the_daemon_and_not_by_a_crash(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    running.set(fsync="exit")
    descriptor = os.open(running.mnt / "file", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError) as caught:
        os.fsync(descriptor)
    assert caught.value.errno == errno.EIO
    assert running.process.wait(10) == 3
    close_dead(descriptor)
    assert running.seen("destroy") and not mount_line(running.mnt)


@pytest.mark.parametrize(
    ("wrong", "noticed"), [("too much", "ValueError"), ("none", "TypeError"), ("bytearray", "ArgumentError")]
)
def test_read_must_return_bytes(daemon: Callable[..., Daemon], wrong: str, noticed: str) -> None:
    running = daemon()
    (running.mnt / "file").write_bytes(b"content" * 10_000)
    assert (running.mnt / "file").read_bytes() == b"content" * 10_000
    running.set(read_answer=wrong)
    with pytest.raises(OSError) as caught:
        (running.mnt / "file").read_bytes()
    assert caught.value.errno == errno.EIO
    assert noticed in running.stderr()  # before it became the kernel's problem


def test_unlink_of_an_open_file_arrives_as_unlink(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    with (running.mnt / "x-journal").open("w+b", buffering=0) as file:
        file.write(b"page")
        (running.mnt / "x-journal").unlink()
        assert [event["path"] for event in running.seen("unlink")] == ["/x-journal"]
        assert not running.seen("rename")
        assert os.pread(file.fileno(), 4, 0) == b"page"  # the handle lives on


def test_large_writes_arrive_whole_and_without_a_path(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    (running.mnt / "file").write_bytes(b"x" * (1 << 20))
    sizes = [event["size"] for event in running.seen("write")]
    assert sizes == [128 * 1024] * 8
    assert {event["path"] for event in running.seen("write")} == {None}


def test_slow_callbacks_overlap(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    for number in range(8):
        (running.mnt / str(number)).write_bytes(b"x")
    running.set(slow_read="1.5")
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: (running.mnt / str(number)).read_bytes(), range(8))) == [b"x"] * 8
    assert time.monotonic() - began < 6  # one after the other: 12 s


def test_threads_keep_their_locals(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    for _ in range(50):
        (running.mnt / "file").write_bytes(b"x")
    last_of = {event["thread"]: event["nth"] for event in running.seen("open", "write", "flush")}
    assert sum(last_of.values()) >= 150


def test_ended_threads_give_their_state_back(daemon: Callable[..., Daemon]) -> None:
    """libfuse ends idle threads beyond ten: the pinned state of each must go with it, and new ones start afresh."""
    running = daemon()
    (running.mnt / "file").write_bytes(b"x")
    running.set(slow_open="0.1")
    tasks = Path(f"/proc/{running.process.pid}/task")
    for _ in range(3):
        with ThreadPoolExecutor(24) as pool:
            assert set(pool.map(lambda _: (running.mnt / "file").read_bytes(), range(24))) == {b"x"}
        until(lambda: len(list(tasks.iterdir())) < 16)
    threads = {event["thread"] for event in running.seen("open")}
    assert [path.name for path in running.mnt.iterdir()] == ["file"]
    assert running.seen("readdir")[0]["states"] < 30 < 40 < len(threads)
    running.process.terminate()
    assert running.process.wait(10) == 0


@pytest.mark.parametrize("signalled", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_mount_cleanly(daemon: Callable[..., Daemon], signalled: signal.Signals) -> None:
    running = daemon(handler=True)
    descriptor = os.open(running.mnt / "file", os.O_WRONLY | os.O_CREAT)
    with ThreadPoolExecutor(1) as pool:
        running.set(slow_fsync="0.6")
        in_flight = pool.submit(os.fsync, descriptor)
        until(lambda: running.seen("fsync"))
        running.process.send_signal(signalled)
        in_flight.result(10)
    assert running.process.wait(10) == 0
    close_dead(descriptor)
    assert [event["op"] for event in running.seen("fsync-done", "destroy")] == ["fsync-done", "destroy"]
    assert not mount_line(running.mnt)


def test_an_unmount_ends_the_daemon(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    with (running.mnt / "file").open("wb"), pytest.raises(Busy, match="close what uses it"):
        unmount(str(running.mnt))
    unmount(str(running.mnt))
    assert running.process.wait(10) == 0
    assert running.seen("destroy") and running.stderr() == ""
    with pytest.raises(UsageError, match="no s3blockfs is mounted"):
        unmount(str(running.mnt))


def test_a_dead_mount_is_cleared_and_a_live_one_left_alone(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    assert clear_dead_mount(str(running.mnt)) is False
    assert running.mnt.is_dir()
    descriptor = os.open(running.mnt / "file", os.O_WRONLY | os.O_CREAT)
    running.process.kill()
    running.process.wait()
    with pytest.raises(OSError) as caught:
        running.mnt.stat()
    assert caught.value.errno == errno.ENOTCONN
    assert clear_dead_mount(str(running.mnt)) is True
    close_dead(descriptor)
    assert not mount_line(running.mnt)
    assert clear_dead_mount(str(running.mnt)) is False


@pytest.mark.parametrize("name", ["two words\\040", "line\nline\r\u2028#", "größe"])
def test_odd_names_of_mount_points(tmp_path: Path, name: str) -> None:
    """The kernel's table escapes some characters and leaves others that Python takes for ends of lines."""
    base = tmp_path / name
    base.mkdir()
    running = Daemon(base)
    try:
        running.wait_mounted()
        assert mount_line(running.mnt)
        running.process.kill()
        running.process.wait()
        link = tmp_path / "link"
        link.symlink_to(running.mnt)
        assert clear_dead_mount(str(link)) is True
        assert not mount_line(running.mnt)
        assert clear_dead_mount(str(running.mnt)) is False
    finally:
        running.stop()


def test_somebody_elses_dead_mount_is_not_touched(daemon: Callable[..., Daemon]) -> None:
    running = daemon(options={"subtype": "other"})
    running.process.kill()
    running.process.wait()
    with pytest.raises(EnvironmentProblem, match=r"dead fuse\.other, not ours"):
        clear_dead_mount(str(running.mnt))
    assert mount_line(running.mnt)


def test_a_mount_that_does_not_answer_is_named_and_left_alone(
    daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = daemon()
    monkeypatch.setattr(mountpoint, "ANSWER_S", 0.3)
    running.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(EnvironmentProblem, match="umount -f -l"):
            clear_dead_mount(str(running.mnt))
    finally:
        running.process.send_signal(signal.SIGCONT)
    assert running.mnt.is_dir()


def test_invalidation_inside_lock_shows_a_remote_change(daemon: Callable[..., Daemon]) -> None:
    running = daemon(keep_cache=True)
    (running.mnt / "file").write_bytes(b"old!")
    with (running.mnt / "file").open("r+b", buffering=0) as file:
        assert os.pread(file.fileno(), 4, 0) == b"old!"
        reads = len(running.seen("read"))
        assert os.pread(file.fileno(), 4, 0) == b"old!"
        assert len(running.seen("read")) == reads  # from the page cache
        running.set(remote="new!")
        assert os.pread(file.fileno(), 4, 0) == b"old!"
        fcntl.lockf(file, fcntl.LOCK_SH, 1, 0)
        assert os.pread(file.fileno(), 4, 0) == b"new!"
        assert len(running.seen("read")) == reads + 1


def test_invalidating_an_unknown_inode_says_so(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    with (running.mnt / "file").open("w+b", buffering=0) as file:
        running.set(inode="4711", remote="new!")
        fcntl.lockf(file, fcntl.LOCK_SH, 1, 0)  # no error: nothing of that inode is cached


def test_lock_sees_owner_range_and_process(daemon: Callable[..., Daemon], client: Any) -> None:
    running = daemon()
    path = running.mnt / "file"
    with path.open("w+b") as one, path.open("r+b") as two:
        fcntl.lockf(one, fcntl.LOCK_SH, 510, 0x40000002)
        fcntl.lockf(two, fcntl.LOCK_EX, 0, 100)  # the same owner: no conflict
        client(
            f"f = open({str(path)!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_SH, 1, 5); print('ready', flush=True); input()"
        )
        mine, also_mine, other = [event for event in running.seen("lock") if event["kind"] != F_UNLCK]
        with pytest.raises(BlockingIOError):
            fcntl.lockf(two, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
    assert (mine["start"], mine["end"], mine["kind"], mine["pid"]) == (0x40000002, 0x400001FF, F_RDLCK, os.getpid())
    assert (also_mine["start"], also_mine["end"], also_mine["kind"]) == (100, TO_END, F_WRLCK)
    assert mine["owner"] == also_mine["owner"] != other["owner"]
    assert other["pid"] != os.getpid()


def test_close_and_death_release_locks(daemon: Callable[..., Daemon], client: Any) -> None:
    running = daemon()
    path = running.mnt / "file"
    path.write_bytes(b"")
    hold = f"f = open({str(path)!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print('ready', flush=True); input()"
    with path.open("r+b") as file:
        holder = client(hold)
        with pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        holder.kill()
        holder.wait()
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with path.open("rb"):
            pass  # closing any descriptor of the file drops the process's locks, as POSIX has it
        client(hold)


@pytest.mark.parametrize("how", ["handler", "kill"])
def test_a_waiter_can_be_interrupted(daemon: Callable[..., Daemon], client: Any, how: str) -> None:
    running = daemon()
    path = running.mnt / "file"
    with path.open("w+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        waiter = client(
            f"signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7)); f = open({str(path)!r}, 'r+b')\n"
            "print('ready', flush=True); fcntl.lockf(f, fcntl.LOCK_EX)"
        )
        until(lambda: any(event["waits"] and event["pid"] == waiter.pid for event in running.seen("lock")))
        waiter.send_signal(signal.SIGUSR1 if how == "handler" else signal.SIGKILL)
        assert waiter.wait(5) == (7 if how == "handler" else -signal.SIGKILL)


def test_without_lock_the_kernel_keeps_local_locks(daemon: Callable[..., Daemon], client: Any) -> None:
    running = daemon(locks=False)
    path = running.mnt / "file"
    path.write_bytes(b"")
    client(f"f = open({str(path)!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print('ready', flush=True); input()")
    with path.open("r+b") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not running.seen("lock")


def test_truncation_arrives_in_open(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    (running.mnt / "file").write_bytes(b"long")
    (running.mnt / "file").write_bytes(b"x")
    assert [event["truncates"] for event in running.seen("open")] == [True, True]
    assert not running.seen("truncate")
    assert (running.mnt / "file").read_bytes() == b"x"


def test_a_name_that_is_no_utf8_gives_eilseq(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    for call in (os.stat, os.unlink, os.listdir, lambda name: os.open(name, os.O_CREAT | os.O_WRONLY)):
        with pytest.raises(OSError) as caught:
            call(os.fsencode(running.mnt) + b"/\xff\xfe")
        assert caught.value.errno == errno.EILSEQ
    (running.mnt / "größe").write_bytes(b"x")
    assert [path.name for path in running.mnt.iterdir()] == ["größe"]


def test_readdir_brings_types_and_gets_its_path(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    (running.mnt / "file").write_bytes(b"x")
    with os.scandir(running.mnt) as entries:
        assert [(entry.name, entry.is_file(follow_symlinks=False)) for entry in entries] == [("file", True)]
    assert [event["path"] for event in running.seen("readdir")] == ["/"]
    status = (running.mnt / "file").stat()
    assert (status.st_mtime_ns, running.mnt.stat().st_nlink) == (1_000_000_001, 1)


def test_the_caller_is_a_process_even_when_a_thread_asks(daemon: Callable[..., Daemon]) -> None:
    running = daemon()
    with ThreadPoolExecutor(1) as pool:
        pool.submit((running.mnt / "file").write_bytes, b"x").result()
    assert {event["pid"] for event in running.seen("open")} == {os.getpid()}


def test_a_waiter_does_not_keep_the_daemon_from_ending(daemon: Callable[..., Daemon], client: Any) -> None:
    running = daemon()
    path = running.mnt / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    waiter = client(f"f = open({str(path)!r}, 'r+b'); print('ready', flush=True); fcntl.lockf(f, fcntl.LOCK_EX)")
    until(lambda: any(event["waits"] for event in running.seen("lock")))
    running.process.terminate()
    assert running.process.wait(10) == 0
    assert waiter.wait(10) != 0
    close_dead(descriptor)


def test_an_end_in_the_middle_of_reads_and_invalidations(tmp_path: Path, client: Any) -> None:
    """The kernel's wait for a page that is being read cannot be killed: the loop must answer it before it ends."""
    running = Daemon(tmp_path)
    running.set(invalidate="yes", slow_read="0.005")
    try:
        running.wait_mounted()
        path = running.mnt / "file"
        path.write_bytes(b"x" * (1 << 20))
        reader = client(
            f"import threading, random; fd = os.open({str(path)!r}, os.O_RDONLY)\n"
            "def work():\n"
            "    while os.pread(fd, 4096, random.randrange(256) * 4096): pass\n"
            "for _ in range(24): threading.Thread(target=work).start()\n"
            "time.sleep(0.5); print('ready', flush=True)"
        )
        running.process.terminate()
        assert running.process.wait(10) == 0
        reader.wait(10)
    finally:
        running.stop()


def test_nobody_waits_for_a_daemon_that_is_finishing(daemon: Callable[..., Daemon]) -> None:
    """Once the loop has ended, requests fail at once, however long `destroy` publishes."""
    running = daemon()
    descriptor = os.open(running.mnt / "file", os.O_RDONLY | os.O_CREAT)
    running.set(slow_destroy="30")
    running.process.terminate()
    until(lambda: running.seen("destroy"))
    close_dead(descriptor)
    assert not running.seen("destroyed")


@pytest.mark.parametrize("operation", ["init", "quiesce", "destroy"])
def test_a_failing_init_quiesce_or_destroy_ends_the_mount_and_comes_out(tmp_path: Path, operation: str) -> None:
    running = Daemon(tmp_path)
    running.set(**{operation: "full"})
    try:
        until(lambda: running.seen("init"))
        if operation == "quiesce":
            running.process.terminate()
        elif operation == "destroy":
            unmount(str(running.mnt))
        assert running.process.wait(10) == 1
        assert running.stderr().splitlines()[-1] == "OSError: [Errno 28] full"
        assert not mount_line(running.mnt)
    finally:
        running.stop()


def test_the_source_may_contain_commas(daemon: Callable[..., Daemon]) -> None:
    running = daemon(options={"fsname": r"s3://bucket/a,b\c"})
    assert "fuse.s3blockfs s3://bucket/a,b\\134c " in mount_line(running.mnt)


@pytest.mark.parametrize("kind", ["missing", "unknown option"])
def test_a_failed_mount_points_at_what_libfuse_says(tmp_path: Path, kind: str, capfd: Any) -> None:
    """libfuse explains a failed mount on stderr only; the error points there."""
    target = tmp_path / "mnt"
    if kind != "missing":
        target.mkdir()
    with pytest.raises(EnvironmentProblem, match="libfuse has just said why") as caught:
        mount(Operations(), str(target), options={"surely_unknown": kind != "missing"})
    assert str(target) in str(caught.value)
    assert ("bad mount point" if kind == "missing" else "surely_unknown") in capfd.readouterr().err


def test_a_directory_with_files_is_refused(tmp_path: Path, capfd: Any) -> None:
    """In our words, because libfuse would recommend the option that hides the files."""
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose an empty directory"):
        mount(Operations(), str(tmp_path))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("option", ["writeback_cache", "nothreads", "use_ino", "nonempty"])
def test_options_that_break_a_promise_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} is refused"):
        mount(Operations(), str(tmp_path), options={option: True})


def test_import_without_libfuse_names_the_package() -> None:
    code = (
        "from s3blockfs.errors import EnvironmentProblem\n"
        "try: import s3blockfs.fuse_binding\n"
        "except EnvironmentProblem as error: print(error)"
    )
    environment = {**os.environ, "FUSE_LIBRARY_PATH": "/nonexistent/libfuse.so.2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "apt-get install libfuse2" in done.stdout and "libfuse2t64" in done.stdout


def test_require_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require()

    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patched, pytest.raises(EnvironmentProblem) as caught:
        patched.setattr(os, "open", refuse)
        require()
    for part in ("Operation not permitted", "modprobe fuse", "chmod 666 /dev/fuse", "--device /dev/fuse"):
        assert part in str(caught.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="install fuse3"):
        require()
