"""Windows over images: their positions, what they sum, and padding that is found at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.windows import (
    Windows,
    count_elements,
    list_plain,
    pad_by_size,
    pads_by_size,
    read_windows,
    sum_windows,
)
from tests.support.images import Case, hold, weights


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("x", [(1, 2, 7, 8), (1, 2, 6, 9)])
@pytest.mark.parametrize("kind", ["Conv", "MaxPool"])
def test_automatic_padding_of_any_image_size(kind: str, x: tuple[int, ...], mode: str) -> None:
    attributes: dict[str, Any] = {"auto_pad": mode, "strides": [2, 3], "kernel_shape": [3, 4]}
    others = {"w": weights(3, 2, 3, 4)} if kind == "Conv" else {}
    case = Case(
        kind=kind, x=x, others=others, trained=("x", *others), attributes=attributes,
        dynamic=(0, 2, 3),
    )  # fmt: skip
    hold(case, oracle="kernel")  # onnx.reference rounds SAME_LOWER down


def make_pool(dims: Sequence[int | str], kind: str = "AveragePool", **attributes: Any) -> ir.Node:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))
    return ir.node(kind, [x], {"kernel_shape": [3, 2], **attributes}, name="pool")


def compute(
    node: ir.Node, write: Callable[[NodeBuilder, ir.Value], ir.Value], x: np.ndarray
) -> np.ndarray:
    (source,) = node.inputs
    assert source is not None
    builder = NodeBuilder("windows")
    made = builder.op("Identity", write(builder, source))
    made.type = source.type
    graph = ir.Graph([source], [made], nodes=builder.nodes, opset_imports={"": 18}, name="g")
    content = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    return np.asarray(onnxruntime.InferenceSession(content).run(None, {"x": x})[0])


def slide(x: np.ndarray, windows: Windows) -> np.ndarray:
    """Sum the windows of each channel with loops."""
    before, after = windows.before, windows.after
    padded = np.pad(x, [(0, 0), (0, 0), (before[0], after[0]), (before[1], after[1])])
    reach = [d * (k - 1) for k, d in zip(windows.kernel, windows.dilations, strict=True)]
    rows = range(0, padded.shape[2] - reach[0], windows.strides[0])
    columns = range(0, padded.shape[3] - reach[1], windows.strides[1])
    (d, e), (k, m) = windows.dilations, windows.kernel
    return np.array(
        [
            [
                [[c[i : i + d * k : d, j : j + e * m : e].sum() for j in columns] for i in rows]
                for c in image
            ]
            for image in padded
        ]
    )


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"strides": [2, 1], "pads": [1, 0, 2, 1]},
    {"dilations": [2, 3]},
    {"strides": [2, 2], "ceil_mode": 1},
    {"strides": [3, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
]


@pytest.mark.parametrize("attributes", LAYOUTS)
def test_sums_and_counts_are_those_of_loops(attributes: dict[str, Any]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 8)).astype(np.float32)
    node = make_pool(x.shape, **attributes)
    windows = read_windows(node)
    found = compute(node, lambda builder, value: sum_windows(builder, node, value, windows), x)
    np.testing.assert_allclose(found, slide(x, windows), rtol=1e-4, atol=1e-4)
    again = make_pool(x.shape, **attributes)
    found = compute(
        again,
        lambda builder, value: count_elements(
            builder, again, value, windows, include_padding=False
        ),
        x,
    )
    assert found.shape[:2] == (1, 1)
    np.testing.assert_array_equal(found, slide(np.ones((1, 1, 7, 8)), windows))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("attributes", LAYOUTS[:3])
def test_counts_of_any_image_size_are_those_of_fixed_ones(
    attributes: dict[str, Any], include: bool
) -> None:
    x = np.ones((2, 3, 7, 8), np.float32)
    counts = []
    for dims in (x.shape, ("N", 3, "H", "W")):
        node = make_pool(dims, **attributes)
        windows = read_windows(node)

        def write(
            builder: NodeBuilder, value: ir.Value, node: ir.Node = node, windows: Windows = windows
        ) -> ir.Value:
            return count_elements(builder, node, value, windows, include_padding=include)

        counts.append(compute(node, write, x))
    fixed, computed = counts
    np.testing.assert_array_equal(computed, fixed)


def test_rounding_up_pads_further_than_what_counts() -> None:
    windows = read_windows(make_pool([1, 1, 6, 6], strides=[2, 2], ceil_mode=1))
    assert (windows.before, windows.counted) == ((0, 0), (0, 0))
    assert windows.after == (1, 0)
    assert windows.attributes == {
        "strides": (2, 2), "dilations": (1, 1), "pads": (0, 0, 1, 0),
    }  # fmt: skip


@pytest.mark.parametrize("size", [(6, 6), (7, 9), (8, 5)])
def test_rounding_up_for_any_image_size_makes_as_many_windows(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, *size)).astype(np.float32)
    sums = []
    for dims in (x.shape, ("N", 2, "H", "W")):
        node = make_pool(dims, strides=[2, 2], ceil_mode=1)

        def write(builder: NodeBuilder, value: ir.Value, node: ir.Node = node) -> ir.Value:
            return sum_windows(builder, node, value, read_windows(node))

        sums.append(compute(node, write, x))
    fixed, computed = sums
    np.testing.assert_allclose(computed, fixed, rtol=1e-5, atol=1e-5)


def test_what_depends_on_a_size_that_is_not_known_is_refused_by_name() -> None:
    dims = ("N", 3, "H", "W")
    with pytest.raises(UnsupportedModel, match=r"'pool' \(AveragePool\): its automatic padding"):
        read_windows(make_pool(dims, auto_pad="SAME_UPPER"))
    with pytest.raises(UnsupportedModel, match="its ceil_mode depends on the image's size"):
        read_windows(make_pool(dims, strides=[4, 4], ceil_mode=1))
    node = make_pool(("N", "C", 8, 8))
    (x,) = node.inputs
    assert x is not None
    with pytest.raises(UnsupportedModel, match="its number of channels is not known"):
        sum_windows(NodeBuilder("windows"), node, x, read_windows(node))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [(6, 9), (7, 8), (1, 1)])
def test_padding_by_size_is_what_the_definition_says(mode: str, size: tuple[int, int]) -> None:
    """ceil(size / stride) windows; what is odd goes to the end that the mode names."""
    node = make_pool(("N", 2, "H", "W"), auto_pad=mode, strides=[2, 3])
    assert pads_by_size(node)
    x = np.random.default_rng(0).standard_normal((1, 2, *size)).astype(np.float32)
    found = compute(node, lambda builder, value: pad_by_size(builder, node, -1.0), x)
    widths = []
    for n, kernel, stride in zip(size, (3, 2), (2, 3), strict=True):
        total = max(0, (-(-n // stride) - 1) * stride + kernel - n)
        small, large = total // 2, total - total // 2
        widths.append((small, large) if mode == "SAME_UPPER" else (large, small))
    expected = np.pad(x, [(0, 0), (0, 0), *widths], constant_values=-1)
    np.testing.assert_array_equal(found, expected)


def test_plain_attributes_are_those_without_padding() -> None:
    node = make_pool((1, 1, 4, 4), auto_pad="VALID", pads=[0, 0, 0, 0], strides=[1, 1])
    assert set(list_plain(node)) == {"kernel_shape", "strides"}
    assert not pads_by_size(node)
