"""Bytes <-> dataclasses for everything stored in the bucket, and every object key. No I/O. See docs/FORMAT.md.

All that is read is untrusted: decoders raise DamagedObject or NewerFormat only, and bound what they allocate."""
