"""The protocol of the head, and of garbage, explored completely in small; and every rule of it shown to be needed.

With `-s` this prints how much was explored, and for each rule the shortest way in which things go wrong without it.
A change of the models changes the numbers below: look at why, then write them down.
"""

from __future__ import annotations

import pytest
from model_garbage import RULES as GARBAGE_RULES
from model_garbage import Garbage
from model_outcomes import RULES as OUTCOME_RULES
from model_outcomes import Outcomes
from smallmodel import explore

Programs = tuple[tuple[str, ...], ...]
long = [pytest.mark.long, pytest.mark.timeout(3600)]

#: What each actor does, requests that may go wrong, and how many states that makes.
OUTCOMES = [
    ((("commit", "commit"), ("commit",)), 3, 5_175),
    ((("delete", "create"), ("delete", "create")), 2, 6_589),
    ((("commit",), ("restore",), ("restore",)), 2, 17_310),
    ((("commit",), ("restore",), ("fold", "floor")), 1, 39_932),
    ((("commit",), ("delete", "create"), ("fold",)), 2, 76_330),
    pytest.param((("commit",), ("commit",), ("fold", "floor")), 2, 224_517, marks=long),
    pytest.param((("commit", "commit"), ("delete", "create"), ("fold",)), 2, 498_475, marks=long),
    pytest.param((("commit",), ("delete", "create"), ("fold", "floor")), 1, 93_478, marks=long),
]
GARBAGE = [
    ((("cut", "commit"), ("fold",), ("fold",)), 1, 9_638),
    ((("bulk", "commit"), ("restore",), ("collect",)), 1, 8_545),
    ((("bulk",), ("delete", "create"), ("collect",)), 1, 6_440),
    ((("bulk",), ("fold",), ("restore",), ("collect",)), 0, 24_382),
    ((("name", "forget"), ("restore",), ("collect",)), 1, 5_919),
    ((("bulk",), ("name", "restore"), ("collect",)), 1, 29_984),
    ((("bulk",), ("name", "forget"), ("collect",)), 1, 43_271),
    ((("commit", "bulk"), ("fold",), ("collect",)), 1, 71_092),
    pytest.param((("bulk",), ("fold",), ("collect",), ("collect",)), 0, 603_047, marks=long),
    pytest.param((("commit", "bulk"), ("fold",), ("collect", "collect")), 1, 496_957, marks=long),
    pytest.param((("commit",), ("fold",), ("delete", "create"), ("collect",)), 0, 125_956, marks=long),
]

TWO_WRITERS: Programs = (("commit",), ("commit",))
WRITER_AND_REMOVER: Programs = (("commit",), ("delete", "create"))
TWO_REMOVERS: Programs = (("delete",), ("delete", "create"))
BULK_AND_COLLECTOR: Programs = (("bulk",), ("collect",))
WRITER_AND_FOLDER: Programs = (("commit",), ("fold",))
ALL_THREE: Programs = (("bulk", "commit"), ("fold",), ("collect",))

#: A rule, what happens without it, and where.
OUTCOMES_WITHOUT = {
    "a 412 is no loss": ("loss was told of", TWO_WRITERS),
    "a 412 is no success": ("success was told of", TWO_WRITERS),
    "look before a repetition": ("loss was told of", TWO_WRITERS),
    "repeat the same bytes": ("applied after its loss was told (I3)", (("commit",), ("restore",), ("fold",))),
    "a no-op before giving up": ("applied after its loss was told (I3)", TWO_WRITERS),
    "the no-op is a new head": ("applied after its loss was told (I3)", TWO_WRITERS),
    "commits are told by their ids": ("success was told of", TWO_WRITERS),
    "commits are looked up in the log": ("loss was told of", TWO_WRITERS),
    "commits are looked up in the archives": ("loss was told of", WRITER_AND_REMOVER),
    "an archive below the floor proves nothing": ("loss was told of", WRITER_AND_REMOVER),
    "swaps are told by their nonces": ("success was told of", WRITER_AND_REMOVER),
    "a commit needs its base's commit": ("was made on commit x, and applied on", TWO_WRITERS),
    "a swap needs its base's database": ("was meant for the database of", TWO_REMOVERS),
    "a new database has a new id": ("was meant for the database of", TWO_REMOVERS),
    "a tombstone is replaced by creations only": ("replaced a tombstone", WRITER_AND_REMOVER),
    "deletion leaves a tombstone": ("rev, seq or floor do not go on", WRITER_AND_REMOVER),
    "seq goes on": ("rev, seq or floor do not go on", WRITER_AND_REMOVER),
}
GARBAGE_WITHOUT = {
    "objects are stored before the swap": ("the head needs", BULK_AND_COLLECTOR),
    "a commit's uploads are above the floor": ("the head needs", ALL_THREE),
    "a fold's uploads are above the floor": ("the head needs", ALL_THREE),
    "a fold finds the segments that it read": ("shows other commits", (("cut",), ("fold",), ("fold",))),
    "a fold leaves newer blocks alone": ("shows other commits", (("bulk",), ("fold",))),
    "a fold needs its base's database": ("shows other commits", (("bulk",), ("fold",), ("restore",))),
    "what is restored is above the floor": ("the head needs", (("bulk",), ("restore",), ("collect",))),
    "a head is archived before its references are dropped": ("a reader of rev 1 misses", BULK_AND_COLLECTOR),
    "archives above the floor are roots": ("root 1 needs", BULK_AND_COLLECTOR),
    "roots are listed after the floor was raised": ("needs", ALL_THREE),
    "only what is not above the floor is deleted": ("the head needs", BULK_AND_COLLECTOR),
    "the floor is raised by a swap": ("root 1 needs", BULK_AND_COLLECTOR),
    "nobody but a collector deletes uploads": ("the head needs", WRITER_AND_FOLDER),
    "named snapshots are roots": ("an archive that has a name is missing", (("name",), ("collect",))),
    "a snapshot is named above the floor": ("has a name is missing", (("bulk",), ("name",), ("collect",))),
    "names are never used again": ("the head needs", WRITER_AND_FOLDER),
    "deletion leaves a tombstone": ("needs", (("bulk",), ("delete", "create"), ("collect",))),
}


@pytest.mark.parametrize(("programs", "faults", "states"), OUTCOMES)
def test_what_callers_are_told_is_true(programs: Programs, faults: int, states: int) -> None:
    explored = explore(Outcomes(programs, faults))
    print(f"\n{programs}, {faults} faults: {explored}")
    assert (explored.wrong, explored.states) == ("", states), explored


@pytest.mark.parametrize(("programs", "faults", "states"), GARBAGE)
def test_nothing_that_somebody_needs_is_missing(programs: Programs, faults: int, states: int) -> None:
    explored = explore(Garbage(programs, faults))
    print(f"\n{programs}, {faults} faults: {explored}")
    assert (explored.wrong, explored.states) == ("", states), explored


@pytest.mark.parametrize("rule", sorted(OUTCOME_RULES))
def test_callers_are_told_lies_without(rule: str) -> None:
    wrong, programs = OUTCOMES_WITHOUT[rule]
    explored = explore(Outcomes(programs, 2, without=rule))
    print(f"\nWithout «{rule}»: {explored}")
    assert explored.wrong and wrong in explored.wrong, explored


@pytest.mark.parametrize("rule", sorted(GARBAGE_RULES))
def test_something_is_missing_without(rule: str) -> None:
    wrong, programs = GARBAGE_WITHOUT[rule]
    explored = explore(Garbage(programs, 1, without=rule))
    print(f"\nWithout «{rule}»: {explored}")
    assert explored.wrong and wrong in explored.wrong, explored
