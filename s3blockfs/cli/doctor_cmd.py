"""`s3blockfs doctor [BUCKET[/PREFIX]]`: what this machine and this bucket lack, and how to fix it.

Every check is tried, also after one that failed, unless it makes no sense any more (a bucket that cannot be reached).
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3blockfs import capabilities
from s3blockfs.cli.options import Target, add_command, config_from, open_store, parse_target
from s3blockfs.config import Config
from s3blockfs.errors import AccessDenied, S3BlockFSError
from s3blockfs.runtime import Runtime

if TYPE_CHECKING:
    from s3blockfs.s3store import S3Store

FUSE_DEVICE = Path("/dev/fuse")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. What is not `ok` says behind a semicolon how to fix it."""

    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok ' if self.ok else 'FIX'} {self.text}"


def add_parser(subparsers: Any) -> None:
    text = """Check this machine, and a bucket if one is named: each line says ok, or FIX and how to.
        Exit code 1 when something needs fixing."""
    parser = add_command(subparsers, "doctor", run, "check this machine and a bucket", text)
    parser.add_argument("target", nargs="?", metavar="BUCKET[/PREFIX]")


def run(namespace: argparse.Namespace) -> int:
    """Print every finding as soon as it is known; 1 if one of them needs fixing."""
    code = 0
    for finding in _findings(namespace):
        print(finding, flush=True)
        code |= not finding.ok
    return code


def _findings(namespace: argparse.Namespace) -> Iterator[Finding]:
    target = parse_target(namespace.target) if namespace.target else None
    yield from machine()
    if target is not None:
        runtime = Runtime()
        with open_store(namespace, target, runtime) as store:
            yield from bucket(store, target, config_from(namespace), runtime)


def machine() -> Iterator[Finding]:
    """What a mount needs on this machine."""
    import apsw

    library = ctypes.util.find_library("fuse")
    missing = "not found; apt-get install libfuse2 (newer releases call it libfuse2t64)"
    yield Finding(library is not None, f"libfuse: {library or missing}")
    fusermount = shutil.which("fusermount")
    yield Finding(fusermount is not None, f"fusermount: {fusermount or 'not found; apt-get install fuse3'}")
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR))
        yield Finding(True, f"{FUSE_DEVICE}: can be opened")
    except OSError as error:
        help_text = "as root, `modprobe fuse && chmod 666 /dev/fuse`; a container needs `--device /dev/fuse`"
        yield Finding(False, f"{FUSE_DEVICE}: {error.strerror}; {help_text}")
    yield Finding(True, f"sqlite: {apsw.sqlite_lib_version()} (apsw {apsw.apsw_version()})")


def bucket(store: S3Store, target: Target, config: Config, runtime: Runtime) -> Iterator[Finding]:
    """What a mount needs from the bucket. Unless read-only, writes a temporary object there and removes it."""
    try:
        store.check_bucket(target.prefix)
    except S3BlockFSError as error:
        yield Finding(False, f"{'credentials' if isinstance(error, AccessDenied) else 'bucket'}: {error}")
        return
    yield Finding(True, "credentials: accepted")
    yield Finding(True, f"bucket: {store.name} can be reached and listed")
    yield _conditional_puts(store, target, config, runtime)
    try:
        findings = store.bucket_findings(target.prefix)
    except S3BlockFSError as error:
        findings = [str(error)]
    for text in findings:
        yield Finding(False, f"settings: {text}")
    if not findings:
        yield Finding(True, "settings: no lifecycle rule, versioning or Object Lock that hurts")


def _conditional_puts(store: S3Store, target: Target, config: Config, runtime: Runtime) -> Finding:
    what = "conditional PUTs"
    if config.read_only:
        return Finding(True, f"{what}: not needed with --read-only")
    try:
        wrong = capabilities.probe(store, target.prefix, runtime)
    except S3BlockFSError as error:
        return Finding(False, f"{what}: {error}")
    if wrong is None:
        return Finding(True, f"{what}: honoured")
    if config.only_writer:
        return Finding(True, f"{what}: {wrong}, but --only-writer promises that nobody else writes")
    return Finding(False, f"{what}: {wrong}; {capabilities.WHAT_TO_DO}")
