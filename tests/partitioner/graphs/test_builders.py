"""The builder of nodes: names of its own, constants shared, types kept, nodes replaced whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import (
    DETACHED,
    MissingOutput,
    NodeBuilder,
    insert_copy,
    known_array,
    known_dims,
    known_rank,
    require_rank,
    store_constant,
    take_input,
)

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def make_value(*dims: int | str) -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(dims))


def make_model(kind: str = "Softplus") -> ir.Model:
    """``z = kind(x) + x``, with ``y`` between them an output too."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node(kind, ["x"], ["y"], name="node"),
        helper.make_node("Add", ["y", "x"], ["z"], name="add"),
    ]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [3])],
        [info("y", TensorProto.FLOAT, [3]), info("z", TensorProto.FLOAT, [3])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ir.from_proto(model)


def test_every_node_and_value_bears_the_prefix_and_a_number_of_its_own() -> None:
    builder = NodeBuilder("part")
    x = make_value(4)
    first = builder.op("Relu", x)
    halves = builder.ops("Split", [first], 2, {"num_outputs": 2})
    builder.op("Concat", *halves, axis=0)
    values = [value.name for node in builder.nodes for value in node.outputs]
    assert values == ["part/0", "part/1", "part/1_1", "part/2"]
    assert [node.name for node in builder.nodes] == ["part/0_Relu", "part/1_Split", "part/2_Concat"]


def test_a_constant_is_written_once() -> None:
    builder = NodeBuilder("part")
    assert builder.number(0.5, FLOAT) is builder.number(0.5, FLOAT)
    assert builder.integers([1, 2]) is builder.integers([1, 2])
    assert builder.integer(3) is builder.integer(3)
    assert len(builder.nodes) == 3


def test_constants_of_other_types_or_ranks_are_kept_apart() -> None:
    builder = NodeBuilder("part")
    made = [
        builder.number(1.0, FLOAT),
        builder.number(1.0, ir.DataType.DOUBLE),
        builder.number(1, INT64),
        builder.integer(1),
        builder.integers([1]),
    ]
    arrays = [known_array(value) for value in made]
    types = [(a.dtype.name, a.shape) for a in arrays if a is not None]
    assert types[0] == ("float32", ())
    assert types[1] == ("float64", ())
    assert types[3] == ("int64", ())
    assert types[4] == ("int64", (1,))


def test_an_element_type_that_is_not_known_is_refused_with_the_prefix() -> None:
    builder = NodeBuilder("layer/rewritten")
    with pytest.raises(UnsupportedModel, match="'layer/rewritten'"):
        builder.number(1.0, None)
    with pytest.raises(UnsupportedModel):
        builder.cast(make_value(3), None)


def test_an_array_is_stored_in_the_type_asked_for() -> None:
    builder = NodeBuilder("part")
    found = known_array(builder.array(np.array([0.5, -2.0]), ir.DataType.FLOAT16))
    assert found is not None
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, [0.5, -2.0])


def test_a_cast_to_the_type_that_is_there_is_none() -> None:
    builder = NodeBuilder("part")
    x = make_value(3)
    assert builder.cast(x, FLOAT) is x
    assert builder.nodes == []
    assert builder.cast(x, INT64).dtype == INT64
    assert [node.op_type for node in builder.nodes] == ["Cast"]


@pytest.mark.parametrize(
    ("dims", "start", "end", "expected"),
    [((2, 3, 4), 0, None, [2, 3, 4]), (("N", 3, 4), 1, None, [3, 4]), (("N", 3, 4), -1, None, [4]),
     (("N", 3, 4), 1, 2, [3])],
)  # fmt: skip
def test_a_known_shape_is_a_constant(
    dims: tuple[int | str, ...], start: int, end: int | None, expected: list[int]
) -> None:
    found = known_array(NodeBuilder("part").shape(make_value(*dims), start, end))
    assert found is not None
    assert found.tolist() == expected


@pytest.mark.parametrize(("start", "end"), [(0, None), (0, 2), (1, None), (-2, None)])
def test_a_shape_that_is_not_known_is_read_from_the_data(start: int, end: int | None) -> None:
    builder = NodeBuilder("part")
    x = make_value("N", "M", 4)
    made = builder.shape(x, start, end)
    made.type = ir.TensorType(INT64)
    graph = ir.Graph([x], [made], nodes=builder.nodes, opset_imports={"": 18}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    (found,) = ReferenceEvaluator(model).run(None, {"x": np.zeros((2, 3, 4), np.float32)})
    assert np.asarray(found).tolist() == [2, 3, 4][start:end]


def test_a_detached_value_keeps_its_type_and_bears_the_mark() -> None:
    x = make_value("N", 3)
    stopped = NodeBuilder("part").detach(x)
    assert (stopped.dtype, stopped.shape) == (x.dtype, x.shape)
    node = stopped.producer()
    assert node is not None
    assert DETACHED in node.metadata_props


def test_what_is_written_takes_over_name_type_and_place() -> None:
    model = make_model()
    x = np.array([-2.0, 0.0, 3.0], np.float32)
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    node = model.graph[0]
    builder = NodeBuilder("y/rewritten")
    one = builder.number(1.0, FLOAT)
    builder.replace(
        node, [builder.op("Log", builder.op("Add", builder.op("Exp", node.inputs[0]), one))]
    )
    assert "Softplus" not in {left.op_type for left in model.graph}
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert model.graph.outputs[0].shape == ir.Shape([3])
    for found, right in zip(
        ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x}), expected, strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=1e-6)


def test_a_value_that_is_not_written_anew_is_handed_through() -> None:
    model = make_model("Identity")
    node = model.graph[0]
    NodeBuilder("y/same").replace(node, [node.inputs[0]])
    x = np.array([1.0, 2.0, 3.0], np.float32)
    y, z = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(z, 2 * x)


@pytest.mark.parametrize("made", [[], [None]])
def test_an_output_that_is_used_must_be_written(made: list[None]) -> None:
    with pytest.raises(MissingOutput, match=r"^y$"):
        NodeBuilder("y/none").replace(make_model().graph[0], made)


def test_an_output_that_nobody_reads_needs_no_replacement() -> None:
    model = make_model("Dropout")
    node = model.graph[0]
    node.resize_outputs(2)
    node.outputs[1].name = "mask"
    builder = NodeBuilder("y/plain")
    builder.replace(node, [builder.op("Identity", node.inputs[0])])
    assert "mask" not in {v.name for left in model.graph for v in left.outputs}


def test_what_is_known_of_a_shape() -> None:
    assert known_dims(make_value("N", 3)) == [None, 3]
    assert known_rank(make_value("N", 3)) == 2
    assert known_dims(ir.Value(name="x")) is None
    assert known_rank(ir.Value(name="x")) is None
    node = ir.node("Relu", [ir.Value(name="x")], name="act")
    with pytest.raises(UnsupportedModel, match=r"'act' \(Relu\): the rank of 'x'"):
        require_rank(node, ir.Value(name="x"))


def test_one_input_of_a_node_is_read_through_a_copy() -> None:
    graph = make_model().graph
    add = graph.node(1)
    before = add.inputs[1]
    copy = insert_copy(graph, add, 1, "copy")
    assert (copy.name, copy.type, copy.shape) == ("copy", ir.TensorType(FLOAT), ir.Shape([3]))
    assert [node.op_type for node in graph] == ["Softplus", "Identity", "Add"]
    assert add.inputs[1] is copy
    assert graph.node(1).inputs[0] is before


def test_a_tensor_of_a_constant_node_is_stored_as_an_initializer() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        held (float[2] x) => (float[2] y)
        { w = Constant <value = float[2] {1.0, 2.0}> ()  y = Add (x, w) }"""
    )
    graph = model.graph
    (add,) = [node for node in graph if node.op_type == "Add"]
    stored = store_constant(graph, take_input(add, 1))
    assert add.inputs[1] is graph.initializers["w"] is stored
    assert [node.op_type for node in graph] == ["Add"]
    assert store_constant(graph, stored) is stored
    assert store_constant(graph, graph.inputs[0]) is graph.inputs[0]


def test_a_constant_has_the_shape_of_its_tensor() -> None:
    builder = NodeBuilder("part")
    made = [builder.number(1.0, FLOAT), builder.integer(2), builder.integers([1, 2, 3])]
    made.append(builder.array(np.zeros((2, 1, 3)), FLOAT))
    assert [known_dims(value) for value in made] == [[], [], [3], [2, 1, 3]]
