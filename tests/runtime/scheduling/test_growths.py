"""What tasks grew to is remembered by user, phase and first size, and in bounded number."""

from __future__ import annotations

from splitonnx.runtime.scheduling import growths
from splitonnx.runtime.scheduling.growths import Growths


def test_a_kind_is_foreseen_to_need_the_most_that_one_of_it_needed() -> None:
    remembered = Growths()
    kind = ("ana", "train", 40)
    assert remembered.foresee(kind) == 40
    for size in (60, 50, 30):
        remembered.note(kind, size)
    assert remembered.foresee(kind) == 60
    assert remembered.foresee(("ben", "train", 40)) == 40


def test_kinds_that_nobody_begins_are_forgotten_and_never_more_than_a_bound_remembered() -> None:
    remembered = Growths()
    kept, forgotten = ("ana", "train", 1), ("ben", "train", 1)
    remembered.note(kept, 9)
    remembered.note(forgotten, 9)
    for number in range(growths._MOST_REMEMBERED - 1):
        remembered.note(kept, 9)
        remembered.note(("eve", "train", number), number + 1)
    assert remembered.foresee(kept) == 9
    assert remembered.foresee(forgotten) == 1


def test_memory_for_a_hundred_thousand_kinds_is_that_of_a_thousand() -> None:
    remembered = Growths()
    for number in range(10 * growths._MOST_REMEMBERED):
        remembered.note(("eve", "train", number), number + 1)
    assert len(remembered._most) == growths._MOST_REMEMBERED
