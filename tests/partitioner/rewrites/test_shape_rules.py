"""Extents: arithmetic on sizes is done at once where they are known, else by the graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    add,
    count_up,
    divide,
    join,
    multiply,
    read_extents,
    require_array,
    require_rank,
    require_sizes,
    reshape,
    to_number,
    to_vector,
)

FLOAT = ir.DataType.FLOAT


def make_value(*dims: int | str) -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(dims))


def make_node(*inputs: ir.Value) -> ir.Node:
    return ir.node("Resize", inputs, name="node")


def compute(
    write: Callable[[NodeBuilder, list[Extent]], ir.Value], dims: list[int | str], *shape: int
) -> np.ndarray:
    """Evaluate what is written of the extents of ``x`` where ``x`` has a shape."""
    x = make_value(*dims)
    builder = NodeBuilder("size")
    made = write(builder, read_extents(builder, make_node(x), x))
    result = builder.op("Identity", made)
    graph = ir.Graph([x], [result], nodes=builder.nodes, opset_imports={"": 18}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    (found,) = ReferenceEvaluator(model).run(None, {"x": values})
    return np.asarray(found)


def test_extents_are_numbers_where_they_are_known() -> None:
    builder = NodeBuilder("size")
    first, *rest = read_extents(builder, make_node(), make_value("N", 3, 4))
    assert isinstance(first, ir.Value)
    assert rest == [3, 4]


def test_arithmetic_on_numbers_writes_no_node() -> None:
    builder = NodeBuilder("size")
    assert (multiply(builder, [2, 3, 4]), multiply(builder, [])) == (24, 1)
    assert (divide(builder, 7, 2), add(builder, 7, -2)) == (3, 5)
    assert builder.nodes == []


@pytest.mark.parametrize("dims", [["N", 3, "M"], ["N", 3, 5], [7, 3, 5]])
def test_arithmetic_on_what_only_the_data_know(dims: list[int | str]) -> None:
    def write(builder: NodeBuilder, extents: list[Extent]) -> ir.Value:
        product = multiply(builder, [*extents, 2])
        parts: list[Extent] = [
            product,
            divide(builder, product, 4),
            add(builder, product, -9),
            add(builder, extents[0], 0),
            divide(builder, extents[2], 1),
        ]
        return join(builder, parts)

    assert compute(write, dims, 7, 3, 5).tolist() == [210, 52, 201, 7, 5]


def test_known_sizes_are_joined_to_one_constant() -> None:
    builder = NodeBuilder("size")
    found = known_array(join(builder, [2, 3, 4]))
    assert found is not None
    assert found.tolist() == [2, 3, 4]
    assert len(builder.nodes) == 1


@pytest.mark.parametrize("dims", [["N", "M"], ["N", 6], [2, 6]])
def test_a_value_is_reshaped_to_extents(dims: list[int | str]) -> None:
    x = make_value(*dims)

    def write(builder: NodeBuilder, extents: list[Extent]) -> ir.Value:
        source = builder.op("Identity", x)
        return reshape(builder, source, [divide(builder, extents[1], 2), extents[0], 2])

    builder = NodeBuilder("size")
    made = write(builder, read_extents(builder, make_node(x), x))
    result = builder.op("Identity", made)
    graph = ir.Graph([x], [result], nodes=builder.nodes, opset_imports={"": 18}, name="g")
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    (found,) = ReferenceEvaluator(model).run(None, {"x": values})
    np.testing.assert_array_equal(found, values.reshape(3, 2, 2))


@pytest.mark.parametrize("dims", [["N"], [5]])
def test_counting_up_to_an_extent_and_calculating_with_it(dims: list[int | str]) -> None:
    found = compute(lambda builder, extents: count_up(builder, extents[0]), dims, 5)
    assert (found.dtype.name, found.tolist()) == ("int64", [0, 1, 2, 3, 4])
    found = compute(lambda builder, extents: to_number(builder, extents[0], FLOAT), dims, 5)
    assert found.dtype == np.float32
    assert float(found.reshape(())) == 5.0
    assert compute(lambda builder, e: to_vector(builder, e[0]), dims, 5).tolist() == [5]


def test_what_is_required_and_not_known_is_refused_by_name() -> None:
    node, bare = make_node(), ir.Value(name="x")
    with pytest.raises(UnsupportedModel, match=r"'node' \(Resize\): the rank of 'x'"):
        require_rank(node, bare)
    with pytest.raises(UnsupportedModel, match="the rank of 'x'"):
        read_extents(NodeBuilder("size"), node, bare)
    with pytest.raises(UnsupportedModel, match="the shape of 'x' is not known from dimension 1"):
        require_sizes(node, make_value("N", "M", 3), 1)
    with pytest.raises(UnsupportedModel, match="the shape of 'x'"):
        require_sizes(node, bare)
    with pytest.raises(UnsupportedModel, match="its scales are computed in the graph"):
        require_array(make_node(make_value(4)), 0, "scales")
    assert require_sizes(node, make_value("N", 4, 3), 1) == [4, 3]
    assert require_rank(node, make_value("N", 4)) == 2
    builder = NodeBuilder("constant")
    found = require_array(make_node(builder.integers([4, 2])), 0, "sizes")
    assert found.tolist() == [4, 2]
