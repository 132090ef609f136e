"""Which session leaves the memory for one more, and when none can."""

from __future__ import annotations

import pytest

from splitonnx.errors import ServerBusy
from splitonnx.runtime.server.capacities import Capacity, Occupant

OLD = Occupant(name="old", owner="ann", left=1.0)
NEW = Occupant(name="new", owner="bob", left=2.0)
BUSY = Occupant(name="busy", owner="ann", left=0.0, is_busy=True)
ATTENDED = Occupant(name="attended", owner="ann")


def choose(
    owner: str, *occupants: Occupant, opening: tuple[str, ...] = (), tried: tuple[str, ...] = (),
    sessions: int = 2, sessions_per_owner: int = 2, can_unload: bool = True,
) -> str | None:  # fmt: skip
    capacity = Capacity(
        sessions=sessions, sessions_per_owner=sessions_per_owner, can_unload=can_unload
    )
    found = capacity.find_leaving(owner, occupants, opening, tried)
    return None if found is None else found.name


def test_as_long_as_there_is_room_none_leaves() -> None:
    assert choose("ann") is None
    assert choose("ann", NEW) is None


def test_the_session_that_was_left_the_longest_ago_leaves_first() -> None:
    assert choose("cleo", NEW, OLD) == "old"
    assert choose("cleo", NEW, OLD, tried=("old",)) == "new"


def test_a_session_that_is_about_to_come_takes_room_already() -> None:
    assert choose("cleo", OLD, opening=("dan",)) == "old"
    assert choose("ann", OLD, opening=("ann",), sessions=9) == "old"
    assert choose("ann", OLD, opening=("dan",), sessions=9) is None


def test_who_has_as_many_as_one_may_have_makes_room_among_its_own() -> None:
    assert choose("ann", NEW, OLD, sessions=9, sessions_per_owner=1) == "old"
    assert choose("cleo", NEW, OLD, sessions=9, sessions_per_owner=1) is None


def test_of_clients_without_a_name_there_may_be_as_many_as_of_all() -> None:
    nameless = [Occupant(name=str(n), owner="", left=float(n)) for n in range(3)]
    assert choose("", *nameless, sessions=4, sessions_per_owner=1) is None


def test_where_none_was_left_the_one_that_is_leaving_is_waited_for() -> None:
    assert choose("cleo", ATTENDED, BUSY) == "busy"
    assert choose("cleo", OLD, BUSY) == "old"


@pytest.mark.parametrize(
    ("owner", "occupants", "settings", "limit"),
    [
        ("cleo", (ATTENDED, ATTENDED), {}, "2 sessions"),
        ("cleo", (OLD, NEW), {"can_unload": False}, "2 sessions"),
        ("cleo", (OLD, BUSY), {"tried": ("old", "busy")}, "2 sessions"),
        ("ann", (ATTENDED,), {"sessions": 9, "sessions_per_owner": 1}, "1 sessions of one token"),
    ],
)
def test_where_none_can_leave_the_server_is_busy(
    owner: str, occupants: tuple[Occupant, ...], settings: dict[str, int], limit: str
) -> None:
    with pytest.raises(ServerBusy) as caught:
        choose(owner, *occupants, **settings)  # type: ignore[arg-type]
    assert caught.value.limit == limit
