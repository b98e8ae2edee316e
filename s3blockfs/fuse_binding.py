"""fusepy on libfuse 2.9 with its traps closed; the only module that imports `fuse`.

Offers: a typed table of operations (`Operations`), the loop (`mount`), and what a callback may ask (`Mounted`,
`context_pid`). The care of mount points (`require`, `unmount`, `clear_dead_mount`) is in `mountpoint.py`. Does not
belong here: anything that knows about databases, S3 or SQLite.

Thread rule: libfuse runs callbacks on threads of its own, as many at once as there are requests; `init` and `destroy`
run once, while no other callback does. A thread that the file system needs is started in `init`.

Importing this module without libfuse raises EnvironmentProblem: import it in the command that mounts, nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Protocol

from s3blockfs.errors import EnvironmentProblem, S3BlockFSError, UsageError
from s3blockfs.mountpoint import SUBTYPE
from s3blockfs.mountpoint import clear_dead_mount as clear_dead_mount
from s3blockfs.mountpoint import require as require
from s3blockfs.mountpoint import unmount as unmount

try:
    import fuse
except OSError as error:
    raise EnvironmentProblem(
        f"libfuse 2 cannot be loaded ({error}): apt-get install libfuse2 (libfuse2t64 on newer Debian and Ubuntu)"
    ) from error

log = logging.getLogger(__name__)

#: What every mount is made with; None of these is a default of libfuse 2.9, where the text says nothing else.
DEFAULT_OPTIONS: Mapping[str, str | int | bool] = {
    "fsname": SUBTYPE,  # first column of /proc/mounts
    "subtype": SUBTYPE,
    # The unlink of an open file arrives as unlink, not as a rename to .fuse_hidden*: a journal's is a commit point.
    "hard_remove": True,
    "big_writes": True,  # writes of up to 128 KiB a request instead of one page
    "max_read": 128 * 1024,  # the most that the kernel asks this protocol version for anyway; said for the reader
    "default_permissions": True,  # the kernel checks modes, so `access` is never called
    "atomic_o_trunc": True,  # O_TRUNC arrives in open's flags, not as a truncate before it
    # The kernel remembers no names and attributes (defaults: 1, 1, 0): another machine may change them.
    "attr_timeout": 0,
    "entry_timeout": 0,
    "negative_timeout": 0,
}

#: Options that break a promise of this package, and why.
_REFUSED_OPTIONS = {
    "writeback_cache": "a journal's unlink would arrive before the pages it commits",
    "nothreads": "one slow request to S3 would stop every other",
    "use_ino": "st_ino must be the kernel's own number, which invalidation needs",
    "nonempty": "files below the mount would be hidden",
}

#: What libfuse says -> what to do about it. The first match wins.
_MOUNT_HINTS = {
    "not empty": "choose an empty directory",
    "bad mount point": "create the directory, and if a dead mount is there, clear it with fusermount -u -z",
    "user_allow_other": "add user_allow_other to /etc/fuse.conf or drop allow_other",
    "unknown option": "drop that mount option",
    "not permitted": "mount as root or with a set-uid fusermount; a container needs --cap-add SYS_ADMIN",
}

#: The application hears these as "I/O error", "read-only" and so on; only the log says why and what to do.
_TO_BE_EXPLAINED = {errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP}

_libfuse = fuse._libfuse
_libfuse.fuse_get_session.restype = ctypes.c_void_p
_libfuse.fuse_session_next_chan.restype = ctypes.c_void_p

F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2
F_GETLK, F_SETLK, F_SETLKW = 5, 6, 7


class Flock(ctypes.Structure):
    """`struct flock` of fcntl(2), as libfuse hands it to `lock`. F_GETLK is answered in place: F_UNLCK means "free".

    Kernel and libfuse have normalised it: `l_whence` is SEEK_SET and `l_len` 0 means "to the end". `l_pid` is the
    caller's process (not its thread), so `lock` needs no `context_pid`; 0 when unlocking.
    """

    _fields_ = (
        ("l_type", ctypes.c_short),
        ("l_whence", ctypes.c_short),
        ("l_start", ctypes.c_int64),
        ("l_len", ctypes.c_int64),
        ("l_pid", ctypes.c_int),
    )
    l_type: int
    l_whence: int
    l_start: int
    l_len: int
    l_pid: int


class FileInfo(Protocol):
    """`struct fuse_file_info`: what `open` and `create` fill in and every later call on the handle brings back."""

    fh: int
    """The file system's handle, 64 bits."""
    flags: int
    """The flags of open(2)."""
    keep_cache: int
    """Set to 1 in open: keep the pages that the kernel has of this inode."""
    direct_io: int
    """Set to 1 in open: no page cache for this handle (and no shared mmap)."""
    lock_owner: int
    """In lock and flush: who asks. One value per descriptor table, that is, per process."""


Attributes = Mapping[str, int]
"""`st_*` or `f_*` names of stat(2) / statvfs(2); times in nanoseconds since the epoch."""


class Operations:
    """The file system. Override what it can do; what stays None answers ENOSYS, or what the kernel does without it.

    (Without `lock` the kernel keeps local locks; without `flush` and `fsync` close and fsync succeed.) A path is a str
    that starts at the mount, or None where the call comes with a handle, which is then the only thing to go by:
    `flag_nopath` spares libfuse from making up paths, and from making an unlink wait for a read of the same path.
    An error is an OSError or S3BlockFSError with the errno to answer; anything else is logged and answered EIO.
    """

    flag_nullpath_ok = 1
    flag_nopath = 1
    use_ns = True

    mounted: Mounted
    """Set before `init` is called."""

    def __call__(self, operation: str, *arguments: Any) -> Any:
        """How fusepy calls an operation."""
        return getattr(self, operation)(*arguments)

    def init(self) -> None:
        """The mount is up, on a thread of libfuse. An exception unmounts it and comes out of `mount`."""

    def destroy(self) -> None:
        """The mount is gone and no callback is running. An exception comes out of `mount`."""

    def quiesce(self) -> None:
        """A signal asked for the end: return when it may come. Requests are still answered meanwhile."""

    def opendir(self, path: str) -> None:
        """Refuse a directory here if need be."""

    def releasedir(self) -> None:
        """Nothing to do: the binding keeps the handles of directories."""

    getattr: Callable[[str | None, FileInfo | None], Attributes] | None = None
    """(path, handle or None). A directory must report st_nlink 1, or find(1) counts wrong."""
    readlink: Callable[[str], str] | None = None
    readdir: Callable[[str], Iterable[tuple[str, Attributes | None]]] | None = None
    """Names with attributes; of these only the type travels (d_type), which spares readers a stat per name."""
    access: Callable[[str, int], None] | None = None
    statfs: Callable[[str], Attributes] | None = None
    create: Callable[[str, int, FileInfo], None] | None = None
    """(path, mode, handle to fill in)."""
    open: Callable[[str, FileInfo], None] | None = None
    read: Callable[[str | None, int, int, FileInfo], bytes] | None = None
    """(path, size, offset, handle). At most `size` bytes; fewer only at the end of the file."""
    write: Callable[[str | None, bytes, int, FileInfo], int] | None = None
    """(path, data, offset, handle) -> how many bytes were taken."""
    truncate: Callable[[str | None, int, FileInfo | None], None] | None = None
    """(path, length, handle or None when called by path)."""
    flush: Callable[[str | None, FileInfo], None] | None = None
    """Once per close(2) of any copy of the descriptor; its error is what close returns."""
    release: Callable[[str | None, FileInfo], None] | None = None
    """The last copy is closed. Later than close(2), and its error reaches nobody."""
    fsync: Callable[[str | None, int, FileInfo], None] | None = None
    fsyncdir: Callable[[str | None, int, int], None] | None = None
    lock: Callable[[str | None, FileInfo, int, Flock], None] | None = None
    """(path, handle, F_GETLK / F_SETLK / F_SETLKW, lock). libfuse calls it with F_UNLCK 0..0 at every close."""
    unlink: Callable[[str], None] | None = None
    rename: Callable[[str, str], None] | None = None
    mkdir: Callable[[str, int], None] | None = None
    rmdir: Callable[[str], None] | None = None
    chmod: Callable[[str, int], None] | None = None
    chown: Callable[[str, int, int], None] | None = None
    utimens: Callable[[str, tuple[int, int] | None], None] | None = None


class Mounted:
    """What a file system can ask of the kernel while it is mounted.

    Before the loop ends, new calls are refused and requests answered until those under way have returned: a call that
    waits for another request (for a page, the kernel's wait cannot even be killed) would otherwise last for ever.
    """

    def __init__(self, mountpoint: str, session: int, descriptor: int) -> None:
        self._mountpoint, self._session = mountpoint, ctypes.c_void_p(session)
        os.set_inheritable(descriptor, False)  # a child that kept it would keep a dead mount from being noticed
        self._device = os.dup(descriptor)  # libfuse closes its own at an unmount, when a thread may still invalidate
        self._changed = threading.Condition()
        self._calls = 0
        self._ending = self._gone = False

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        with self._changed:
            if self._ending:
                raise OSError(errno.ENOTCONN, "the mount is ending: stop using it")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def invalidate_inode(self, ino: int, offset: int = 0, length: int = 0) -> bool:
        """Make the kernel forget its attributes of an inode and its pages from `offset` (`length` 0: to the end).

        Returns False when the kernel does not know the inode (any more): then nothing is cached. Waits for READs of
        those pages that are being answered, so hold no lock that a read needs, and never call it from a write to that
        inode. OSError: the pages may still be cached; ENOTCONN when the mount is ending.
        """
        # The bytes that fuse_lowlevel_notify_inval_inode sends: fuse_out_header (size, FUSE_NOTIFY_INVAL_INODE, 0) and
        # fuse_notify_inval_inode_out of <linux/fuse.h>. That function uses libfuse's channel, which is freed before
        # `destroy` is called, when a thread of the file system may still be about to invalidate.
        with self._call():
            try:
                os.write(self._device, struct.pack("=IiQQqq", 40, 2, 0, ino, offset, length))
            except FileNotFoundError:
                return False
            return True

    def inode(self, path: str) -> int:
        """The kernel's number of the inode that is now at `path`, for `invalidate_inode`.

        Makes requests to this very mount (`getattr` of every directory on the way and of the file): hold no lock that
        they need, and call it from no create, unlink or rename, during which the kernel has the directory locked.
        """
        with self._call():
            return Path(self._mountpoint + path).stat().st_ino

    def interrupted(self) -> bool:
        """Whether to give up waiting: the caller got a signal, or the mount is ending. Only on a callback's thread."""
        return self._ending or bool(_libfuse.fuse_interrupted())

    def _drain(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.wait_for(lambda: self._calls == 0)
            if self._device >= 0:
                os.close(self._device)
                self._device = -1

    def _stop(self, loop_thread: int) -> None:
        """End the loop, with its requests still being answered until all calls have returned."""
        self._drain()
        with self._changed:
            if not self._gone:
                _libfuse.fuse_session_exit(self._session)
                signal.pthread_kill(loop_thread, signal.SIGTERM)  # out of its sem_wait; whatever the handler does

    def _close(self) -> None:
        self._drain()
        with self._changed:
            self._gone = True  # libfuse frees the session next


def context_pid() -> int:
    """The process (not the thread) that made the current request; 0 when it is not visible from here.

    Only on the thread of a callback. Reads /proc, so not for every read and write.
    """
    thread = int(fuse.fuse_get_context()[2])
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the caller is gone, as a killed one can be
        found = re.search(r"^Tgid:\s*(\d+)", Path(f"/proc/{thread}/status").read_text(), re.MULTILINE)
        return int(found[1]) if found else thread
    return thread


# --- one thread state per thread -----------------------------------------------------------------------------------

# ctypes gives every callback on a foreign thread a new Python thread state and destroys it afterwards: slow, and
# threading.local starts empty each time. One extra PyGILState_Ensure per thread keeps it. libfuse ends idle threads, so
# the extra reference is given back when the thread ends, by glibc's hook for C++, which runs while the thread can still
# call Python (pthread keys are destroyed when Python's own is already cleared). Without that hook nothing is pinned.
_thread = threading.local()
_call_at_thread_exit = getattr(ctypes.CDLL(None), "__cxa_thread_atexit_impl", None)


def _unpin(_: int | None) -> None:
    ctypes.pythonapi.PyGILState_Release(0)  # 0: the interpreter lock stays with the callback that we are in


_unpin_callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_unpin)


def _pin() -> None:
    _thread.known = True
    if _call_at_thread_exit is not None:
        ctypes.pythonapi.PyGILState_Ensure()
        # The third argument is any address in the library to keep loaded until then; NULL crashes glibc.
        _call_at_thread_exit(_unpin_callback, None, ctypes.pythonapi.PyGILState_Ensure)


class _CapturedStderr:
    """Everything that is written to descriptor 2, until `end`: libfuse explains a failed mount nowhere else."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`, on another thread
        self._stderr = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        self.lines: list[str] = []

    def end(self) -> None:
        if self._file.closed:
            return
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._file.seek(0)
        self.lines = [line for line in self._file.read().decode(errors="replace").splitlines() if line.strip()]
        self._file.close()


class Fuse(fuse.FUSE):  # type: ignore[misc]  # fusepy has no types
    """fusepy's loop. Use `mount`."""

    def __init__(
        self,
        operations: Operations,
        mountpoint: str,
        options: Mapping[str, str | int | bool],
        on_fatal: Callable[[], None],
    ) -> None:
        """`on_fatal` is called from a callback after which the mount must end; it arranges for a call of `stop`."""
        self._mount: tuple[Operations, str, Mapping[str, str | int | bool]] = operations, mountpoint, options
        self._on_fatal = on_fatal
        self._failure: BaseException | None = None
        self._directories: dict[int, str] = {}
        self._handles = count(1)
        self._mounted: Mounted | None = None
        self._up_or_ended = threading.Event()

    def run(self) -> None:
        """From the mount to the unmount."""
        operations, mountpoint, options = self._mount
        self._loop_thread = threading.get_ident()
        self._captured = _CapturedStderr()
        try:
            super().__init__(operations, mountpoint, raw_fi=True, **options)
        except RuntimeError as error:  # fuse_main's exit status, always 1
            self._captured.end()
            said = (
                self._captured.lines[0] if self._captured.lines else "libfuse ended the loop; its message is on stderr"
            )
            hint = next((do for word, do in _MOUNT_HINTS.items() if word in said.lower()), "run `s3blockfs doctor`")
            raise self._failure or EnvironmentProblem(f"cannot mount on {mountpoint}: {said}: {hint}") from error
        finally:
            self._captured.end()
            self._up_or_ended.set()
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """End `run`, from another thread: callbacks in flight finish first."""
        self._up_or_ended.wait()
        if self._mounted:
            self._mounted._stop(self._loop_thread)

    def _wrapper(self, function: Callable[..., int | None], *arguments: Any) -> int:
        """Every callback: an exception that reached ctypes would make the call return garbage, even "success"."""
        try:
            if not getattr(_thread, "known", False) and threading.get_ident() != self._loop_thread:
                _pin()
            result = function(*arguments)
            if result is None:
                return 0
            if not isinstance(result, int):
                raise TypeError(f"{function.__name__} returned {type(result).__name__}, not int or None")
            return result
        except BaseException as error:  # noqa: BLE001  a C caller cannot take an exception; _answer logs it
            return self._answer(function.__name__, arguments, error)

    def _answer(self, name: str, arguments: tuple[Any, ...], error: BaseException) -> int:
        """The negative errno for an exception of a callback."""
        if isinstance(error, UnicodeDecodeError) and error.object in arguments:
            return -errno.EILSEQ  # a path that is no UTF-8
        code: int = getattr(error, "errno", None) or errno.EIO
        if not isinstance(error, (OSError, S3BlockFSError)) or code not in errno.errorcode:
            code = errno.EIO  # None (TimeoutError), 0, negative; and the kernel never answers a request that got 512..
        if not isinstance(error, (OSError, S3BlockFSError)):
            log.error("%s failed in a way nobody foresaw; the caller gets EIO", name, exc_info=error)
        elif code in _TO_BE_EXPLAINED:
            log.error("%s: %s: %s", name, type(error).__name__, error)
        else:
            log.debug("%s: %s", name, error)
        if name in ("init", "destroy") or not isinstance(error, Exception):
            self._failure = self._failure or error
            self._on_fatal()
        return 0 if name == "init" else -code  # what init returns becomes a pointer

    # --- callbacks that differ from fusepy's ---------------------------------------------------------------------

    def init(self, _connection: int) -> None:
        self._captured.end()
        session = ctypes.c_void_p(_libfuse.fuse_get_session(ctypes.c_void_p(_libfuse.fuse_get_context().contents.fuse)))
        channel = ctypes.c_void_p(_libfuse.fuse_session_next_chan(session, None))
        self._mounted = Mounted(self._mount[1], session.value or 0, _libfuse.fuse_chan_fd(channel))
        self._up_or_ended.set()
        self.operations.mounted = self._mounted
        self.operations.init()

    def destroy(self, _private: int) -> None:
        if self._mounted:
            self._mounted._close()
        self.operations.destroy()

    def read(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        data = self.operations.read(self._decode_optional_path(path), size, offset, info.contents)
        if len(data) > size:  # fusepy asserts it, and `python -O` would then write past the end of libfuse's buffer
            raise ValueError(f"read returned {len(data)} bytes for a buffer of {size}")
        ctypes.memmove(buffer, data, len(data))
        return len(data)

    def lock(self, path: bytes | None, info: Any, command: int, lock: int) -> None:
        self.operations.lock(self._decode_optional_path(path), info.contents, command, Flock.from_address(lock))

    def opendir(self, path: bytes, info: Any) -> None:
        name = path.decode(self.encoding)
        self.operations.opendir(name)
        info.contents.fh = handle = next(self._handles)
        self._directories[handle] = name

    def readdir(self, _path: bytes | None, buffer: int, filler: Any, _offset: int, info: Any) -> None:
        entries = self.operations.readdir(self._directories[info.contents.fh])
        for name, attributes in [(".", None), ("..", None), *entries]:
            stat = None
            if attributes is not None:
                stat = fuse.c_stat()
                fuse.set_st_attrs(stat, attributes, use_ns=True)
            if filler(buffer, name.encode(self.encoding), stat, 0) != 0:
                raise MemoryError("libfuse cannot take more directory entries")

    def releasedir(self, _path: bytes | None, info: Any) -> None:
        del self._directories[info.contents.fh]


def mount(operations: Operations, mountpoint: str, *, options: Mapping[str, str | int | bool] | None = None) -> None:
    """Serve `operations` on `mountpoint` in the foreground, on threads of libfuse, until it is unmounted.

    Returns after an unmount, SIGTERM, SIGINT or SIGHUP: callbacks in flight have finished and `destroy` was called.
    Call it on the main thread; elsewhere libfuse's own handlers end the loop without waiting for calls of `Mounted`.
    `options` go on top of DEFAULT_OPTIONS; False removes one. Raises UsageError for an option that would break a
    promise, EnvironmentProblem when the mount fails, and whatever `init` or `destroy` raised.
    """
    chosen = {**DEFAULT_OPTIONS, **(options or {})}
    for name, reason in _REFUSED_OPTIONS.items():
        if chosen.get(name, False) is not False:
            raise UsageError(f"mount option {name} is refused: {reason}")
    require()
    escaped = {  # libfuse splits options at commas
        name: re.sub(r"([\\,])", r"\\\1", value) if isinstance(value, str) else value for name, value in chosen.items()
    }
    # The loop runs on another thread, because Python handles signals on the main one. `put` may be called in a handler.
    events: SimpleQueue[str] = SimpleQueue()
    loop = Fuse(
        operations, str(Path(mountpoint).absolute()), {"foreground": True, **escaped}, lambda: events.put("stop")
    )
    with _handling_signals(lambda: events.put("stop")), ThreadPoolExecutor(1, "s3blockfs-fuse") as executor:
        running = executor.submit(loop.run)
        running.add_done_callback(lambda _: events.put("ended"))
        if events.get() == "stop":
            operations.quiesce()
            loop.stop()
        running.result()


@contextlib.contextmanager
def _handling_signals(action: Callable[[], None]) -> Iterator[None]:
    """Do `action` on the signals that ask a daemon to end; SIGINT and SIGHUP stay ignored if they are (nohup)."""
    replaced = {}
    if threading.current_thread() is threading.main_thread():
        may_be_ignored = [each for each in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
        asked = [signal.SIGTERM, *may_be_ignored]
        replaced = {each: signal.signal(each, lambda *_: action()) for each in asked}
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
