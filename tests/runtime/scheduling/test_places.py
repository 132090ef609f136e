"""Places of which there are few: who keeps one, and who has to leave."""

from __future__ import annotations

from splitonnx.runtime.scheduling.places import TENURE_SECONDS, Places


class Clocked:
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
    few = Clocked(2)
    assert [few.take("ann"), few.take("bob"), few.take("cleo")] == [True, True, False]


def test_who_has_a_place_keeps_it_though_others_ask() -> None:
    few = Clocked(1)
    few.take("ann")
    assert not few.take("bob")
    assert few.take("ann")


def test_a_place_is_passed_on_once_its_time_is_over_and_not_before() -> None:
    few = Clocked(1)
    few.take("ann")
    few.now = TENURE_SECONDS - 0.1
    assert few.find_leaving("bob") is None
    assert not few.take("bob")
    few.now = TENURE_SECONDS
    assert few.find_leaving("bob") == "ann"
    assert few.take("bob")
    assert not few.take("ann")  # it is bob's turn now


def test_nobody_leaves_for_nobody() -> None:
    few = Clocked(1)
    few.take("ann")
    few.now = 10 * TENURE_SECONDS
    assert few.places.find_leaving((), ()) is None
    assert few.places.find_leaving(("ann",), ()) is None
    assert few.take("ann")


def test_nobody_leaves_while_there_is_room() -> None:
    few = Clocked(2)
    few.take("ann")
    few.now = 10 * TENURE_SECONDS
    assert few.find_leaving("bob") is None


def test_of_those_at_rest_the_one_that_has_been_there_longest_leaves() -> None:
    few = Clocked(3)
    for user in ("ann", "bob", "cleo"):
        few.take(user)
        few.now += 1.0
    few.now = 2 * TENURE_SECONDS
    assert few.find_leaving("dan", "ann") == "bob"
    assert few.take("dan", "ann")
    assert few.take("ann", "ann")
    assert not few.take("bob", "ann", "cleo", "dan")


def test_who_is_at_work_may_begin_nothing_more_and_leaves_when_done() -> None:
    few = Clocked(1)
    few.take("ann")
    few.now = TENURE_SECONDS
    assert few.find_leaving("bob", "ann") == "ann"
    assert not few.take("bob", "ann")
    assert few.take("bob")


def test_who_is_gone_keeps_nobody_waiting() -> None:
    few = Clocked(1)
    few.take("ann")
    few.gone.add("ann")
    assert not few.take("bob", "ann")  # its last task still runs
    assert few.take("bob")


def test_who_comes_back_begins_a_time_of_its_own() -> None:
    few = Clocked(1)
    few.take("ann")
    few.now = TENURE_SECONDS
    few.take("bob")
    few.now = 2 * TENURE_SECONDS
    few.take("ann")
    few.now += 0.5 * TENURE_SECONDS
    assert few.find_leaving("bob") is None
