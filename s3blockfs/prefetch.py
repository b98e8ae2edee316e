"""Read-ahead: notices a sequential reader and says what to fetch before it asks. Pure; no I/O, no threads.

The window doubles with every range asked for: a point read costs one block, a long scan soon megabytes a request. A
scan of a B-tree jumps to interior pages now and then, so a reader is at several places, each with its own window."""

from s3blockfs.format.data import OBJECT_BYTES

FIRST_WINDOW_BYTES = 256 * 1024  # two of the 128 KiB reads with which the kernel itself reads ahead
SLACK_BYTES = 512 * 1024  # so far off still counts as sequential: kernel threads deliver reads out of order
PLACES = 4  # a table, its interior pages, an index and its own


class _Place:
    """Where somebody reads on: bytes are expected from `expected` on, asked for up to `fetched_to`."""

    __slots__ = ("expected", "fetched_to", "hits", "window")

    def __init__(self, end: int) -> None:
        self.window, self.hits, self.expected, self.fetched_to = 0, 0, end, end


class Readahead:
    """State of one reader (one file handle). The caller serialises calls, or accepts a lost hint."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._places = [_Place(0)]  # the one used last is at the end

    def next_range(self, offset: int, length: int, size: int) -> tuple[int, int] | None:
        """(start, end) to fetch ahead after this read of a file of `size` bytes, or None."""
        end, places = offset + length, self._places
        near = (place for place in reversed(places) if -SLACK_BYTES <= offset - place.expected <= SLACK_BYTES)
        place = next(near, None)
        self._places = [*(other for other in places if other is not place), place or _Place(end)][-PLACES:]
        if place is None or self._limit == 0:
            return None
        if end <= place.expected:
            return None  # a page read again, or backwards, or late: nothing ahead of it is asked for on its account
        place.expected, place.hits = end, place.hits + 1
        start = place.fetched_to = max(place.fetched_to, end)
        # Two neighbouring reads happen by chance in any B-tree; half a window ahead is enough.
        if place.hits < 3 or start - end > place.window // 2:
            return None
        place.window = min(self._limit, max(FIRST_WINDOW_BYTES, place.window * 2))
        stop = end + place.window
        if place.window >= 2 * OBJECT_BYTES:
            stop -= stop % OBJECT_BYTES  # whole objects: fewer, larger requests
        stop = min(stop, size)
        if stop <= start:
            return None
        place.fetched_to = stop
        return start, stop
