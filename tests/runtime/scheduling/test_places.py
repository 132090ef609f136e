"""Places of which there are few: who keeps one, and who has to leave."""

from __future__ import annotations

from splitonnx.runtime.scheduling.places import TENURE_SECONDS, Places


class Hall:
    """Places under a clock of our own, and who is gone."""

    def __init__(self, most: int) -> None:
        self.now = 0.0
        self.gone: set[object] = set()
        self.places = Places(
            most, is_there=lambda user: user not in self.gone, clock=lambda: self.now
        )

    def take(self, user: str, *at_work: str) -> bool:
        return self.places.take(user, at_work)

    def find_leaving(self, waiting: str, *at_work: str) -> object:
        return self.places.find_leaving((waiting,), at_work)


def test_who_comes_while_there_is_room_gets_a_place() -> None:
    hall = Hall(2)
    assert [hall.take("ann"), hall.take("bob"), hall.take("cleo")] == [True, True, False]


def test_who_has_a_place_keeps_it_though_others_ask() -> None:
    hall = Hall(1)
    hall.take("ann")
    assert not hall.take("bob")
    assert hall.take("ann")


def test_a_place_is_passed_on_once_its_time_is_over_and_not_before() -> None:
    hall = Hall(1)
    hall.take("ann")
    hall.now = TENURE_SECONDS - 0.1
    assert hall.find_leaving("bob") is None
    assert not hall.take("bob")
    hall.now = TENURE_SECONDS
    assert hall.find_leaving("bob") == "ann"
    assert hall.take("bob")
    assert not hall.take("ann")  # it is bob's turn now


def test_nobody_leaves_for_nobody() -> None:
    hall = Hall(1)
    hall.take("ann")
    hall.now = 10 * TENURE_SECONDS
    assert hall.places.find_leaving((), ()) is None
    assert hall.places.find_leaving(("ann",), ()) is None
    assert hall.take("ann")


def test_nobody_leaves_while_there_is_room() -> None:
    hall = Hall(2)
    hall.take("ann")
    hall.now = 10 * TENURE_SECONDS
    assert hall.find_leaving("bob") is None


def test_of_those_at_rest_the_one_that_has_been_there_longest_leaves() -> None:
    hall = Hall(3)
    for user in ("ann", "bob", "cleo"):
        hall.take(user)
        hall.now += 1.0
    hall.now = 2 * TENURE_SECONDS
    assert hall.find_leaving("dan", "ann") == "bob"
    assert hall.take("dan", "ann")
    assert hall.take("ann", "ann")
    assert not hall.take("bob", "ann", "cleo", "dan")


def test_who_is_at_work_may_begin_nothing_more_and_leaves_when_done() -> None:
    hall = Hall(1)
    hall.take("ann")
    hall.now = TENURE_SECONDS
    assert hall.find_leaving("bob", "ann") == "ann"
    assert not hall.take("bob", "ann")
    assert hall.take("bob")


def test_who_is_gone_keeps_nobody_waiting() -> None:
    hall = Hall(1)
    hall.take("ann")
    hall.gone.add("ann")
    assert not hall.take("bob", "ann")  # its last task still runs
    assert hall.take("bob")


def test_who_comes_back_begins_a_time_of_its_own() -> None:
    hall = Hall(1)
    hall.take("ann")
    hall.now = TENURE_SECONDS
    hall.take("bob")
    hall.now = 2 * TENURE_SECONDS
    hall.take("ann")
    hall.now += 0.5 * TENURE_SECONDS
    assert hall.find_leaving("bob") is None
