"""The exception tree: each class knows its errno (what a mount answers) and its CLI exit code.

Rules: an error is raised where it happens, its text is one line that says what to do next, and nothing
turns it into success. SQLite sees the errno as SQLITE_IOERR, SQLITE_READONLY, SQLITE_FULL or SQLITE_BUSY.
"""

from __future__ import annotations

import errno


class S3BlockFSError(Exception):
    """Base of everything this package raises on purpose."""

    errno: int = errno.EIO
    exit_code: int = 1


class UsageError(S3BlockFSError):
    """The command line, an option or a name cannot be used as given."""

    errno = errno.EINVAL
    exit_code = 2


class EnvironmentProblem(S3BlockFSError):
    """This machine lacks something: libfuse, /dev/fuse, fusermount, the embedded server."""

    errno = errno.ENODEV
    exit_code = 8


# --- the object store ---------------------------------------------------------------------------------


class StoreError(S3BlockFSError):
    """A request to the object store failed. The request definitely had no effect unless a subclass says otherwise."""

    exit_code = 5


class ObjectNotFound(StoreError):
    """404: no object under that key."""

    errno = errno.ENOENT
    exit_code = 3


class BucketNotFound(StoreError):
    """404 NoSuchBucket."""

    errno = errno.ENOENT
    exit_code = 3


class PreconditionFailed(StoreError):
    """412: the object is not (or no longer) what If-Match / If-None-Match asked for."""


class AccessDenied(StoreError):
    """401 / 403, or no usable credentials."""

    errno = errno.EACCES
    exit_code = 4


class StoreRefused(StoreError):
    """Another definite 4xx: the store understood the request and did not carry it out."""


class StoreUnavailable(StoreError):
    """Not answered within the deadline, for a request that has no effect if repeated or was never sent."""


class RequestInDoubt(StoreError):
    """A conditional PUT whose outcome is unknown (409, 5xx, time-out, connection cut): it may still be applied.

    Only who settles it may catch this: `head.py` for commits, `capabilities.py` for its own probe.
    """


# --- formats ------------------------------------------------------------------------------------------


class DamagedObject(S3BlockFSError):
    """An object is not what its name, length or checksum says. The text names the object."""

    exit_code = 6

    def __str__(self) -> str:
        return f"{super().__str__()}; put an earlier version of that object back (S3 versioning, a backup)"


class NewerFormat(S3BlockFSError):
    """Written by a newer s3blockfs; this one must not guess."""

    errno = errno.EPROTONOSUPPORT
    exit_code = 6


# --- databases ----------------------------------------------------------------------------------------


class DatabaseNotFound(S3BlockFSError):
    """No database of that name (or a tombstone)."""

    errno = errno.ENOENT
    exit_code = 3


class DatabaseExists(S3BlockFSError):
    """A database of that name exists."""

    errno = errno.EEXIST
    exit_code = 7


class DatabaseGone(S3BlockFSError):
    """The database was deleted or replaced by somebody else while it was open here."""

    errno = errno.ESTALE
    exit_code = 7


class CommitLost(S3BlockFSError):
    """Another writer committed first. Nothing of this transaction is or will be visible (invariant I3)."""

    exit_code = 7


class OutcomeUnknown(S3BlockFSError):
    """Nobody could tell whether the commit applied; every call on the database fails until it is settled."""

    exit_code = 5


class Busy(S3BlockFSError):
    """A lock is held by somebody else; SQLite's busy_timeout retries."""

    errno = errno.EAGAIN
    exit_code = 7


class ReadOnly(S3BlockFSError):
    """Writing is not possible here: a read-only mount, or a store without conditional PUTs."""

    errno = errno.EROFS
    exit_code = 4


class NotSupported(S3BlockFSError):
    """SQLite or the application asked for something this version refuses rather than get wrong."""

    errno = errno.EOPNOTSUPP
