"""Django's ORM on the project beside this file; `python with_django.py FUNCTION` in a folder with a copy of it."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import django
from calling import main

sys.path.insert(0, str(Path.cwd()))
os.environ["DJANGO_SETTINGS_MODULE"] = "project.settings"
django.setup()

from django.db import IntegrityError, connection, transaction  # noqa: E402  (needs the settings)
from django.db.models import Count, F, Q, Sum  # noqa: E402
from notes.models import Event, Note, Tag  # noqa: E402


def orm() -> Any:
    """Many at once, relations, JSON, expressions, aggregates, a constraint."""
    Note.objects.bulk_create([Note(text=f"note {i}", stars=i % 5, details={"n": i}) for i in range(200)])
    red, blue = Tag.objects.create(name="red"), Tag.objects.create(name="blue")
    red.note_set.add(*Note.objects.filter(stars=4))
    blue.note_set.add(*Note.objects.filter(Q(details__n__lt=10) | Q(text="note 199")))
    Note.objects.filter(stars=0).update(stars=F("stars") + 10)
    try:
        with transaction.atomic():
            Note.objects.filter(text="note 1").update(stars=-1)
        refused = "accepted"
    except IntegrityError as error:
        refused = str(error)
    Note.objects.filter(text="note 2").delete()
    tags = Tag.objects.annotate(notes=Count("note")).order_by("name").values_list("name", "notes")
    return [Note.objects.aggregate(Sum("stars"))["stars__sum"], list(tags), refused]


def atomic() -> Any:
    """A block that raises is rolled back; one inside another is a savepoint; `on_commit` runs at the end only."""
    said: list[str] = []
    try:
        with transaction.atomic():
            Note.objects.create(text="rolled back")
            transaction.on_commit(lambda: said.append("never"))
            raise KeyError
    except KeyError:
        pass
    with transaction.atomic():
        outer = Note.objects.create(text="outer")
        try:
            with transaction.atomic():
                Note.objects.create(text="inner, rolled back")
                raise KeyError
        except KeyError:
            Event.objects.create(note=outer, what="inner failed")
        with transaction.atomic():
            Note.objects.create(text="inner")
        sid = transaction.savepoint()
        Note.objects.create(text="by hand, rolled back")
        transaction.savepoint_rollback(sid)
        transaction.on_commit(lambda: said.append("committed"))
    kept = list(Note.objects.filter(~Q(text__startswith="note ")).order_by("id").values_list("text", flat=True))
    return [kept, Event.objects.count(), said, connection.in_atomic_block]


def beside() -> Any:
    """How the connection was opened; how many notes another thread sees beside an open transaction, and after it."""
    modes = []
    with connection.cursor() as cursor:
        for pragma in ("journal_mode", "synchronous"):
            cursor.execute(f"PRAGMA {pragma}")
            modes += cursor.fetchone()
    with ThreadPoolExecutor(1) as other:
        with transaction.atomic():
            Note.objects.create(text="beside")
            before = other.submit(Note.objects.count).result()
        return [modes, before, other.submit(Note.objects.count).result()]


if __name__ == "__main__":
    main(globals())
