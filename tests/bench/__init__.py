"""The benchmark: `scripts/bench`. See `__main__`."""
