"""SQLite databases that live in S3 and behave like ordinary local files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3blockfs.files import open as open
    from s3blockfs.vfs import connect as connect

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`connect` and `open` on demand: the command line starts faster without boto3 and APSW."""
    if name == "connect":
        from s3blockfs.vfs import connect

        return connect
    if name == "open":
        from s3blockfs import files

        return files.open
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
