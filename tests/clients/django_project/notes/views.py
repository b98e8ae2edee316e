"""GET lists notes, POST adds one with its event and tags, in one transaction."""

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt

from notes.models import Event, Note, Tag


class Refused(Exception):
    pass


@csrf_exempt
def notes(request: HttpRequest) -> JsonResponse:
    if request.method == "GET":
        found = Note.objects.order_by("id").prefetch_related("tags")
        rows = [{"text": note.text, "tags": sorted(tag.name for tag in note.tags.all())} for note in found]
        return JsonResponse({"notes": rows, "events": Event.objects.count()})
    try:
        with transaction.atomic():
            note = Note.objects.create(text=request.POST["text"])
            Event.objects.create(note=note, what="written")
            for name in request.POST.getlist("tag"):
                note.tags.add(Tag.objects.get_or_create(name=name)[0])
            if "refuse" in request.POST:
                raise Refused
    except Refused:
        return JsonResponse({"refused": request.POST["text"]}, status=409)
    return JsonResponse({"id": note.pk}, status=201)
