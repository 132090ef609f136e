"""Cross-entropy and its gradient against the fused kernels, over the operator's attributes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from onnx import helper

from tests.partitioner.lowerings.fused_kernels import compare
from tests.support.zoo import FLOAT, INT64, Net


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5)])
def test_cross_entropy(
    reduction: str, ignored: int | None, weighted: bool, shape: tuple[int, ...]
) -> None:
    net = Net()
    inputs = ["x", "labels"]
    if weighted:
        values = helper.make_tensor("v", FLOAT, [4], [0.5, 1.0, 2.0, 3.0])
        net.nodes.append(helper.make_node("Constant", [], ["classes"], value=values))
        inputs.append("classes")
    attributes: dict[str, Any] = {"reduction": reduction}
    if ignored is not None:
        attributes["ignore_index"] = ignored
    net.nodes.append(
        helper.make_node("SoftmaxCrossEntropyLoss", inputs, ["y", "log_prob"], **attributes)
    )
    found = compare(net, "y", shape)
    assert found >= {"SoftmaxCrossEntropyLoss", "SoftmaxCrossEntropyLossGrad"}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_labels_do_not_count_where_a_score_is_infinite(reduction: str) -> None:
    """Class 0 stands in for an ignored label; a product of its -inf and 0 would be NaN."""
    net = Net()
    for name, value, dims in (("ignored", 2, []), ("one", 1, [1])):
        tensor = helper.make_tensor("v", INT64, dims, [value])
        net.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
    mask = helper.make_tensor("v", FLOAT, [1, 4], [-math.inf, 0.0, 0.0, 0.0])
    net.nodes.append(helper.make_node("Constant", [], ["mask"], value=mask))
    net.op("Unsqueeze", net.op("Equal", "labels", "ignored", out="is"), "one", out="rows")
    masked = net.op("Where", "rows", net.op("Add", "x", "mask", out="hidden"), "x", out="scores")
    net.nodes.append(
        helper.make_node(
            "SoftmaxCrossEntropyLoss",
            [masked, "labels"],
            ["y", "log_prob"],
            reduction=reduction,
            ignore_index=2,
        )
    )
    compare(net, "y", (12, 4))
