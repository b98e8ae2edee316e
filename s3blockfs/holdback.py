"""For how long new readers wait while those under way keep a newer state from being shown.

Whoever begins to read then gets Busy, as by SQLite's PENDING, so that there will be a moment without readers. A long
transaction makes that be in vain, so it goes on for a few seconds only, then not for a while, twice as long each time.
Thread rule: the caller's locks."""

#: In WAL mode SQLite takes 10 s of waiting for an error.
HELD_BACK_S, PAUSE_S, LONGEST_PAUSE_S = 3.0, 8.0, 120.0


class HoldBack:
    """Made anew when a newer state is first known. Times are of the caller's monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._met_s: float | None = None
        self._pause_s, self._after_s = PAUSE_S, 0.0

    def is_paused(self, now: float) -> bool:
        return now < self._after_s

    def begin(self) -> None:
        """The time begins with the next reader that `holds` is asked for."""
        self._met_s = None

    def holds(self, now: float) -> bool:
        """Whether somebody who begins to read has to wait."""
        if self.is_paused(now):
            return False
        self._met_s = now if self._met_s is None else self._met_s
        if self.is_over(now):
            self.pause(now)
            return False
        return True

    def is_over(self, now: float) -> bool:
        """Whether those that were met have waited for long enough."""
        return self._met_s is not None and now - self._met_s >= HELD_BACK_S

    def pause(self, now: float) -> None:
        """It was in vain."""
        self._met_s, self._after_s = None, now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
