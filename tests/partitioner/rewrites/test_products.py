"""Products, determinants and splits, where the gradient builder fails by itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from tests.support.differentiations import hold_gradients
from tests.support.zoo import FLOAT, Net

RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(0.2, 1.0, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("left", "right"),
    [((4,), (4,)), ((4,), (4, 3)), ((4,), (2, 4, 3)), ((3, 4), (4,)), ((2, 5, 3, 4), (4,))],
)
def test_products_with_a_vector(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    hold_gradients([node], {"a": draw(*left), "b": draw(*right)}, ["y"])


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (2, 4, 4), (2, 3, 5, 5)])
def test_determinants(shape: tuple[int, ...]) -> None:
    node = helper.make_node("Det", ["x"], ["y"])
    dynamic = {"x": 0} if len(shape) > 2 else {}
    hold_gradients([node], {"x": draw(*shape)}, ["y"], dynamic=dynamic)


def test_a_singular_matrix_has_the_gradient_of_its_cofactors() -> None:
    x = draw(4, 4)
    x[2] = x[0] + x[1]
    hold_gradients([helper.make_node("Det", ["x"], ["y"])], {"x": x}, ["y"], entries=16)


def test_a_determinant_of_unknown_size_is_refused() -> None:
    net = Net()
    net.op("Det", net.op("Mul", "x", net.weight("scale", 3), out="scaled"), out="y")
    model = net.finish({"x": (FLOAT, ["N", "M", 3])}, "y")
    with pytest.raises(UnsupportedModel, match="square and of a known size"):
        cut(model, at=None, loss="mse")


@pytest.mark.parametrize("dynamic", [{}, {"x": 0}, {"x": 1}])
@pytest.mark.parametrize("used", [["a", "c"], ["b"], ["a", "b", "c"]])
def test_a_split_of_which_not_every_piece_is_used(dynamic: dict[str, int], used: list[str]) -> None:
    node = helper.make_node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3)

    def evaluate(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        pieces = dict(zip("abc", np.split(arrays["x"], [3, 6], 1), strict=True))
        return {name: pieces[name] for name in used}

    hold_gradients([node], {"x": draw(4, 8)}, used, evaluate=evaluate, dynamic=dynamic)


@pytest.mark.parametrize("kind", ["Split", "Slice"])
def test_pieces_that_only_decide_and_carry_no_gradient(kind: str) -> None:
    sizes = {"sizes": np.array([2, 3], np.int64)}
    nodes = [helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=1)]
    if kind == "Slice":
        sizes = {name: np.array([value]) for name, value in (("zero", 0), ("two", 2), ("five", 5))}
        sizes["axis"] = np.array([1])
        nodes = [
            helper.make_node("Slice", ["x", "zero", "two", "axis"], ["a"]),
            helper.make_node("Slice", ["x", "two", "five", "axis"], ["b"]),
        ]
    nodes.append(helper.make_node("Sign", ["b"], ["sign"]))

    def evaluate(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"a": arrays["x"][:, :2], "sign": np.sign(arrays["x"][:, 2:])}

    arrays = {"x": draw(4, 5), **sizes}
    hold_gradients(nodes, arrays, ["a", "sign"], evaluate=evaluate, dynamic={"x": 0})


def test_a_mask_is_padded_with_minus_infinity_that_is_computed() -> None:
    arrays = {"x": draw(3, 4), "widths": np.array([0, 0, 0, 2]), "limit": draw(2)}
    nodes = [
        helper.make_node("Log", ["zero"], ["lowest"]),
        helper.make_node("Mul", ["limit", "zero"], ["nothing"]),
        helper.make_node("Add", ["lowest", "nothing"], ["fills"]),
        helper.make_node("ReduceSum", ["fills"], ["fill"], keepdims=0),
        helper.make_node("Pad", ["x", "widths", "fill"], ["padded"]),
        helper.make_node("Softmax", ["padded"], ["y"]),
    ]

    def evaluate(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        powers = np.exp(feeds["x"])
        found = powers / powers.sum(1, keepdims=True)
        return {"y": np.pad(found, [(0, 0), (0, 2)])}

    arrays["zero"] = np.zeros(1, np.float32)
    constants = ["zero"]
    hold_gradients(nodes, arrays, ["y"], evaluate=evaluate, constants=constants)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_softmax_that_is_taken_in_float64(kind: str) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node(kind, ["wide"], ["soft"], axis=1),
        helper.make_node("Cast", ["soft"], ["y"], to=TensorProto.FLOAT),
    ]

    def evaluate(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shifted = feeds["x"] - np.log(np.exp(feeds["x"]).sum(1, keepdims=True))
        return {"y": np.exp(shifted) if kind == "Softmax" else shifted}

    hold_gradients(nodes, {"x": draw(3, 4, 2)}, ["y"], evaluate=evaluate, dynamic={"x": 0})
