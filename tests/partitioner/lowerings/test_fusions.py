"""A Pad before a pooling stays apart from it: ONNX Runtime's optimizer would merge the two wrongly.

Its rule (PadFusion) adds the widths of the Pad to the ``pads`` of the pooling, although what a Pad
puts there counts in an average and can be a window's largest, and what ``pads`` put there does not.
ONNX Runtime 1.19.2 is wrong for both poolings, 1.30 for MaxPool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from splitonnx.errors import UnsupportedModel
from splitonnx.names import Target
from splitonnx.partitioner.lowerings.fusions import separate_pads
from tests.support.case_trials import TARGETS
from tests.support.differentiations import hold_gradients
from tests.support.pooled_models import (
    WIDTHS,
    X,
    build,
    choose,
    evaluate,
    hold_predictions,
    split_off,
)
from tests.support.zoo import FLOAT

ONE = np.array([1.0], np.float32)
POOLS: list[tuple[str, dict[str, Any]]] = [
    ("MaxPool", {"pads": [1, 1, 1, 1]}),
    ("AveragePool", {"pads": [1, 1, 1, 1]}),
    ("AveragePool", {"pads": [0, 0, 0, 0]}),
    ("AveragePool", {"pads": [1, 1, 1, 1], "count_include_pad": 1}),
]


def write_nodes(kind: str, attributes: dict[str, Any]) -> list[onnx.NodeProto]:
    settings = {"kernel_shape": [3, 3], "strides": [2, 2], **attributes}
    return [
        helper.make_node("Pad", ["x", "widths"], ["wide"], name="pad"),
        helper.make_node(kind, ["wide"], ["y"], name="pool", **settings),
    ]


@pytest.mark.parametrize(("kind", "attributes"), POOLS)
def test_training_through_a_pad_and_a_pooling_is_what_onnx_defines(
    kind: str, attributes: dict[str, Any]
) -> None:
    arrays = {"x": X, "widths": WIDTHS}
    hold_gradients(write_nodes(kind, attributes), arrays, ["y"], constants=["widths"])


def rename(nodes: list[onnx.NodeProto], names: dict[str, str]) -> list[onnx.NodeProto]:
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return nodes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "attributes"), POOLS)
def test_predictions_and_merged_models_are_what_onnx_defines(
    kind: str, attributes: dict[str, Any], target: Target
) -> None:
    model = build(rename(write_nodes(kind, attributes), {"x": "h"}))
    expected = evaluate(model, {"x": X})
    hold_predictions(model, expected, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strides", [[2, 2], [2, 3], [3, 2]])
def test_an_average_over_its_padding_that_rounds_up_is_what_onnx_defines(
    strides: list[int], target: Target
) -> None:
    """On earlier versions predictions are off by 0.1, without a word."""
    settings: dict[str, Any] = {"kernel_shape": [3, 3], "strides": strides, "pads": [1, 1, 1, 1]}
    settings |= {"ceil_mode": 1, "count_include_pad": 1}
    model = build([helper.make_node("AveragePool", ["h"], ["y"], name="pool", **settings)])
    hidden, last = split_off(model)
    hold_predictions(model, average_padded(hidden, strides) * last, target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_window_too_many_is_forgotten_by_all_that_follows(target: Target) -> None:
    """onnx and ONNX Runtime count four windows of three along 8; the last starts behind the image.

    On earlier versions such a model is refused, with advice on its export.
    """
    settings: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [1, 1, 1, 1]}
    settings["ceil_mode"] = 1
    model = build(
        [
            helper.make_node("MaxPool", ["h"], ["z"], name="pool", **settings),
            helper.make_node("Shape", ["z"], ["size"], name="size"),
            helper.make_node("ConstantOfShape", ["size"], ["zeros"], name="zeros"),
            helper.make_node("Add", ["z", "zeros"], ["same"], name="add"),
            helper.make_node("Tanh", ["same"], ["y"], name="tanh"),
        ]
    )
    hidden, last = split_off(model)
    wide = np.pad(hidden, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    largest = [[wide[:, :, i : i + 3, j : j + 3].max((2, 3)) for j in (0, 3, 6)] for i in (0, 3, 6)]
    expected = np.tanh(np.moveaxis(np.array(largest), (0, 1), (2, 3))) * last
    hold_predictions(model, expected, target)


def average_padded(x: np.ndarray, strides: list[int]) -> np.ndarray:
    """Average 3x3 windows over a padding of 1, which counts; what lies beyond it never does.

    A window starts before the padding at the end (AveragePool-19).
    """
    height, width = x.shape[2:]
    wide = np.zeros((*x.shape[:2], height + 2, width + 2))
    wide[:, :, 1:-1, 1:-1] = x
    starts = [
        [p for p in range(0, n + 1, s) if p - s + 3 < n + 2]
        for n, s in zip((height, width), strides, strict=True)
    ]
    rows = [[wide[:, :, i : i + 3, j : j + 3].mean((2, 3)) for j in starts[1]] for i in starts[0]]
    return np.moveaxis(np.array(rows), (0, 1), (2, 3))


NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
BETWEEN: dict[str, Callable[[], list[onnx.NodeProto]]] = {
    "an Identity": lambda: [helper.make_node("Identity", ["p"], ["wide"], name="n")],
    "times one": lambda: [helper.make_node("Mul", ["p", "one"], ["wide"], name="n")],
    "plus zero": lambda: [helper.make_node("Add", ["p", "zero"], ["wide"], name="n")],
    "by one": lambda: [helper.make_node("Div", ["p", "one"], ["wide"], name="n")],
    "a Cast": lambda: [helper.make_node("Cast", ["p"], ["wide"], name="n", to=FLOAT)],
    "an Expand": lambda: [helper.make_node("Expand", ["p", "ones"], ["wide"], name="n")],
    "transposes": lambda: [
        helper.make_node("Transpose", ["p"], ["q"], name="n", perm=NHWC),
        helper.make_node("Transpose", ["q"], ["wide"], name="m", perm=NCHW),
    ],
}
"""What the optimizer takes out, so that a Pad and a pooling meet."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["AveragePool", "MaxPool"])
@pytest.mark.parametrize("between", BETWEEN)
def test_what_the_optimizer_takes_out_between_the_two_does_not_let_them_meet(
    between: str, kind: str, target: Target
) -> None:
    pad, pool = rename(write_nodes(kind, {"pads": [1, 1, 1, 1]}), {"x": "h"})
    pad.output[0] = "p"
    constants: dict[str, np.ndarray] = {"one": ONE, "zero": ONE - 1, "ones": np.ones(4, np.int64)}
    model = build([pad, *BETWEEN[between](), pool], constants)
    hold_predictions(model, evaluate(model, {"x": X}), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["AveragePool", "MaxPool"])
def test_a_pad_of_channels_last_between_transposes_is_padding_of_the_image(
    kind: str, target: Target
) -> None:
    """As exporters of Keras write it."""
    settings: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 0, 0]}
    model = build(
        [
            helper.make_node("Transpose", ["h"], ["hwc"], name="to_last", perm=NHWC),
            helper.make_node("Pad", ["hwc", "around"], ["padded"], name="pad"),
            helper.make_node("Transpose", ["padded"], ["wide"], name="to_first", perm=NCHW),
            helper.make_node(kind, ["wide"], ["y"], name="pool", **settings),
        ],
        {"around": np.array([0, 1, 1, 0, 0, 1, 1, 0])},
    )
    hold_predictions(model, evaluate(model, {"x": X}), target)


def test_the_two_are_kept_apart_in_bodies_too() -> None:
    body = rename(write_nodes("MaxPool", {"pads": [1, 1, 1, 1]}), {"y": "z"})
    choice = choose("yes", body, "x")
    yes = helper.make_tensor_value_info("yes", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph(
        [choice],
        "choice",
        [helper.make_tensor_value_info("x", FLOAT, [2, 2, 7, 8]), yes],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(WIDTHS, "widths")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    feeds = {"x": X, "yes": np.array(True)}
    expected = evaluate(model, feeds)
    separated = ir.from_proto(model)
    separate_pads(separated.graph)
    content = ir.to_proto(separated).SerializeToString()
    found = np.asarray(onnxruntime.InferenceSession(content).run(None, feeds)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["AveragePool", "MaxPool"])
def test_a_pooling_in_a_branch_that_rounds_up_has_no_window_too_many(
    kind: str, target: Target
) -> None:
    """The branch stays an If: nothing in it is trained."""
    settings: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [1, 1, 1, 1]}
    then = [helper.make_node(kind, ["g"], ["z"], name="pool", ceil_mode=1, **settings)]
    model = build(
        [
            helper.make_node("Neg", ["h"], ["g"], name="negative"),
            helper.make_node("ReduceMax", ["g"], ["most"], name="most", keepdims=0),
            helper.make_node("Less", ["most", "bound"], ["small"], name="small"),
            choose("small", then, "g"),
        ],
        {"bound": np.array(1e9, np.float32)},
    )
    hidden, last = split_off(model)
    fill = -np.inf if kind == "MaxPool" else np.nan
    wide = np.pad(-hidden, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=fill)
    reduce = np.max if kind == "MaxPool" else np.nanmean
    rows = [
        [reduce(wide[:, :, i : i + 3, j : j + 3], axis=(2, 3)) for j in (0, 3, 6)]
        for i in (0, 3, 6)
    ]
    expected = np.moveaxis(np.array(rows), (0, 1), (2, 3)) * last
    hold_predictions(model, expected, target, at="y", freeze=["first"])


def test_a_pad_before_a_convolution_stays_as_it_is() -> None:
    """There the rule is right, and saves a copy."""
    pad = helper.make_node("Pad", ["h", "widths"], ["wide"], name="pad")
    conv = helper.make_node("Conv", ["wide", "first"], ["y"], name="conv")
    separated = ir.from_proto(build([pad, conv]))
    separate_pads(separated.graph)
    (found,) = (node for node in separated.graph if node.op_type == "Pad")
    assert len(found.inputs) == 2


def test_a_pad_whose_widths_are_no_list_is_the_models_fault() -> None:
    model = build(write_nodes("MaxPool", {}), {"widths": np.array(1)})
    with pytest.raises(UnsupportedModel, match=r"node 'pad' \(Pad\)"):
        separate_pads(ir.from_proto(model).graph)
