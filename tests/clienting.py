"""Programs that know nothing of s3blockfs, run on machines that look for news now and then, as those of users do.

What is run is in tests/clients/ or a program of its own; answers come out of it as JSON, lines, or pages.
"""

from __future__ import annotations

import contextlib
import http.cookiejar
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mounting import PATIENCE_S, Mount, Place, mounted, shell, sqlite

#: Of the mounts that clients share; the tests wait for it once, and the first look after it has to be right.
REFRESH_S = 0.5

PROGRAMS = Path(__file__).with_name("clients")


@dataclass(frozen=True)
class Desks:
    """Two machines on one key prefix."""

    here: Mount
    there: Mount

    def told(self, name: str, *statements: str) -> str:
        """What the second machine sees of a database, an interval later, and that it is sound."""
        time.sleep(REFRESH_S)
        sound, _, rest = sqlite(self.there / name, "PRAGMA integrity_check", *statements).partition("\n")
        assert sound == "ok"
        return rest


def run(program: str, function: str, *arguments: str | Path, **options: Any) -> Any:
    """What a function of `tests/clients/with_PROGRAM.py` returns."""
    done = shell(sys.executable, PROGRAMS / f"with_{program}.py", function, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def module(name: str, *arguments: str | Path, **options: Any) -> str:
    """What a program that comes with a package prints (`python -m NAME`)."""
    done = shell(sys.executable, "-m", name, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def running(line: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone at the end, by SIGTERM if it has not ended by itself."""
    process = subprocess.Popen([str(part) for part in line], text=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(PATIENCE_S / 4)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def said_until_killed(process: subprocess.Popen[str], mount: Mount, lines: int = 20) -> list[str]:
    """The lines that a client says, one after each commit, when the daemon is killed after some of them: up to the
    one that is no number, or the last."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if len(said) == lines:
            mount.kill()
        if not line.strip().isdecimal():
            break
    assert len(said) >= lines, said
    return said


@contextlib.contextmanager
def again(place: Place, mount: Mount) -> Iterator[Mount]:
    """After SIGKILL: a daemon on the same directory, with nothing but what is in S3."""
    root = mount.directory.parent
    for folder in (mount.spill, root / "tmp"):
        shutil.rmtree(folder)
        folder.mkdir()
    with mounted(place, root.parent, "--lease", "1", root=root) as remounted:
        yield remounted


class Site:
    """What a client serves on 127.0.0.1, and somebody with a browser who keeps cookies."""

    def __init__(self, url: str, cookies: http.cookiejar.CookieJar | None = None) -> None:
        self.url = url
        self.cookies = http.cookiejar.CookieJar() if cookies is None else cookies
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.cookies))

    def ask(self, path: str, fields: Mapping[str, str | Sequence[str]] | None = None) -> tuple[int, str]:
        """GET, or POST with `fields`; status and page."""
        body = None if fields is None else urllib.parse.urlencode(fields, doseq=True).encode()
        request = urllib.request.Request(self.url + path, body, {"Referer": self.url + path})
        try:
            with self._opener.open(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, refusal.read().decode()

    def json(self, path: str) -> Any:
        status, page = self.ask(path)
        assert status == 200, page
        return json.loads(page)

    def submit(self, path: str, fields: Mapping[str, str]) -> tuple[int, str]:
        """Fill in the form at `path`, which carries Django's token."""
        (token, *_) = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', self.ask(path)[1])
        return self.ask(path, {**fields, "csrfmiddlewaretoken": token})


@contextlib.contextmanager
def served(line: Sequence[str | Path], log: Path, **options: Any) -> Iterator[Site]:
    """A server that chooses a port and logs its address."""
    options |= {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with log.open("w") as output, running(line, stdout=output, **options) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Site(address[0])
