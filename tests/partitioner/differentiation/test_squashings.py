"""Activations that a loss would apply a second time: found in ``cut`` and in ``check``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.squashings import find_repeated_activation
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.partitions import cut
from tests.support.nets import FLOAT, Net


def build(*kinds: str) -> onnx.ModelProto:
    """Put operators in a row behind scores of shape (N, 3); a Mul is one by a half."""
    net = Net()
    net.constant("half", np.array(0.5, np.float32))
    value = net.op("MatMul", "x", net.weight("w", 4, 3), out="scores")
    for index, kind in enumerate(kinds):
        value = net.op(kind, value, *(["half"] if kind == "Mul" else []), out=f"t{index}")
    return net.finish({"x": (FLOAT, ["N", 4])}, value, 3)


def find(kinds: Sequence[str], loss: str) -> str | None:
    model = ir.from_proto(build(*kinds))
    found = find_repeated_activation(
        map_values(model.graph)[model.graph.outputs[0].name or ""], loss
    )
    return None if found is None else found.op_type


@pytest.mark.parametrize(
    ("kinds", "loss", "expected"),
    [
        (["Softmax", "Mul"], "cross-entropy", "Softmax"),
        (["Sigmoid"], "cross-entropy", "Sigmoid"),
        (["HardSigmoid", "Identity"], "bce-with-logits", "HardSigmoid"),
        (["Softmax"], "cross-entropy", None),
        (["Sigmoid", "Mul"], "mse", None),
        (["Sigmoid", "Tanh"], "cross-entropy", None),
        (["LogSoftmax"], "cross-entropy", None),
        ([], "cross-entropy", None),
    ],
)
def test_only_what_the_loss_does_not_skip_is_found(
    kinds: list[str], loss: str, expected: str | None
) -> None:
    assert find(kinds, loss) == expected


def test_cut_says_that_scores_are_squashed_twice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "splitonnx"):
        cut(build("Softmax"), at="scores")
        assert caplog.records == []
        cut(build("Softmax", "Mul"), at="scores")
    (record,) = caplog.records
    assert "comes from the Softmax 't0_node' already" in record.getMessage()
