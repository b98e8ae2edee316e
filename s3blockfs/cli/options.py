"""The options that commands share: flags, their environment variables, targets, and the store they lead to.

Every field of `Config` is an option; its type decides how the text is read. Each option is also an environment variable
`S3BLOCKFS_<OPTION>`; the flag wins.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3blockfs import telemetry
from s3blockfs.config import Config
from s3blockfs.errors import BucketNotFound, UsageError
from s3blockfs.format.head import MAX_BLOCK_BYTES, MIN_BLOCK_BYTES
from s3blockfs.format.keys import is_file_name
from s3blockfs.runtime import Runtime

if TYPE_CHECKING:
    from s3blockfs.s3store import S3Store

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+)([KMGT]?)(?:iB|B)?", re.IGNORECASE)
# The rules of AWS for new and old buckets, widened to what MinIO and Ceph accept.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")


def size(text: str) -> int:
    """Bytes from `65536`, `64K`, `128M`, `1G` (powers of 1024). Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no size; write one like 64K, 128M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def _block_size(text: str) -> int:
    value = size(text)
    if not MIN_BLOCK_BYTES <= value <= MAX_BLOCK_BYTES or value & (value - 1):
        raise UsageError(f"{text!r} is no block size; write a power of two from {MIN_BLOCK_BYTES} to 4M")
    return value


def seconds(text: str) -> float:
    """Seconds from `1`, `0.5`. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"{text!r} is no number of seconds; write one like 1 or 0.5")
    return value


def switch(text: str) -> bool:
    """An environment variable's yes or no. Raises UsageError."""
    words = {**ConfigParser.BOOLEAN_STATES, "": False}
    try:
        return words[text.strip().lower()]
    except KeyError:
        raise UsageError(f"{text!r} is neither yes nor no; write 1 or 0") from None


def _level(text: str) -> str:
    if text.lower() not in telemetry.LEVELS:
        raise UsageError(f"{text!r} is no log level; write one of {', '.join(telemetry.LEVELS)}")
    return text.lower()


@dataclass(frozen=True, slots=True)
class Option:
    """A flag and its variable. `name` is the attribute of the namespace and, if there is one, the field of Config."""

    name: str
    convert: Callable[[str], Any]
    help: str
    metavar: str = "TEXT"
    default: Any = None

    @property
    def flag(self) -> str:
        return "--" + self.name.removesuffix("_s").replace("_", "-")

    @property
    def variable(self) -> str:
        return "S3BLOCKFS_" + self.flag[2:].replace("-", "_").upper()

    def parse(self, text: str) -> Any:
        try:
            return self.convert(text)
        except UsageError as error:  # argparse knows no other exception with a text
            raise argparse.ArgumentTypeError(f"{error} (or unset ${self.variable})") from error

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        # argparse converts a default that is a text like a given argument, and only if the flag is not given.
        default = os.environ.get(self.variable, self.default)
        if self.convert is switch:
            action = parser.add_argument(
                self.flag, dest=self.name, action="store_const", const=True, default=default, help=self.help
            )
            action.type = self.parse
            return
        shown = "" if self.default is None else f" (default {_show(self.default)})"
        parser.add_argument(
            self.flag, dest=self.name, type=self.parse, metavar=self.metavar, default=default, help=self.help + shown
        )


def _show(value: Any) -> str:
    if isinstance(value, int):
        return next(f"{value // _UNITS[unit]}{unit}" for unit in ("G", "M", "K", "") if value % _UNITS[unit] == 0)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _config_options() -> Iterator[Option]:
    kinds: dict[Any, tuple[Callable[[str], Any], str]] = {
        **{int: (size, "SIZE"), float: (seconds, "SECONDS"), bool: (switch, ""), str | None: (str, "TEXT")},
        "block_size": (_block_size, "SIZE"),
    }
    for field in fields(Config):
        convert, metavar = kinds.get(field.name) or kinds[field.type]
        yield Option(field.name, convert, field.metadata["help"], metavar, field.default)


COMMON = (
    Option("log_level", _level, f"one of {', '.join(telemetry.LEVELS)}", "LEVEL", "warning"),
    Option("log_file", str, "append the log to FILE instead of stderr", "FILE"),
    Option("debug", switch, "log everything, and show the traceback of an error", default=False),
)
STORE = (
    *_config_options(),
    Option("local", str, "no S3: keep the buckets in DIR, with a server that runs while it is needed", "DIR"),
)


def store_options() -> argparse.ArgumentParser:
    """The parent parser of commands that talk to a store: Config's fields and --local."""
    parser = argparse.ArgumentParser(add_help=False)
    for option in STORE:
        option.add_to(parser)
    return parser


def add_command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, text: str, *, store: bool = True
) -> argparse.ArgumentParser:
    """Register a command; main adds --log-level, --log-file and --debug."""
    parents = [store_options()] if store else []
    parser: argparse.ArgumentParser = subparsers.add_parser(name, parents=parents, help=summary, description=text)
    parser.set_defaults(run=run)
    return parser


def config_from(namespace: argparse.Namespace) -> Config:
    return Config(**{field.name: getattr(namespace, field.name) for field in fields(Config)})


@dataclass(frozen=True, slots=True)
class Target:
    """What is mounted: a bucket and a key prefix without slashes at its ends (empty: the whole bucket)."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse_target(text: str) -> Target:
    """Read `BUCKET[/PREFIX]` or `s3://BUCKET[/PREFIX]`; one trailing slash is fine. Raises UsageError."""
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{text!r}: {bucket!r} is no bucket name; write BUCKET or BUCKET/PREFIX")
    parts = prefix.removesuffix("/").split("/") if prefix else []
    for part in parts:
        if not is_file_name(part):
            raise UsageError(f"{text!r}: {part!r} cannot be a part of a prefix; write BUCKET/FOLDER/FOLDER")
    return Target(bucket, "/".join(parts))


@contextmanager
def open_store(namespace: argparse.Namespace, target: Target, runtime: Runtime) -> Iterator[S3Store]:
    """The store of `target`. With --local its server runs as long as the context, and the bucket is created if missing.
    Sends nothing to a store on the network yet, so a missing bucket shows at the first request.
    Raises UsageError, EnvironmentProblem (no embedded server here) and what starting the server raises."""
    from s3blockfs.s3store import S3Store  # boto3 takes 0.2 s to import: only for commands that need it

    config = config_from(namespace)
    settings: dict[str, Any] = {"runtime": runtime, "request_deadline_s": config.request_deadline_s}
    if namespace.local is None:
        settings |= {"endpoint_url": config.endpoint_url, "region": config.region, "profile": config.profile}
        with closing(S3Store(target.bucket, **settings)) as store:
            yield store
        return
    if config.endpoint_url or config.profile:
        raise UsageError("--local brings its own server; leave out --endpoint-url and --profile")
    from s3blockfs.embedded import EmbeddedServer

    with (
        EmbeddedServer.join(Path(namespace.local), runtime) as server,
        closing(S3Store(target.bucket, **settings, **server.endpoint.settings)) as store,
    ):
        try:
            store.check_bucket()
        except BucketNotFound:
            store.create_bucket()
        yield store
