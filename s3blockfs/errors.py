"""The exception tree: each class knows its errno (what a mount answers) and its CLI exit code.

An error is raised where it happens, its text is one line that says what to do next, nothing turns it into success."""

import errno as codes


class S3BlockFSError(Exception):
    """Base of everything this package raises on purpose."""

    errno = codes.EIO
    exit_code = 1

    def __init_subclass__(cls, *, errno: int | None = None, exit_code: int | None = None) -> None:
        cls.errno = errno or cls.errno
        cls.exit_code = exit_code or cls.exit_code


class UsageError(S3BlockFSError, errno=codes.EINVAL, exit_code=2):
    """The command line, an option or a name cannot be used as given."""


class EnvironmentProblem(S3BlockFSError, errno=codes.ENODEV, exit_code=8):
    """This machine lacks something: libfuse, /dev/fuse, fusermount, the embedded server."""


class StoreError(S3BlockFSError, errno=codes.EREMOTEIO, exit_code=5):
    """A request to the object store failed. The request definitely had no effect unless a subclass says otherwise.
    To a read that met EIO SQLite says "malformed", and not for damaged objects alone."""


class ObjectNotFound(StoreError, errno=codes.ENOENT, exit_code=3):
    """404: no object under that key."""


class BucketNotFound(StoreError, errno=codes.ENOENT, exit_code=3):
    """404 NoSuchBucket."""


class PreconditionFailed(StoreError):
    """412: the object is not (or no longer) what If-Match / If-None-Match asked for."""


class AccessDenied(StoreError, errno=codes.EACCES, exit_code=4):
    """401 / 403, or no usable credentials."""


class StoreRefused(StoreError):
    """Another definite 4xx: the store understood the request and did not carry it out."""


class StoreUnavailable(StoreError):
    """Not answered within the deadline, for a request that has no effect if repeated or was never sent."""


class RequestInDoubt(StoreError):
    """A conditional PUT whose outcome is unknown (409, 5xx, time-out, connection cut): it may still be applied.

    Only who settles it may catch this: `head.py` for commits, `capabilities.py` for its own probe."""


class DamagedObject(S3BlockFSError, exit_code=6):
    """An object is not what its name, length or checksum says. The text names the object."""

    def __str__(self) -> str:
        return f"{super().__str__()}; put an earlier version of that object back (S3 versioning, a backup)"


class NewerFormat(S3BlockFSError, errno=codes.EPROTONOSUPPORT, exit_code=6):
    """Written by a newer s3blockfs; this one must not guess."""


class DatabaseNotFound(S3BlockFSError, errno=codes.ENOENT, exit_code=3):
    """No database of that name (or a tombstone)."""


class TooOld(S3BlockFSError, errno=codes.ESTALE, exit_code=3):
    """A past state is older than the retention: its objects are garbage, or collected already."""


class DatabaseExists(S3BlockFSError, errno=codes.EEXIST, exit_code=7):
    """A database of that name exists."""


class ObjectReplaced(StoreError, errno=codes.ESTALE, exit_code=7):
    """A plain object is not, or no longer, the one that was opened."""


class DatabaseGone(S3BlockFSError, errno=codes.ESTALE, exit_code=7):
    """The database was deleted or replaced by somebody else while it was open here."""


class CommitLost(S3BlockFSError, exit_code=7):
    """Another writer committed first. Nothing of this transaction is or will be visible (invariant I3)."""


class OutcomeUnknown(S3BlockFSError, errno=codes.EREMOTEIO, exit_code=5):
    """Nobody could tell whether the commit applied; every call on the database fails until it is settled."""


class Busy(S3BlockFSError, errno=codes.EAGAIN, exit_code=7):
    """A lock is held by somebody else; SQLite's busy_timeout retries."""


class ReadOnly(S3BlockFSError, errno=codes.EROFS, exit_code=4):
    """Writing is not possible here: a read-only mount, or a store without conditional PUTs."""


class Immutable(ReadOnly):
    """The past, or a plain object. Opening it for writing is how SQLite begins to read it."""


class NotSupported(S3BlockFSError, errno=codes.EOPNOTSUPP):
    """SQLite or the application asked for something this version refuses rather than get wrong."""


#: What is wrong with one database, and no reason to keep quiet about others.
UNUSABLE = DamagedObject, NewerFormat, NotSupported, DatabaseGone, AccessDenied, StoreRefused
