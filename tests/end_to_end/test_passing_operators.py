"""Operators without a gradient of their own, on side paths of a model that trains.

They read a value that a parameter moves, and their result weighs the loss as a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.support.derivatives import assert_differentiable
from tests.support.zoo import Net

FLOAT, INT64, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8
DATA = {"x": np.random.default_rng(4).uniform(0.6, 3.4, (3, 4, 5)).astype(np.float32)}

Build = Callable[[Net, str], str]


def bound(net: Net, value: float = 2.0) -> str:
    return net.constant("bound", np.array(value, np.float32))


def compare(kind: str) -> Build:
    return lambda net, h: net.op(kind, h, bound(net), out="found")


def decide(kind: str) -> Build:
    def build(net: Net, h: str) -> str:
        above = net.op("Greater", h, bound(net), out="above")
        even = net.op("Less", h, net.constant("other", np.array(2.5, np.float32)), out="even")
        return net.op(kind, *([above] if kind == "Not" else [above, even]), out="found")

    return build


def count(kind: str) -> Build:
    def build(net: Net, h: str) -> str:
        whole = net.op("Cast", h, out="whole", to=UINT8)
        three = net.constant("three", np.array(3, np.uint8))
        inputs = [whole] if kind == "BitwiseNot" else [whole, three]
        attributes = {"direction": "LEFT"} if kind == "BitShift" else {}
        return net.op(kind, *inputs, out="found", **attributes)

    return build


def locate(kind: str) -> Build:
    return lambda net, h: net.op(kind, h, out="found", axis=1)


def ask(kind: str) -> Build:
    return lambda net, h: net.op(kind, h, out="found")


def place(net: Net, h: str) -> str:
    above = net.op("Greater", h, bound(net), out="above")
    return total(net, net.op("NonZero", above, out="places"))


def total(net: Net, whole: str) -> str:
    return net.op("ReduceSum", whole, out="found", keepdims=0)


def rank_unique(net: Net, h: str) -> str:
    net.nodes.append(
        helper.make_node("Unique", [h], ["u", "first", "places", "counts"], name="unique", sorted=1)
    )
    return total(net, "places")


def rank_best(net: Net, h: str) -> str:
    two = net.constant("two", np.array([2]))
    net.nodes.append(helper.make_node("TopK", [h, two], ["best", "places"], name="top", axis=1))
    return total(net, "places")


def suppress(net: Net, h: str) -> str:
    """Boxes are rows of five numbers, of which the last is the score."""
    parts = net.constant("parts", np.array([4, 1]))
    net.nodes.append(helper.make_node("Split", [h, parts], ["boxes", "score"], name="s", axis=2))
    scores = net.op("Transpose", "score", out="scores", perm=[0, 2, 1])
    most = net.constant("most", np.array([3]))
    limits = [net.constant(n, np.array([v], np.float32)) for n, v in (("iou", 0.5), ("low", 0.0))]
    kept = net.op(
        "NonMaxSuppression", "boxes", scores, most, *limits, out="kept", center_point_box=1
    )
    return total(net, kept)


BUILDS: dict[str, Build] = {
    **{k: compare(k) for k in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
    **{k: decide(k) for k in ("And", "Not", "Or", "Xor")},
    **{k: count(k) for k in ("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor")},
    **{k: locate(k) for k in ("ArgMax", "ArgMin")},
    **{k: ask(k) for k in ("IsInf", "IsNaN", "Shape", "Size")},
    "NonMaxSuppression": suppress,
    "NonZero": place,
    "TopK": rank_best,
    "Unique": rank_unique,
}


@pytest.mark.parametrize("kind", BUILDS)
def test_a_side_path_of_integers_or_truth_values_is_a_constant(kind: str) -> None:
    net = Net()
    h = net.op("Mul", "x", net.constant("w", np.full((4, 5), 1.02, np.float32)), out="h")
    found = BUILDS[kind](net, h)
    weight = net.op("Cast", found, out="weight", to=FLOAT)
    if kind == "Shape":
        weight = net.op("ReduceSum", weight, out="sum", keepdims=0)
    net.op("Mul", net.op("Add", weight, bound_one(net), out="raised"), h, out="y")
    assert_differentiable(net, DATA, parameters=["w"])


def bound_one(net: Net) -> str:
    return net.constant("one", np.array(1, np.float32))


@pytest.mark.parametrize("axis", [0, 1])
def test_constants_in_the_shape_of_a_value_that_moves(axis: int) -> None:
    net = Net()
    h = net.op("Mul", "x", net.constant("w", np.full((4, 5), 1.02, np.float32)), out="h")
    square = net.op("Squeeze", net.op("Slice", h, *(
        net.constant(n, np.array([v])) for n, v in (("s", 0), ("e", 1), ("a", 1 - axis))
    ), out="one_row"), net.constant("at", np.array([1 - axis])), out="square")  # fmt: skip
    eye = net.op("EyeLike", square, out="eye", k=1)
    filled = net.op("ConstantOfShape", net.op("Shape", square, out="shape"), out="ones",
                    value=helper.make_tensor("value", FLOAT, [1], [1.0]))  # fmt: skip
    net.op("Mul", net.op("Add", eye, filled, out="grid"), square, out="y")
    assert_differentiable(net, DATA)
