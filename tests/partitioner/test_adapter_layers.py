"""Which weights can have adapters, and what is said of the others."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.partitioner.adapter_layers import find_layers
from splitonnx.partitioner.gate.gates import open_model
from tests.support.nets import FLOAT, INT64, Net

SCOPES = "pkg.torch.onnx.name_scopes"


def build() -> onnx.ModelProto:
    """Return a model with a weight of each kind that can have an adapter, and of some that cannot.

    ``x`` has the shape (N, 4), and so have most results.
    """
    net = Net()
    net.op("MatMul", "x", net.weight("plain.weight", 4, 4), out="a")
    net.op("Gemm", "a", net.weight("gemm.weight", 4, 4), net.weight("bias", 4), out="b", transB=1)
    net.op("Transpose", net.weight("turned.weight", 3, 4), out="turned_t", perm=[1, 0])
    net.op("MatMul", "b", "turned_t", out="c")
    net.op("MatMul", "c", net.weight("widen.weight", 3, 4), out="d")
    net.op("Identity", net.weight("shared.weight", 4, 4), out="copy")
    net.op("MatMul", "d", "copy", out="e")
    net.op("MatMul", "e", "shared.weight", out="f")
    net.op("MatMul", net.weight("left.weight", 4, 4), "f", out="g")
    net.op("MatMul", "f", net.weight("both.weight", 4, 4), out="h")
    net.op("Gemm", "h", "both.weight", out="i", transB=1)
    net.op("Gather", net.weight("table.weight", 9, 4), "tokens", out="j")
    net.op("Transpose", "table.weight", out="table_t", perm=[1, 0])
    net.op("MatMul", "i", "table_t", out="k")
    net.op("MatMul", "x", net.weight("stack.weight", 2, 4, 4), out="l")
    net.op("Add", "k", net.weight("output_bias", 9), out="m")
    return net.finish({"x": (FLOAT, [4, 4]), "tokens": (INT64, [4])}, "m", 9)


def open_graph() -> ir.Graph:
    return open_model(build()).graph


@pytest.mark.parametrize(
    ("name", "sizes", "products", "is_transposed"),
    [
        ("plain.weight", (4, 4), ["a_node"], False),
        ("gemm.weight", (4, 4), ["b_node"], True),
        ("turned.weight", (4, 3), ["c_node"], True),
        ("widen.weight", (3, 4), ["d_node"], False),
        ("shared.weight", (4, 4), ["f_node", "e_node"], False),
    ],
)
def test_a_matrix_that_only_products_multiply_by_can_have_an_adapter(
    name: str, sizes: tuple[int, int], products: list[str], is_transposed: bool
) -> None:
    layer = find_layers(open_graph(), [f"^{name}$"]).layers[name]
    assert layer.sizes == sizes
    assert sorted(node.name or "" for node in layer.products) == sorted(products)
    assert layer.is_transposed is is_transposed


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("left.weight", r"input 0 of node 'g_node' \(MatMul\)"),
        ("both.weight", "both as it is and transposed"),
        ("table.weight", "Gather uses it"),
        ("stack.weight", "it has 3 dimensions"),
        ("output_bias", "it is not a matrix"),
    ],
)
def test_a_weight_that_can_have_none_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{name}' can have no adapter: .*{reason}"):
        find_layers(open_graph(), [f"^{name}$"])


def test_a_pattern_that_finds_both_leaves_out_what_does_not_fit_and_says_why() -> None:
    found = find_layers(open_graph(), ["weight"])
    assert list(found.layers) == [
        "plain.weight", "gemm.weight", "turned.weight", "widen.weight", "shared.weight",
    ]  # fmt: skip
    assert list(found.reasons) == ["left.weight", "both.weight", "table.weight", "stack.weight"]


def test_the_name_of_a_product_or_of_its_module_finds_its_weight() -> None:
    model = build()
    for node in model.graph.node:
        if node.name == "c_node":
            node.metadata_props.add(key=SCOPES, value="['', 'enc', 'enc.fc1', 'linear_3']")
    graph = open_model(model).graph
    assert list(find_layers(graph, ["^b_node$"]).layers) == ["gemm.weight"]
    assert list(find_layers(graph, [r"enc\.fc1$"]).layers) == ["turned.weight"]


def test_a_pattern_that_finds_nothing_is_refused_with_names_that_there_are() -> None:
    with pytest.raises(UnsupportedModel, match=r"--lora plain\.wieght.*'plain\.weight'"):
        find_layers(open_graph(), ["plain.wieght"])
    with pytest.raises(UsageError, match="not a regular expression"):
        find_layers(open_graph(), ["("])


def test_integers_and_weights_in_branches_are_refused() -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "outer"], ["then"], name="within")],
        "then",
        [],
        [helper.make_tensor_value_info("then", FLOAT, [2, 3])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["else"])],
        "else",
        [],
        [helper.make_tensor_value_info("else", FLOAT, [2, 3])],
    )
    graph = helper.make_graph(
        [
            helper.make_node("If", ["on"], ["y"], then_branch=inner, else_branch=other),
            helper.make_node("MatMulInteger", ["bytes", "whole"], ["z"], name="integers"),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, [2, 3]),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("bytes", TensorProto.UINT8, [2, 3]),
        ],
        [
            helper.make_tensor_value_info("y", FLOAT, [2, 3]),
            helper.make_tensor_value_info("z", TensorProto.INT32, [2, 3]),
        ],
        [
            numpy_helper.from_array(np.eye(3, dtype=np.float32), "outer"),
            numpy_helper.from_array(np.eye(3, dtype=np.int8), "whole"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(UnsupportedModel, match=r"node 'within' \(MatMul\).*in a branch or loop"):
        find_layers(open_model(model).graph, ["outer"])
    with pytest.raises(UnsupportedModel, match="it is INT8; adapters need a weight of floats"):
        find_layers(open_model(model).graph, ["whole"])
