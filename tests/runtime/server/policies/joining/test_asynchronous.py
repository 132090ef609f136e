"""Each share is joined as it comes; who is too far ahead waits, and who leaves ends with all."""

from __future__ import annotations

import pytest

from splitonnx.runtime.server.policies.joining.asynchronous import Asynchronous
from splitonnx.runtime.server.policies.joining.rounds import Answer, RoundRules
from splitonnx.runtime.server.policies.tasks import RoundReport
from tests.support.shares import make_share, summarize

TIMEOUT = 10.0


def start(names: str, *, staleness: int = 4) -> Asynchronous:
    """Return the rounds of some clients that have received the first model, which is 0."""
    rules = RoundRules(clients_min=len(names), quorum=len(names), timeout=TIMEOUT)
    rounds = Asynchronous(rules, staleness=staleness)
    for name in names:
        answers = rounds.add(make_share(name, 0), 0.0)
    assert summarize(answers) == dict.fromkeys(names, (0, 0.0))
    return rounds


def only(answers: list[Answer]) -> tuple[str, int, float]:
    """Return the one session that is answered, the round's number, and the joined tensor."""
    ((name, (number, value)),) = summarize(answers).items()
    return name, number, round(value, 9)


def test_the_first_round_waits_for_all_clients_that_are_asked_for() -> None:
    rounds = Asynchronous(RoundRules(clients_min=2, timeout=TIMEOUT))
    assert rounds.add(make_share("a", 0, value=1.0), 0.0) == []
    assert rounds.close_if_due(1e9) == []
    answers = rounds.add(make_share("b", 0, value=3.0), 1e9)
    assert summarize(answers) == {"a": (0, 2.0), "b": (0, 2.0)}


def test_a_share_is_joined_at_once_by_a_weight_that_falls_with_its_lag() -> None:
    rounds = start("abc")
    first = 0.6 * 10.0
    answers = rounds.add(make_share("a", 1, 1, value=10.0), 1.0)
    assert only(answers) == ("a", 1, round(first, 9))
    weight = 0.6 / 2**0.5  # one round came between
    second = (1 - weight) * first + weight * -4.0
    answers = rounds.add(make_share("b", 1, 7, value=-4.0), 2.0)
    assert only(answers) == ("b", 2, round(second, 9))
    weight = 0.6 / 3**0.5
    third = (1 - weight) * second + weight * 8.0
    answers = rounds.add(make_share("c", 5, 1, value=8.0), 3.0)
    assert only(answers) == ("c", 3, round(third, 9))
    fourth = 0.4 * third + 0.6 * 2.0  # it has the newest
    answers = rounds.add(make_share("c", 6, 1, value=2.0), 3.0)
    assert only(answers) == ("c", 4, round(fourth, 9))


def test_the_number_of_samples_does_not_change_a_weight() -> None:
    found = [only(start("a").add(make_share("a", 1, n, value=1.0), 0.0)) for n in (1, 1000)]
    assert found[0] == found[1] == ("a", 1, 0.6)


def test_a_share_whose_answer_was_lost_is_joined_once() -> None:
    rounds = start("ab")
    rounds.add(make_share("a", 1, 1, value=10.0), 1.0)
    rounds.withdraw("a")
    assert only(rounds.add(make_share("a", 1, 1, value=10.0), 1.0)) == ("a", 1, 6.0)
    assert rounds.report().closed == 1


def test_who_asks_for_the_model_only_changes_nothing() -> None:
    rounds = start("ab")
    assert only(rounds.add(make_share("a", 1, 0, value=99.0), 1.0)) == ("a", 0, 0.0)


def test_what_a_client_learned_before_it_received_a_model_is_not_joined() -> None:
    rounds = start("a")
    assert only(rounds.add(make_share("e", 7, 100, value=99.0), 1.0)) == ("e", 0, 0.0)
    assert only(rounds.add(make_share("e", 8, 100, value=1.0), 1.0)) == ("e", 1, 0.6)


def test_a_fast_client_waits_once_it_is_too_far_ahead_of_the_slowest() -> None:
    rounds = start("ab", staleness=2)
    assert rounds.add(make_share("a", 1, 1), 1.0)
    assert rounds.add(make_share("a", 2, 1), 1.0)
    assert rounds.add(make_share("a", 3, 1, value=5.0), 1.0) == []
    assert rounds.report() == RoundReport(closed=3, members=2, waiting=1)  # it was joined
    assert rounds.close_if_due(1.0 + TIMEOUT - 0.1) == []
    answered = summarize(rounds.add(make_share("b", 1, 1), 2.0))
    assert set(answered) == {"a", "b"}
    assert {number for number, _ in answered.values()} == {4}  # both have the newest


def test_without_staleness_clients_go_in_step() -> None:
    rounds = start("ab", staleness=0)
    assert rounds.add(make_share("a", 1, 1), 1.0) == []
    assert set(summarize(rounds.add(make_share("b", 1, 1), 1.0))) == {"a", "b"}


def test_a_member_that_lets_others_wait_too_long_is_not_waited_for_until_it_shares_again() -> None:
    rounds = start("abc", staleness=0)
    rounds.add(make_share("a", 1, 1), 1.0)
    rounds.add(make_share("b", 1, 1), 2.0)
    assert set(summarize(rounds.close_if_due(1.0 + TIMEOUT))) == {"a", "b"}
    assert rounds.report().members == 2
    rounds.add(make_share("a", 2, 1), 12.0)
    assert set(summarize(rounds.add(make_share("b", 2, 1), 12.0))) == {"a", "b"}
    assert rounds.add(make_share("c", 1, 1), 13.0) == []  # it counts from the slowest
    assert rounds.add(make_share("a", 3, 1), 14.0) == []
    assert set(summarize(rounds.add(make_share("b", 3, 1), 14.0))) == {"a", "b", "c"}


def test_who_comes_late_begins_at_the_count_of_the_slowest() -> None:
    rounds = start("ab", staleness=1)
    for step in (1, 2, 3):
        rounds.add(make_share("a", step, 1), 1.0)
        rounds.add(make_share("b", step, 1), 1.0)
    assert only(rounds.add(make_share("d", 0), 2.0))[0] == "d"
    assert only(rounds.add(make_share("a", 4, 1), 2.0))[0] == "a"  # one ahead of it, not four
    assert only(rounds.add(make_share("b", 4, 1), 2.0))[0] == "b"
    assert rounds.add(make_share("a", 5, 1), 2.0) == []
    assert set(summarize(rounds.add(make_share("d", 1, 1), 2.0))) == {"a", "d"}


def test_who_leaves_waits_for_all_to_leave_and_all_end_with_one_model() -> None:
    rounds = start("ab", staleness=1)
    assert rounds.add(make_share("a", 1, 1, value=10.0, leaves=True), 1.0) == []
    for step in range(1, 6):  # nobody waits for a client that leaves
        assert only(rounds.add(make_share("b", step, 1), 2.0))[0] == "b"
    answered = summarize(rounds.add(make_share("b", 6, 1, value=1.0, leaves=True), 3.0))
    assert set(answered) == {"a", "b"}
    assert len(set(answered.values())) == 1
    assert rounds.report().members == 0


def test_who_leaves_does_not_wait_longer_than_the_time_of_a_round() -> None:
    rounds = start("ab")
    rounds.add(make_share("a", 1, 1, value=10.0, leaves=True), 1.0)
    assert rounds.close_if_due(1.0 + TIMEOUT - 0.1) == []
    assert only(rounds.close_if_due(1.0 + TIMEOUT)) == ("a", 1, 6.0)
    assert rounds.report().members == 1


def test_who_waits_to_leave_is_answered_when_the_last_of_the_others_is_gone() -> None:
    rounds = start("ab")
    rounds.add(make_share("a", 1, 1, value=10.0, leaves=True), 1.0)
    rounds.leave("b")
    assert only(rounds.close_if_due(1.0)) == ("a", 1, 6.0)


def test_the_slowest_that_leaves_holds_nobody_any_longer() -> None:
    rounds = start("ab", staleness=0)
    assert rounds.add(make_share("a", 1, 1), 1.0) == []
    rounds.leave("b")
    assert only(rounds.close_if_due(1.0))[0] == "a"


def test_rounds_continue_from_the_newest_one() -> None:
    before = start("ab")
    before.add(make_share("a", 1, 1, value=10.0), 1.0)
    rules = RoundRules(clients_min=2, quorum=2, timeout=TIMEOUT)
    after = Asynchronous(rules, before.newest, staleness=0)
    assert only(after.add(make_share("a", 1, 1, value=10.0), 0.0)) == ("a", 1, 6.0)  # joined
    weight = 0.6 / 2**0.5
    expected = (1 - weight) * 6.0 + weight * -4.0
    assert after.add(make_share("b", 1, 1, value=-4.0), 0.0) == []  # Ann has shared nothing since
    assert after.newest is not None
    assert float(after.newest.tensors["w"]) == pytest.approx(expected)
