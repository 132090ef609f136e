"""The mask of a Clip's gradient: one comparison with its output, with the same bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.partitioner.lowerings.kernels.chosen import choose, run

X = np.array([-np.inf, -1.5, -1, -0.5, 0.0, 2.0, 2.5, np.inf, np.nan], np.float32)


def build(
    low: float, high: float, *, clip_high: float | None = None, is_last: bool = False
) -> ir.Model:
    """A Clip, and the mask of its gradient as the gradient builder writes it."""
    numbers = {"low": low, "high": high, "other": high if clip_high is None else clip_high}
    nodes = [
        helper.make_node("Clip", ["x", "low", "high" if clip_high is None else "other"], ["y"]),
        helper.make_node("LessOrEqual", ["x", "high"], ["below"]),
        helper.make_node("GreaterOrEqual", ["x", "low"], ["above"]),
        helper.make_node("And", ["above", "below"], ["inside"]),
        helper.make_node("Cast", ["inside"], ["mask"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        [*nodes[1:], nodes[0]] if is_last else nodes,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "mask")],
        [numpy_helper.from_array(np.array(v, np.float32), name) for name, v in numbers.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))


@pytest.mark.parametrize(("low", "high"), [(-1, 2), (0, 0), (-np.inf, 2)])
def test_a_clip_is_compared_with_its_output(low: float, high: float) -> None:
    model = build(low, high)
    assert choose(model) == ["Clip", "Equal", "Cast"]
    expected = ((low <= X) & (high >= X)).astype(np.float32)
    np.testing.assert_array_equal(run(model, {"x": X})["mask"], expected)


def test_limits_in_the_wrong_order_are_left_to_both_comparisons() -> None:
    model = build(2, -1)
    assert "And" in choose(model)
    np.testing.assert_array_equal(run(model, {"x": X})["mask"], np.zeros(len(X), np.float32))


def test_a_clip_with_another_limit_is_not_taken() -> None:
    assert "And" in choose(build(-1, 2, clip_high=3))


def test_a_clip_that_comes_later_is_not_read() -> None:
    model = build(-1, 2, is_last=True)
    assert "And" in choose(model)
    expected = ((X >= -1) & (X <= 2)).astype(np.float32)
    np.testing.assert_array_equal(run(model, {"x": X})["mask"], expected)
