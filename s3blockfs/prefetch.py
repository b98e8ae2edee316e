"""Read-ahead: notices a sequential reader and says what to fetch before it asks. Pure; no I/O, no threads.

The window doubles with every range asked for: a point read costs one block, a long scan soon megabytes a request."""

from s3blockfs.format.data import OBJECT_BYTES

FIRST_WINDOW_BYTES = 256 * 1024  # two of the 128 KiB reads with which the kernel itself reads ahead
SLACK_BYTES = 512 * 1024  # so far off still counts as sequential: kernel threads deliver reads out of order


class Readahead:
    """State of one reader (one file handle). The caller serialises calls, or accepts a lost hint."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._window = self._expected = self._fetched_to = self._hits = 0

    def next_range(self, offset: int, length: int, size: int) -> tuple[int, int] | None:
        """(start, end) to fetch ahead after this read of a file of `size` bytes, or None."""
        end = offset + length
        if not -SLACK_BYTES <= offset - self._expected <= SLACK_BYTES or self._limit == 0:
            self._window, self._hits, self._expected, self._fetched_to = 0, 0, end, end
            return None
        if end <= self._expected:
            return None  # a page read again, or backwards, or late: nothing ahead of it is asked for on its account
        self._expected, self._hits = end, self._hits + 1
        start = self._fetched_to = max(self._fetched_to, end)
        # Two neighbouring reads happen by chance in any B-tree; half a window ahead is enough.
        if self._hits < 3 or start - end > self._window // 2:
            return None
        self._window = min(self._limit, max(FIRST_WINDOW_BYTES, self._window * 2))
        stop = end + self._window
        if self._window >= 2 * OBJECT_BYTES:
            stop -= stop % OBJECT_BYTES  # whole objects: fewer, larger requests
        stop = min(stop, size)
        if stop <= start:
            return None
        self._fetched_to = stop
        return start, stop
