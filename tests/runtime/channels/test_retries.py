"""How long a client waits between two attempts to reach its server."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from splitonnx.runtime.channels.retries import FIRST_DELAY, LONGEST_DELAY, Backoff


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
