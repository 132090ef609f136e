"""Rewritten operators together, and functions that need no rewrite beside them."""

from __future__ import annotations

from typing import Any

import pytest

from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.partitioner.rewrites.elementwise import (
    draw,
    hold_dynamic_batch,
    hold_slopes,
)
from tests.support.case_trials import TARGETS
from tests.support.derivatives import close_net
from tests.support.zoo import Net

FUNCTIONS: list[tuple[str, dict[str, Any], float, float]] = [
    ("Abs", {}, -2, 2),
    ("Cos", {}, -3, 3),
    ("Erf", {}, -2, 2),
    ("Exp", {}, -2, 2),
    ("Log", {}, 0.5, 3),
    ("Neg", {}, -2, 2),
    ("Reciprocal", {}, 0.5, 2),
    ("Sigmoid", {}, -3, 3),
    ("Sin", {}, -3, 3),
    ("Sqrt", {}, 0.5, 3),
    ("Tanh", {}, -2, 2),
]


@pytest.mark.parametrize(("kind", "attributes", "low", "high"), FUNCTIONS)
def test_functions_of_a_dynamic_batch(
    kind: str, attributes: dict[str, Any], low: float, high: float
) -> None:
    hold_dynamic_batch(kind, attributes, low, high)


LIMITS = [
    ("Sigmoid", [-1e4, 0, 1e4], [0, 0.25, 0]),
    ("Tanh", [-1e4, 0, 1e4], [0, 1, 0]),
]


@pytest.mark.parametrize(("kind", "values", "expected"), LIMITS)
def test_no_slope_overflows_on_a_branch_that_is_not_taken(
    kind: str, values: list[float], expected: list[float]
) -> None:
    hold_slopes(kind, values, expected)


def test_a_network_of_rewritten_operators_trains_split_as_whole() -> None:
    net = Net()
    at = net.op("MatMul", "x", net.weight("w1", 6, 8), out="a")
    for kind in ("Elu", "Softsign", "Atan", "Mish", "Selu"):
        at = net.op(kind, at, out=f"{kind}.out")
    at = net.op("PRelu", at, net.constant("slope", draw(0.1, 0.3, 8)), out="prelu")
    at = net.op("MatMul", at, net.weight("w2", 8, 4), out="b")
    net.op("Sinh", net.op("Softplus", at, out="plus"), out="y")
    data = {"x": draw(-1, 1, 24, 6), "labels": draw(0, 1, 24, 4)}
    model = close_net(net, {"x": data["x"]})
    for target in TARGETS:
        bundle = cut(
            model, at="Softsign.out", tail_at="b", loss="mse",
            client_target=target, server_target=target,
        )  # fmt: skip
        assert verify(bundle, data, steps=3, batch_size=8).largest_difference <= 1e-6
