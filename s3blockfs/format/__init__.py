"""Bytes <-> dataclasses for everything stored in the bucket, and every object key. No I/O. See docs/FORMAT.md.

All integers are big-endian, as in SQLite's own file format. Everything read is untrusted: decoders raise DamagedObject
(or NewerFormat) with the object's name, never another exception, and allocate no more than their documented bounds.
"""
