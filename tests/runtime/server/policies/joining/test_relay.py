"""Clients train one after the other, each with what the one before it learned."""

from __future__ import annotations

import pytest

from splitonnx.runtime.server.policies.joining.relay import Relay
from splitonnx.runtime.server.policies.joining.rounds import RoundRules
from splitonnx.runtime.server.policies.tasks import RoundReport
from tests.support.shares import make_share, summarize


@pytest.fixture
def relay() -> Relay:
    """Return the relay of three clients, the first of which has its turn."""
    made = Relay(RoundRules(clients_min=3, timeout=10.0))
    for name in "abc":
        answers = made.add(make_share(name, 0), 0.0)
    assert summarize(answers) == {"a": (0, 0.0)}
    return made


def test_each_client_receives_what_the_one_before_it_learned(relay: Relay) -> None:
    turns = [("a", 2, "b"), ("b", 2, "c"), ("c", 2, "a"), ("a", 4, "b")]
    for number, (name, step, following) in enumerate(turns, start=1):
        answers = relay.add(make_share(name, step, 1, value=float(number)), 1.0)
        assert summarize(answers) == {following: (number, float(number))}


def test_a_client_alone_goes_on_with_what_it_learned() -> None:
    relay = Relay(RoundRules())
    assert summarize(relay.add(make_share("a", 0, value=1.0), 0.0)) == {"a": (0, 1.0)}
    assert summarize(relay.add(make_share("a", 2, 1, value=2.0), 0.0)) == {"a": (1, 2.0)}


def test_who_has_no_turn_hands_nothing_on(relay: Relay) -> None:
    assert relay.add(make_share("b", 2, 1, value=99.0), 1.0) == []
    assert summarize(relay.add(make_share("a", 2, 1, value=2.0), 1.0)) == {"b": (1, 2.0)}
    assert relay.report().late == 1


def test_a_turn_that_takes_too_long_passes_to_the_next(relay: Relay) -> None:
    assert relay.close_if_due(9.0) == []
    assert summarize(relay.close_if_due(10.0)) == {"b": (0, 0.0)}
    assert relay.add(make_share("a", 2, 1, value=99.0), 11.0) == []  # too late: it waits again
    assert relay.report() == RoundReport(closed=0, members=3, waiting=2, late=1)
    assert summarize(relay.add(make_share("b", 2, 1, value=3.0), 12.0)) == {"c": (1, 3.0)}


def test_the_turn_waits_for_the_next_in_order_to_come_back(relay: Relay) -> None:
    relay.withdraw("b")  # it reconnects
    assert relay.add(make_share("a", 2, 1, value=2.0), 1.0) == []
    assert summarize(relay.add(make_share("b", 0), 2.0)) == {"b": (1, 2.0)}


def test_a_client_that_leaves_passes_its_turn_on(relay: Relay) -> None:
    answers = relay.add(make_share("a", 2, 1, value=5.0, leaves=True), 1.0)
    assert summarize(answers) == {"a": (1, 5.0), "b": (1, 5.0)}
    relay.leave("b")
    assert summarize(relay.close_if_due(2.0)) == {"c": (1, 5.0)}


def test_a_share_whose_answer_was_lost_is_handed_on_once(relay: Relay) -> None:
    relay.add(make_share("a", 2, 1, value=5.0), 1.0)
    relay.withdraw("a")  # it reconnects, and shares again
    assert relay.add(make_share("a", 2, 1, value=5.0), 1.0) == []
    assert summarize(relay.add(make_share("b", 2, 1, value=6.0), 1.0)) == {"c": (2, 6.0)}
    assert relay.report().late == 0


def test_the_turn_outlasts_the_server(relay: Relay) -> None:
    relay.add(make_share("a", 2, 1, value=5.0), 1.0)
    after = Relay(RoundRules(clients_min=3, timeout=10.0), relay.newest)
    assert after.add(make_share("a", 2, 1, value=5.0), 0.0) == []
    assert after.add(make_share("c", 0), 0.0) == []
    assert summarize(after.add(make_share("b", 0), 0.0)) == {"b": (1, 5.0)}


def test_what_a_client_learns_in_its_turn_is_handed_on_although_the_server_fails_meanwhile(
    relay: Relay,
) -> None:
    relay.add(make_share("a", 2, 1, value=5.0), 1.0)  # b has its turn now
    after = Relay(RoundRules(clients_min=3, timeout=10.0), relay.newest)
    after.rewind("b", 0)
    assert after.add(make_share("b", 2, 1, value=6.0), 0.0) == []
    assert after.report() == RoundReport(closed=2, members=3, waiting=1)
    assert summarize(after.add(make_share("c", 0), 0.0)) == {"c": (2, 6.0)}


def test_a_client_that_joins_later_comes_last(relay: Relay) -> None:
    assert relay.add(make_share("d", 0, value=99.0), 1.0) == []
    order = []
    for name in "abcd":
        order += list(summarize(relay.add(make_share(name, 2, 1), 1.0)))
    assert order == ["b", "c", "d", "a"]


def test_all_but_the_client_that_has_the_turn_wait(relay: Relay) -> None:
    relay.add(make_share("a", 2, 1), 1.0)
    found = {name: relay.report_member(name, 0) for name in "abc"}
    assert {name: (one.round, one.is_waiting) for name, one in found.items()} == {
        "a": (1, True), "b": (1, False), "c": (None, True)
    }  # fmt: skip
