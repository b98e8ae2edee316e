"""The programs of docs/RECIPES_SERVICES.md, run as they stand there: a fleet, Django on two machines, a function."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inprocess import elsewhere
from mounting import PATIENCE_S, Place, mounted, shell
from proxy import FaultProxy

pytestmark = pytest.mark.mount

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "RECIPES_SERVICES.md").read_text()
FLEET, SETTINGS, MODELS, VIEWS, HANDLER = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", file=sys.stderr)


# --- a fleet -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tenants", [300, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(3 * 3600)])]
)
def test_a_fleet(
    tenants: int, place: Place, proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Created, listed, one written to, all migrated, with the requests that the document tells; and migrated again."""
    bucket = Place(place.url, place.access_key, place.secret_key, f"fleet-{place.prefix}")
    bucket.create_bucket()
    (tmp_path / "fleet.py").write_text(FLEET)
    environment = bucket.environment | {"BUCKET": bucket.bucket, "AWS_ENDPOINT_URL": proxy.url}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def fleet(*arguments: object, schema: int = 2) -> tuple[str, Counter[str]]:
        proxy.reset()
        begin = time.monotonic()
        line = [sys.executable, tmp_path / "fleet.py", *map(str, arguments)]
        done = shell(*line, env=environment | {"SCHEMA": str(schema)}, timeout=3600)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        asked = Counter("LIST" if request.kind in ("list", "bucket") else request.method for request in proxy.requests)
        say(capsys, f"{tenants} tenants: {arguments[0]}: {dict(asked)} in {time.monotonic() - begin:.1f} s")
        return done.stdout, asked

    said, asked = fleet("create", tenants, schema=1)
    assert said == f"{tenants} tenants, schema 1\n"
    assert asked["PUT"] <= 2 * tenants + 40 and asked["GET"] <= 6 * tenants + 40  # the probe, by all threads at once
    fleet("add", "00123", "of that tenant", schema=1)
    said, asked = fleet("migrate")
    assert said == f"{tenants} tenants, schema 2\n"
    assert asked["PUT"] <= tenants + 10 and asked["GET"] <= 2 * tenants + 10 and asked["LIST"] <= tenants / 500 + 2
    said, asked = fleet("migrate")
    assert asked["PUT"] == 0 and asked["GET"] <= tenants + 10
    assert fleet("show", "00123")[0] == "(1, 'of that tenant', 0)\n"
    assert fleet("show", "00124")[0] == "\n"


# --- Django --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(project: Path, database: Path, environment: dict[str, str]) -> Iterator[int]:
    """The port of a server process of the project."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    line = [sys.executable, "manage.py", "runserver", "--noreload", f"127.0.0.1:{port}"]
    with (project / "log").open("ab") as log:
        server = subprocess.Popen(
            line, cwd=project, env=environment | {"DATABASE": str(database)}, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None and time.monotonic() < deadline, (project / "log").read_text()
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait(PATIENCE_S)


def ask(port: int, method: str = "GET", body: str | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request(method, "/notes", body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.clients
def test_django_on_two_machines(place: Place, tmp_path: Path) -> None:
    """A project as `startproject` makes it: the reader sees what the writer committed, and cannot write itself."""
    project, environment = tmp_path / "project", place.environment
    project.mkdir()

    def manage(*arguments: str, database: Path) -> str:
        done = shell(
            sys.executable, "-m", "django", *arguments, cwd=project,
            env=environment | {"DATABASE": str(database), "PYTHONPATH": str(project)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with mounted(place, tmp_path) as writes, mounted(place, tmp_path, "--read-only") as reads:
        here, there = writes / "site.sqlite", reads / "site.sqlite"
        manage("startproject", "site_", ".", database=here)
        manage("startapp", "notes", database=here)
        with (project / "site_/settings.py").open("a") as settings:
            settings.write(SETTINGS + 'INSTALLED_APPS.append("notes")\n')
        (project / "notes/models.py").write_text(MODELS)
        (project / "notes/views.py").write_text(VIEWS)
        urls = "from django.urls import path\nfrom notes.views import notes\nurlpatterns = [path('notes', notes)]\n"
        (project / "site_/urls.py").write_text(urls)
        environment |= {"DJANGO_SETTINGS_MODULE": "site_.settings"}
        manage("makemigrations", "notes", database=here)
        assert "Applying notes.0001_initial... OK" in manage("migrate", database=here)
        manage("migrate", "--check", database=there)
        with served(project, here, environment) as writer, served(project, there, environment) as reader:
            for number in range(5):
                texts = [f"note {n}" for n in range(number + 1)]
                assert ask(writer, "POST", texts[-1]) == (200, texts)
                assert ask(reader) == (200, texts)
            assert ask(reader, "POST", "of the reader") == (503, {"error": "attempt to write a readonly database"})
            assert ask(reader) == ask(writer) == (200, texts)


# --- a function ----------------------------------------------------------------------------------------------

#: What calls a handler: an event a line in, a line out; first how long the import took.
RUNTIME = """
import json, sys, time
begin = time.perf_counter()
from handler import handler
print(json.dumps(time.perf_counter() - begin), flush=True)
for line in sys.stdin:
    print(json.dumps(handler(json.loads(line), None)), flush=True)
"""


class Function:
    """An instance of the function, as a cloud would start it: with nothing but environment variables."""

    def __init__(self, folder: Path, place: Place) -> None:
        environment = {
            "AWS_ACCESS_KEY_ID": place.access_key,
            "AWS_SECRET_ACCESS_KEY": place.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": place.url,
            "DATABASE": f"s3://{place.target}/events.sqlite",
        }
        line = [sys.executable, "-c", RUNTIME]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.cold_s: float = self.receive()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE_S)[0], "no answer"
        return json.loads(self.process.stdout.readline())

    def __call__(self, name: str, value: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": name, "value": value}) + "\n")
        self.process.stdin.flush()
        answer: int = self.receive()["total"]
        return answer

    def __enter__(self) -> Function:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


def test_a_function(place: Place, proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cold, warm, frozen while others go on, thawed; an event that comes twice counts once."""
    (tmp_path / "handler.py").write_text(HANDLER)
    with Function(tmp_path, place) as first:
        assert first("a", 1) == 1
        proxy.reset()
        with Function(tmp_path, place.via(proxy.url)) as second:
            connected = [f"{request.method} {request.kind}" for request in proxy.requests]
            assert second("b", 2) == 3
            cold = [f"{request.method} {request.kind}" for request in proxy.requests]
            say(capsys, f"cold: {second.cold_s:.2f} s to import and connect ({connected}), first call {cold}")
            assert len(cold) <= 5 and [each for each in cold if each.startswith("PUT")] == ["PUT head"]
            proxy.reset()
            assert second("c", 4) == 7
            warm = [f"{request.method} {request.kind}" for request in proxy.requests]
            assert sorted(warm) == ["GET head", "GET head", "PUT head"]
            os.kill(second.process.pid, signal.SIGSTOP)  # frozen, as after each answer
            begin = time.monotonic()
            assert first("d", 8) == 15
            assert time.monotonic() - begin < 5  # nobody waits for a lease that a frozen one has
            os.kill(second.process.pid, signal.SIGCONT)
            assert second("e", 16) == 31
            assert second("d", 8) == 31  # delivered twice
    assert elsewhere(place, "SELECT count(*), total(value) FROM event", "events.sqlite") == [(5, 31.0)]


def test_reading_takes_one_request(place: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text(HANDLER)
    with Function(tmp_path, place) as function:
        function("a", 1)
    program = "import os, s3blockfs; print(s3blockfs.connect(bucket=os.environ['B'], name=os.environ['N'], "
    program += "read_only=True).execute('SELECT * FROM event').get)"
    environment = place.environment | {"B": place.bucket, "N": f"{place.prefix}/events.sqlite"}
    proxy.reset()
    done = shell(sys.executable, "-c", program, env=environment | {"AWS_ENDPOINT_URL": proxy.url})
    assert (done.stdout, done.stderr) == ("('a', 1)\n", "")
    assert [f"{request.method} {request.kind}" for request in proxy.requests] == ["GET head"]
