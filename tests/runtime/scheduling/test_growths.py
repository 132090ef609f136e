"""What tasks grew to is remembered by user, phase and first size, in a bounded number a user."""

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
    kept, forgotten = TaskKind("ana", "train", 10_001), TaskKind("ana", "train", 10_002)
    remembered.note(kept, 20_000)
    remembered.note(forgotten, 20_000)
    for number in range(3 * growths._MOST_KINDS):
        assert remembered.foresee(kept) == 20_000
        remembered.note(TaskKind("ana", "train", number), number + 1)
    assert remembered.foresee(forgotten) == 10_002
    assert count_kinds(remembered) == growths._MOST_KINDS


def test_nobody_has_what_is_known_of_another_forgotten() -> None:
    remembered = Growths()
    kind = TaskKind("ana", "train", 1)
    remembered.note(kind, 9)
    for number in range(3 * growths._MOST_KINDS):
        remembered.note(TaskKind("eve", "train", number), number + 1)
    assert remembered.foresee(kind) == 9
    assert count_kinds(remembered) == 1 + growths._MOST_KINDS


def test_where_users_are_too_many_one_who_is_gone_is_forgotten_first() -> None:
    there = {"ana"}
    remembered = Growths(is_there=there.__contains__)
    kind = TaskKind("ana", "train", 1)
    remembered.note(kind, 9)
    for number in range(3 * growths._MOST_USERS):
        user = f"visitor {number}"
        there.add(user)
        remembered.note(TaskKind(user, "train", 1), 9)
        there.remove(user)
    assert remembered.foresee(kind) == 9
    assert remembered.foresee(TaskKind("visitor 0", "train", 1)) == 1
    assert remembered.foresee(TaskKind(user, "train", 1)) == 9
    assert len(remembered._most) == growths._MOST_USERS


def test_where_all_users_are_there_the_one_longest_without_a_task_is_forgotten() -> None:
    remembered = Growths()
    kept, forgotten = TaskKind("ana", "train", 1), TaskKind("ben", "train", 1)
    remembered.note(kept, 9)
    remembered.note(forgotten, 9)
    for number in range(3 * growths._MOST_USERS):
        assert remembered.foresee(kept) == 9
        remembered.note(TaskKind(number, "train", 1), 9)
    assert remembered.foresee(forgotten) == 1
    assert len(remembered._most) == growths._MOST_USERS


def test_all_that_is_remembered_is_bounded() -> None:
    remembered = Growths()
    for user in range(2 * growths._MOST_USERS):
        for first in range(growths._MOST_KINDS + 8):
            remembered.note(TaskKind(user, "train", first), first + 1)
    assert count_kinds(remembered) == growths._MOST_USERS * growths._MOST_KINDS


def count_kinds(remembered: Growths) -> int:
    return sum(len(kinds) for kinds in remembered._most.values())
