"""The `s3blockfs` command: finds the sub-command, runs it, and turns errors into one line and an exit code.

A command is a function in a module `cli/<topic>_cmd.py`, see `options.command`. These functions import what is slow
(boto3, libfuse, SQLite) themselves, so that `--help` is instant."""

import getopt
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from s3blockfs import __version__
from s3blockfs.cli import doctor_cmd, mount_cmd, names_cmd, options, past_cmd, serve_cmd, transfer_cmd, upkeep_cmd
from s3blockfs.errors import S3BlockFSError


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """SQLite databases in S3 that behave like ordinary local files."""


for _module in (doctor_cmd, mount_cmd, names_cmd, past_cmd, serve_cmd, transfer_cmd, upkeep_cmd):
    for _command in vars(_module).values():
        if isinstance(_command, options.Command):
            commands.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    settings = options.Settings(list(sys.argv[1:] if arguments is None else arguments))
    try:
        try:
            # Not `commands.main`: it has its own ideas of Ctrl-C and of closed pipes.
            with commands.make_context("s3blockfs", settings.arguments[:], obj=settings) as context:
                code = commands.invoke(context) or 0
        except click.exceptions.Exit as done:  # --help and --version
            code = done.exit_code
        sys.stdout.flush()  # here, so that a closed pipe shows now and not while Python shuts down
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python flushes stdout once more at exit: give that somewhere to go.
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (S3BlockFSError, click.ClickException, OSError) as error:
        if settings.debug:
            traceback.print_exc()
        options.complain(_in_one_line(error))
        return getattr(error, "exit_code", 1)


def _in_one_line(error: S3BlockFSError | click.ClickException | OSError) -> str:
    if isinstance(error, OSError):  # about a local file, or a name that is a folder
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    if isinstance(error, S3BlockFSError):
        return str(error)
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "s3blockfs"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; see `{command} --help`"


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main())


def mount_entry() -> NoReturn:
    """The console script `mount.s3blockfs SOURCE DIR [-sfnv] [-o OPTIONS] [-t TYPE]`, as mount(8) calls it."""
    try:
        given, places = getopt.gnu_getopt(sys.argv[1:], "sfnvo:t:")
    except getopt.GetoptError as error:
        sys.exit(f"mount.s3blockfs: {error}; mount(8) calls this, people call `s3blockfs mount`")
    options = [part for name, value in given if name in ("-o", "-s") for part in ("-o", value or "sloppy")]
    sys.exit(0 if ("-f", "") in given else main(["mount", *options, "--", *places]))
