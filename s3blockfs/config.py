"""One frozen dataclass behind flags, environment and `-o` options: every tunable with its default and help."""

import re
from dataclasses import dataclass, field
from typing import Any

KIB = 1024
MIB = 1024 * KIB
HOUR_S = 3600.0

_TIMES = {"": 1, "S": 1, "M": 60, "H": HOUR_S, "D": 24 * HOUR_S}


def duration_s(text: str) -> float | None:
    """What `1`, `0.5`, `30s`, `90m`, `24h`, `7d` stand for; None for anything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d*)?)([SMHD]?)", text.strip(), re.IGNORECASE)
    return float(match[1]) * _TIMES[match[2].upper()] if match else None


def _option(default: Any, help_text: str, *, mount: bool = False) -> Any:
    """`mount`: of no use to other commands."""
    return field(default=default, metadata={"help": help_text, "mount": mount})


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one store, mount or connection. Sizes in bytes, times (`_s`) in seconds."""

    block_size: int = _option(64 * KIB, "unit of storage of databases created here; others keep their own")
    cache_size: int = _option(128 * MIB, "memory for blocks read from S3")
    cache_dir: str | None = _option(None, "folder for blocks read from S3; survives restarts, can be shared by mounts")
    cache_dir_size: int = _option(4096 * MIB, "how much of that folder's disk to use")
    memory: int = _option(256 * MIB, "memory for blocks on their way to S3")
    readahead_size: int = _option(16 * MIB, "how far ahead of a sequential reader to fetch")
    refresh_s: float = _option(1.0, "how old the last look at a database may be when a read starts; 0 looks every time")
    request_deadline_s: float = _option(10.0, "bound on one request to S3, its retries included")
    transaction_deadline_s: float = _option(60.0, "bound on publishing one transaction, settling its outcome included")
    lease_s: float = _option(10.0, "when another writer's unchanged lease may be taken over; 0 takes no leases")
    group_commit_s: float = _option(1.0, "how long commits in WAL mode with synchronous=NORMAL may wait", mount=True)
    retain_s: float = _option(24 * HOUR_S, "how long replaced states are kept, at least 1h")
    exclusive: bool = _option(False, "keep the lease of every database that is open here; no WAL", mount=True)
    read_only: bool = _option(False, "refuse to write")
    direct_io: bool = _option(
        False, "past the kernel's pages: with --read-only, each descriptor follows by itself", mount=True
    )
    only_writer: bool = _option(False, "promise that nobody else ever writes: for stores without conditional PUTs")
    spill_dir: str | None = _option(None, "where uncommitted bytes are kept (default: $TMPDIR or /var/tmp)")
    endpoint_url: str | None = _option(None, "an S3 service other than AWS, such as https://minio.example:9000")
    region: str | None = _option(None, "the bucket's region")
    profile: str | None = _option(None, "section of the AWS configuration files")
    sse: str | None = _option(None, "encryption to ask S3 for: AES256, aws:kms or aws:kms:dsse (default: the bucket's)")
    sse_kms_key_id: str | None = _option(None, "KMS key to encrypt with, by its ID, ARN or alias; implies aws:kms")
    allow_other: bool = _option(False, "let other users of this machine in", mount=True)
    uid: int | None = _option(None, "owner of files and folders (default: who mounts)", mount=True)
    gid: int | None = _option(None, "group of files and folders (default: that of who mounts)", mount=True)
    umask: int = _option(0o077, "permissions that nobody has, in octal", mount=True)
    metrics: str | None = _option(None, "HOST:PORT of this machine where Prometheus may ask for figures", mount=True)

    @property
    def access(self) -> dict[str, str | None]:
        """For `S3Store`."""
        return {name: getattr(self, name) for name in ("endpoint_url", "region", "profile", "sse", "sse_kms_key_id")}
