"""Which values of a step have the same shape in every step."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.control_flow.fixed_shapes import FixedShapes


def make(name: str, *dims: int | str | None) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims))


def open_step(*made: ir.Value) -> tuple[ir.Graph, list[ir.Value]]:
    """Return a graph that makes the values, and its inputs."""
    given = [make("a", "N", 3), make("b", "unk__around:0", "2*T"), make("c", "(H)//(2)")]
    nodes = [ir.Node("", "Any", given, outputs=[value]) for value in made]
    return ir.Graph(given, made, nodes=nodes), given


@pytest.mark.parametrize(
    "dims", [(), (2, 3), ("N", 3), ("unk__around:0",), ("N*T + 1",), ("(H)//(2)",), ("(N)//(2)",)]
)
def test_sizes_that_follow_from_those_of_the_inputs_do_not_change(
    dims: tuple[int | str, ...],
) -> None:
    value = make("v", *dims)
    assert value in FixedShapes(*open_step(value))


@pytest.mark.parametrize("dims", [(None,), ("K", 3), ("N", "unk__v:0"), ("N + K",), ("H",)])
def test_other_sizes_may_change(dims: tuple[str | None, ...]) -> None:
    value = make("v", *dims)
    assert value not in FixedShapes(*open_step(value))


def test_a_value_of_unknown_rank_may_change() -> None:
    value = ir.Value(name="v")
    assert value not in FixedShapes(*open_step(value))


def test_a_shape_is_remembered_where_a_derived_graph_no_longer_knows_it() -> None:
    fixed = FixedShapes(*open_step(make("v", "unk__around:0")))
    assert make("v", None) in fixed
    assert make("other", None) not in fixed
