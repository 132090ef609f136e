"""Declared shapes give way to those that follow from the inputs, in bodies, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from splitonnx.partitioner.graphs.traversals import list_nodes, map_values
from splitonnx.partitioner.inference.declared_shapes import drop_declared_shapes
from tests.partitioner.inference.test_shapes import FLOAT, build, list_dims

Shapes = Mapping[str, Sequence[int | str]]


def test_declared_shapes_give_way_to_what_follows_from_the_inputs() -> None:
    model = build(
        helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"]),
        w=np.zeros((6, 5), np.float32),
    )  # fmt: skip
    values = map_values(model.graph)
    for shape in ("1 5", "N 4", "N", "M 5"):
        dims = [int(size) if size.isdecimal() else size for size in shape.split()]
        values["h"].shape = ir.Shape(dims)
        drop_declared_shapes(model)
        assert list_dims(model, "h") == ["N", 5], shape


def test_a_size_that_does_not_follow_from_the_inputs_is_not_believed() -> None:
    """Behind a Reshape to rows of 4, onnx does not know that there are N of them."""
    model = build(
        helper.make_node("Reshape", ["x", "to"], ["h"]), helper.make_node("Relu", ["h"], ["y"]),
        to=np.array([-1, 4]),
    )  # fmt: skip
    map_values(model.graph)["h"].shape = ir.Shape([1, 4])
    drop_declared_shapes(model)
    assert list_dims(model, "h") == [None, 4]


def test_an_output_keeps_the_declared_number_of_classes_that_nothing_else_tells() -> None:
    model = build(helper.make_node("Reshape", ["x", "to"], ["y"]))
    model.graph.inputs.append(ir.Value(name="to", type=ir.TensorType(ir.DataType.INT64),
                                       shape=ir.Shape([2])))  # fmt: skip
    model.graph.outputs[0].shape = ir.Shape([1, 3])
    drop_declared_shapes(model)
    assert list_dims(model, "y") == [None, 3]


def declare(name: str, *dims: int | str, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def write_body(
    nodes: list[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    **declared: Sequence[int],
) -> onnx.GraphProto:
    infos = [declare(name, *dims) for name, dims in declared.items()]
    return helper.make_graph(nodes, "body", list(inputs), list(outputs), value_info=infos)


def repeat(
    nodes: list[onnx.NodeProto], before: Sequence[int | str], after: Sequence[int | str]
) -> onnx.GraphProto:
    """Write the body of a Loop that carries ``old`` to ``new``, with the shapes declared so."""
    return write_body(
        [*nodes, helper.make_node("Identity", ["on"], ["again"])],
        [declare("i", dtype=TensorProto.INT64), declare("on", dtype=TensorProto.BOOL),
         declare("old", *before)],
        [declare("again", dtype=TensorProto.BOOL), declare("new", *after)],
    )  # fmt: skip


def list_all_dims(model: ir.Model) -> dict[str, list[int | str | None]]:
    """Map each float value in the bodies of a model to its shape, after wrong ones are dropped."""
    drop_declared_shapes(model)
    values = [value for graph in list(model.graphs())[1:] for value in graph.inputs]
    values += [value for node in list_nodes(model.graph) for value in node.outputs]
    return {
        value.name or "": [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        for value in values
        if value.shape is not None and value.dtype in (ir.DataType.FLOAT, None)
    }


def test_branches_that_share_a_name_get_their_own_shapes() -> None:
    def branch(weight: str, back: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x", weight], ["m"]),
            helper.make_node("MatMul", ["m", back], ["o"]),
        ]
        return write_body(nodes, [], [declare("o", 1, 6)], m=[1, 9])

    wide, narrow = np.zeros((6, 7), np.float32), np.zeros((6, 2), np.float32)
    model = build(
        helper.make_node(
            "If", ["go"], ["y"], then_branch=branch("a", "b"), else_branch=branch("c", "d")
        ),
        go=np.array(True), a=wide, b=wide.T.copy(), c=narrow, d=narrow.T.copy(),
    )  # fmt: skip
    drop_declared_shapes(model)
    found = {
        key: [str(value.shape) for node in body.as_graph() for value in node.outputs]
        for key, body in model.graph[0].attributes.items()
    }
    assert found == {"then_branch": ["[N,7]", "[N,6]"], "else_branch": ["[N,2]", "[N,6]"]}


@pytest.mark.parametrize("stale", [[1, 6], [1], ["M", 6]])
def test_what_a_loop_carries_has_its_first_shape_as_long_as_the_body_keeps_it(
    stale: list[int | str],
) -> None:
    body = repeat([helper.make_node("Tanh", ["old"], ["new"])], stale, stale)
    model = build(
        helper.make_node("Loop", ["trips", "", "x"], ["last"], body=body),
        helper.make_node("Relu", ["last"], ["y"]),
        trips=np.array(3),
    )
    for name in ("last", "y"):
        map_values(model.graph)[name].shape = ir.Shape([1, 6])
    found = list_all_dims(model)
    assert [found[name] for name in ("old", "new", "last", "y")] == [["N", 6]] * 4


def test_a_size_that_changes_from_one_iteration_to_the_next_is_not_known() -> None:
    body = repeat([helper.make_node("Concat", ["old", "old"], ["new"], axis=0)], [1, 6], [2, 6])
    model = build(
        helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body),
        trips=np.array(3), dims=(1, 6),
    )  # fmt: skip
    map_values(model.graph)["y"].shape = ir.Shape([1, 6])
    found = list_all_dims(model)
    assert (found["old"], found["new"], found["y"]) == ([None, 6], [None, 6], [None, 6])


def test_a_size_that_only_the_file_knows_is_believed_if_a_loop_begins_with_it() -> None:
    nodes = [
        helper.make_node("Shape", ["old"], ["shape"]),
        helper.make_node("Compress", ["shape", "both"], ["to"]),
        helper.make_node("Reshape", ["old", "to"], ["new"]),
    ]
    model = build(
        helper.make_node("Loop", ["trips", "", "x"], ["y"], body=repeat(nodes, [1, 6], [1, 6])),
        trips=np.array(3), both=np.array([True, True]),
    )  # fmt: skip
    found = list_all_dims(model)
    assert (found["old"], found["new"]) == ([None, 6], [None, 6])


def test_a_loop_in_a_loop_is_followed() -> None:
    inner = repeat([helper.make_node("Tanh", ["old"], ["new"])], [1, 6], [1, 6])
    for value in (inner.input[2], inner.output[1], inner.node[0]):
        value.name = f"inner_{value.name}"
    inner.node[0].input[0], inner.node[0].output[0] = "inner_old", "inner_new"
    nodes = [
        helper.make_node("Sin", ["old"], ["s"]),
        helper.make_node("Loop", ["trips", "", "s"], ["new"], body=inner),
    ]
    model = build(
        helper.make_node("Loop", ["trips", "", "x"], ["y"], body=repeat(nodes, [1, 6], [1, 6])),
        trips=np.array(3),
    )
    found = list_all_dims(model)
    assert [found[n] for n in ("old", "inner_old", "inner_new", "new")] == [["N", 6]] * 4


def test_the_body_of_a_scan_sees_one_row_at_a_time() -> None:
    body = write_body(
        [helper.make_node("Add", ["old", "row"], ["new"]), helper.make_node("Neg", ["new"], ["z"])],
        [declare("old", 1), declare("row", 1)],
        [declare("new", 1), declare("z", 1)],
    )
    model = build(
        helper.make_node("ReduceSum", ["x", "first"], ["start"], keepdims=0),
        helper.make_node("Scan", ["start", "x"], ["last", "y"], body=body, num_scan_inputs=1),
        first=np.array([0]),
    )  # fmt: skip
    map_values(model.graph)["y"].shape = ir.Shape([1, 6])
    found = list_all_dims(model)
    assert [found[name] for name in ("old", "row", "new", "z")] == [[6]] * 4
    assert found["y"] == ["N", 6]
