"""Products that read and write transposed matrices: where, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import NodeProto, TensorProto, helper

from tests.partitioner.lowerings.kernels.chosen import choose, run

X, D, W = (5, 2, 3), (5, 2, 4), (4, 3)


def build(
    *nodes: NodeProto,
    kind: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
    **shapes: Any,
) -> ir.Model:
    inputs = [helper.make_tensor_value_info(n, kind, shape) for n, shape in shapes.items()]
    made = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    graph = helper.make_graph(nodes, "case", inputs, made)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def draw(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def fused(first: str, second: str, **attributes: Any) -> NodeProto:
    return helper.make_node(
        "FusedMatMul", [first, second], ["y"], domain="com.microsoft", **attributes
    )


def turn(name: str, made: str = "t", **attributes: Any) -> NodeProto:
    return helper.make_node("Transpose", [name], [made], **{"perm": [1, 0], **attributes})


def check(model: ir.Model, arrays: Mapping[str, np.ndarray], expected: np.ndarray) -> list[str]:
    kinds = choose(model)
    found = run(model, dict(arrays))
    np.testing.assert_allclose(found["y"], expected, rtol=1e-5, atol=1e-6)
    return kinds


def test_a_product_with_transposed_weights_reads_the_weights() -> None:
    arrays = draw(x=X, w=W)
    model = build(turn("w"), helper.make_node("MatMul", ["x", "t"], ["y"]), x=X, w=W)
    assert check(model, arrays, arrays["x"] @ arrays["w"].T) == ["FusedMatMul"]


def test_a_product_with_weights_transposed_twice_is_a_plain_one() -> None:
    arrays = draw(d=D, w=W)
    model = build(turn("w"), fused("d", "t", transB=1), d=D, w=W)
    assert check(model, arrays, arrays["d"] @ arrays["w"]) == ["MatMul"]


def test_a_factor_and_the_first_matrix_s_order_are_kept() -> None:
    arrays = draw(x=(5, 3, 2), w=W)
    model = build(turn("w"), fused("x", "t", transA=1, alpha=0.5), x=(5, 3, 2), w=W)
    expected = 0.5 * arrays["x"].transpose(0, 2, 1) @ arrays["w"].T
    assert check(model, arrays, expected) == ["FusedMatMul"]


def test_a_transposed_matrix_that_is_read_elsewhere_is_kept() -> None:
    node = helper.make_node("MatMul", ["x", "t"], ["y"])
    model = build(turn("w"), node, outputs=("y", "t"), x=X, w=W)
    arrays = draw(x=X, w=W)
    assert check(model, arrays, arrays["x"] @ arrays["w"].T) == ["Transpose", "FusedMatMul"]


@pytest.mark.parametrize(
    "model",
    [
        build(turn("w"), helper.make_node("MatMul", ["x", "t"], ["y"]), x=(3,), w=W),
        build(turn("w"), helper.make_node("MatMul", ["x", "t"], ["y"]), x=None, w=W),
        build(
            turn("w"), helper.make_node("MatMul", ["x", "t"], ["y"]),
            kind=TensorProto.DOUBLE, x=X, w=W,
        ),
        build(
            turn("w", perm=[0, 2, 1]), helper.make_node("MatMul", ["x", "t"], ["y"]),
            x=X, w=(5, 4, 3),
        ),
        build(turn("w"), fused("x", "t", transBatchA=1), x=X, w=W),
    ],
    ids=["a vector", "an unknown rank", "another type", "more axes", "batches in another order"],
)  # fmt: skip
def test_other_products_stay(model: ir.Model) -> None:
    assert "Transpose" in choose(model)


@pytest.mark.parametrize("orders", [(1, 0), (0, 1), (0, 0), (1, 1)])
def test_a_gradient_of_weights_is_written_in_their_order(orders: tuple[int, int]) -> None:
    first, second = ((7, 3), (3, 7))[1 - orders[0]], ((7, 4), (4, 7))[orders[1]]
    product = helper.make_node(
        "Gemm", ["x", "d"], ["t0"], transA=orders[0], transB=orders[1], alpha=2.0
    )
    arrays = draw(x=first, d=second)
    model = build(product, turn("t0", "y"), x=first, d=second)
    x = arrays["x"].T if orders[0] else arrays["x"]
    d = arrays["d"].T if orders[1] else arrays["d"]
    assert check(model, arrays, 2.0 * (x @ d).T) == ["Gemm"]


def test_a_product_that_something_is_added_to_keeps_its_order() -> None:
    product = helper.make_node("Gemm", ["x", "d", "c"], ["t0"], transA=1)
    model = build(product, turn("t0", "y"), x=(7, 3), d=(7, 4), c=(4,))
    assert choose(model) == ["Gemm", "Transpose"]


def test_a_product_that_is_read_in_both_orders_keeps_its_own() -> None:
    product = helper.make_node("Gemm", ["x", "d"], ["t0"], transA=1)
    model = build(product, turn("t0", "y"), outputs=("y", "t0"), x=(7, 3), d=(7, 4))
    assert choose(model) == ["Gemm", "Transpose"]
