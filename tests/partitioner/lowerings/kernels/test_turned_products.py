"""Products that read and write transposed matrices: where, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper

from splitonnx.partitioner.lowerings.kernels import turned_products
from tests.partitioner.lowerings.kernels.chosen import choose, run

X, D, W = (5, 2, 3), (5, 2, 4), (4, 3)
TURNED = ["Transpose", "Reshape", "Gemm"]
PRODUCT = helper.make_node("Gemm", ["x", "d"], ["y"], transA=1)


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


@pytest.mark.parametrize("turns_second", [0, 1])
@pytest.mark.parametrize("added", [(), ("c",)], ids=["", "added"])
def test_a_wide_product_reads_its_first_matrix_from_a_transpose(
    added: tuple[str, ...], turns_second: int
) -> None:
    wide, rows = turned_products.WIDE, 3
    shapes: dict[str, Any] = {"x": (7, rows), "d": (wide, 7) if turns_second else (7, wide)}
    shapes |= dict.fromkeys(added, (wide,))
    product = helper.make_node(
        "Gemm", ["x", "d", *added], ["y"], transA=1, transB=turns_second, alpha=2.0, beta=0.5
    )
    arrays = draw(**shapes)
    second = arrays["d"].T if turns_second else arrays["d"]
    expected = 2.0 * arrays["x"].T @ second + 0.5 * arrays.get("c", np.float32(0))
    assert check(build(product, **shapes), arrays, expected) == TURNED


def test_a_wide_product_written_in_the_order_of_a_transpose_reads_what_is_transposed() -> None:
    """First it transposes both its matrices itself, and then it is found to be wide."""
    shapes: dict[str, Any] = {"x": (turned_products.WIDE, 7), "d": (7, 3)}
    product = helper.make_node("Gemm", ["x", "d"], ["t0"])
    arrays = draw(**shapes)
    expected = (arrays["x"] @ arrays["d"]).T
    found = check(build(product, turn("t0", "y"), **shapes), arrays, expected)
    assert found == TURNED


@pytest.mark.parametrize(
    "model",
    [
        build(PRODUCT, x=(7, 3), d=(7, 767)),
        build(PRODUCT, x=(7, 3), d=(7, None)),
        build(PRODUCT, x=(7, None), d=(7, 768)),
        build(PRODUCT, x=(7, 3), d=(7, 768), kind=TensorProto.DOUBLE),
        build(helper.make_node("Gemm", ["x", "d"], ["y"]), x=(3, 7), d=(7, 768)),
    ],
    ids=["narrow", "unknown", "unknown rows", "another type", "not transposed"],
)  # fmt: skip
def test_other_products_read_their_first_matrix_as_it_is(model: ir.Model) -> None:
    assert choose(model) == ["Gemm"]


def test_the_optimizer_takes_nothing_back(tmp_path: Path) -> None:
    """Portable stages pass ONNX Runtime's optimizer, which joins a Transpose with a Gemm."""
    model = build(PRODUCT, x=("N", 3), d=("N", turned_products.WIDE))
    choose(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    assert [node.op_type for node in optimized.node] == TURNED
