"""Selecting and moving elements: gradients where the batch is dynamic and the node cases end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.partitioner.lowerings.fused_kernels import run
from tests.support.derivatives import assert_differentiable
from tests.support.zoo import Net

DATA = {"x": np.random.default_rng(0).standard_normal((3, 4, 5), np.float32)}


def weigh(net: Net, *shape: int) -> str:
    """x times a weight, so that every element that is moved has a gradient."""
    return net.op("Mul", "x", net.weight("w", *(shape or (4, 5))), out="h")


def ints(net: Net, name: str, values: object) -> str:
    return net.constant(name, np.array(values, np.int64))


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_compress_by_a_condition_that_is_computed(axis: int | None) -> None:
    net = Net()
    kept = net.op("ReduceSum", "x", ints(net, "a", [0, 1]), out="sums", keepdims=0)
    kept = net.op("Greater", kept, net.constant("bound", np.array(-1, np.float32)), out="kept")
    attributes = {} if axis is None else {"axis": axis}
    size = 5 if axis == -1 else 3
    if size == 3:
        kept = net.op("Slice", kept, ints(net, "s", [0]), ints(net, "e", [3]), out="some")
    net.op("Compress", weigh(net), kept, out="y", **attributes)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize(("time", "batch"), [(0, 1), (1, 0)])
def test_reverse_sequence(time: int, batch: int) -> None:
    net = Net()
    lengths = ints(net, "n", [3, 1, 2, 3] if batch else [4, 1, 2])
    net.op("ReverseSequence", weigh(net), lengths, out="y", time_axis=time, batch_axis=batch)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ([-1], [-9], [1], [-2]),
        ([4, 0, -1], [-9, 9, 0], [2, 0, 1], [-1, 1, -1]),
        ([-1, 1], [-9, 3], [0, 2], [-1, 1]),
        ([2, 3, 4], [-9, -9, 0], None, [-1, -1, -2]),
    ],
)
def test_slices_that_go_backwards(
    starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int]
) -> None:
    net = Net()
    where = ints(net, "a", axes) if axes else ""
    net.op(
        "Slice", weigh(net), ints(net, "s", starts), ints(net, "e", ends), where,
        ints(net, "t", steps), out="y",
    )  # fmt: skip
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("step", [2, -1])
def test_slices_by_a_step_that_is_data(step: int) -> None:
    net = Net()
    start, end = ([0], [9]) if step > 0 else ([-1], [-9])
    axes = net.op("Identity", ints(net, "a0", [1]), out="a")
    values = [ints(net, "s", start), ints(net, "e", end), axes]
    net.op("Slice", weigh(net), *values, "step", out="y")
    model_data = {**DATA, "step": np.array([step])}
    assert_differentiable(net, model_data)


def test_one_hot_between_two_values_that_are_trained() -> None:
    net = Net()
    values = net.op("Mul", net.weight("v", 2), net.weight("u", 2), out="values")
    places = net.op("ArgMax", "x", out="places", axis=2, keepdims=0)
    net.op("OneHot", places, ints(net, "depth", 5), values, out="y", axis=1)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [None, -1, 2])
def test_trilu(upper: int, k: int | None) -> None:
    net = Net()
    shift = [] if k is None else [ints(net, "k", k)]
    net.op("Trilu", weigh(net), *shift, out="y", upper=upper)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_gather_nd_with_batch_axes(batch: int) -> None:
    net = Net()
    w = net.weight("w", 3, 4, 5)
    places = np.random.default_rng(1).integers(
        0, 3, {0: (6, 2), 1: (3, 7, 2), 2: (3, 4, 6, 1)}[batch]
    )
    h = net.op("GatherND", w, ints(net, "i", places), out="h", batch_dims=batch)
    total = net.op("ReduceSum", "x", ints(net, "all", [1, 2]), out="t", keepdims=0)
    total = net.op("ReduceSum", total, out="total", keepdims=0)
    net.op("Mul", h, total, out="y")
    assert_differentiable(net, DATA)


def test_gather_nd_with_a_batch_of_any_size() -> None:
    net = Net()
    places = net.op("ArgMax", "x", out="best", axis=2, keepdims=0)
    places = net.op("Unsqueeze", places, ints(net, "last", [-1]), out="places")
    net.op("GatherND", weigh(net), places, out="y", batch_dims=2)
    assert_differentiable(net, DATA)


def test_range_from_trained_ends() -> None:
    net = Net()
    ends = [
        net.op("ReduceMean", net.weight(name, 2), out=f"{name}_end", keepdims=0) for name in "ab"
    ]
    limit = net.constant("limit", np.array(5, np.float32))
    delta = net.op("Exp", ends[1], out="delta")
    places = net.op("Range", ends[0], limit, delta, out="places")
    places = net.op("ReduceSum", places, out="sum", keepdims=0)
    net.op("Mul", "x", places, out="y")
    assert_differentiable(net, DATA)


def test_unique_values() -> None:
    net = Net()
    net.nodes.append(
        helper.make_node("Unique", [weigh(net)], ["u", "i", "v", "c"], name="unique", sorted=1)
    )
    net.op("Mul", "u", "u", out="y")
    assert_differentiable(net, DATA)


def test_the_same_tensor_several_times_in_a_concat() -> None:
    net = Net()
    h = weigh(net)
    net.op("Concat", h, "x", h, h, out="y", axis=1)
    assert_differentiable(net, DATA)


def test_transpose_without_an_order() -> None:
    net = Net()
    net.op("Transpose", weigh(net), out="y")
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_split_of_which_only_some_parts_reach_the_loss(used: tuple[int, ...]) -> None:
    net = Net()
    net.nodes.append(
        helper.make_node("Split", [weigh(net), ints(net, "n", [1, 3, 1])], ["p0", "p1", "p2"],
                         name="split", axis=2)
    )  # fmt: skip
    net.op("Concat", *(f"p{index}" for index in used), out="y", axis=2)
    assert_differentiable(net, DATA)


def test_a_split_of_which_a_part_reaches_the_loss_as_an_integer_only() -> None:
    net = Net(opset=13)
    net.nodes.append(helper.make_node("Split", [weigh(net, 4, 6)], ["p0", "p1"], name="s", axis=2))
    best = net.op("ArgMax", "p0", out="best", axis=2, keepdims=1)
    net.op("Mul", net.op("Cast", best, out="cast", to=1), "p1", out="y")
    data = {"x": np.random.default_rng(0).standard_normal((3, 4, 6), np.float32)}
    assert_differentiable(net, data)


def test_slices_side_by_side_of_which_one_reaches_the_loss() -> None:
    """get_optimized_model makes one Split of them."""
    net = Net()
    h = weigh(net)
    axis = ints(net, "a", [1])
    limits = [ints(net, f"l{index}", [limit]) for index, limit in enumerate((0, 1, 4))]
    net.op("Slice", h, limits[0], limits[1], axis, out="p0")
    net.op("Slice", h, limits[1], limits[2], axis, out="p1")
    best = net.op("ArgMax", "p0", out="best", axis=1, keepdims=1)
    net.op("Mul", net.op("Cast", best, out="cast", to=1), "p1", out="m")
    net.op("Add", "m", "p1", out="y")
    assert_differentiable(net, DATA)


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes"),
    [
        ("Tile", [[2, 1, 3]], {}),
        ("Expand", [[2, 1, 1, 5]], {}),
        ("Unsqueeze", [[0, -1]], {}),
        ("Flatten", [], {"axis": 2}),
        ("Reshape", [[0, -1, 2, 2]], {}),
        ("Reshape", [[-1, 20]], {"allowzero": 1}),
        ("Transpose", [], {"perm": [2, 0, 1]}),
        ("Identity", [], {}),
    ],
)
def test_moves_with_a_batch_of_any_size(
    kind: str, inputs: list[list[int]], attributes: dict[str, object]
) -> None:
    net = Net()
    settings = [ints(net, f"s{index}", values) for index, values in enumerate(inputs)]
    shape = {"Expand": (4, 1), "Reshape": (4, 5)}.get(kind, (4, 5))
    data = {"x": DATA["x"][:, :, :1]} if kind == "Expand" else DATA
    data = {"x": DATA["x"][:, :, :4]} if kind == "Reshape" and not attributes else data
    net.op(kind, weigh(net, *data["x"].shape[1:] or shape), *settings, out="y", **attributes)
    assert_differentiable(net, data)


def test_an_allowzero_with_a_computed_shape_as_dynamo_writes_it() -> None:
    """Two sizes of the target are read from an input, so they are not known before the run."""
    net = Net()
    sizes = net.op("Reshape", "sizes", ints(net, "two", [2]), out="pair")
    net.op("Reshape", weigh(net), sizes, out="m", allowzero=1)
    net.op("Mul", "m", "m", out="y")
    assert_differentiable(net, {**DATA, "sizes": np.array([3, len(DATA["x"]) * 20 // 3])})


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(
    "marks", [{"transBatchA": 1}, {"transBatchB": 1, "transB": 1}, {"transA": 1}]
)
def test_fused_products_with_moved_batch_axes(rank: int, marks: dict[str, int]) -> None:
    """onnxruntime's own kernel is the oracle."""
    from splitonnx.partitioner.lowerings import lower

    random, side = np.random.default_rng(0), 3
    feeds = {n: random.standard_normal([side] * rank, np.float32) for n in "ab"}
    results = []
    for lowered in (False, True):
        values = [
            ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([side] * rank))
            for n in "ab"
        ]
        node = ir.node("FusedMatMul", values, {**marks, "alpha": 0.5}, domain="com.microsoft")
        node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
        imports = {"": 18, "com.microsoft": 1}
        graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports=imports, name="product")
        if lowered:
            lower(graph)
        results.append(run(ir.Model(graph, ir_version=9), feeds)["y"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def slice_by_attributes(net: Net, h: str) -> None:
    net.op("Slice", h, out="y", starts=[1, 0], ends=[3, -1], axes=[1, 2])


def split_by_attribute(net: Net, h: str) -> None:
    net.nodes.append(helper.make_node("Split", [h], ["a", "b"], name="s", axis=1, split=[1, 3]))
    net.op("Concat", "b", "a", out="y", axis=1)


def split_evenly(net: Net, h: str) -> None:
    net.nodes.append(helper.make_node("Split", [h], ["a", "b"], name="s", axis=1))
    net.op("Mul", "a", "b", out="y")


def squeeze_by_attribute(net: Net, h: str) -> None:
    net.op("Squeeze", net.op("Unsqueeze", h, out="u", axes=[1]), out="y", axes=[1])


def scatter_by_its_old_name(net: Net, h: str) -> None:
    updates = net.constant("u", np.array([[[1.0, 2.0]]], np.float32))
    net.op("Scatter", h, ints(net, "i", [[[0, 3]]]), updates, out="y", axis=2)


def choose_between_values(net: Net, h: str) -> None:
    values = net.constant("v", np.array([-1, 2], np.float32))
    hot = net.op("OneHot", ints(net, "i", [1, 2, 0, 3]), ints(net, "d", 5), values, out="hot")
    net.op("Mul", h, hot, out="y")


@pytest.mark.parametrize(
    ("opset", "build"),
    [
        (7, slice_by_attributes),
        (9, slice_by_attributes),
        (7, split_by_attribute),
        (12, split_by_attribute),
        (11, split_evenly),
        (7, squeeze_by_attribute),
        (9, scatter_by_its_old_name),
        (10, scatter_by_its_old_name),
        (9, choose_between_values),
        (12, choose_between_values),
    ],
)
def test_older_forms(opset: int, build: Callable[[Net, str], None]) -> None:
    net = Net(opset=opset)
    build(net, weigh(net))
    assert_differentiable(net, DATA)
