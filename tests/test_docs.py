"""Documentation is run: transcripts give the output they show, every command and every exit code is documented."""

from __future__ import annotations

import os
import re
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


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_tests_that_documents_name_exist() -> None:
    defined = {name for file in ROOT.glob("tests/*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/DURABILITY.md").read_text()))
    assert len(named) > 20 and named <= defined, named - defined


def test_every_outage_has_a_test_and_every_test_an_outage() -> None:
    section = (ROOT / "docs/SEMANTICS.md").read_text().partition("## Outages\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    named = [re.findall(r"`(\w+)`", line.split("|")[-2]) for line in lines]
    assert all(named), "a line without a test"
    files = [ROOT / "tests" / f"test_outages{kind}.py" for kind in ("", "_process")]
    tests = [name for file in files for name in re.findall(r"^def test_(\w+)\(", file.read_text(), re.MULTILINE)]
    assert sorted(name for names in named for name in names) == sorted(tests)
