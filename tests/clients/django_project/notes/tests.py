"""Run by `manage.py test`: Django makes a database of its own on the mount, and removes it."""

from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase

from notes.models import Event, Note


class InOneTransaction(TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        Note.objects.create(text="of the class")

    def test_each_begins_with_the_same(self) -> None:
        self.assertEqual(Note.objects.count(), 1)
        Note.objects.all().delete()

    def test_each_begins_with_the_same_again(self) -> None:
        self.assertEqual(Note.objects.count(), 1)
        Note.objects.create(text="of this test")

    def test_a_page(self) -> None:
        answer = self.client.post("/notes/", {"text": "posted", "tag": ["a", "b"]})
        self.assertEqual(answer.status_code, 201)
        self.assertEqual(self.client.get("/notes/").json()["notes"][-1], {"text": "posted", "tags": ["a", "b"]})


class Committed(TransactionTestCase):
    def test_a_refused_note_leaves_nothing(self) -> None:
        self.assertEqual(self.client.post("/notes/", {"text": "no", "refuse": "1"}).status_code, 409)
        self.assertEqual((Note.objects.count(), Event.objects.count()), (0, 0))

    def test_on_commit(self) -> None:
        done: list[str] = []
        with transaction.atomic():
            transaction.on_commit(lambda: done.append("committed"))
            Note.objects.create(text="a")
            self.assertEqual(done, [])
        self.assertEqual(done, ["committed"])

    def test_the_database_is_on_the_mount(self) -> None:
        self.assertTrue(connection.settings_dict["NAME"].endswith("-test.sqlite"))
        self.assertEqual(connection.cursor().execute("PRAGMA journal_mode").fetchone(), ("delete",))
