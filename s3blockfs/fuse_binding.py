"""fusepy on libfuse 2.9 with its traps closed; the only module that imports `fuse`. Knows nothing of databases or S3.

Thread rule: libfuse runs callbacks on threads of its own, as many at once as there are requests; `init` and `destroy`
run once, while no other callback does. A thread that the file system needs is started in `init`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import operator
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_int64, c_short, c_void_p
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from s3blockfs.errors import EnvironmentProblem, Immutable, S3BlockFSError, UsageError
from s3blockfs.mountpoint import SUBTYPE, require

try:
    import fuse
except OSError as error:
    fix = "apt-get install libfuse2 (libfuse2t64 on newer Debian and Ubuntu)"
    raise EnvironmentProblem(f"libfuse 2 cannot be loaded ({error}): {fix}") from error

log = logging.getLogger(__name__)

#: What every mount is made with. What is False here may not be asked for.
DEFAULT_OPTIONS: Mapping[str, str | int | bool] = {
    "subtype": SUBTYPE,
    "hard_remove": True,  # an unlink of an open file (a commit point) arrives as such, not as rename to .fuse_hidden*
    "big_writes": True,  # writes of up to 128 KiB a request instead of one page
    "default_permissions": True,  # the kernel checks modes, so `access` is never called
    "atomic_o_trunc": True,  # O_TRUNC arrives in open's flags, not as a truncate before it
    "attr_timeout": 0,  # 1 s by default, but another machine may change attributes; see `kernelcache.py`
    "entry_timeout": 0,  # and names
    "writeback_cache": False,  # a journal's unlink would arrive before the pages it commits
    "nothreads": False,  # one slow request to S3 would stop every other
    "use_ino": False,  # st_ino must be the kernel's own number, which invalidation needs
    "nonempty": False,  # files below the mount would be hidden
}

#: The application hears these as "I/O error", "read-only" and so on; only the log says why and what to do.
_TO_BE_EXPLAINED = {errno.EIO, errno.EREMOTEIO, errno.EROFS, errno.EACCES, errno.ESTALE}
_TO_BE_EXPLAINED |= {errno.EPROTONOSUPPORT, errno.EOPNOTSUPP}

_libfuse = fuse._libfuse
_libfuse.fuse_get_session.restype = _libfuse.fuse_session_next_chan.restype = c_void_p


class Flock(ctypes.Structure):
    """`struct flock` of fcntl(2): `l_len` 0 means "to the end"; F_GETLK is answered in place, F_UNLCK means "free"."""

    _fields_ = (("l_type", c_short), ("l_whence", c_short), ("l_start", c_int64), ("l_len", c_int64), ("l_pid", c_int))
    l_type: int
    l_start: int
    l_len: int
    l_pid: int  # the caller's process; 0 when unlocking


class LookAgain(OSError):
    """Raised by `open`: what the kernel was told of this name is old. It looks the name up anew, and opens it then."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.ESTALE, os.strerror(errno.ESTALE), path)


class FileInfo(Protocol):
    """`struct fuse_file_info`: what `open` and `create` fill in and every later call on the handle brings back."""

    fh: int  # the file system's handle
    flags: int  # of open(2)
    direct_io: int  # set to 1 in open: read by this handle alone, past the kernel's pages
    keep_cache: int  # set to 1 in open: keep the pages that the kernel has of this inode
    lock_owner: int  # in lock and flush: who asks, one value per descriptor table, that is, per process


#: `st_*` or `f_*` names of stat(2) / statvfs(2); times in nanoseconds since the epoch.
Attributes = Mapping[str, int]


class Operations:
    """The file system: fusepy's operations with `raw_fi`; what is not defined answers ENOSYS, or what the kernel does
    without it. `getattr` says st_nlink 1 for a directory (find(1) counts on it), `readdir(path)` gives pairs of a name
    and its attributes, `lock` gets a Flock and comes with F_UNLCK 0..0 at every close(2).

    A path starts at the mount; it is None where there is a handle, so that no unlink waits for a read of the same path.
    Raise OSError or S3BlockFSError with the errno to answer; anything else is logged and answered EIO."""

    mounted: Mounted  # set before `init` is called

    flag_nullpath_ok = flag_nopath = 1
    use_ns = True
    opendir = releasedir = True  # the binding does these, to remember the path of a directory's handle

    def __call__(self, operation: str, *arguments: Any) -> Any:
        """How fusepy calls an operation."""
        return getattr(self, operation)(*arguments)

    def init(self) -> None:
        """The mount is up, on a thread of libfuse. An exception unmounts it and comes out of `mount`."""

    def destroy(self) -> None:
        """The mount is gone and no callback is running. An exception comes out of `mount`."""

    def quiesce(self) -> None:
        """A signal asked for the end: return when it may come. Requests are still answered meanwhile."""


def context_thread() -> int:
    """The thread that made this callback's request; 0 when it is not visible from here."""
    return int(fuse.fuse_get_context()[2])


def context_pid() -> int:
    """Its process."""
    thread = context_thread()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the caller is gone, as a killed one can be
        return int(Path(f"/proc/{thread}/status").read_text().split("\nTgid:")[1].split()[0])
    return thread


# ctypes gives every callback on a foreign thread a new Python thread state and destroys it afterwards: slow, and
# threading.local starts empty each time. One PyGILState_Ensure per thread keeps it. libfuse ends idle threads, so that
# is given back when the thread ends, by glibc's hook for C++, which runs while the thread can still call Python
# (pthread keys are destroyed when Python's own is already cleared). Without that hook nothing is pinned.
_thread = threading.local()
_call_at_thread_exit = getattr(ctypes.CDLL(None), "__cxa_thread_atexit_impl", None)
_unpin = ctypes.CFUNCTYPE(None, c_void_p)(lambda _: ctypes.pythonapi.PyGILState_Release(0))  # 0: GIL stays held


def _pin() -> None:
    _thread.known = True
    if _call_at_thread_exit is not None:
        ctypes.pythonapi.PyGILState_Ensure()
        # The third argument is any address in the library to keep loaded until then; NULL crashes glibc.
        _call_at_thread_exit(_unpin, None, ctypes.pythonapi.PyGILState_Ensure)


class Mounted(fuse.FUSE):  # type: ignore[misc]  # fusepy has no types
    """fusepy's loop, and what a file system can ask of the kernel while it runs: calls that may wait for requests (for
    a page, the kernel's wait cannot even be killed), so all of them have to return before the loop may end."""

    def __init__(self) -> None:
        self.events: SimpleQueue[str] = SimpleQueue()  # "stop": time to call `stop`; "ended". For signal handlers too
        self._failure: BaseException | None = None
        self._directories: dict[int, str] = {}
        self._handles = count(1)
        self._up_or_ended = threading.Event()
        self._session: c_void_p | None = None
        self._device = -1
        self._changed = threading.Condition()
        self._calls, self._ending = 0, False

    def invalidate_inode(self, ino: int) -> None:
        """Make the kernel forget the attributes and pages of an inode. OSError (ENOTCONN: the mount is ending): it may
        still have them. Waits for READs: hold no lock that they need, and never call it from a write to that inode."""
        # What fuse_lowlevel_notify_inval_inode sends; that uses a channel which libfuse frees before `destroy`.
        with self._call(), contextlib.suppress(FileNotFoundError):
            os.write(self._device, struct.pack("=IiQQqq", 40, 2, 0, ino, 0, 0))

    def inode(self, path: str) -> int:
        """The kernel's number of the inode that is now at `path`, by `getattr` requests: hold no lock that they need,
        and call it from no create, unlink or rename, during which the kernel has the directory locked."""
        with self._call():
            found = Path(self._mountpoint + path).stat()
            self._number = found.st_dev
            return found.st_ino

    def locks(self, ino: int) -> set[tuple[bool, int, int, int]]:
        """(is a write lock, process, first byte, last byte) of the POSIX locks that the kernel granted on an inode that
        `inode` told, when `lock` is not offered. Listed in pieces, one may be missed while others go: so twice."""
        found = set()
        for line in (Path("/proc/locks").read_text() + Path("/proc/locks").read_text()).splitlines():
            _, kind, *fields = line.split()
            if kind == "POSIX" and fields[3] == f"{os.major(self._number):02x}:{os.minor(self._number):02x}:{ino}":
                end = (1 << 63) - 1 if fields[5] == "EOF" else int(fields[5])
                found.add((fields[1] == "WRITE", int(fields[2]), int(fields[4]), end))
        return found

    def interrupted(self) -> bool:
        """Whether to give up waiting: the caller got a signal, or the mount is ending. Only on a callback's thread."""
        return self._ending or bool(_libfuse.fuse_interrupted())

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

    def run(self, operations: Operations, mountpoint: str, options: Mapping[str, str | int | bool]) -> None:
        """From the mount to the unmount."""
        self._mountpoint, self._loop_thread = mountpoint, threading.get_ident()
        _thread.known = True  # this one is Python's own
        try:
            super().__init__(operations, mountpoint, raw_fi=True, foreground=True, **options)
        except RuntimeError:  # fuse_main's exit status, always 1
            if self._up_or_ended.is_set():  # libfuse does not know the kernel's answer while it aborts a request
                log.warning("%s: unmounted while requests were under way", mountpoint)
            else:
                said = f"{mountpoint} cannot be mounted: libfuse has just said why; `s3blockfs doctor` may know more"
                self._failure = self._failure or EnvironmentProblem(said)
        finally:
            self._up_or_ended.set()
            self.events.put("ended")
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """End `run`, from another thread: callbacks in flight finish first."""
        self._up_or_ended.wait()
        self._refuse_calls()
        with self._changed:
            if self._session:
                _libfuse.fuse_session_exit(self._session)
                signal.pthread_kill(self._loop_thread, signal.SIGTERM)  # out of its sem_wait; whatever the handler does

    def _refuse_calls(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.wait_for(lambda: self._calls == 0)
            if self._device >= 0:
                os.close(self._device)
                self._device = -1

    # --- callbacks; those that are not here are as fusepy has them -------------------------------------------------

    def _wrapper(self, function: Callable[..., int | None], *arguments: Any) -> int:
        """Every callback: an exception that reached ctypes would make the call return garbage, even "success"."""
        name, code = function.__name__, errno.EIO
        try:
            if not hasattr(_thread, "known"):
                _pin()
            return operator.index(function(*arguments) or 0)
        except (OSError, S3BlockFSError) as error:
            failure: BaseException = error
            if error.errno and error.errno in errno.errorcode:  # not None; and 512.. would get no answer
                code = error.errno
            is_usual = isinstance(error, Immutable | LookAgain) and name == "open"
            level = logging.ERROR if code in _TO_BE_EXPLAINED and not is_usual else logging.DEBUG
            log.log(level, "%s: %s: %s", name, type(error).__name__, error)
        except BaseException as error:
            if isinstance(error, UnicodeDecodeError) and error.object in arguments:
                return -errno.EILSEQ  # a path that is no UTF-8
            failure = error
            log.error("%s failed in a way nobody foresaw; the caller gets EIO", name, exc_info=error)
        if name in ("init", "destroy") or not isinstance(failure, Exception):
            self._failure = self._failure or failure
            self.events.put("stop")
        del failure  # its traceback leads back here: a full journal would stay on the disk until Python finds the cycle
        return 0 if name == "init" else -code  # what init returns becomes a pointer

    def init(self, _connection: int) -> None:
        self._session = c_void_p(_libfuse.fuse_get_session(c_void_p(_libfuse.fuse_get_context().contents.fuse)))
        descriptor = _libfuse.fuse_chan_fd(c_void_p(_libfuse.fuse_session_next_chan(self._session, None)))
        os.set_inheritable(descriptor, False)  # a child that kept it would keep a dead mount from being noticed
        self._device = os.dup(descriptor)  # libfuse closes its own at an unmount, when a thread may still invalidate
        self._up_or_ended.set()
        self.operations.mounted = self
        self.operations.init()

    def destroy(self, _private: int) -> None:
        self._refuse_calls()
        with self._changed:
            self._session = None  # libfuse frees it next
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
        info.contents.fh = handle = next(self._handles)
        self._directories[handle] = path.decode(self.encoding)

    def readdir(self, _path: bytes | None, buffer: int, filler: Any, _offset: int, info: Any) -> None:
        entries = self.operations.readdir(self._directories[info.contents.fh])
        for name, attributes in [(".", None), ("..", None), *entries]:
            stat = fuse.c_stat()
            fuse.set_st_attrs(stat, attributes or {}, use_ns=True)
            if filler(buffer, name.encode(self.encoding), stat, 0) != 0:
                raise MemoryError("libfuse cannot take more directory entries")

    def releasedir(self, _path: bytes | None, info: Any) -> None:
        del self._directories[info.contents.fh]


def mount(operations: Operations, mountpoint: str, *, options: Mapping[str, str | int | bool] | None = None) -> None:
    """Serve `operations`, on the main thread, until the unmount, SIGTERM, SIGINT or SIGHUP and the end of callbacks.
    `options` go on top of DEFAULT_OPTIONS. Raises UsageError for one, or a directory, that cannot be used,
    EnvironmentProblem when the mount fails (libfuse says why on stderr), and what init, quiesce or destroy raised."""
    chosen = {**DEFAULT_OPTIONS, **(options or {})}
    for name, value in chosen.items():
        if value is not False and DEFAULT_OPTIONS.get(name) is False:
            raise UsageError(f"mount option {name} is refused: it would break a promise of s3blockfs")
        if isinstance(value, str):
            chosen[name] = value.replace("\\", "\\\\").replace(",", "\\,")  # libfuse splits options at commas
    require()
    if Path(mountpoint).is_dir() and any(Path(mountpoint).iterdir()):  # libfuse would recommend `nonempty`
        raise UsageError(f"{mountpoint}: not empty; choose an empty directory")
    loop = Mounted()
    # SIGINT and SIGHUP stay ignored if they are (nohup); `stop` needs a handler of SIGTERM.
    signals = [each for each in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    handlers = {each: signal.signal(each, lambda *_: loop.events.put("stop")) for each in [signal.SIGTERM, *signals]}
    try:
        with ThreadPoolExecutor(1, "s3blockfs-fuse") as executor:  # Python handles signals on the main thread only
            running = executor.submit(loop.run, operations, str(Path(mountpoint).absolute()), chosen)
            if loop.events.get() == "stop":
                try:
                    operations.quiesce()
                finally:
                    loop.stop()
            running.result()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
