from django.db import models


class Tag(models.Model):
    name = models.CharField(max_length=30, unique=True)


class Note(models.Model):
    text = models.TextField()
    details = models.JSONField(default=dict)
    stars = models.IntegerField(default=0)
    written = models.DateTimeField(auto_now_add=True)
    tags = models.ManyToManyField(Tag, blank=True)

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(stars__gte=0), name="no_negative_stars")]  # noqa: RUF012  (as in Django)

    def __str__(self) -> str:
        return self.text


class Event(models.Model):
    """One for each note."""

    note = models.ForeignKey(Note, on_delete=models.CASCADE)
    what = models.CharField(max_length=30)
