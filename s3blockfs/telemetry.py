"""Logger names, log set-up, and counters of what the engine asked of the store and of its cache.

Threads: everything may be called from any thread. Does not belong here: deciding what is worth a log line.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

from s3blockfs.errors import UsageError

#: The package's logger; the others are its children, so that one level governs all of them.
LOGGER = "s3blockfs"
STORE_LOGGER = f"{LOGGER}.store"
HEAD_LOGGER = f"{LOGGER}.head"
ENGINE_LOGGER = f"{LOGGER}.engine"
FUSE_LOGGER = f"{LOGGER}.fuse"
SERVER_LOGGER = f"{LOGGER}.server"
CLI_LOGGER = f"{LOGGER}.cli"

LEVELS = ("debug", "info", "warning", "error")


class _OneLine(logging.Formatter):
    """One line per record, tracebacks included, so that a log can be searched by line."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " | ")


def setup_logging(level: str = "warning", log_file: str | None = None) -> None:
    """Send log records to `log_file` (appended to), or to stderr. Calling it again replaces the earlier set-up.

    `level` (one of LEVELS) is for this package. Libraries stay at warnings: botocore's debug records hold request
    headers, session tokens among them. Raises UsageError when the file cannot be opened.
    """
    try:
        handler = logging.FileHandler(log_file, encoding="utf-8") if log_file else logging.StreamHandler()
    except OSError as error:
        raise UsageError(f"--log-file {log_file}: {error.strerror}; name a file that can be written") from error
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s %(threadName)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(LOGGER).setLevel(level.upper())


class Counters:
    """Sums by name, such as `requests.get.head.read` (operation, then site), `bytes.sent` or `cache.hits`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()

    def request(self, operation: str, site: str, *, sent_bytes: int = 0, received_bytes: int = 0) -> None:
        """One request to the store: `operation` is get, put, delete or list; `site` the caller's label."""
        with self._lock:
            self._sums[f"requests.{operation}.{site}"] += 1
            self._sums["bytes.sent"] += sent_bytes
            self._sums["bytes.received"] += received_bytes

    def cache(self, *, hit: bool) -> None:
        """One lookup in the block cache."""
        with self._lock:
            self._sums["cache.hits" if hit else "cache.misses"] += 1

    def read(self) -> dict[str, int]:
        """What was counted so far, by name; a copy from one moment."""
        with self._lock:
            return dict(self._sums)
