"""Poolings behind a pooling for which onnx counts a window too many.

Along 8, three windows of three at stride 3 begin at -1, 2 and 5; a fourth, at 8, would begin
behind the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from splitonnx.errors import UnsupportedModel
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from tests.support.case_trials import TARGETS
from tests.support.pooled_models import build, choose, hold_predictions, split_off

FIRST: dict[str, Any] = {
    "kernel_shape": [3, 3], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1,
}  # fmt: skip
KERNEL = np.random.default_rng(7).standard_normal((2, 2, 2, 2)).astype(np.float32)
SECOND: list[tuple[str, dict[str, Any]]] = [
    ("MaxPool", {"auto_pad": "SAME_UPPER"}),
    ("MaxPool", {"ceil_mode": 1}),
    ("AveragePool", {"auto_pad": "SAME_LOWER"}),
    ("AveragePool", {"ceil_mode": 1}),
    ("Conv", {"auto_pad": "SAME_UPPER"}),
]
"""What stands behind, by windows of 2 at stride 2: on 3x3 it needs one row and column more."""


def write_second(kind: str, attributes: dict[str, Any], source: str, output: str) -> NodeProto:
    settings = {"kernel_shape": [2, 2], "strides": [2, 2], **attributes}
    names = [source, "kernel"] if kind == "Conv" else [source]
    return helper.make_node(kind, names, [output], name="second", **settings)


def write_first(source: str, output: str) -> NodeProto:
    return helper.make_node("MaxPool", [source], [output], name="first_pool", **FIRST)


def reduce_windows(
    x: np.ndarray, kind: str, rows: Sequence[range], columns: Sequence[range]
) -> np.ndarray:
    """Reduce each window of positions; those outside the image are left out."""
    height, width = x.shape[2:]
    result = []
    for row in rows:
        for column in columns:
            at = [(i, j) for i in row for j in column if 0 <= i < height and 0 <= j < width]
            inside = np.stack([x[:, :, i, j] for i, j in at])
            if kind == "Conv":
                taps = np.stack([KERNEL[:, :, i - row[0], j - column[0]] for i, j in at])
                result.append(np.einsum("pnc,pkc->nk", inside, taps))
            else:
                result.append(inside.max(0) if kind == "MaxPool" else inside.mean(0))
    count = (len(rows), len(columns))
    return np.stack(result, axis=-1).reshape(*x.shape[:2], *count)


def compute(hidden: np.ndarray, kind: str, attributes: dict[str, Any]) -> np.ndarray:
    threes = [range(start, start + 3) for start in (-1, 2, 5)]
    first = reduce_windows(hidden, "MaxPool", threes, threes)
    begin = -1 if attributes.get("auto_pad") == "SAME_LOWER" else 0
    twos = [range(start, start + 2) for start in (begin, begin + 2)]
    return reduce_windows(first, kind, twos, twos)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "attributes"), SECOND)
def test_what_stands_behind_a_window_too_many_is_padded_by_the_right_size(
    kind: str, attributes: dict[str, Any], target: Target
) -> None:
    """On earlier versions predictions are off by 1, or have too few windows, without a word."""
    second = write_second(kind, attributes, "z", "y")
    model = build([write_first("h", "z"), second], {"kernel": KERNEL})
    hidden, last = split_off(model)
    hold_predictions(model, compute(hidden, kind, attributes) * last, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "attributes"), SECOND)
@pytest.mark.parametrize("place", ["within", "behind"])
def test_so_it_is_in_and_behind_a_branch(
    place: str, kind: str, attributes: dict[str, Any], target: Target
) -> None:
    """The branch stays an If: nothing in it is trained."""
    stored = {"kernel": KERNEL} if kind == "Conv" else {}
    if place == "within":
        then = [write_first("g", "p"), write_second(kind, attributes, "p", "z")]
        nodes = [choose("small", then, "g")]
    else:
        chosen = choose("small", [write_first("g", "z")], "g")
        chosen.output[0] = "chosen"
        nodes = [chosen, write_second(kind, attributes, "chosen", "y")]
    model = build(
        [
            helper.make_node("Neg", ["h"], ["g"], name="negative"),
            helper.make_node("ReduceMax", ["g"], ["most"], name="most", keepdims=0),
            helper.make_node("Less", ["most", "bound"], ["small"], name="small"),
            *nodes,
        ],
        {"bound": np.array(1e9, np.float32), **stored},
    )
    hidden, last = split_off(model)
    expected = compute(-hidden, kind, attributes) * last
    hold_predictions(model, expected, target, at="y", freeze=["first", *stored])


def test_a_padding_that_onnx_runtime_does_not_take_is_refused_by_name() -> None:
    """On earlier versions the model is cut, and neither part of it nor the merged one runs."""
    settings: dict[str, Any] = {
        "kernel_shape": [2, 2], "dilations": [2, 3], "strides": [2, 1], "pads": [0, 1, 1, 0],
        "ceil_mode": 1,
    }  # fmt: skip
    model = build([helper.make_node("AveragePool", ["h"], ["y"], name="pool", **settings)])
    with pytest.raises(UnsupportedModel, match=r"'pool' \(AveragePool\).*Pad before it"):
        cut(model, at="h", loss="mse")
