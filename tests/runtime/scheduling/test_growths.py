"""What tasks grew to is remembered by user, phase and first size, and in bounded number."""

from __future__ import annotations

from splitonnx.runtime.scheduling import growths
from splitonnx.runtime.scheduling.growths import Growths, TaskKind


def test_a_kind_is_foreseen_to_need_the_most_that_one_of_it_needed() -> None:
    remembered = Growths()
    kind = TaskKind("ana", "train", 40)
    assert remembered.foresee(kind) == 40
    for size in (60, 50, 30):
        remembered.note(kind, size)
    assert remembered.foresee(kind) == 60
    assert remembered.foresee(TaskKind("ben", "train", 40)) == 40


def test_a_large_task_once_is_forgotten_by_those_that_need_less() -> None:
    remembered = Growths()
    kind = TaskKind("ana", "train", 40)
    remembered.note(kind, 900)
    foreseen = []
    for _ in range(200):
        remembered.note(kind, 60)
        foreseen.append(remembered.foresee(kind))
        remembered.end(kind, 60)
    assert foreseen == sorted(foreseen, reverse=True)
    assert (foreseen[0], foreseen[-1]) == (900, 60)


def test_tasks_that_need_it_each_time_lose_nothing_of_it() -> None:
    remembered = Growths()
    kind = TaskKind("ana", "train", 40)
    for _ in range(100):
        remembered.note(kind, 60)
        remembered.end(kind, 60)
        assert remembered.foresee(kind) == 60


def test_a_kind_that_grows_no_more_is_forgotten() -> None:
    remembered = Growths()
    kind = TaskKind("ana", "train", 40)
    remembered.note(kind, 60)
    for _ in range(100):
        remembered.end(kind, 40)
    assert not remembered._most


def test_what_is_begun_again_and_again_is_kept_and_what_is_not_makes_room() -> None:
    remembered = Growths()
    kept, forgotten = TaskKind("ana", "train", 1), TaskKind("ben", "train", 1)
    remembered.note(kept, 9)
    remembered.note(forgotten, 9)
    for number in range(3 * growths._MOST_REMEMBERED):
        assert remembered.foresee(kept) == 9
        remembered.note(TaskKind("eve", "train", number), number + 1)
    assert remembered.foresee(forgotten) == 1
    assert len(remembered._most) == growths._MOST_REMEMBERED
