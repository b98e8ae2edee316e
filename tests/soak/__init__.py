"""Mounts, processes and connections that stay open for long, while everybody writes; see `runner.py`."""
