"""Activations: dynamic batches, limits, bounds and slopes that are parameters themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.partitioner.rewrites.elementwise import (
    draw,
    hold_dynamic_batch,
    hold_slopes,
    weigh,
)
from tests.support.derivatives import assert_differentiable, close_net, take_step
from tests.support.zoo import Net

FUNCTIONS: list[tuple[str, dict[str, Any], float, float]] = [
    ("Celu", {"alpha": 0.5}, -2, 2),
    ("Elu", {"alpha": 1.7}, -2, 2),
    ("Gelu", {"approximate": "none"}, -3, 3),
    ("Gelu", {"approximate": "tanh"}, -3, 3),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, -3, 3),
    ("HardSwish", {}, -5, 5),
    ("LeakyRelu", {"alpha": 0.2}, -2, 2),
    ("LeakyRelu", {"alpha": -0.2}, -2, 2),
    ("LogSoftmax", {"axis": 1}, -3, 3),
    ("Mish", {}, -3, 3),
    ("Selu", {"alpha": 1.2, "gamma": 1.1}, -2, 2),
    ("Shrink", {"lambd": 0.4, "bias": 0.3}, -1, 1),
    ("Softmax", {"axis": 0}, -3, 3),
    ("Softplus", {}, -3, 3),
    ("Softsign", {}, -3, 3),
    ("ThresholdedRelu", {"alpha": 0.7}, -1, 2),
]


@pytest.mark.parametrize(("kind", "attributes", "low", "high"), FUNCTIONS)
def test_functions_of_a_dynamic_batch(
    kind: str, attributes: dict[str, Any], low: float, high: float
) -> None:
    hold_dynamic_batch(kind, attributes, low, high)


LIMITS = [
    ("Celu", [-1e4, 0, 1e4], [0, 1, 1]),
    ("Elu", [-1e30, -100, 0, 100, 1e30], [0, 0, 1, 1, 1]),
    ("HardSigmoid", [-1e30, 1e30], [0, 0]),
    ("HardSwish", [-1e30, 0, 1e30], [0, 0.5, 1]),
    ("Mish", [-1e4, 0, 1e4], [0, 0.6, 1]),
    ("Selu", [-1e4, 1e4], [0, 1.050701]),
    ("Softplus", [-1e30, -100, 0, 100, 1e30], [0, 0, 0.5, 1, 1]),
    ("Softsign", [-1e4, 0, 1e4], [1e-8, 1, 1e-8]),
]


@pytest.mark.parametrize(("kind", "values", "expected"), LIMITS)
def test_no_slope_overflows_on_a_branch_that_is_not_taken(
    kind: str, values: list[float], expected: list[float]
) -> None:
    hold_slopes(kind, values, expected)


@pytest.mark.parametrize("shape", [(5,), (4, 1), (1,), (1, 4, 5), (3, 1, 1)])
def test_prelu_with_every_broadcast_slope(shape: tuple[int, ...]) -> None:
    net = Net()
    net.op("PRelu", weigh(net, 4, 5), net.constant("slope", draw(0.1, 0.5, *shape)), out="y")
    assert_differentiable(net, {"x": draw(-1, 1, 3, 4, 5)})


@pytest.mark.parametrize(("low", "high"), [(True, True), (True, False), (False, True)])
def test_clip_with_bounds_that_are_computed_from_parameters(low: bool, high: bool) -> None:
    net = Net()
    value = weigh(net, 5)
    axes = net.constant("axes", np.array([0], np.int64))
    bounds = [
        net.op("ReduceSum", net.constant(name, draw(*span, 2)), axes, out=f"{name}.sum", keepdims=0)
        for name, span in (("lower", (-0.5, 0)), ("upper", (0.2, 0.6)))
    ]
    inputs = [bound if wanted else "" for bound, wanted in zip(bounds, (low, high), strict=True)]
    net.op("Clip", value, *inputs, out="y")
    kept = ["w", *(n for n, wanted in (("lower", low), ("upper", high)) if wanted)]
    assert_differentiable(net, {"x": draw(-2, 2, 3, 5)}, parameters=kept)


def test_a_masked_softmax_keeps_its_infinities() -> None:
    net = Net()
    hidden = net.op("Greater", "x", net.constant("edge", np.array(0.8, "f")), out="hidden")
    masked = net.op(
        "Where", hidden, net.constant("never", np.array(-np.inf, "f")), weigh(net, 4, 5), out="m"
    )
    net.op("Softmax", masked, out="y")
    assert_differentiable(net, {"x": draw(-1, 1, 3, 4, 5)})


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_before_opset_13_runs_over_all_that_follows_its_axis(kind: str, axis: int) -> None:
    old, new = Net(opset=11), Net()
    old.op(kind, weigh(old, 4, 5), out="y", axis=axis)
    flat = new.op("Flatten", weigh(new, 4, 5), out="flat", axis=axis)
    shape = new.op("Shape", "h", out="shape")
    new.op("Reshape", new.op(kind, flat, out="bent"), shape, out="y")
    data = {"x": draw(-2, 2, 3, 4, 5)}
    expected = take_step(close_net(new, data), data)
    model = close_net(old, data)
    for found, right in zip(take_step(model, data), expected, strict=True):
        np.testing.assert_allclose(found["w_grad"], right["w_grad"], rtol=1e-5, atol=1e-8)
