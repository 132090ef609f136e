"""Assertions in graphs: a value passes where the condition holds, and else the stage ends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.assertions import (
    either,
    known_sizes,
    note,
    pass_if,
    refuse_where,
    require_rank,
    reshape,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder

FLOAT, BOOL, I64 = ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT64


def make_session(
    write: Callable[[NodeBuilder, list[ir.Value]], ir.Value], *inputs: ir.Value
) -> onnxruntime.InferenceSession:
    """Make a session of ONNX Runtime, whose errors are what ends a stage."""
    builder = NodeBuilder("check")
    made = write(builder, list(inputs))
    result = note(builder.op("Identity", made), made.dtype, made.shape)
    graph = ir.Graph(list(inputs), [result], nodes=builder.nodes, opset_imports={"": 18}, name="g")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    return onnxruntime.InferenceSession(content, options)


def make_value(name: str, dtype: ir.DataType, *dims: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def guard() -> onnxruntime.InferenceSession:
    """``x`` behind the assertion that nothing in ``bad`` is true."""
    return make_session(
        lambda builder, values: pass_if(builder, values[0], refuse_where(builder, values[1])),
        make_value("x", FLOAT, "N", 3),
        make_value("bad", BOOL, "M"),
    )


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_value_passes_unchanged_where_nothing_is_wrong(count: int) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3), np.float32)
    (found,) = guard().run(None, {"x": x, "bad": np.zeros(count, bool)})
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("place", [0, 3])
def test_one_element_that_is_wrong_ends_the_stage(place: int) -> None:
    bad = np.arange(4) == place
    with pytest.raises(Exception, match="out of data bounds"):
        guard().run(None, {"x": np.ones((4, 3), np.float32), "bad": bad})


def test_even_an_empty_value_is_refused_where_something_is_wrong() -> None:
    with pytest.raises(Exception, match="out of data bounds"):
        guard().run(None, {"x": np.ones((0, 3), np.float32), "bad": np.array([True])})


def test_conditions_are_joined_by_or() -> None:
    values = [make_value(name, BOOL, 2, 2, 2) for name in "abc"]
    session = make_session(lambda builder, given: either(builder, *given), *values)
    feeds = dict(zip("abc", np.indices((2, 2, 2)).astype(bool), strict=True))
    (found,) = session.run(None, feeds)
    np.testing.assert_array_equal(found, np.logical_or.reduce(list(feeds.values())))


def test_a_reshape_to_another_number_of_elements_ends_the_stage() -> None:
    session = make_session(
        lambda builder, values: reshape(builder, *values),
        make_value("x", FLOAT, "N"),
        make_value("shape", I64, 2),
    )
    x = np.arange(6, dtype=np.float32)
    (found,) = session.run(None, {"x": x, "shape": np.array([2, 3])})
    np.testing.assert_array_equal(found, x.reshape(2, 3))
    with pytest.raises(Exception, match=r"(?i)reshape"):
        session.run(None, {"x": x, "shape": np.array([2, 4])})


def test_type_and_shape_of_what_passes_are_noted() -> None:
    builder = NodeBuilder("check")
    x = make_value("x", FLOAT, "N", 3)
    passed = pass_if(builder, x, refuse_where(builder, make_value("bad", BOOL, 2)))
    assert passed.dtype == FLOAT
    assert passed.shape == ir.Shape(["N", 3])


def test_a_rank_that_is_not_known_is_refused_by_name() -> None:
    assert require_rank(make_value("x", FLOAT, "N", 3)) == 2
    with pytest.raises(UnsupportedModel, match="tensor 'y': its rank is not known"):
        require_rank(ir.Value(name="y"))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(1, None, [3, 4]), (1, 2, [3]), (0, None, None), (0, 1, None), (3, None, [])],
)
def test_sizes_are_known_where_all_of_a_stretch_are_numbers(
    start: int, end: int | None, expected: list[int] | None
) -> None:
    assert known_sizes(make_value("x", FLOAT, "N", 3, 4), start, end) == expected


def test_nothing_is_known_of_the_sizes_of_a_value_without_shape() -> None:
    assert known_sizes(ir.Value(name="x")) is None
