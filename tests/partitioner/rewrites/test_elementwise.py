"""Activations, functions and arithmetic: dynamic batches, limits, and what node cases leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import assert_differentiable, close_net, take_step
from tests.support.zoo import FLOAT, Net


def draw(low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(4).uniform(low, high, shape).astype(np.float32)


def weigh(net: Net, *shape: int) -> str:
    """x times a weight close to one, so that what follows sees the range that x was drawn from."""
    weight = net.constant("w", draw(0.9, 1.0, *shape))
    return net.op("Mul", "x", weight, out="h")


FUNCTIONS: list[tuple[str, dict[str, Any], float, float]] = [
    ("Abs", {}, -2, 2),
    ("Acos", {}, -0.9, 0.9),
    ("Acosh", {}, 1.5, 5),
    ("Asin", {}, -0.9, 0.9),
    ("Asinh", {}, -3, 3),
    ("Atan", {}, -3, 3),
    ("Atanh", {}, -0.9, 0.9),
    ("Celu", {"alpha": 0.5}, -2, 2),
    ("Cos", {}, -3, 3),
    ("Cosh", {}, -2, 2),
    ("Elu", {"alpha": 1.7}, -2, 2),
    ("Erf", {}, -2, 2),
    ("Exp", {}, -2, 2),
    ("Gelu", {"approximate": "none"}, -3, 3),
    ("Gelu", {"approximate": "tanh"}, -3, 3),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, -3, 3),
    ("HardSwish", {}, -5, 5),
    ("LeakyRelu", {"alpha": 0.2}, -2, 2),
    ("LeakyRelu", {"alpha": -0.2}, -2, 2),
    ("Log", {}, 0.5, 3),
    ("LogSoftmax", {"axis": 1}, -3, 3),
    ("Mish", {}, -3, 3),
    ("Neg", {}, -2, 2),
    ("Reciprocal", {}, 0.5, 2),
    ("Selu", {"alpha": 1.2, "gamma": 1.1}, -2, 2),
    ("Shrink", {"lambd": 0.4, "bias": 0.3}, -1, 1),
    ("Sigmoid", {}, -3, 3),
    ("Sin", {}, -3, 3),
    ("Sinh", {}, -2, 2),
    ("Softmax", {"axis": 0}, -3, 3),
    ("Softplus", {}, -3, 3),
    ("Softsign", {}, -3, 3),
    ("Sqrt", {}, 0.5, 3),
    ("Tan", {}, -1, 1),
    ("Tanh", {}, -2, 2),
    ("ThresholdedRelu", {"alpha": 0.7}, -1, 2),
]


@pytest.mark.parametrize(("kind", "attributes", "low", "high"), FUNCTIONS)
def test_functions_of_a_dynamic_batch(
    kind: str, attributes: dict[str, Any], low: float, high: float
) -> None:
    net = Net(opset=20 if kind == "Gelu" else 18)
    net.op(kind, weigh(net, 4, 5), out="y", **attributes)
    assert_differentiable(net, {"x": draw(low, high, 3, 4, 5)})


def find_slopes(
    kind: str, values: list[float], *inputs: np.ndarray, **attributes: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Give value and slope of a function of one parameter at each value, on both targets."""
    net = Net(opset=20)
    parameter = net.constant("p", np.array(values, np.float32))
    others = [net.constant(f"o{i}", array) for i, array in enumerate(inputs)]
    net.op(kind, parameter, *others, out="y", **attributes)
    net.op("Mul", "y", "x", out="product")
    net.op("ReduceSum", "product", out="total", keepdims=0)
    data = {"x": np.ones((1, len(values)), np.float32)}
    model = close_net(net, data, "total")
    found = []
    for target in TARGETS:
        bundle = cut(model, at=None, loss="from-model", client_target=target, train=["^p$"])
        results = run_step(bundle, data)
        found.append((results["loss"], results["p_grad"]))
    return found


LIMITS = [
    ("Acosh", [1e10, 1e30], [1e-10, 1e-30]),
    ("Asinh", [-1e30, 0, 1e30], [1e-30, 1, 1e-30]),
    ("Atan", [-1e30, 0, 1e4], [0, 1, 1e-8]),
    ("Celu", [-1e4, 0, 1e4], [0, 1, 1]),
    ("Elu", [-1e30, -100, 0, 100, 1e30], [0, 0, 1, 1, 1]),
    ("HardSigmoid", [-1e30, 1e30], [0, 0]),
    ("HardSwish", [-1e30, 0, 1e30], [0, 0.5, 1]),
    ("Mish", [-1e4, 0, 1e4], [0, 0.6, 1]),
    ("Selu", [-1e4, 1e4], [0, 1.050701]),
    ("Sigmoid", [-1e4, 0, 1e4], [0, 0.25, 0]),
    ("Softplus", [-1e30, -100, 0, 100, 1e30], [0, 0, 0.5, 1, 1]),
    ("Softsign", [-1e4, 0, 1e4], [1e-8, 1, 1e-8]),
    ("Tanh", [-1e4, 0, 1e4], [0, 1, 0]),
]


@pytest.mark.parametrize(("kind", "values", "expected"), LIMITS)
def test_no_slope_overflows_on_a_branch_that_is_not_taken(
    kind: str, values: list[float], expected: list[float]
) -> None:
    for loss, slopes in find_slopes(kind, values):
        assert np.isfinite(loss)
        np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize("kind", ["Acos", "Asin"])
def test_an_infinite_slope_spoils_no_value(kind: str) -> None:
    for loss, slopes in find_slopes(kind, [-1.0, 1.0]):
        assert abs(float(loss) - {"Acos": np.pi, "Asin": 0.0}[kind]) < 1e-6
        assert (np.abs(slopes) > 1e38).all()


def test_a_power_has_a_slope_where_base_or_exponent_is_zero() -> None:
    exponents = np.array([0, 1, 2, 2, 3, -1], np.float32)
    for loss, slopes in find_slopes("Pow", [0, 0, 0, -2, -2, -2], exponents):
        assert float(loss) == 1 + 0 + 0 + 4 - 8 - 0.5
        np.testing.assert_allclose(slopes, [0, 1, 0, -4, 12, -0.25], rtol=1e-6)


@pytest.mark.parametrize("kind", ["Ceil", "Floor", "Hardmax", "Round", "Sign"])
def test_a_step_function_stops_gradients_but_not_values(kind: str) -> None:
    net = Net()
    step = net.op(kind, weigh(net, 5), out="step")
    net.op("Mul", step, net.constant("v", draw(0.5, 2, 5)), out="y")
    assert_differentiable(net, {"x": draw(-3, 3, 4, 5)})


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


@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Min"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_broadcast_inputs(kind: str, count: int) -> None:
    net = Net()
    others = [net.constant("a", draw(-1, 1, 4, 1)), net.constant("b", draw(-1, 1, 3, 1, 5))]
    net.op(kind, *[weigh(net, 4, 5), *others][:count], out="y")
    assert_differentiable(net, {"x": draw(-1, 1, 3, 4, 5)}, parameters=["w", "a", "b"][:count])


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Pow", "Mod"])
@pytest.mark.parametrize("shape", [(4, 5), (5,), (4, 1), (1,), (2, 1, 4, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_both_sides_of_an_operator_may_be_stretched(
    kind: str, shape: tuple[int, ...], turned: bool
) -> None:
    net = Net()
    pair = [weigh(net, 4, 5), net.constant("v", draw(1.1, 1.9, *shape))]
    attributes = {"fmod": 1} if kind == "Mod" else {}
    net.op(kind, *(reversed(pair) if turned else pair), out="y", **attributes)
    trained = ["w"] if kind == "Mod" and not turned else ["w", "v"]  # a divisor is a setting
    assert_differentiable(net, {"x": draw(3, 5, 3, 4, 5)}, parameters=trained)


@pytest.mark.parametrize(
    "exponent",
    [
        np.array(3, np.int64),
        np.array([2, 0, 1, 3, -1], np.int32),
        np.array([[0.0], [0.5], [2.0], [1.0]], np.float32),
    ],
)
def test_a_power_with_exponents_of_any_type(exponent: np.ndarray) -> None:
    net = Net()
    net.op("Pow", weigh(net, 4, 5), net.constant("e", exponent), out="y")
    assert_differentiable(net, {"x": draw(0.5, 2, 3, 4, 5)}, parameters=["w"])


@pytest.mark.parametrize("condition", [(3, 4, 5), (4, 5), (5,), (4, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("shape", [(4, 5), (1,), (4, 1), (3, 1, 5)])
def test_a_choice_between_broadcast_branches(
    condition: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    net = Net()
    chosen = net.constant("chosen", draw(-1, 1, *condition) > 0)
    net.op("Where", chosen, weigh(net, 4, 5), net.constant("other", draw(-1, 1, *shape)), out="y")
    assert_differentiable(net, {"x": draw(-1, 1, 3, 4, 5)})


def test_a_choice_stretched_along_a_dynamic_batch() -> None:
    net = Net()
    chosen = net.op("Greater", "x", net.constant("zero", np.array(0, "f")), out="chosen")
    scaled = net.op("Neg", net.constant("w", draw(-1, 1, 5)), out="scaled")
    net.op("Where", chosen, net.constant("v", draw(-1, 1, 1, 5)), scaled, out="y")
    assert_differentiable(net, {"x": draw(-1, 1, 3, 5)})


def test_a_masked_softmax_keeps_its_infinities() -> None:
    net = Net()
    hidden = net.op("Greater", "x", net.constant("edge", np.array(0.8, "f")), out="hidden")
    masked = net.op(
        "Where", hidden, net.constant("never", np.array(-np.inf, "f")), weigh(net, 4, 5), out="m"
    )
    net.op("Softmax", masked, out="y")
    assert_differentiable(net, {"x": draw(-1, 1, 3, 4, 5)})


@pytest.mark.parametrize("kind", ["Mul", "Add", "Div", "Sub", "Max"])
def test_a_parameter_may_meet_itself(kind: str) -> None:
    net = Net()
    twice = net.op(kind, net.weight("w", 4, 5), "w", out="twice")
    net.op("Mul", net.op("Mul", twice, "w", out="thrice"), "x", out="y")
    assert_differentiable(net, {"x": draw(-1, 1, 3, 4, 5)})


def test_casts_between_floats_and_to_the_dtype_that_is_there() -> None:
    net = Net()
    wide = net.op("Cast", weigh(net, 4, 5), out="wide", to=11)
    wide = net.op("Sigmoid", wide, out="bent")
    narrow = net.op("CastLike", wide, "x", out="narrow")
    same = net.op("Cast", narrow, out="same", to=FLOAT)
    net.op("Mul", same, net.op("CastLike", same, "x", out="again"), out="y")
    assert_differentiable(net, {"x": draw(-1, 1, 3, 4, 5)})


def test_a_cast_to_eight_bits_is_refused_by_name() -> None:
    net = Net(opset=19)
    narrow = net.op("Cast", weigh(net, 4, 5), out="narrow", to=TensorProto.FLOAT8E4M3FN)
    net.op("Cast", narrow, out="y", to=FLOAT)
    model = close_net(net, {"x": draw(-1, 1, 3, 4, 5)})
    with pytest.raises(UnsupportedModel, match=r"'narrow_node' \(Cast\).*FLOAT8E4M3FN"):
        cut(model, at=None, loss="mse")


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
