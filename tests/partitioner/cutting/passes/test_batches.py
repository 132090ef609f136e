"""A batch of 1 in shapes and constants, and when it can only be the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.cutting.passes.batches import (
    describe_freed,
    find_fixing_node,
    free_batches,
)
from tests.support.oracles import make_evaluator

X = np.random.default_rng(0).standard_normal((1, 2, 6)).astype(np.float32)
Nodes = list[tuple[str, list[str], dict[str, Any]]]


def build(nodes: Nodes, constants: dict[str, Any], batch: int | str = "N") -> onnx.ModelProto:
    """Build ``x [batch, 2, 6] -> nodes in a row -> y``.

    An empty name is the value before, and "-" an input that is left out.
    """
    made, value = [], "x"
    for index, (kind, inputs, attributes) in enumerate(nodes):
        name = f"v{index}"
        made.append(
            helper.make_node(
                kind,
                [{"": value, "-": ""}.get(i, i) for i in inputs],
                [name],
                name=name,
                **attributes,
            )
        )
        value = name
    graph = helper.make_graph(
        made,
        "batch",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2, 6])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    graph.output[0].CopyFrom(onnx.ValueInfoProto(name=value))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    found, *_ = make_evaluator(model).run(None, {"x": x})
    return np.asarray(found)


def free(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    opened = ir.from_proto(model)
    names = free_batches(opened.graph, ())
    return ir.to_proto(opened), names


WEIGHT = np.ones((12, 3), np.float32)
KEPT: dict[str, tuple[Nodes, dict[str, Any]]] = {
    "all sizes": ([("Reshape", ["", "s"], {})], {"s": [1, 4, 3]}),
    "a copied size": ([("Reshape", ["", "s"], {})], {"s": [1, 0, 2, 3]}),
    "a product takes the rest": (
        [("Reshape", ["", "s"], {}), ("Gemm", ["", "w"], {})],
        {"s": [1, -1], "w": WEIGHT},
    ),
    "a transposed product": (
        [("Reshape", ["", "s"], {}), ("Gemm", ["", "w"], {"transB": 1})],
        {"s": [1, -1], "w": WEIGHT.T.copy()},
    ),
    "a token before the data": (
        [("Concat", ["token", ""], {"axis": 1})],
        {"token": np.ones((1, 1, 6), np.float32)},
    ),
    "sizes of a resized image": ([("Resize", ["", "-", "-", "s"], {})], {"s": [1, 2, 9]}),
    "sizes of some axes": (
        [("Resize", ["", "-", "-", "s"], {"axes": [2, 0], "mode": "linear"})],
        {"s": [9, 1]},
    ),
    "one grid": (
        [("Unsqueeze", ["", "a"], {}), ("GridSample", ["", "g"], {})],
        {"a": [1], "g": np.linspace(-1, 1, 18, dtype=np.float32).reshape(1, 3, 3, 2)},
    ),
    "first states": (
        [
            ("Transpose", [""], {"perm": [1, 0, 2]}),
            ("RNN", ["", "w", "r", "b", "", "h"], {"hidden_size": 3}),
        ],
        {
            "w": np.ones((1, 3, 6), np.float32),
            "r": np.ones((1, 3, 3), np.float32),
            "b": np.zeros((1, 6), np.float32),
            "h": np.ones((1, 1, 3), np.float32),
        },
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_1_that_can_only_be_the_batch_is_replaced(case: str) -> None:
    model = build(*KEPT[case])
    freed, names = free(model)
    assert len(names) == 1
    expected = run(model, X)
    np.testing.assert_allclose(run(freed, X), expected, rtol=1e-5, atol=1e-6)
    axis = 2 if case == "first states" else 0
    batch = run(freed, np.concatenate([X, 2 * X, X]))
    assert batch.shape[axis] == 3
    np.testing.assert_allclose(np.take(batch, [2], axis), expected, rtol=1e-5, atol=1e-6)


LEFT: dict[str, tuple[Nodes, dict[str, Any], int | str]] = {
    "fits any batch": ([("Reshape", ["", "s"], {})], {"s": [1, -1]}, "N"),
    "the product takes another size": (
        [("Reshape", ["", "s"], {}), ("MatMul", ["", "w"], {})],
        {"s": [1, -1, 4], "w": np.ones((4, 2), np.float32)},
        "N",
    ),
    "another number of elements": ([("Reshape", ["", "s"], {})], {"s": [1, 5]}, "N"),
    "not a 1": ([("Reshape", ["", "s"], {})], {"s": [2, -1]}, "N"),
    "not a batch of 1": ([("Resize", ["", "-", "-", "s"], {})], {"s": [2, 2, 9]}, "N"),
    "axes without the batch": (
        [("Resize", ["", "-", "-", "s"], {"axes": [1, 2]})],
        {"s": [1, 9]},
        "N",
    ),
    "a region of the batch": (
        [
            (
                "Resize",
                ["", "r", "-", "s"],
                {"coordinate_transformation_mode": "tf_crop_and_resize"},
            )
        ],
        {"r": np.array([0, 0, 0, 1, 1, 1], np.float32), "s": [1, 2, 9]},
        "N",
    ),
    "a fixed batch": ([("Reshape", ["", "s"], {})], {"s": [1, 12]}, 1),
    "joined along the batch": (
        [("Concat", ["token", ""], {"axis": 0})],
        {"token": np.ones((1, 2, 6), np.float32)},
        "N",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_shapes_stay(case: str) -> None:
    model = build(*LEFT[case])
    _, names = free(model)
    assert names == []


def test_a_shape_that_depends_on_a_freed_one_is_inferred_again() -> None:
    model = build(
        [("Reshape", ["", "s"], {}), ("Relu", [""], {}), ("Reshape", ["", "s"], {})],
        {"s": [1, 12]},
    )
    once, first = free(model)
    again, second = free(onnx.shape_inference.infer_shapes(once))
    assert (first, second) == (["v0"], ["v2"])
    assert run(again, np.concatenate([X, X])).shape == (2, 12)


def test_the_node_that_fixes_a_batch_is_said() -> None:
    by_node = ir.from_proto(build(*LEFT["fits any batch"][:2])).graph
    assert find_fixing_node(by_node, (), "v0") == "the batch is fixed at 1 by node 'v0' (Reshape)"
    by_input = ir.from_proto(build(*LEFT["a fixed batch"])).graph
    assert find_fixing_node(by_input, (), "v0") == ""
    free_graph = ir.from_proto(build([("Relu", [""], {})], {})).graph
    assert find_fixing_node(free_graph, (), "v0") == ""
    loss = ir.from_proto(build([("ReduceMean", [""], {"keepdims": 1})], {})).graph
    assert find_fixing_node(loss, (), "v0") == ""


def test_nodes_are_named_up_to_a_number() -> None:
    assert describe_freed([]) == ""
    assert describe_freed(["a"]).startswith("'a' has a batch of 1")
    assert "'n7'" in describe_freed([f"n{i}" for i in range(9)])
    assert "'n8'" not in describe_freed([f"n{i}" for i in range(9)])
