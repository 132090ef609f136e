"""Arithmetic of any number of broadcast inputs, powers, choices and casts."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from tests.partitioner.rewrites.elementwise import draw, find_slopes, weigh
from tests.support.derivatives import assert_differentiable, close_net
from tests.support.zoo import FLOAT, Net


def test_a_power_has_a_slope_where_base_or_exponent_is_zero() -> None:
    exponents = np.array([0, 1, 2, 2, 3, -1], np.float32)
    for loss, slopes in find_slopes("Pow", [0, 0, 0, -2, -2, -2], exponents):
        assert float(loss) == 1 + 0 + 0 + 4 - 8 - 0.5
        np.testing.assert_allclose(slopes, [0, 1, 0, -4, 12, -0.25], rtol=1e-6)


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
