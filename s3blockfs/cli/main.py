"""The `s3blockfs` command: finds the sub-command, runs it, and turns errors into one line and an exit code.

A command is a module `cli/<name>_cmd.py` with `add_parser(subparsers)`, which sets `run=function(namespace) -> int`.
These modules import what is slow (boto3, libfuse, SQLite) inside `run`, so that `--help` is instant.
"""

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from s3blockfs import __version__, telemetry
from s3blockfs.cli.options import COMMON
from s3blockfs.errors import S3BlockFSError, UsageError

COMMANDS = ("mount", "umount", "ls", "doctor", "serve")


class _Parser(argparse.ArgumentParser):
    """Usage errors are one line like all others, and name the help to read."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command's sub-parser."""
    parser = _Parser(prog="s3blockfs", description="SQLite databases in S3 that behave like ordinary local files.")
    parser.add_argument("--version", action="version", version=f"s3blockfs {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"s3blockfs.cli.{name}_cmd").add_parser(subparsers)
    for command in subparsers.choices.values():
        for option in COMMON:
            option.add_to(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse's own exits (--help, --version) are SystemExit."""
    namespace = argparse.Namespace(debug=None)
    try:
        build_parser().parse_args(argv, namespace)
        telemetry.setup_logging("debug" if namespace.debug else namespace.log_level, namespace.log_file)
        code: int = namespace.run(namespace)
        sys.stdout.flush()  # here, so that a closed pipe shows now and not while Python shuts down
        return code
    except S3BlockFSError as error:
        if namespace.debug:
            traceback.print_exc()
        print(f"s3blockfs: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python flushes stdout once more at exit: give that somewhere to go.
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main())
