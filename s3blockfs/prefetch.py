"""Read-ahead: notices sequential and dense readers and says what to fetch before they ask. Pure; no I/O, no threads.

The window grows with what was read: a point read costs one block, a long scan soon megabytes a request. A
scan of a B-tree jumps to interior pages now and then, so a reader is at several places, each with its own window."""

from s3blockfs.format.data import OBJECT_BYTES

FIRST_WINDOW_BYTES = 256 * 1024  # two of the 128 KiB reads with which the kernel itself reads ahead
SLACK_BYTES = 512 * 1024  # so far off still counts as sequential: kernel threads deliver reads out of order
GROWTH = 16  # a window is so many times as large as what was read up to it: a little, some MiB, all; 15 ms a step
PLACES = 4  # a table, its interior pages, an index and its own

#: Random reads are dense when fetching the whole neighbourhood costs less than waiting for one after the other: a miss
#: takes 20 ms or so, in which a link in a data centre brings some MiB. A look at a few rows stays below MISSES.
MISSES, BYTES_A_MISS = 8, 12 << 20
FIRST_LEVEL = 20  # neighbourhoods are of 1 MiB, 2 MiB, ..., aligned
LATELY_S = 5.0  # older misses do not count: who reads a row now and then has the time
REFILL_BYTES = 256 * 1024  # what each miss adds to what may be fetched ahead, once that is used up

Range = tuple[int, int]


class _Place:
    """Where somebody reads on, since `began`: bytes are expected from `expected` on, asked for up to `fetched_to`."""

    __slots__ = ("began", "expected", "fetched_to", "hits", "window")

    def __init__(self, end: int) -> None:
        self.window, self.hits, self.began, self.expected, self.fetched_to = 0, 0, end, end, end


class Readahead:
    """State of one reader (one file handle). The caller serialises calls, or accepts a lost hint."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._places = [_Place(0)]  # the one used last is at the end

    def next_range(self, offset: int, length: int, size: int) -> Range | None:
        """(start, end) to fetch ahead after this read of a file of `size` bytes, or None."""
        end, places = offset + length, self._places
        place: _Place | None = places[-1]
        if not -SLACK_BYTES <= offset - places[-1].expected <= SLACK_BYTES:
            near = (place for place in reversed(places) if -SLACK_BYTES <= offset - place.expected <= SLACK_BYTES)
            place = next(near, None)
            self._places = [*(other for other in places if other is not place), place or _Place(end)][-PLACES:]
        if place is None or self._limit == 0:
            return None
        if end <= place.expected:
            return None  # a page read again, or backwards, or late: nothing ahead of it is asked for on its account
        place.expected, place.hits = end, place.hits + 1
        start = place.fetched_to = max(place.fetched_to, end)
        # Two neighbouring reads happen by chance in any B-tree. Later there is one more object to fetch with each read.
        if place.hits < 2 or start - end > max(place.window // 2, place.window - OBJECT_BYTES):
            return None
        place.window = min(self._limit, GROWTH * (end - place.began) if place.window else FIRST_WINDOW_BYTES)
        stop = end + place.window
        if place.window >= 2 * OBJECT_BYTES:
            stop -= stop % OBJECT_BYTES  # whole objects: fewer, larger requests
        stop = min(stop, size)
        if stop <= start:
            return None
        place.fetched_to = stop
        return start, stop


class Density:
    """Where one database is read densely, judged by what readers had to wait for. The caller serialises calls."""

    def __init__(self, most_bytes: int) -> None:
        """At most so many bytes are asked for, and a few more for each miss: no more than the cache holds, or a large
        database that is read everywhere would drive itself out of it."""
        self._most_bytes = self._left_bytes = most_bytes
        self._began_s = float("-inf")
        self._misses: dict[tuple[int, int], int] = {}  # (level, start)
        self._asked: list[Range] = []

    def missed(self, now_s: float, offset: int, size: int) -> Range | None:
        """(start, end) to fetch ahead after a GET for the bytes at `offset` of a file of `size` bytes, or None."""
        if now_s - self._began_s > LATELY_S:
            self._began_s = now_s
            self._misses.clear()
            self._asked.clear()
        self._left_bytes = min(self._most_bytes, self._left_bytes + REFILL_BYTES)
        found: Range | None = None
        for level in range(FIRST_LEVEL, 64):
            start = offset >> level << level
            end = min(start + (1 << level), size)
            if end - start > self._left_bytes:
                break
            self._misses[level, start] = misses = self._misses.get((level, start), 0) + 1
            if misses >= max(MISSES, (end - start) // BYTES_A_MISS):
                found = start, end
            if (start, end) == (0, size):
                break
        if found is None or any(low <= found[0] and found[1] <= high for low, high in self._asked):
            return None
        self._asked.append(found)
        self._left_bytes -= found[1] - found[0]
        return found
