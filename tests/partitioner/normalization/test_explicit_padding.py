"""Padding made explicit: every window stands where the operator's definition puts it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.normalization.explicit_padding import (
    count_windows,
    make_paddings_explicit,
    read_kernel,
)

FLOAT = TensorProto.FLOAT


def build(
    kind: str, dims: list[int | str], weight: tuple[int, ...] = (), **attributes: Any
) -> ir.Model:
    inputs, stored = ["x"], []
    if weight:
        inputs.append("w")
        random = np.random.default_rng(1)
        stored.append(numpy_helper.from_array(random.standard_normal(weight).astype("f"), "w"))
    node = helper.make_node(kind, inputs, ["y"], name="node", **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", FLOAT, dims)],
        [helper.make_tensor_value_info("y", FLOAT, [None] * len(dims))], stored,
    )  # fmt: skip
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    )


def find(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.name == "node")


def run(model: ir.Model, x: np.ndarray, *, optimized: bool = False) -> np.ndarray:
    options, levels = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    content = ir.to_proto(model).SerializeToString()
    return np.asarray(onnxruntime.InferenceSession(content, options).run(None, {"x": x})[0])


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("strides", [[1, 1], [2, 3], [3, 2]])
@pytest.mark.parametrize("size", [(7, 8), (6, 9)])
def test_automatic_padding_of_a_convolution_is_what_the_kernel_computes(
    mode: str, strides: list[int], size: tuple[int, int]
) -> None:
    settings = {"auto_pad": mode, "strides": strides}
    model = build("Conv", [1, 2, *size], (3, 2, 3, 4), **settings)
    expected = run(model, draw(1, 2, *size))
    make_paddings_explicit(model.graph)
    assert "auto_pad" not in find(model).attributes
    np.testing.assert_allclose(run(model, draw(1, 2, *size)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "pads"), [("SAME_UPPER", [1, 1, 1, 2]), ("SAME_LOWER", [1, 2, 1, 1])]
)
def test_what_is_odd_goes_to_the_end_that_the_mode_names(mode: str, pads: list[int]) -> None:
    model = build("MaxPool", ["N", 2, "H", "W"], kernel_shape=[3, 4], auto_pad=mode)
    make_paddings_explicit(model.graph)
    assert list(find(model).attributes.get_ints("pads")) == pads  # stride 1 needs no size


def test_padding_by_a_size_that_is_not_known_stays_as_it_is() -> None:
    model = build("Conv", ["N", 2, "H", "W"], (3, 2, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    make_paddings_explicit(model.graph)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_dilated_window_reaches_further() -> None:
    model = build(
        "Conv", [1, 2, 9, 9], (3, 2, 3, 3), auto_pad="SAME_UPPER", dilations=[2, 3], strides=[1, 1]
    )
    make_paddings_explicit(model.graph)
    assert list(find(model).attributes.get_ints("pads")) == [2, 3, 2, 3]


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("size", [(6, 7), (7, 8)])
def test_rounding_up_adds_windows_that_count_nothing(
    kind: str, pads: list[int], include: int, size: tuple[int, int]
) -> None:
    settings: dict[str, Any] = {
        "kernel_shape": [3, 3], "strides": [2, 3], "pads": pads, "ceil_mode": 1,
    }  # fmt: skip
    if kind == "AveragePool":
        settings["count_include_pad"] = include
    model = build(kind, [1, 2, *size], **settings)
    x = draw(1, 2, *size)
    expected = pool(kind, x[0], include=bool(include), pads=pads)
    make_paddings_explicit(model.graph)
    assert "ceil_mode" not in find(model).attributes
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.xfail(
    strict=True,
    reason="ONNX Runtime 1.19.2 merges the Pad into the AveragePool, which then counts no padding",
)
def test_padding_that_counts_does_so_in_an_optimized_session_too() -> None:
    model = build(
        "AveragePool", [1, 2, 6, 7], kernel_shape=[3, 3], strides=[2, 3], pads=[1, 1, 1, 1],
        ceil_mode=1, count_include_pad=1,
    )  # fmt: skip
    x = draw(1, 2, 6, 7)
    make_paddings_explicit(model.graph)
    expected = pool("AveragePool", x[0], include=True, pads=[1, 1, 1, 1])
    np.testing.assert_allclose(run(model, x, optimized=True)[0], expected, rtol=1e-5, atol=1e-5)


def pool(kind: str, x: np.ndarray, *, include: bool, pads: list[int]) -> np.ndarray:
    """Pool by 3x3 windows of strides 2 and 3, each of which starts before the padding at the end.

    What lies beyond the padding never counts; the padding does with ``include``.
    """
    sizes, strides = x.shape[1:], (2, 3)
    counts = []
    for axis, (n, s) in enumerate(zip(sizes, strides, strict=True)):
        starts = [p for p in range(-pads[axis], n, s) if p - s + 3 < n + pads[2 + axis]]
        counts.append(starts)
    result = np.zeros((len(x), len(counts[0]), len(counts[1])))
    for i, top in enumerate(counts[0]):
        for j, left in enumerate(counts[1]):
            window = x[:, max(0, top) : top + 3, max(0, left) : left + 3]
            if kind == "MaxPool":
                result[:, i, j] = window.max((1, 2))
                continue
            rows = min(top + 3, sizes[0] + pads[2]) - top
            columns = min(left + 3, sizes[1] + pads[3]) - left
            count = rows * columns if include else window[0].size
            result[:, i, j] = window.sum((1, 2)) / count
    return result


@pytest.mark.parametrize(
    ("size", "reach", "stride", "before", "after", "expected"),
    [(7, 3, 2, 0, 0, 3), (8, 3, 2, 0, 0, 4), (2, 1, 2, 0, 0, 1), (3, 1, 2, 0, 1, 2),
     (4, 2, 3, 1, 1, 2), (4, 3, 2, 1, 1, 3)],
)  # fmt: skip
def test_every_window_starts_before_the_end_of_the_image(
    size: int, reach: int, stride: int, before: int, after: int, expected: int
) -> None:
    assert count_windows(size, reach, stride, before, after) == expected
    assert (expected - 1) * stride < size + before


def test_the_windows_extents_come_from_the_attribute_or_the_weights() -> None:
    assert read_kernel(find(build("Conv", [1, 2, 9, 9], (3, 2, 4, 5)))) == [4, 5]
    assert read_kernel(find(build("MaxPool", [1, 2, 9, 9], kernel_shape=[2, 3]))) == [2, 3]
    node = find(build("Conv", [1, 2, 9, 9], (3, 2, 4, 5)))
    assert node.inputs[1] is not None
    node.inputs[1].shape = ir.Shape([3, 2, "K", 5])
    assert read_kernel(node) is None


def test_operators_of_another_domain_are_left_alone() -> None:
    model = build("MaxPool", [1, 2, 6, 6], kernel_shape=[2, 2], auto_pad="VALID")
    find(model).domain = "my.domain"
    make_paddings_explicit(model.graph)
    assert "auto_pad" in find(model).attributes
