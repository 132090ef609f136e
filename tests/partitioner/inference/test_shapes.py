"""Shapes as onnx infers them, and those that no runtime may be given."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import NotAModel, UnsupportedModel
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.inference.dimensions import name_unknown
from splitonnx.partitioner.inference.shapes import (
    MOST_ALONG,
    check_ranks,
    infer_shapes,
)

FLOAT = TensorProto.FLOAT


def build(*nodes: onnx.NodeProto, dims: Any = ("N", 6), **weights: np.ndarray) -> ir.Model:
    graph = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", FLOAT, dims)],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ir.from_proto(model)


def list_dims(model: ir.Model, name: str) -> list[int | str | None] | None:
    shape = map_values(model.graph)[name].shape
    return None if shape is None else [d if isinstance(d, int) else d.value for d in shape]


def test_types_and_shapes_are_noted_on_every_value() -> None:
    model = build(
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Greater", ["h", "edge"], ["mask"]),
        helper.make_node("Shape", ["mask"], ["shape"]),
        w=np.zeros((6, 4), np.float32),
        edge=np.array(0.5, np.float32),
    )
    infer_shapes(model)
    values = map_values(model.graph)
    assert (values["h"].dtype, list_dims(model, "h")) == (ir.DataType.FLOAT, ["N", 4])
    assert (values["mask"].dtype, list_dims(model, "mask")) == (ir.DataType.BOOL, ["N", 4])
    assert (values["shape"].dtype, list_dims(model, "shape")) == (ir.DataType.INT64, [2])


def test_weights_stay_where_they_are_and_the_inputs_too() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 400)).astype(np.float32)
    model = build(helper.make_node("MatMul", ["x", "w"], ["h"]), w=weight)
    infer_shapes(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), weight)
    assert list_dims(model, "h") == ["N", 400]


def test_small_contents_tell_shapes_and_large_ones_need_not() -> None:
    model = build(helper.make_node("Reshape", ["x", "to"], ["h"]), dims=(4, 6), to=np.array([3, 8]))
    infer_shapes(model)
    assert list_dims(model, "h") == [3, 8]


def test_values_in_bodies_are_typed_too() -> None:
    def branch(kind: str, operator: str) -> onnx.GraphProto:
        node = helper.make_node(operator, ["x"], [f"{kind}.y"], name=kind)
        return helper.make_graph([node], kind, [], [onnx.ValueInfoProto(name=f"{kind}.y")])

    choice = helper.make_node(
        "If", ["go"], ["y"],
        then_branch=branch("then", "Neg"), else_branch=branch("else", "Exp"),
    )  # fmt: skip
    model = build(choice, go=np.array(True))
    infer_shapes(model)
    inner = [value for node in model.graph.all_nodes() for value in node.outputs]
    assert {value.name: value.dtype for value in inner} == dict.fromkeys(
        ["y", "then.y", "else.y"], ir.DataType.FLOAT
    )


def test_a_model_that_contradicts_itself_is_left_as_it_is() -> None:
    model = build(helper.make_node("MatMul", ["x", "w"], ["h"]), w=np.zeros((5, 4), np.float32))
    infer_shapes(model)  # 6 columns meet 5 rows: no error here, the runtime will say
    assert list_dims(model, "h") in (None, ["N", 4])


def window(
    kind: str, dims: tuple[int | str, ...], weight: tuple[int, ...] = (), **attributes: Any
) -> ir.Graph:
    inputs = ["x", "w"] if weight else ["x"]
    arrays = {"w": np.zeros(weight, np.float32)} if weight else {}
    node = helper.make_node(kind, inputs, ["y"], name="node", **attributes)
    return build(node, dims=dims, **arrays).graph


def test_windows_that_fit_pass() -> None:
    check_ranks(window("Conv", ("N", 3, 8, 8), (4, 3, 3, 3), pads=[1, 1, 1, 1]))
    check_ranks(window("MaxPool", ("N", 3, 8), kernel_shape=[2]))
    node = helper.make_node("LayerNormalization", ["x", "w"], ["y"], name="node", axis=-2)
    check_ranks(build(node, w=np.ones(6, np.float32)).graph)


@pytest.mark.parametrize(
    ("kind", "dims", "weight", "attributes"),
    [
        ("Conv", ("N", 3, 8, 8), (4, 3, 3), {}),
        ("Conv", ("N", 3, 8, 8), (4, 3, 3, 3), {"strides": [2]}),
        ("Conv", ("N", 3, 8, 8), (4, 3, 3, 3), {"pads": [1, 1]}),
        ("Conv", ("N", 3), (4, 3), {}),
        ("Conv", ("N", 3, 8, 8), (4, 3, 0, 3), {}),
        ("MaxPool", ("N", 3, 8, 8), (), {"kernel_shape": [2]}),
        ("AveragePool", ("N", 3, 8, 8), (), {"kernel_shape": [2, 2], "dilations": [1, 1, 1]}),
    ],
)
def test_windows_of_other_ranks_than_their_images_are_refused_by_name(
    kind: str, dims: tuple[int | str, ...], weight: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    with pytest.raises(NotAModel, match=rf"'node' \({kind}\)"):
        check_ranks(window(kind, dims, weight, **attributes))


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_that_the_input_has_not_is_refused(axis: int) -> None:
    node = helper.make_node("LayerNormalization", ["x", "w"], ["y"], name="node", axis=axis)
    with pytest.raises(NotAModel, match=f"rank 2 has no axis {axis}"):
        check_ranks(build(node, w=np.ones(6, np.float32)).graph)


def test_absurd_outputs_are_refused_whatever_makes_them() -> None:
    graph = build(helper.make_node("Relu", ["x"], ["y"], name="node")).graph
    graph[0].outputs[0].shape = ir.Shape([1] * 33)
    with pytest.raises(NotAModel, match="33 dimensions"):
        check_ranks(graph)
    graph[0].outputs[0].shape = ir.Shape([MOST_ALONG + 1])
    with pytest.raises(NotAModel, match="beyond all memory"):
        check_ranks(graph)
    graph[0].outputs[0].shape = ir.Shape([MOST_ALONG])
    check_ranks(graph)


def test_a_window_without_an_image_is_told_by_its_node() -> None:
    graph = window("Conv", ("N", 3, 8, 8), (4, 3, 3, 3))
    graph[0].resize_inputs(1)
    with pytest.raises(UnsupportedModel, match=r"'node' \(Conv\)"):
        check_ranks(graph)


EINSUMS = [
    ("ntd,ntd->ntd", ["N", "T", 5], ["N", "S", 5], ["N", "%y:1", 5]),
    ("...d,...d->...d", ["N", "T", 5], ["N", "S", 5], ["N", "%y:1", 5]),
    ("...d,...d->...d", ["N", "T", 5], ["S", 5], ["N", "%y:1", 5]),
    ("ntd,ntd->ntd", ["N", 1, 5], ["N", "S", 5], ["N", "S", 5]),
    ("ntd,ntd->ntd", ["N", 1, 5], ["N", 3, 5], ["N", 3, 5]),
    ("ntd,ntd->ntd", ["N", "T", 5], ["N", 3, 5], ["N", 3, 5]),
    ("ntd,ntd->ntd", ["N", "T", 5], ["N", "T", 5], ["N", "T", 5]),
    ("ntd,nsd->nts", ["N", "T", 5], ["N", "S", 5], ["N", "T", "S"]),
    ("ntd,ntk", ["N", "T", 4], ["N", "S", 5], [4, 5]),
]


@pytest.mark.parametrize(("equation", "first", "second", "expected"), EINSUMS)
def test_an_einsum_and_what_follows_it_have_the_sizes_that_operands_are_repeated_to(
    equation: str, first: list[Any], second: list[Any], expected: list[Any]
) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Einsum", ["a", "b"], ["y"], equation=equation),
            helper.make_node("Einsum", ["y"], ["z"], equation="...->..."),
            helper.make_node("Relu", ["z"], ["end"]),
        ],
        "g",
        [helper.make_tensor_value_info(n, FLOAT, d) for n, d in (("a", first), ("b", second))],
        [onnx.ValueInfoProto(name="end")],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    for _ in range(2):  # shapes that are already noted stay
        infer_shapes(model)
        dims = [str(name_unknown("y", 1)) if dim == "%y:1" else dim for dim in expected]
        assert [list_dims(model, name) for name in ("y", "z", "end")] == [dims] * 3
