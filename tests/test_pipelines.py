"""Schedules of a step's micro-batches: their text, and what every one of them keeps to."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError
from splitonnx.names import ACCUMULATE, CLIENT
from splitonnx.partitioner.partitions import cut
from splitonnx.pipelines import StepDivision, choose_division, list_pieces, make_schedule
from tests.support.zoo import ZOO

TEXTS = {
    (2, 3, 1): "F0 B0 F1 B1 F2 B2 U E",
    (2, 3, 2): "F0 F1 B0 F2 B1 U B2 E",
    (2, 5, 3): "F0 F1 F2 B0 F3 B1 F4 B2 U B3 B4 E",
    (3, 2, 2): "F0 F1 T0 T1 B0 U B1 E",
    (4, 2, 2): "F0 F1 T1.0 T1.1 T2.0 T2.1 B0 U B1 E",
    (2, 1, 4): "F0 U B0 E",
    (3, 1, 2): "F0 T0 U B0 E",
    (1, 2, 3): "F0 F1 U E",
}


@pytest.mark.parametrize("pieces", TEXTS)
def test_a_schedule_reads_as_text(pieces: tuple[int, int, int]) -> None:
    assert str(make_schedule(*pieces)) == TEXTS[pieces]


def test_an_update_that_needs_what_the_client_computed_waits_for_it() -> None:
    late = make_schedule(2, 3, 2, update_pieces=3, is_update_early=False)
    assert str(late) == "F0 F1 B0 F2 B1 B2 U T3 E"


def test_without_a_server_nothing_ends_the_update() -> None:
    assert str(make_schedule(1, 2, 1, update_pieces=1)) == "F0 F1 U"


@given(pieces=st.integers(1, 5), micro_batches=st.integers(1, 12), in_flight=st.integers(1, 16))
def test_every_piece_runs_once_after_the_one_before_and_few_are_in_flight(
    pieces: int, micro_batches: int, in_flight: int
) -> None:
    operations = make_schedule(pieces, micro_batches, in_flight).operations
    done: dict[int, int] = {}
    finished: list[int] = []
    for operation in operations:
        assert operation.piece == done.get(operation.task, 0)
        done[operation.task] = operation.piece + 1
        if operation.piece == 0:
            assert operation.task == len(done) - 1
        last = 2 if operation.task == micro_batches else pieces
        if done[operation.task] == last:
            finished.append(operation.task)
        assert len(done) - len(finished) <= in_flight
    assert finished == list(range(micro_batches + 1))  # each ends before the next one ends


def test_with_several_in_flight_the_server_always_has_another_to_work_on() -> None:
    operations = make_schedule(2, 8, 2).operations
    begun = [operation.task for operation in operations if operation.piece == 0]
    ended = [operation.task for operation in operations if operation.piece == 1]
    assert all(one < other for one, other in pairwise(begun))
    assert begun[: len(ended)] == ended


def list_client(bundle: Bundle) -> list[set[str]]:
    phase = bundle.client.manifest.phase(ACCUMULATE)
    return [set(wires) for wires in list_pieces(phase, CLIENT)]


def test_pieces_are_what_runs_between_two_replies() -> None:
    chain = ZOO["chain"].build()
    results = {"loss", "accuracy"}
    assert list_client(cut(chain, at=None)) == [set()]
    assert list_client(cut(chain, at="act1")) == [set(), {"act1@server_grad"} | results]
    u_shaped = list_client(cut(chain, at="act1", tail_at="act3"))
    assert u_shaped == [set(), {"act3@client"}, {"act1@server_grad"}]


@pytest.mark.parametrize(
    ("numbers", "division"),
    [
        ((1, 1, 3), StepDivision()),
        ((4, 1, 3), StepDivision(count=4)),
        ((1, 4, 3), StepDivision(count=4, in_flight=3)),
    ],
)
def test_a_step_is_divided_as_asked(numbers: tuple[int, int, int], division: StepDivision) -> None:
    assert choose_division(*numbers) == division


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((0, 1, 3), "accumulate must be at least 1"),
        ((1, 0, 3), "micro_batches must be at least 1"),
        ((1, 2, 0), "in_flight must be from 1 to 16, not 0"),
        ((1, 2, 17), "in_flight must be from 1 to 16, not 17"),
        ((2, 2, 3), "give one of them"),
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        choose_division(*numbers)
