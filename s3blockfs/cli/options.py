"""What commands share: their options, targets, and the databases they lead to.

Every field of `Config` is an option; its type decides how the text is read. Each option is also an environment variable
`S3BLOCKFS_<OPTION>`; the flag wins. A command's function gets only its own arguments: options are in `settings()`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from s3blockfs import telemetry
from s3blockfs.config import HOUR_S, Config, duration_s
from s3blockfs.errors import UsageError
from s3blockfs.format.head import LABEL, MAX_BLOCK_BYTES, MIN_BLOCK_BYTES
from s3blockfs.format.keys import is_file_name, join
from s3blockfs.malloc import few_arenas
from s3blockfs.runtime import Runtime

if TYPE_CHECKING:
    from s3blockfs.catalog import Catalog
    from s3blockfs.s3store import S3Store

# --- types: functions that read a text or raise BadParameter, to which click adds the option ------------------------

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LAST_S = 253_402_300_799  # of the year 9999; heads may hold any number
# The rules of AWS for new and old buckets, widened to what MinIO and Ceph accept.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")


def _match(pattern: str, text: str, complaint: str) -> re.Match[str]:
    if (match := re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII)) is None:
        raise click.BadParameter(f"{text!r} {complaint}")
    return match


def size(text: str) -> int:
    """Bytes from `65536`, `64K`, `128M`, `1G` (powers of 1024)."""
    match = _match(r"(\d{1,18})([KMGT]?)(?:iB|B)?", text.strip(), "is no size; write one like 64K, 128M or 1G")
    return int(match[1]) * _SIZES[match[2].upper()]


def block_size(text: str) -> int:
    value = size(text)
    if not MIN_BLOCK_BYTES <= value <= MAX_BLOCK_BYTES or value & (value - 1):
        raise click.BadParameter(f"{text!r} is no block size; write a power of two from {MIN_BLOCK_BYTES} to 4M")
    return value


def seconds(text: str) -> float:
    """Seconds from `1`, `0.5`, `30s`, `90m`, `24h`, `7d`."""
    if (value := duration_s(text)) is None:
        raise click.BadParameter(f"{text!r} is no time; write one like 1, 0.5, 90m or 24h")
    return value


def retention(text: str) -> float:
    if (value := seconds(text)) < HOUR_S:
        raise click.BadParameter(f"{text!r} is too short for readers elsewhere; write 1h or more")
    return value


def octal(text: str) -> int:
    return int(_match("[0-7]{1,3}|0[0-7]{3}", text, "is no umask; write one like 077")[0], 8)


def address(text: str) -> str:
    """Only of this machine: the figures are not for the network."""
    match = re.fullmatch(r"(127\.0\.0\.1|localhost|\[?::1\]?):(\d{1,5})", text)
    if match is None or int(match[2]) > 0xFFFF:
        raise click.BadParameter(f"{text!r} is no address of this machine; write one like 127.0.0.1:9100")
    return text


class Target(NamedTuple):
    """A bucket, a key prefix without slashes at its ends (empty: the whole bucket), and a database's name, if any."""

    bucket: str
    prefix: str
    name: str = ""

    @property
    def key(self) -> str:
        """The key prefix of that database."""
        return join(self.prefix, self.name)

    def __str__(self) -> str:
        return "s3://" + "/".join(filter(None, self))


def target(text: str) -> Target:
    """Read `BUCKET[/PREFIX]` or `s3://BUCKET[/PREFIX]`; one trailing slash is fine."""
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise click.BadParameter(f"{text!r}: {bucket!r} is no bucket name; write BUCKET or BUCKET/PREFIX")
    parts = prefix.removesuffix("/").split("/") if prefix else []
    for part in parts:
        if not is_file_name(part):
            raise click.BadParameter(f"{text!r}: {part!r} cannot be a part of a prefix; write BUCKET/FOLDER/FOLDER")
    return Target(bucket, "/".join(parts))


def database(text: str) -> Target:
    """Read `BUCKET/NAME` or `s3://BUCKET/NAME`; folders before the name become the prefix."""
    folder, _, name = target(text).prefix.rpartition("/")
    if not name or text.endswith("/"):
        raise click.BadParameter(f"{text!r} names no database; write BUCKET/NAME")
    return Target(target(text).bucket, folder, name)


def label(text: str) -> str:
    """Of a named snapshot; can be taken neither for a number nor for a time."""
    if not LABEL.fullmatch(text):
        raise click.BadParameter(f"{text!r} is no label; write a letter, then letters, digits, dots, dashes")
    return text


def utc(time_ms: int) -> str:
    return datetime.fromtimestamp(min(time_ms // 1000, LAST_S), timezone.utc).isoformat()


# --- options --------------------------------------------------------------------------------------------------------


def _option(name: str, kind: Any, help_text: str, default: Any = None) -> click.Option:
    flag = name.removesuffix("_s").replace("_", "-")
    more = {"is_flag": True} if kind is bool else {"type": kind, "default": _text(kind, default), "show_default": True}
    variable = "S3BLOCKFS_" + flag.replace("-", "_").upper()
    return click.Option([f"--{flag}", name], help=help_text, envvar=variable, show_envvar=True, **more)


def _text(kind: Any, default: Any) -> str | None:
    """As a user would write it."""
    if kind in (size, block_size):
        return next(f"{default // unit}{letter}" for letter, unit in reversed(_SIZES.items()) if default % unit == 0)
    if kind is octal:
        return f"{default:03o}"
    if isinstance(default, float):
        return f"{default / HOUR_S:g}h" if default >= HOUR_S else f"{default:g}"
    return None if default is None else str(default)


_KINDS: dict[Any, Any] = {
    **{int: size, float: seconds, bool: bool, str | None: str, int | None: click.IntRange(min=0)},
    **{"block_size": block_size, "retain_s": retention, "umask": octal, "metrics": address},
}
COMMON = (
    _option("log_level", click.Choice(telemetry.LEVELS, case_sensitive=False), "how much to log", "warning"),
    _option("log_file", str, "append the log to this file instead of stderr"),
    _option("debug", bool, "log everything, and show the traceback of an error"),
)
LOCAL = _option("local", str, "no S3: keep the buckets in this folder, with a server that runs while it is needed")
CONFIG = {
    each.name: _option(each.name, _KINDS.get(each.name, _KINDS[each.type]), each.metadata["help"], each.default)
    for each in fields(Config)
}


@dataclass(slots=True)
class Settings:
    """The command line, and what its options say."""

    arguments: list[str]
    config: Config = field(default_factory=Config)
    local: str | None = None
    debug: bool = False


def settings() -> Settings:
    """Those of the command that runs."""
    found: Settings = click.get_current_context().obj
    return found


class Command(click.Command):
    """Has the options that all commands have, and unless `store` is false those of commands that talk to a store."""

    def __init__(self, *arguments: Any, store: bool = True, mount: bool = False, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if store:
            self.params += [CONFIG[each.name] for each in fields(Config) if mount or not each.metadata["mount"]]
            self.params += [LOCAL]
        self.params += COMMON

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        level, log_file, ctx.obj.debug = (ctx.params.pop(option.name) for option in COMMON)
        telemetry.setup_logging("debug" if ctx.obj.debug else level, log_file)
        ctx.obj.local = ctx.params.pop("local", None)
        ctx.obj.config = Config(**{name: ctx.params.pop(name) for name in CONFIG if name in ctx.params})
        return rest


def command(name: str, **options: Any) -> Callable[[Callable[..., int | None]], click.Command]:
    """Makes a command of a function; its docstring is the help, what it returns (None: 0) the exit code."""
    return click.command(name, cls=Command, **options)


force_option = click.option("--force", is_flag=True, help="overwrite what is there")
json_option = click.option("--json", "as_json", is_flag=True, help="one JSON object a line")


def show(facts: Mapping[str, object], as_json: bool, *lines: str) -> None:
    """Print what is known of one thing: for a program, or for a person in these `lines` or in one for each fact."""
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    told = lines or [f"{name:16}{'-' if value in (None, '') else value}" for name, value in shown.items()]
    print(json.dumps(facts) if as_json else "\n".join(map(telemetry.printable, told)))


def complain(said: object) -> None:
    print(telemetry.printable(f"s3blockfs: {said}"), file=sys.stderr)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on the terminal, if stderr is one; is told (bytes done, bytes in all, if that is known)."""
    with click.progressbar(length=0, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def report(done: int, total: int | None) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield report


# --- the stack ------------------------------------------------------------------------------------------------------


@contextmanager
def opened(where: Target) -> Iterator[tuple[Catalog, S3Store, Runtime]]:
    """The databases under the prefix of `where`. With --local its server runs as long as the context, and the bucket is
    created if missing. Sends nothing to a store on the network yet, so a missing bucket shows at the first request.
    Raises UsageError, EnvironmentProblem (no embedded server here) and what starting the server raises."""
    from s3blockfs.catalog import Catalog
    from s3blockfs.s3store import S3Store  # boto3 takes 0.2 s to import: only for commands that need it

    few_arenas()
    local, config, runtime = settings().local, settings().config, Runtime()
    with ExitStack() as stack:
        access: dict[str, Any] = config.access
        if local is not None:
            if given := [name for name, value in config.access.items() if value and name != "region"]:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise UsageError(f"--local brings its own server; leave out {flags}")
            from s3blockfs.embedded import EmbeddedServer

            access = stack.enter_context(EmbeddedServer.join(Path(local), runtime)).endpoint.settings
        store = S3Store(where.bucket, runtime=runtime, request_deadline_s=config.request_deadline_s, **access)
        stack.enter_context(closing(store))
        stack.enter_context(closing(runtime))
        if local is not None:
            store.create_bucket()
        yield stack.enter_context(closing(Catalog(store, runtime, config, where.prefix))), store, runtime
