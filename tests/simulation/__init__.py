"""Deterministic simulation of the production engine: the real code on a simulated network, clock and executor.

`kernel.py` schedules, `network.py` is S3 and the way to it, `oracle.py` knows what must hold, `clients.py` behave as
SQLite does, `actors.py` do everything else, `world.py` puts a run together from a seed, `mutants.py` break the engine,
`shrink.py` makes failures short, `__main__.py` is the command (`scripts/simulate`).
"""
