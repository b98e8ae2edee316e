"""Clients that serve pages: a Django project, and datasette. (docs/CLIENTS.md has all clients.)"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clienting import PROGRAMS, REFRESH_S, Desks, Site, again, run, served
from mounting import PATIENCE_S, Place, fresh_name, mounted, numbers, shell, sqlite

pytestmark = [pytest.mark.mount, pytest.mark.clients]


# --- Django ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Project:
    """A copy of the project in tests/clients, with its database on a mount."""

    folder: Path
    database: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "DATABASE": str(self.database), "HOME": str(self.folder)}

    def manage(self, *arguments: str, **changes: str) -> str:
        """What `manage.py` says to this."""
        line = [sys.executable, "manage.py", *arguments]
        done = shell(*line, cwd=self.folder, env={**self.environment, **changes})
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def call(self, function: str) -> Any:
        return run("django", function, cwd=self.folder, env=self.environment)

    def served(self) -> contextlib.AbstractContextManager[Site]:
        """By four threads in two processes."""
        line = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "2", "--threads", "2"]
        log = self.folder / f"{fresh_name()}.log"
        return served([*line, "project.wsgi"], log, cwd=self.folder, env=self.environment)


def project(folder: Path, database: Path) -> Project:
    shutil.copytree(PROGRAMS / "django_project", folder / "site", ignore=shutil.ignore_patterns("__pycache__"))
    new = Project(folder / "site", database)
    new.manage("makemigrations", "notes")
    new.manage("migrate")
    return new


def test_django_orm_and_transactions(desks: Desks, tmp_path: Path) -> None:
    """migrate, the ORM, `atomic` with rollback and savepoints, a migration that makes tables anew; the project on the
    other machine reads all of it."""
    name = fresh_name()
    here = project(tmp_path, desks.here / name)
    there = Project(here.folder, desks.there / name)
    assert here.call("orm") == [798, [["blue", 10], ["red", 40]], "CHECK constraint failed: no_negative_stars"]
    assert here.call("atomic") == [["outer", "inner"], 1, ["committed"], False]
    assert (
        desks.told(name, "SELECT count(*), sum(stars), max(json_extract(details, '$.n')) FROM notes_note")
        == "201|798|199"
    )
    models = here.folder / "notes" / "models.py"
    changed = models.read_text().replace(
        "stars = models.", 'colour = models.CharField(max_length=9, default="red")\n    stars = models.'
    )
    models.write_text(changed.replace("max_length=30, unique", "max_length=40, unique"))
    here.manage("makemigrations", "notes")
    assert "Applying notes.0002" in here.manage("migrate")
    assert desks.told(name, "SELECT DISTINCT colour FROM notes_note", "PRAGMA foreign_key_check") == "red"
    assert "No changes detected" in there.manage("makemigrations", "--check")
    dumped = json.loads(there.manage("dumpdata", "notes"))
    assert len(dumped) == 201 + 2 + 1
    assert {each["fields"]["colour"] for each in dumped if each["model"] == "notes.note"} == {"red"}


def test_django_and_wal(desks: Desks, tmp_path: Path) -> None:
    """`init_command` asks for it; a second thread reads beside an open transaction."""
    name = fresh_name()
    site = project(tmp_path, desks.here / name)
    asking = {**site.environment, "INIT": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"}
    assert run("django", "atomic", cwd=site.folder, env=asking) == [["outer", "inner"], 1, ["committed"], False]
    assert run("django", "beside", cwd=site.folder, env=asking) == [["wal", 1], 2, 3]
    assert desks.told(name, "PRAGMA journal_mode", "SELECT count(*) FROM notes_note") == "wal\n3"


def test_django_test_runner(desks: Desks, tmp_path: Path) -> None:
    """`manage.py test` makes its database on the mount, and removes it."""
    name = fresh_name()
    shutil.copytree(PROGRAMS / "django_project", tmp_path / "site", ignore=shutil.ignore_patterns("__pycache__"))
    said = Project(tmp_path / "site", desks.here / name).manage("test")
    assert "Ran 6 tests" in said and "\nOK\n" in said
    time.sleep(REFRESH_S)
    assert name not in shell("ls", desks.there.directory).stdout


def test_django_pages_on_two_machines(desks: Desks, tmp_path: Path) -> None:
    """Servers on both machines: who logs in at one is logged in at the other, and both see what both wrote."""
    name = fresh_name()
    here = project(tmp_path, desks.here / name)
    there = Project(here.folder, desks.there / name)
    user = {"DJANGO_SUPERUSER_USERNAME": "ann", "DJANGO_SUPERUSER_PASSWORD": "secret"}
    here.manage("createsuperuser", "--noinput", "--email", "ann@example.com", **user)
    with here.served() as site, there.served() as second:
        other = Site(second.url, site.cookies)
        for each in (site, other):
            assert each.ask("/notes/", {"text": f"at {each.url}", "tag": ["a", "b"]})[0] == 201
        assert other.ask("/notes/", {"text": "no", "tag": "z", "refuse": "1"})[0] == 409
        time.sleep(REFRESH_S)
        both = [{"text": f"at {each.url}", "tags": ["a", "b"]} for each in (site, other)]
        assert site.json("/notes/") == other.json("/notes/") == {"notes": both, "events": 2}
        posted = [threading.Thread(target=post, args=(each, f"{n}", 8)) for n in range(2) for each in (site, other)]
        for thread in posted:
            thread.start()
        for thread in posted:
            thread.join()
        time.sleep(REFRESH_S)
        assert site.json("/notes/") == other.json("/notes/")
        assert site.json("/notes/")["events"] == len(site.json("/notes/")["notes"]) == 2 + 4 * 8

        status, page = site.submit("/admin/login/?next=/admin/", {"username": "ann", "password": "secret"})
        assert status == 200 and "Site administration" in page
        time.sleep(REFRESH_S)
        note = {"text": "from the <admin>", "details": '{"a": 1}', "stars": "3"}
        status, page = other.submit("/admin/notes/note/add/", note)
        assert status == 200 and "was added successfully" in page, re.findall(r"errorlist.*", page)
        time.sleep(REFRESH_S)
        page = site.ask("/admin/notes/note/")[1]
        assert "from the &lt;admin&gt;" in page and "35 notes" in page
    assert desks.told(name, "SELECT count(*) FROM notes_tag", "SELECT count(*) FROM notes_event") == "2\n34"


def post(site: Site, text: str, times: int) -> None:
    for _ in range(times):
        assert site.ask("/notes/", {"text": text})[0] == 201


def test_django_when_the_daemon_is_killed(place: Place, tmp_path: Path) -> None:
    """Under requests: they are answered with an error. With a new daemon, which has nothing but S3, the server goes on
    by itself, and has every note that it said it had."""
    acknowledged: list[str] = []
    ten = threading.Event()

    def write(site: Site, who: str) -> None:
        for i in range(10_000):
            if site.ask("/notes/", {"text": f"{who} {i}"})[0] != 201:
                return
            acknowledged.append(f"{who} {i}")
            if len(acknowledged) >= 10:
                ten.set()

    with mounted(place, tmp_path, "--lease", "1") as mount, project(tmp_path, mount / "a.db").served() as site:
        writers = [threading.Thread(target=write, args=(site, who)) for who in "abc"]
        for writer in writers:
            writer.start()
        assert ten.wait(PATIENCE_S)
        mount.kill()
        for writer in writers:
            writer.join()
        assert site.ask("/notes/")[0] == 500
        with again(place, mount) as remounted:
            found = site.json("/notes/")
            notes = {note["text"] for note in found["notes"]}
            assert notes >= set(acknowledged) and len(notes) <= len(acknowledged) + 3
            assert found["events"] == len(found["notes"]) == len(notes)
            assert site.ask("/notes/", {"text": "after"})[0] == 201
            assert sqlite(remounted / "a.db", "PRAGMA integrity_check", "PRAGMA foreign_key_check") == "ok"


# --- datasette -------------------------------------------------------------------------------------------------


def test_datasette_over_a_mounted_folder(desks: Desks, tmp_path: Path) -> None:
    """JSON, CSV and HTML of every database in a folder of the mount, with its metadata.json on it as well; search,
    labels of other tables, facets; what the other machine writes; and a past state, served as immutable."""
    folder = fresh_name("dir")
    here, there = desks.here / folder, desks.there / folder
    done = shell("mkdir", here)
    assert done.returncode == 0, done.stderr
    sqlite(
        here / "town.db",
        "PRAGMA journal_mode=WAL",
        "CREATE TABLE country(id INTEGER PRIMARY KEY, name TEXT)",
        "CREATE TABLE town(id INTEGER PRIMARY KEY, name TEXT, country INTEGER REFERENCES country(id), data BLOB)",
        "INSERT INTO country VALUES (1, 'Norway'), (2, 'Italy & more')",
        f"INSERT INTO town SELECT i, 'town ' || i, 1 + i % 2, x'00' FROM ({numbers(500)})",
        'CREATE VIRTUAL TABLE town_fts USING fts5(name, content="town", content_rowid="id")',
        "INSERT INTO town_fts(town_fts) VALUES ('rebuild')",
    )
    sqlite(here / "other.sqlite", "CREATE TABLE only(a)", "INSERT INTO only VALUES ('here')")
    metadata = tmp_path / "metadata.json"
    named = {"title": "On a mount", "databases": {"town": {"queries": {"named": "SELECT count(*) AS n FROM town"}}}}
    metadata.write_text(json.dumps(named))
    assert shell("cp", metadata, here / "metadata.json").returncode == 0
    past = desks.here / f".snapshots/{folder}/other.sqlite/{commits(desks, folder)}.sqlite"
    line = [sys.executable, "-m", "datasette", "serve", here, "--host", "127.0.0.1", "--port", "0"]
    line += ["--setting", "sql_time_limit_ms", "20000"]  # instead of 1 s: the machine may be busy
    with served([*line, "--immutable", past], tmp_path / "log") as site:
        names = {each["name"] for each in site.json("/-/databases.json")}
        assert names == {"town", "other", past.stem}
        assert "On a mount" in site.ask("/")[1]
        rows = site.json("/town/town.json?_shape=array&id__lte=2&_col=name&_sort=id")
        assert [(row["id"], row["name"]) for row in rows] == [(1, "town 1"), (2, "town 2")]
        assert site.json("/town.json?sql=select+count(*)+n+from+town&_shape=array") == [{"n": 500}]
        assert site.json("/town/named.json?_shape=array") == [{"n": 500}]
        page = site.ask("/town/town?_search=town+77&_facet=country")[1]
        assert re.findall(r'<td class="col-name[^>]*>([^<]*)</td>', page) == ["town 77"]
        assert "Italy &amp; more</a>" in page
        lines = list(csv.DictReader(io.StringIO(site.ask("/town/town.csv?_stream=on&_labels=on")[1])))
        assert len(lines) == 500 and lines[0]["country_label"] == "Italy & more"

        sqlite(there / "town.db", ".timeout 30000", "INSERT INTO town VALUES (501, 'new', 1, NULL)")
        sqlite(there / "other.sqlite", ".timeout 30000", "UPDATE only SET a = 'there'")
        time.sleep(REFRESH_S)
        assert site.json("/town/town/501.json?_shape=objects")["rows"][0]["name"] == "new"
        assert site.json("/other/only.json?_shape=arrays")["rows"] == [[1, "there"]]
        assert site.json(f"/{past.stem}/only.json?_shape=arrays")["rows"] == [[1, "here"]]


def commits(desks: Desks, folder: str) -> int:
    """The number of the last commit of a database in it."""
    return max(
        int(Path(name).stem) for name in shell("ls", desks.here / f".snapshots/{folder}/other.sqlite").stdout.split()
    )
