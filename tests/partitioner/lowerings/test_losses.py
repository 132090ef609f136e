"""Cross-entropy and its gradient against the fused kernels, over the operator's attributes."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import helper

from tests.partitioner.lowerings.fused_kernels import compare
from tests.support.zoo import FLOAT, Net


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
