"""One frozen dataclass behind flags, environment (and later `-o` options): every tunable with its unit and default."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one store, mount or connection. Sizes in bytes, times in seconds."""

    block_size: int = 64 * KIB
    """Unit of storage of databases created here; an existing database keeps its own (it is in its head)."""

    cache_size: int = 128 * MIB
    """Bytes of immutable blocks and log extents kept in memory."""

    upload_memory: int = 64 * MIB
    """Bytes of block objects and segments in flight to S3 at once."""

    readahead_size: int = 16 * MIB
    """How far ahead of a sequential reader blocks are fetched."""

    refresh_s: float = 1.0
    """How old the last look at a head may be when a read transaction starts; 0 looks every time."""

    request_deadline_s: float = 10.0
    """Bound on one request to the store, its retries included."""

    transaction_deadline_s: float = 60.0
    """Bound on publishing one transaction, all its requests and the settling of unknown outcomes included."""

    read_only: bool = False
    only_writer: bool = False
    """The user's promise that nobody else writes: lifts the refusal of stores without conditional PUTs."""

    spill_dir: str | None = None
    """Where uncommitted bytes and journals are kept, in unlinked files; None means $TMPDIR or /var/tmp."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
