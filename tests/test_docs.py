"""Documentation is run: transcripts give the output they show, every command and every exit code is documented."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mounting import Place, shell
from servers import seaweed

from s3blockfs import errors
from s3blockfs.cli.main import commands

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def _run(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


@pytest.mark.mount
def test_the_readme_transcript_and_its_python_give_what_they_show(tmp_path: Path) -> None:
    (transcript,) = _blocks("README.md", "console")
    on_the_mount, in_process, objects = _blocks("README.md", "python")
    steps = re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]
    assert len(steps) >= 6
    try:
        for step in steps:
            command, _, shown = step.partition("\n")
            assert _run(command, tmp_path) == shown, command
            if command.startswith("sqlite3 here"):  # the Python example works on the mount of the transcript
                assert _run(f"{sys.executable} -c '{on_the_mount}'", tmp_path) == "(2,)\n"
                with seaweed(tmp_path / "s3") as server:  # joins the one that serves the mount
                    place = Place(server.url, server.access_key, server.secret_key, "bucket")
                    environment = place.environment | {"AWS_ENDPOINT_URL": server.url}
                    done = shell(sys.executable, "-c", in_process, env=environment)
                    assert (done.stdout, done.stderr) == ("(3,)\n", "")
                    done = shell(sys.executable, "-c", objects, env=environment)
                    assert (done.stdout, done.stderr) == ("['hello.txt']\n(3,)\n", "")
                    assert _run("sqlite3 here/published.sqlite 'SELECT count(*) FROM note'", tmp_path) == "3\n"
                    place.delete("published.sqlite")
                _run(
                    "sqlite3 here/app.sqlite '.timeout 20000' \"DELETE FROM note WHERE text != 'written here'\"",
                    tmp_path,
                )
    finally:
        for name in ("here", "there"):
            if os.path.ismount(tmp_path / name):
                _run(f"s3blockfs umount {name}", tmp_path)


@pytest.mark.mount
def test_the_tutorial_gives_what_it_shows(tmp_path: Path) -> None:
    """In order: commands of its transcripts, and programs, which are saved under the name in their first line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (ROOT / "docs/TUTORIAL.md").read_text().replace("8000", str(port))
    run = 0
    try:
        for kind, block in re.findall(r"^```(console|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if kind == "python":
                (tmp_path / block.split()[1]).write_text(block)
                continue
            for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, shown = step.partition("\n")
                assert _run(command, tmp_path) == shown, command
                run += 1
        assert run > 20
    finally:
        if (pid := tmp_path / "app.pid").exists():
            with contextlib.suppress(ProcessLookupError):  # the page ends it itself
                os.kill(int(pid.read_text()), signal.SIGKILL)
        for name in ("machine-a", "machine-b"):
            if os.path.ismount(tmp_path / name):
                _run(f"s3blockfs umount {name}", tmp_path)


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in commands.commands:
        assert f"| `s3blockfs {command} " in readme


def test_every_exit_code_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    (codes,) = re.findall(r"Exit codes: (.*?)\.", readme)
    named = {int(number) for number in re.findall(r"\b(\d+) ", codes)}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.S3BlockFSError)]
    assert {c.exit_code for c in classes} <= named


def _anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", document.read_text()):
            target = document.parent / file if file else document
            assert target.exists(), f"{document.name}: {file}"
            assert not anchor or anchor in _anchors(target), f"{document.name}: {file}#{anchor}"


def test_tests_that_documents_name_exist() -> None:
    defined = {name for file in ROOT.glob("tests/*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    for document, least in (("docs/DURABILITY.md", 20), ("docs/RECIPES.md", 4)):
        named = set(re.findall(r"`(test_\w+)`", (ROOT / document).read_text()))
        assert len(named) > least and named <= defined, named - defined


def test_every_outage_has_a_test_and_every_test_an_outage() -> None:
    section = (ROOT / "docs/SEMANTICS.md").read_text().partition("## Outages\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    named = [re.findall(r"`(\w+)`", line.split("|")[-2]) for line in lines]
    assert all(named), "a line without a test"
    files = [ROOT / "tests" / f"test_outages{kind}.py" for kind in ("", "_process")]
    tests = [name for file in files for name in re.findall(r"^def test_(\w+)\(", file.read_text(), re.MULTILINE)]
    assert sorted(name for names in named for name in names) == sorted(tests)


def test_every_client_that_is_run_is_in_the_table() -> None:
    table = (ROOT / "docs/CLIENTS.md").read_text().partition("\n## ")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert all(len(cells) == 4 and re.search(r"\d\.\d", cells[1]) for cells in lines), "a client without a version"
    tests = [name for *_, names in lines for name in re.findall(r"`(\w+)`", names)]
    files = [*ROOT.glob("tests/test_clients_*.py"), ROOT / "tests/test_mptester.py", ROOT / "tests/test_recipes.py"]
    there = [name for file in files for name in re.findall(r"^def test_(\w+)\(", file.read_text(), re.MULTILINE)]
    recipes = set(re.findall(r"^def test_(\w+)\(", files[-1].read_text(), re.MULTILINE)) - set(tests)
    assert sorted(tests) == sorted(set(there) - recipes)
    (group,) = re.findall(r"^clients = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    packages = re.findall(r'^    "([\w-]+)', group, re.MULTILINE)
    clients = " ".join(cells[0] for cells in lines).lower()
    assert packages and not [package for package in packages if package not in clients]
