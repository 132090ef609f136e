"""Einsum over the forms that an equation can take, with and without extents that are known."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from tests.support.differentiations import hold_gradients
from tests.support.zoo import FLOAT, Net

SIZES = {"i": 2, "j": 3, "k": 4, "l": 5, "b": 3, "A": 2}

EQUATIONS = [
    "ij->ji", "ij->", "ij->j", "ii->i", "ii->", "iij->ij", "iijj->ji", "iii->i", "ij",
    "i,i->", "i,j->ij", "i,i->i", "ij,jk->ik", "ij,jk", "ij,kj->ki", "bij,bjk->bik",
    "bij,bkj->bik", "bijk,bilk->bijl", "ijk,jil->kl", "ijk,ijk->", "ijk,k->ij", "ij,ij->ij",
    "ijk,lk->lij", "ij,kl->ikjl", "Ai,iA->A", "ii,ij->j", "ij,jk,kl->il", "i,j,k->kji",
    "bi,bj,ijk->bk", "ij,i->i", "ij , jk -> ik", "i,->i", "b,bij->ij",
]  # fmt: skip


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + sum(shape)).normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_equations(equation: str, known: bool) -> None:
    terms = equation.replace(" ", "").split("->")[0].split(",")
    shapes = [tuple(SIZES[label] for label in term) for term in terms]
    arrays = {f"x{index}": draw(*shape) for index, shape in enumerate(shapes)}
    dynamic = {} if known else {name: 0 for name, array in arrays.items() if array.ndim}
    hold(equation, arrays, dynamic)


@pytest.mark.parametrize(
    ("equation", "shapes", "dynamic"),
    [
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)], {"x0": 0, "x1": 0}),
        ("...ij,...jk", [(2, 3, 4), (2, 4, 5)], {}),
        ("...ij,jk->...ik", [(2, 3, 3, 4), (4, 5)], {"x0": 0}),
        ("...ij,...jk->...ik", [(2, 3, 4), (4, 5)], {"x0": 0}),
        ("...ij,...jk->...ik", [(2, 1, 3, 4), (3, 4, 5)], {}),
        ("...ij,...jk->ik...", [(1, 3, 4), (6, 4, 5)], {"x1": 0}),
        ("i...->...", [(2, 3, 4)], {"x0": 0}),
        ("...ii->...i", [(3, 4, 4)], {"x0": 0}),
        ("i...j,j->...i", [(2, 3, 4, 5), (5,)], {"x0": 1}),
        ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)], {"x0": 2, "x1": 2}),
        ("bqhd,bkhd->bhqk", [(2, 4, 3, 5), (2, 6, 3, 5)], {"x0": 1, "x1": 1}),
        ("ij,ij->i", [(3, 4), (3, 1)], {}),
    ],
)
def test_ellipses_and_axes_that_are_spread(
    equation: str, shapes: list[tuple[int, ...]], dynamic: dict[str, int]
) -> None:
    hold(equation, {f"x{index}": draw(*shape) for index, shape in enumerate(shapes)}, dynamic)


def hold(equation: str, arrays: dict[str, np.ndarray], dynamic: dict[str, int]) -> None:
    node = helper.make_node("Einsum", list(arrays), ["y"], equation=equation)
    hold_gradients(
        [node],
        arrays,
        ["y"],
        evaluate=lambda feeds: {"y": np.einsum(equation, *feeds.values())},
        dynamic=dynamic,
        entries=3,
    )


def test_an_equation_that_does_not_fit_is_refused() -> None:
    net = Net()
    net.op(
        "Einsum", net.op("Mul", "x", "x", out="z"), net.weight("w", 3), out="y", equation="ij->i"
    )
    graph = helper.make_graph(
        net.nodes,
        "odd",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["N"])],
        net.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(UnsupportedModel, match="does not fit its 2 inputs"):
        cut(model, at=None, loss="mse")
