"""Logger names and log set-up. Does not belong here: deciding what is worth a log line. Threads: any."""

import logging
import os

from s3blockfs.errors import UsageError

LOGGER = "s3blockfs"  # those of the modules are its children, so that one level governs all of them
LEVELS = ("debug", "info", "warning", "error")


class _OneLine(logging.Formatter):
    """One line per record, tracebacks included, so that a log can be searched by line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record).replace("\n", " | "))


def printable(text: str) -> str:
    """Names come from the bucket, and control characters in them could forge lines or command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def setup_logging(level: str = "warning", log_file: str | None = None) -> None:
    """Send log records to `log_file` (appended to), or to stderr. Calling it again replaces the earlier set-up.
    `level` (one of LEVELS) is for this package. Libraries stay at warnings: botocore's debug records hold request
    headers, session tokens among them. Raises UsageError when the file cannot be opened."""
    try:
        if log_file:  # names of databases are nobody else's business
            os.close(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        handler = logging.FileHandler(log_file, encoding="utf-8") if log_file else logging.StreamHandler()
    except OSError as error:
        raise UsageError(f"--log-file {log_file}: {error.strerror}; name a file that can be written") from error
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s %(threadName)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(LOGGER).setLevel(level.upper())
