"""`s3blockfs doctor [BUCKET[/PREFIX]]`: what this machine and this bucket lack, and how to fix it.

Every check is tried, also after one that failed, unless it makes no sense then (a bucket that cannot be reached)."""

from __future__ import annotations

import ctypes.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from s3blockfs import capabilities, mountpoint
from s3blockfs.cli import options
from s3blockfs.config import Config
from s3blockfs.errors import AccessDenied, S3BlockFSError
from s3blockfs.runtime import Runtime

if TYPE_CHECKING:
    from s3blockfs.s3store import S3Store


@options.command("doctor", short_help="check this machine and a bucket")
@click.argument("target", type=options.target, metavar="[BUCKET[/PREFIX]]", required=False)
def run(target: options.Target | None) -> int:
    """Check this machine, and a bucket if one is named: each line says ok, or FIX and how to.
    Exit code 1 when something needs fixing."""
    code = 0
    for finding in _findings(target):
        print(finding, flush=True)
        code |= finding.startswith("FIX")
    return code


def _findings(target: options.Target | None) -> Iterator[str]:
    """What needs fixing says behind a semicolon how to."""
    import apsw

    library = ctypes.util.find_library("fuse")
    missing = "FIX libfuse: not found; apt-get install libfuse2 (newer releases call it libfuse2t64)"
    yield f"ok  libfuse: {library}" if library else missing
    yield from mountpoint.findings()
    yield f"ok  sqlite: {apsw.sqlite_lib_version()} (apsw {apsw.apsw_version()})"
    if target is not None:
        with options.opened(target) as (_, store, runtime):
            yield from bucket(store, target.prefix, options.settings().config, runtime)


def bucket(store: S3Store, prefix: str, config: Config, runtime: Runtime) -> Iterator[str]:
    """What a mount needs from the bucket. Unless read-only, writes a temporary object there and removes it."""
    try:
        store.check_bucket(prefix)
    except S3BlockFSError as error:
        yield f"FIX {'credentials' if isinstance(error, AccessDenied) else 'bucket'}: {error}"
        return
    yield "ok  credentials: accepted"
    yield f"ok  bucket: {store.name} can be reached and listed"
    yield _conditional_puts(store, prefix, config, runtime)
    try:
        findings = store.bucket_findings(prefix)
    except S3BlockFSError as error:
        findings = [str(error)]
    yield from (f"FIX settings: {text}" for text in findings)
    if not findings:
        yield "ok  settings: no lifecycle rule, versioning or Object Lock that hurts"


def _conditional_puts(store: S3Store, prefix: str, config: Config, runtime: Runtime) -> str:
    if config.read_only:
        return "ok  conditional PUTs: not needed with --read-only"
    try:
        wrong = capabilities.probe(store, prefix, runtime)
    except S3BlockFSError as error:
        return f"FIX conditional PUTs: {error}"
    if wrong is None:
        return "ok  conditional PUTs: honoured"
    if config.only_writer:
        return f"ok  conditional PUTs: {wrong}, but --only-writer promises that nobody else writes"
    return f"FIX conditional PUTs: {wrong}; {capabilities.WHAT_TO_DO}"
