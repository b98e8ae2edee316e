"""When to fold and to collect garbage: in the background of a process that writes, and by `s3blockfs gc`."""

import logging
from concurrent.futures import Future
from typing import Any

from s3blockfs import gc
from s3blockfs.config import Config
from s3blockfs.errors import S3BlockFSError
from s3blockfs.fold import fold, is_due
from s3blockfs.head import HeadFile
from s3blockfs.snapshot import Source

log = logging.getLogger(__name__)

COLLECT_EVERY_S = 3600.0  # by each process that writes; nothing becomes garbage before the retention ends
PAUSE_S = 60.0  # after a job that failed, or that somebody else did


def clean_up(source: Source, heads: HeadFile, config: Config) -> gc.Report:
    """Fold what is due, delete what is older than the retention, move what lies in mostly dead objects."""
    if (version := heads.stored()) is not None and is_due(version.head):
        fold(source, heads, config, version)
    report = gc.collect(source, heads, config.retain_s)
    version = heads.latest
    if report.sparse and version is not None:
        fold(source, heads, config, version, report.sparse)
    return report


class Housekeeper:
    """Of one database in one process. `tick` is called by one thread at a time."""

    def __init__(self, source: Source, heads: HeadFile, config: Config) -> None:
        self._source, self._heads, self._config = source, heads, config
        self._running: Future[Any] | None = None
        self._after_s = 0.0
        self._collect_s = source.runtime.monotonic() + COLLECT_EVERY_S

    def tick(self) -> None:
        """Start what is due. Costs nothing while nothing is."""
        now, newest = self._source.runtime.monotonic(), self._heads.latest
        if newest is None or now < self._after_s or (self._running is not None and not self._running.done()):
            return
        if now >= self._collect_s or is_due(newest.head):
            self._after_s = now + PAUSE_S
            try:
                self._running = self._source.runtime.background(self._work)
            except RuntimeError as error:  # no more threads, or the end
                log.debug("%s: no housekeeping: %s", self._source.prefix, error)

    def _work(self) -> None:
        try:
            newest = self._heads.latest
            if self._source.runtime.monotonic() >= self._collect_s:
                clean_up(self._source, self._heads, self._config)
                self._collect_s = self._source.runtime.monotonic() + COLLECT_EVERY_S
            elif newest is not None and fold(self._source, self._heads, self._config, newest) is not None:
                self._after_s = 0.0
        except S3BlockFSError as error:
            log.warning("%s: housekeeping: %s", self._source.prefix, error)
