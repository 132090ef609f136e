"""How long a client waits between two attempts to reach its server."""

from __future__ import annotations

import random
from itertools import islice
from math import inf, nan

import pytest

from splitonnx.errors import UsageError
from splitonnx.runtime.channels.retries import FIRST_DELAY, LONGEST_DELAY, Backoff
from splitonnx.runtime.client.clients import Client
from tests.support import tiny
from tests.support.tiny_servers import TinyServer


def pick_longest(low: float, high: float) -> float:
    return high


def pick_shortest(low: float, high: float) -> float:
    return low


def test_the_first_attempt_is_made_at_once() -> None:
    assert next(Backoff(first=5.0).delays()) == 0


def test_waits_double_until_they_are_as_long_as_they_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random, "uniform", pick_longest)
    delays = Backoff(first=1.0, longest=6.0).delays()
    assert list(islice(delays, 7)) == [0, 1, 2, 4, 6, 6, 6]


def test_a_wait_is_at_least_half_of_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", pick_shortest)
    delays = Backoff(first=1.0, longest=6.0).delays()
    assert list(islice(delays, 5)) == [0, 0.5, 1, 2, 3]


def test_the_clients_of_one_server_do_not_all_come_at_once() -> None:
    first, second = (list(islice(Backoff().delays(), 50))[1:] for _ in range(2))
    assert first != second
    assert len(set(first)) > 40


def test_waits_have_no_end_and_never_pass_the_longest() -> None:
    delays = list(islice(Backoff().delays(), 2000))
    assert max(delays) <= LONGEST_DELAY
    assert min(delays[1:]) >= FIRST_DELAY / 2


def test_each_count_of_waits_begins_anew() -> None:
    backoff = Backoff(first=1.0, longest=8.0)
    assert max(islice(backoff.delays(), 10)) > 2
    assert list(islice(backoff.delays(), 2))[1] <= 1


def test_a_client_never_gives_up_unless_told() -> None:
    assert Backoff().give_up_after is None


@pytest.mark.parametrize(("first", "longest"), [(0.0, 0.0), (2.0, 2.0), (0.05, inf)])
def test_a_first_wait_up_to_the_longest_is_taken(first: float, longest: float) -> None:
    assert all(
        wait <= longest for wait in islice(Backoff(first=first, longest=longest).delays(), 9)
    )


def test_a_first_wait_beyond_the_longest_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not be longer than the longest \(5 s\), not 20 s"):
        Backoff(first=20.0, longest=5.0)
    with pytest.raises(UsageError, match="longer than the longest"):
        Backoff(first=20.0)  # with the default of the other


@pytest.mark.parametrize("name", ["first", "longest", "give_up_after"])
@pytest.mark.parametrize("seconds", [-1.0, -inf, nan])
def test_a_time_that_is_none_is_refused_by_its_name(name: str, seconds: float) -> None:
    times = {"first": 0.0} | {name: seconds}
    with pytest.raises(UsageError, match=f"{name} must be 0 seconds or more, not {seconds:g}"):
        Backoff(**times)


@pytest.mark.parametrize("seconds", [-1.0, nan])
def test_a_client_refuses_it_before_it_asks_a_server(seconds: float) -> None:
    server = TinyServer(bundle=tiny.split_bundle())
    with pytest.raises(UsageError, match="give_up_after must be 0 seconds or more"):
        Client(server.bundle.client, server.dial, give_up_after=seconds)
    assert server.heard == []
