"""Trained weights are matched with a network by name and shape; nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from splitonnx.errors import WeightsMismatch
from splitonnx.torch.matches import Weights, match
from splitonnx.torch.networks import Layout

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float32)
SHAPES = {"a.weight": (2, 3), "n.running_mean": (4,), "n.num_batches_tracked": ()}


def lay_out(*tied: str, learnt: tuple[str, ...] = ("a.weight",)) -> Layout:
    """Lay out a network with a.weight, under the names ``tied`` as well, and one statistic."""
    group = ("a.weight", *tied)
    return Layout(
        groups={**dict.fromkeys(group, group), "n.running_mean": ("n.running_mean",)},
        parameters=frozenset(group),
        buffers=frozenset({"n.running_mean", "n.num_batches_tracked"}),
        learnt=frozenset(learnt),
        statistics=frozenset({"n.running_mean"}),
    )


def make_weights(
    arrays: Mapping[str, np.ndarray], ties: Mapping[str, tuple[str, bool]] | None = None
) -> Weights:
    return Weights(source="b", arrays=arrays, trained=frozenset(arrays), ties=ties or {})


def test_each_tensor_is_found_by_its_name_and_counters_are_left() -> None:
    found = match(
        make_weights({"a.weight": A, "n.running_mean": B}), lay_out(), SHAPES, strict=True
    )
    assert found.keys() == {"a.weight", "n.running_mean"}
    assert found["a.weight"] is A


def test_a_tied_weight_is_found_under_any_of_its_names() -> None:
    shapes = SHAPES | {"z.weight": (2, 3)}
    weights = make_weights({"z.weight": A, "n.running_mean": B})
    found = match(weights, lay_out("z.weight"), shapes, strict=True)
    assert found["a.weight"] is found["z.weight"] is A


def test_a_tied_weight_that_was_trained_as_two_is_refused() -> None:
    weights = make_weights({"a.weight": A, "z.weight": A + 1, "n.running_mean": B})
    with pytest.raises(WeightsMismatch, match="are one tensor in the network, but two"):
        match(weights, lay_out("z.weight"), SHAPES | {"z.weight": (2, 3)}, strict=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_parameter_that_tie_replaced_gets_the_other_s_numbers(transposed: bool) -> None:
    shapes = SHAPES | {"o": (3, 2) if transposed else (2, 3)}
    arrays = {"a.weight": A, "n.running_mean": B}
    weights = make_weights(arrays, {"o": ("a.weight", transposed)})
    found = match(weights, lay_out(learnt=("a.weight", "o")), shapes, strict=True)
    np.testing.assert_array_equal(found["o"], A.T if transposed else A)


@pytest.mark.parametrize("name", ["a.weight", "n.running_mean"])
def test_a_missing_parameter_or_statistic_is_refused_unless_not_strict(name: str) -> None:
    weights = make_weights({k: v for k, v in zip(SHAPES, (A, B), strict=False) if k != name})
    with pytest.raises(WeightsMismatch, match="strict=False") as caught:
        match(weights, lay_out(), SHAPES, strict=True)
    assert caught.value.missing == [name]
    assert match(weights, lay_out(), SHAPES, strict=False).keys() == weights.arrays.keys()


def test_a_trained_tensor_without_a_place_is_refused_also_when_not_strict() -> None:
    weights = make_weights({"a.weight": A, "n.running_mean": B, "onnx::MatMul_3": A})
    for strict in (True, False):
        with pytest.raises(WeightsMismatch, match="the network has no 'onnx::MatMul_3'"):
            match(weights, lay_out(), SHAPES, strict=strict)


def test_another_shape_is_refused_with_both() -> None:
    weights = make_weights({"a.weight": A.T, "n.running_mean": B})
    with pytest.raises(WeightsMismatch, match=r"'a.weight' is \[2, 3\] in the network, but \[3, 2"):
        match(weights, lay_out(), SHAPES, strict=False)


def test_weights_of_which_the_network_has_none_are_refused() -> None:
    constant = Weights(source="b", arrays={"c": A}, trained=frozenset())
    with pytest.raises(WeightsMismatch):
        match(constant, lay_out(), SHAPES, strict=False)
