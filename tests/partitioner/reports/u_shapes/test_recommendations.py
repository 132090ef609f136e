"""Which pairs are recommended: those that no other pair is better than."""

from __future__ import annotations

from dataclasses import dataclass

from splitonnx.partitioner.reports.u_shapes.recommendations import find_recommended


@dataclass(kw_only=True)
class Pair:
    bytes_up: int | None = 100
    bytes_down: int | None = 100
    head_parameters: int = 10
    tail_parameters: int = 10
    server_parameters: int = 80
    client_share: float = 0.2


def test_a_pair_that_sends_less_and_one_that_leaves_the_client_less_are_both_recommended() -> None:
    fewer_bytes = Pair(bytes_up=10, client_share=0.9)
    fewer_weights = Pair(client_share=0.1)
    assert find_recommended([fewer_bytes, fewer_weights]) == [True, True]


def test_a_pair_that_is_no_better_in_anything_is_not_recommended() -> None:
    assert find_recommended([Pair(), Pair(bytes_down=120), Pair(client_share=0.3)]) == [
        True, False, False,
    ]  # fmt: skip


def test_bytes_are_counted_both_ways() -> None:
    assert find_recommended([Pair(bytes_up=150, bytes_down=10), Pair()]) == [True, False]


def test_of_equal_pairs_the_last_is_recommended() -> None:
    assert find_recommended([Pair(), Pair(), Pair(bytes_up=200)]) == [False, True, False]


def test_a_share_that_differs_by_less_than_a_percent_is_the_same() -> None:
    assert find_recommended([Pair(client_share=0.201), Pair(client_share=0.204)]) == [False, True]


def test_a_pair_that_trains_nothing_somewhere_is_not_recommended() -> None:
    pairs = [Pair(head_parameters=0), Pair(tail_parameters=0), Pair(server_parameters=0)]
    assert find_recommended([*pairs, Pair(bytes_up=999)]) == [False, False, False, True]


def test_a_pair_whose_bytes_are_unknown_is_not_recommended() -> None:
    assert find_recommended([Pair(bytes_up=None), Pair(bytes_down=None)]) == [False, False]
    assert find_recommended([]) == []
