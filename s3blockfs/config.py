"""One frozen dataclass behind flags, environment (and later `-o` options): every tunable with its default and help."""

from dataclasses import dataclass, field
from typing import Any

KIB = 1024
MIB = 1024 * KIB


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one store, mount or connection. Sizes in bytes, times (`_s`) in seconds."""

    block_size: int = _option(64 * KIB, "unit of storage of databases created here; others keep their own")
    cache_size: int = _option(128 * MIB, "memory for blocks read from S3")
    upload_memory: int = _option(64 * MIB, "memory for blocks on their way to S3")
    readahead_size: int = _option(16 * MIB, "how far ahead of a sequential reader to fetch")
    refresh_s: float = _option(1.0, "how old the last look at a database may be when a read starts; 0 looks every time")
    request_deadline_s: float = _option(10.0, "bound on one request to S3, its retries included")
    transaction_deadline_s: float = _option(60.0, "bound on publishing one transaction, settling its outcome included")
    read_only: bool = _option(False, "refuse to write")
    only_writer: bool = _option(False, "promise that nobody else ever writes: for stores without conditional PUTs")
    spill_dir: str | None = _option(None, "where uncommitted bytes are kept (default: $TMPDIR or /var/tmp)")
    endpoint_url: str | None = _option(None, "an S3 service other than AWS, such as https://minio.example:9000")
    region: str | None = _option(None, "the bucket's region")
    profile: str | None = _option(None, "section of the AWS configuration files")
