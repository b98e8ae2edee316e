"""`s3blockfs serve DIR`: the embedded S3 server in the foreground, for other programs and other commands."""

import contextlib
import signal
from pathlib import Path

import click

from s3blockfs.cli import options
from s3blockfs.errors import EnvironmentProblem
from s3blockfs.runtime import Runtime

WATCH_S = 1.0


@options.command("serve", store=False, short_help="run the embedded S3 server in the foreground")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def run(directory: Path) -> None:
    """Run an S3 server on 127.0.0.1 with its data in DIR, which is created if missing, until Ctrl-C.
    `--local DIR` uses it too."""
    from s3blockfs.embedded import EmbeddedServer

    # SIGTERM becomes an exception like SIGINT: it then also ends a start that hangs, and cleans up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        contextlib.closing(Runtime()) as runtime,
        EmbeddedServer.join(directory, runtime) as server,
    ):
        print(
            f"S3 endpoint  {server.endpoint.url}  (path-style addresses, any region)\n"
            f"keys         access_key and secret_key in {server.directory / 'server.json'}\n"
            f"use it       s3blockfs COMMAND --local {directory} ...\n"
            "Ctrl-C leaves; the server ends with its last user.",
            flush=True,
        )
        while server.alive:
            runtime.sleep(WATCH_S)
        log = server.directory / "server.log"
        raise EnvironmentProblem(f"{directory}: the embedded S3 server ended; read {log}, then start again")
