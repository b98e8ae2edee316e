"""What glibc's malloc keeps of memory that is free. Nothing happens where the C library is another one."""

import ctypes

_M_ARENA_MAX = -8  # https://man7.org/linux/man-pages/man3/mallopt.3.html


def few_arenas() -> None:
    """For a process whose threads move megabytes, before they start: each would have an arena of its own, none of which
    gives back what it once needed."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_ARENA_MAX, 2)


def trim() -> None:
    """Give the system what is free, between what is in use as well: heads of 100 KiB and more leave holes."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)
