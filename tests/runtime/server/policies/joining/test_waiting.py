"""Whom rounds wait for over several rounds, and whose shares they join."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.messages import TaskKey
from splitonnx.runtime.server.policies.joining.rounds import Answer, RoundRules, Rounds, Share
from splitonnx.runtime.storage.round_records import RoundRecord

ANN, BOB, EVE = "a" * 32, "b" * 32, "e" * 32
TIMEOUT = 10.0


def share(
    session: str, step: int, value: float = 0.0, *, samples: int = 1, leaves: bool = False
) -> Share:
    key = TaskKey(session, "share", step, 0)
    tensors = {"w": np.array([value], np.float32)}
    return Share(key=key, samples=samples, leaves=leaves, tensors=tensors)


def start(*sessions: str, quorum: int = 1, timeout: float | None = TIMEOUT) -> Rounds:
    """Rounds whose first one was closed with these sessions, at time 0."""
    rules = RoundRules(clients_min=len(sessions), quorum=quorum, timeout=timeout)
    rounds = Rounds(rules)
    answers = [a for name in sessions for a in rounds.add(share(name, 0, samples=0), 0.0)]
    assert read(answers) == dict.fromkeys(sessions, (0, 0.0))
    return rounds


def read(answers: list[Answer]) -> dict[str, tuple[int, float]]:
    """Return for each session that is answered the round's number and the joined value."""
    return {
        answer.key.session: (answer.joint.number, float(answer.joint.tensors["w"][0]))
        for answer in answers
    }


def test_a_client_that_never_returns_stops_no_round_once_its_time_is_over() -> None:
    rounds = start(ANN, BOB, EVE, quorum=2)
    rounds.add(share(ANN, 1, 1.0), 5.0)
    assert rounds.add(share(BOB, 1, 3.0), 6.0) == []
    assert rounds.close_if_due(5.0 + TIMEOUT - 0.1) == []
    assert read(rounds.close_if_due(5.0 + TIMEOUT)) == {ANN: (1, 2.0), BOB: (1, 2.0)}
    rounds.add(share(ANN, 2, 4.0), 100.0)
    assert read(rounds.add(share(BOB, 2, 6.0), 100.0)) == {ANN: (2, 5.0), BOB: (2, 5.0)}


def test_the_last_client_does_not_wait_for_a_quorum_that_has_left() -> None:
    rounds = start(ANN, BOB, EVE, quorum=2)
    rounds.add(share(ANN, 1, 1.0), 0.0)
    rounds.add(share(BOB, 1, 3.0), 0.0)
    assert rounds.close_if_due(TIMEOUT)  # Eve is gone, without a word
    assert rounds.add(share(ANN, 1, samples=0, leaves=True), 20.0)
    assert read(rounds.add(share(BOB, 2, 7.0), 20.0)) == {BOB: (2, 7.0)}


def test_the_late_share_of_a_straggler_is_answered_and_not_joined() -> None:
    rounds = start(ANN, BOB)
    rounds.add(share(ANN, 1, 1.0), 0.0)
    assert set(read(rounds.close_if_due(TIMEOUT))) == {ANN}
    assert read(rounds.add(share(BOB, 1, 99.0), 20.0)) == {BOB: (1, 1.0)}
    assert rounds.report().late == 1
    rounds.add(share(BOB, 2, 3.0), 30.0)  # and its next share is
    assert read(rounds.add(share(ANN, 2, 5.0), 30.0)) == {ANN: (2, 4.0), BOB: (2, 4.0)}


def test_a_client_that_comes_late_receives_the_newest_model_and_is_waited_for_then() -> None:
    rounds = start(ANN)
    rounds.add(share(ANN, 1, 1.0), 0.0)
    assert read(rounds.add(share(BOB, 0, samples=0), 1.0)) == {BOB: (1, 1.0)}
    assert rounds.add(share(ANN, 2, 3.0), 2.0) == []
    assert read(rounds.add(share(BOB, 1, 5.0), 3.0)) == {ANN: (2, 4.0), BOB: (2, 4.0)}


def test_what_a_client_learned_before_it_received_a_model_is_not_joined() -> None:
    rounds = start(ANN)
    assert read(rounds.add(share(EVE, 7, 99.0, samples=100), 1.0)) == {EVE: (0, 0.0)}


def test_a_client_that_says_goodbye_in_the_middle_of_a_round_is_not_waited_for() -> None:
    rounds = start(ANN, BOB, EVE)
    rounds.add(share(ANN, 1, 1.0), 0.0)
    rounds.add(share(BOB, 1, 9.0), 0.0)
    rounds.leave(EVE)
    assert set(read(rounds.close_if_due(0.0))) == {ANN, BOB}
    rounds.add(share(ANN, 2, 1.0), 1.0)
    rounds.leave(BOB)
    assert read(rounds.close_if_due(1.0)) == {ANN: (2, 1.0)}


def test_a_client_that_shares_twice_counts_once_with_what_it_shared_last() -> None:
    rounds = start(ANN, BOB)
    rounds.add(share(ANN, 1, 99.0), 0.0)
    rounds.add(share(ANN, 1, 1.0), 0.0)
    assert read(rounds.add(share(BOB, 1, 3.0), 0.0)) == {ANN: (1, 2.0), BOB: (1, 2.0)}
    assert read(rounds.add(share(ANN, 1, 99.0), 0.0)) == {ANN: (1, 2.0)}  # its answer was lost
    assert rounds.report().late == 0


def test_a_server_that_returns_waits_for_the_members_of_its_last_round() -> None:
    rounds = start(ANN, BOB)
    rounds.add(share(ANN, 2, 1.0), 0.0)
    rounds.add(share(BOB, 2, 3.0), 0.0)
    again = Rounds(RoundRules(clients_min=2), rounds.newest)
    for session, step in ((ANN, 2), (BOB, 0)):  # Bob's checkpoint is older
        again.rewind(session, step)
    assert again.add(share(ANN, 4, 5.0), 0.0) == []
    assert read(again.add(share(BOB, 2, 3.0), 0.0)) == {BOB: (1, 2.0)}
    assert read(again.add(share(BOB, 4, 7.0), 0.0)) == {ANN: (2, 6.0), BOB: (2, 6.0)}


@pytest.mark.parametrize("names", [(ANN, BOB, EVE), (EVE, ANN, BOB)])
def test_a_round_has_the_same_bits_whatever_its_clients_are_called(names: tuple[str, ...]) -> None:
    rounds = start(*names)
    values = (0.1, 1e-9, 3e7)
    for name, value, samples in zip(names, values, (7, 11, 13), strict=True):
        answers = rounds.add(share(name, 1, value, samples=samples), 0.0)
    exact = sum(float(np.float32(v)) * n for v, n in zip(values, (7, 11, 13), strict=True)) / 31
    assert {value for _, value in read(answers).values()} == {float(np.float32(exact))}


def test_sessions_that_never_share_are_not_remembered() -> None:
    rounds = start(ANN)
    for number in range(5000):
        rounds.rewind(f"{number:032x}", 0)
    rounds.add(share(ANN, 1), 0.0)
    assert isinstance(rounds.newest, RoundRecord)
    assert set(rounds.newest.adoptions) == {ANN}


def test_a_client_that_left_and_comes_back_is_a_member_again() -> None:
    rounds = start(ANN, BOB)
    rounds.add(share(BOB, 1, 3.0, leaves=True), 0.0)
    rounds.add(share(ANN, 1, 1.0), 0.0)
    assert read(rounds.add(share(BOB, 1, samples=0), 1.0)) == {BOB: (1, 2.0)}
    assert rounds.add(share(ANN, 2, 5.0), 2.0) == []
    assert read(rounds.add(share(BOB, 2, 7.0), 2.0)) == {ANN: (2, 6.0), BOB: (2, 6.0)}


def test_sessions_that_come_and_go_do_not_fill_the_records() -> None:
    rounds = start(ANN, quorum=1)
    for number in range(1, 60):
        rounds.add(share(f"{number:032x}", 0, samples=0), 0.0)  # and is never heard of again
        rounds.add(share(ANN, number, 1.0), 0.0)
        assert set(read(rounds.close_if_due(TIMEOUT))) == {ANN}
        assert rounds.newest is not None
        assert set(rounds.newest.members) == {ANN}
