"""What forked processes do: a daemon, a client or command at work, and who looks at what is left."""

from __future__ import annotations

import contextlib
import io
import os
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import apsw
import boto3
import botocore.session
import sqlite_s3vfs
from botocore.loaders import create_loader

from killing import mutants
from killing.folders import Files, Folder, InProcess, State
from killing.forks import Reporter
from killing.steps import COMMAND, MOUNT, STEPS, Step
from s3blockfs import housekeeping
from s3blockfs.cli import main, options
from s3blockfs.runtime import Runtime
from s3blockfs.s3store import S3Store

#: Long enough for a burst, short enough to be waited for after each kill.
LEASE_S = 0.3

#: Options of `connect`.
IN_PROCESS = {"lease_s": LEASE_S, "refresh_s": 0.0}

#: An environment variable that names one of mutants.py.
MUTANT = "KILLSWEEP_MUTANT"

#: What the functions here, and commands, would import each time.
SLOW = "backup", "check", "fuse_binding", "fuse_ops", "past"


def prepare() -> None:
    """Of the fork server. An SDK client takes 0.15 s to make, most of it to parse files that are always the same."""
    for name in SLOW:
        import_module(f"s3blockfs.{name}")
    loader = create_loader()
    botocore.session.create_loader = lambda path=None: loader
    S3Store("warm-up", runtime=Runtime(), endpoint_url="http://127.0.0.1:1", access_key="a", secret_key="b").close()
    # A retention of less than nothing, because S3 tells times in whole seconds.
    options.CONFIG["retain_s"].type.func = lambda text: -10.0 if text == "0" else options.retention(text)


def break_engine() -> None:
    """If who ordered this process wants it so."""
    if mutant := os.environ.get(MUTANT):
        getattr(mutants, mutant)()


def mount(_: Reporter, *arguments: str) -> int:
    break_engine()
    return main.main(["mount", "-f", *arguments])


def folder(face: str, where: dict[str, Any], state: State, *arguments: Any) -> Folder:
    if face == MOUNT:
        return Files(Path(where["directory"]), state, *arguments)
    return InProcess(where["url"], where["bucket"], where["prefix"], IN_PROCESS, state, *arguments)


def step_named(name: str) -> Step:
    return next(step for step in STEPS if step.name == name)


def work(reporter: Reporter, face: str, where: dict[str, Any], state: list[Any], name: str, source: str) -> int:
    """Run a script. Reports "done" after each acknowledged part, then "end", or the error that ended it."""
    break_engine()
    place = folder(face, where, State(*state), source, lambda: reporter.say("done"))
    place.pause = reporter.dismissed
    try:
        step_named(name).script(place)
    except Exception as error:  # noqa: BLE001  whatever it was, it is reported, and looked at by who ordered this
        traceback.print_exc()
        reporter.say(f"{type(error).__name__}: {error}")
        return 1
    reporter.say("end")
    return 0


def make(_: Reporter, face: str, where: dict[str, Any], state: list[Any], name: str) -> int:
    """Bring about what a script starts from; nothing is folded or collected behind its back."""
    housekeeping.Housekeeper.tick = lambda self: None  # type: ignore[method-assign]
    step, kind = step_named(name), State(*state)
    place = folder(face, where, kind)
    if step.legacy:
        bucket = boto3.resource("s3", endpoint_url=where["url"]).Bucket(where["bucket"])
        place.vfs = sqlite_s3vfs.S3VFS(bucket=bucket, block_size=kind.block_size)
        place.connect = lambda name, create: apsw.Connection(place.path(name), vfs=place.vfs.name)
    step.prepare(place)
    return 0


def look(reporter: Reporter, face: str, where: dict[str, Any], state: list[Any], names: list[str]) -> int:
    """Report what each database holds, and what files there are; fail if one cannot be written.

    A copy that died before its head leaves objects, which are listed as a name, and are not there when looked for."""
    place = folder(face, where, State(*state))
    found = {name: place.content(name) for name in names}
    reporter.say(found)
    if isinstance(place, Files):
        reporter.say(sorted(path.name for path in place.directory.iterdir() if path.is_file()))
    else:
        catalog = place.vfs.catalog
        entries = {name: catalog.lookup(place.path(name)) for name, _ in catalog.listing(place.prefix)}
        reporter.say(sorted(name for name, entry in entries.items() if entry and not entry.is_folder))
    for name in [name for name in names if found[name] is not None]:
        with place.open(name) as run:
            run("CREATE TABLE later(x)")
            run("INSERT INTO later VALUES (1)")
    return 0


def verify(reporter: Reporter, _: str, where: dict[str, Any], state: list[Any], names: list[str]) -> int:
    """`s3blockfs check`, and again after everything that can be garbage was collected."""
    place = folder(COMMAND, where, State(*state))
    for words in (("check", *names), ("gc", ".", "--retain", "0"), ("check", *names)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                place.command(*words)
            except RuntimeError as error:
                reporter.say(f"{error}: {said.getvalue()}")
                return 1
    return 0
