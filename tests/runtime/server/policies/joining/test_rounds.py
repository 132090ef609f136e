"""A round is closed when all members have shared, or when its time is over and enough have."""

from __future__ import annotations

import pytest

from splitonnx.runtime.server.policies.joining.rounds import RoundRules, Rounds
from splitonnx.runtime.server.policies.tasks import MemberReport, RoundReport
from tests.support.shares import make_share, summarize


@pytest.fixture
def rounds() -> Rounds:
    """Return the rounds of three clients, all of which have the model of the first round."""
    made = Rounds(RoundRules(clients_min=3, quorum=2, timeout=10.0))
    for name in "abc":
        answers = made.add(make_share(name, 0), 0.0)
    assert summarize(answers) == dict.fromkeys("abc", (0, 0.0))
    return made


def test_the_first_round_waits_for_as_many_clients_as_asked_for() -> None:
    rounds = Rounds(RoundRules(clients_min=2, timeout=10.0))
    assert rounds.add(make_share("a", 0, value=1.0), 0.0) == []
    assert rounds.close_if_due(1e9) == []
    assert summarize(rounds.add(make_share("b", 0, value=3.0), 1e9)) == {
        "a": (0, 2.0),
        "b": (0, 2.0),
    }


def test_clients_that_start_from_several_states_continue_from_the_one_trained_longest() -> None:
    rounds = Rounds(RoundRules(clients_min=3))
    rounds.add(make_share("a", 40, value=6.0), 0.0)
    rounds.add(make_share("b", 0, value=1.0), 0.0)
    answers = rounds.add(make_share("c", 40, value=6.0), 0.0)
    assert summarize(answers) == dict.fromkeys("abc", (0, 6.0))


def test_a_session_that_ended_is_forgotten(rounds: Rounds) -> None:
    rounds.forget("a")
    assert rounds.report().members == 2
    assert summarize(rounds.add(make_share("a", 0), 1.0)) == {"a": (0, 0.0)}


def test_a_round_is_closed_when_every_member_has_shared(rounds: Rounds) -> None:
    assert rounds.add(make_share("a", 2, 1, value=1.0), 1.0) == []
    assert rounds.add(make_share("b", 2, 1, value=2.0), 2.0) == []
    assert rounds.report() == RoundReport(closed=0, members=3, waiting=2)
    answers = rounds.add(make_share("c", 2, 2, value=6.0), 3.0)
    assert summarize(answers) == dict.fromkeys("abc", (1, 3.75))


def test_when_its_time_is_over_a_round_is_closed_without_those_that_are_late(
    rounds: Rounds,
) -> None:
    rounds.add(make_share("a", 2, 1, value=1.0), 1.0)
    assert rounds.close_if_due(20.0) == []  # one is no quorum
    assert summarize(rounds.add(make_share("b", 2, 1, value=3.0), 20.0)) == {
        "a": (1, 2.0), "b": (1, 2.0)
    }  # fmt: skip
    late = rounds.add(make_share("c", 2, 1, value=99.0), 21.0)
    assert summarize(late) == {"c": (1, 2.0)}
    assert rounds.report() == RoundReport(closed=1, members=3, waiting=0, late=1)


def test_a_lost_connection_does_not_make_a_round_wait_longer(rounds: Rounds) -> None:
    rounds.add(make_share("a", 2, 1, value=1.0), 1.0)
    rounds.withdraw("a")  # it reconnects
    rounds.add(make_share("a", 2, 1, value=1.0), 9.0)
    rounds.add(make_share("b", 2, 1, value=3.0), 10.0)
    assert rounds.close_if_due(10.9) == []
    assert summarize(rounds.close_if_due(11.0)) == {"a": (1, 2.0), "b": (1, 2.0)}


def test_a_client_that_was_missed_is_not_waited_for_until_it_comes_back(rounds: Rounds) -> None:
    for name in "ab":
        rounds.add(make_share(name, 2, 1), 1.0)
    rounds.close_if_due(11.0)
    rounds.add(make_share("a", 4, 1, value=2.0), 12.0)
    assert summarize(rounds.add(make_share("b", 4, 1, value=4.0), 12.0)) == {
        "a": (2, 3.0), "b": (2, 3.0)
    }  # fmt: skip


def test_a_client_that_leaves_in_mid_round_is_not_waited_for(rounds: Rounds) -> None:
    rounds.add(make_share("a", 2, 1, value=5.0), 1.0)
    rounds.add(make_share("b", 2, 1, value=7.0), 1.0)
    rounds.leave("c")
    assert summarize(rounds.close_if_due(1.0)) == {"a": (1, 6.0), "b": (1, 6.0)}


def test_what_a_client_learned_last_is_joined_although_it_leaves(rounds: Rounds) -> None:
    rounds.add(make_share("a", 2, 1, value=3.0, leaves=True), 1.0)
    rounds.add(make_share("b", 2, 1, value=6.0), 1.0)
    assert rounds.add(make_share("c", 2, 1, value=9.0), 1.0)
    rounds.add(make_share("b", 4, 1, value=1.0), 2.0)
    assert summarize(rounds.add(make_share("c", 4, 1, value=3.0), 2.0)) == {
        "b": (2, 2.0), "c": (2, 2.0)
    }  # fmt: skip


def test_the_last_clients_need_no_quorum_of_those_that_left(rounds: Rounds) -> None:
    rounds.leave("a")
    rounds.leave("b")
    assert summarize(rounds.add(make_share("c", 2, 1, value=4.0), 1.0)) == {"c": (1, 4.0)}


def test_a_client_that_joins_late_receives_the_newest_model_at_once(rounds: Rounds) -> None:
    for name, value in zip("abc", (1.0, 2.0, 3.0), strict=True):
        rounds.add(make_share(name, 2, 1, value=value), 1.0)
    assert summarize(rounds.add(make_share("d", 0, value=99.0), 2.0)) == {"d": (1, 2.0)}
    assert rounds.report().members == 4


def test_a_share_whose_answer_was_lost_is_answered_again_and_joined_once(rounds: Rounds) -> None:
    for name in "abc":
        rounds.add(make_share(name, 2, 1, value=3.0), 1.0)
    assert summarize(rounds.add(make_share("a", 2, 1, value=3.0), 2.0)) == {"a": (1, 3.0)}
    assert rounds.report() == RoundReport(closed=1, members=3, waiting=0, late=0)


def test_a_client_that_went_back_receives_what_was_joined_when_it_shares_again(
    rounds: Rounds,
) -> None:
    for name in "abc":
        rounds.add(make_share(name, 2, 1, value=3.0), 1.0)
    rounds.rewind("a", 0)
    assert summarize(rounds.add(make_share("a", 2, 1, value=3.0), 2.0)) == {"a": (1, 3.0)}
    assert rounds.report().waiting == 0


def test_going_back_takes_a_share_out_of_the_open_round(rounds: Rounds) -> None:
    rounds.add(make_share("a", 2, 1, value=100.0), 1.0)
    rounds.rewind("a", 0)
    for name in "abc":
        answers = rounds.add(make_share(name, 2, 1, value=3.0), 1.0)
    assert summarize(answers)["a"] == (1, 3.0)


def test_rounds_continue_from_the_newest_one_with_its_members(rounds: Rounds) -> None:
    for name in "abc":
        rounds.add(make_share(name, 2, 1, value=3.0), 1.0)
    after = Rounds(RoundRules(clients_min=3, quorum=3), rounds.newest)
    assert summarize(after.add(make_share("a", 2, 1, value=3.0), 0.0)) == {"a": (1, 3.0)}
    assert after.add(make_share("b", 4, 1, value=1.0), 0.0) == []
    assert after.add(make_share("a", 4, 1, value=2.0), 0.0) == []
    assert summarize(after.add(make_share("c", 4, 1, value=3.0), 0.0))["a"] == (2, 2.0)


def test_of_each_client_is_known_which_round_it_has_and_whether_it_waits(rounds: Rounds) -> None:
    rounds.add(make_share("a", 2, 1), 1.0)
    rounds.add(make_share("b", 2, 1), 1.0)
    assert rounds.report_member("a", 7) == MemberReport(
        version=7, round=0, rounds_behind=0, is_waiting=True
    )
    rounds.close_if_due(11.0)
    found = {name: rounds.report_member(name, 0) for name in "abcd"}
    assert {name: (one.round, one.rounds_behind) for name, one in found.items()} == {
        "a": (1, 0), "b": (1, 0), "c": (0, 1), "d": (None, 2)
    }  # fmt: skip
    assert not any(one.is_waiting for one in found.values())
    rounds.rewind("a", 0)
    assert rounds.report_member("a", 0).round == 0
    assert Rounds(RoundRules()).report_member("a", 0) == MemberReport(version=0, rounds_behind=0)


def test_all_shares_of_the_open_round_are_withdrawn_at_once(rounds: Rounds) -> None:
    for name in "ab":
        rounds.add(make_share(name, 2, 1), 1.0)
    assert [key.session for key in rounds.withdraw_all()] == ["a", "b"]
    assert rounds.report() == RoundReport(closed=0, members=3, waiting=0)
    assert rounds.withdraw_all() == []


def test_a_duplicate_continues_apart_from_the_rounds_that_it_was_made_of(rounds: Rounds) -> None:
    rounds.add(make_share("a", 2, 1, value=3.0), 1.0)
    before = rounds.duplicate()
    for name in "bc":
        answers = rounds.add(make_share(name, 2, 1, value=9.0), 2.0)
    assert summarize(answers)["a"] == (1, 7.0)
    assert before.report() == RoundReport(closed=0, members=3, waiting=1)
    assert before.adoptions == dict.fromkeys("abc", ((0, 0),))
    for name in "bc":
        answers = before.add(make_share(name, 2, 1, value=3.0), 3.0)
    assert summarize(answers)["a"] == (1, 3.0)


def test_who_asks_again_can_have_what_it_received_in_the_round_before(rounds: Rounds) -> None:
    assert rounds.find_received(make_share("a", 0)) is None  # that is the newest
    for name in "abc":
        rounds.add(make_share(name, 2, 1, value=3.0), 1.0)
    found = rounds.find_received(make_share("a", 0))
    assert found is not None
    assert summarize([found]) == {"a": (0, 0.0)}
    assert rounds.list_adopted("a") == (2, 0)
    others = (make_share("a", 0, 1), make_share("a", 1), make_share("a", 2), make_share("d", 0))
    assert [rounds.find_received(share) for share in others] == [None] * 4
