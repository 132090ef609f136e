"""Activations that a loss would apply a second time: found in ``cut`` and in ``check``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.activations.squashings import find_repeated_activation
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.partitions import cut
from tests.support.nets import FLOAT, Net

Node = tuple[str, list[str]]


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
    output = map_values(model.graph)[model.graph.outputs[0].name or ""]
    found = find_repeated_activation(output, output, loss)
    return None if found is None else found.kind


def find_spelled_out(nodes: Sequence[Node], loss: str) -> str | None:
    """Put nodes behind scores of shape (N, 3), and search for an activation that is repeated."""
    net = Net()
    for name, number in (("one", 1), ("minus3", -3), ("tiny", 1e-7)):
        net.constant(name, np.array(number, np.float32))
    net.constant("axis", np.array([1]))
    value = net.op("MatMul", "x", net.weight("w", 4, 3), out="scores")
    for index, (kind, inputs) in enumerate(nodes):
        more = {"axis": 1} if kind == "Concat" else {}
        value = net.op(kind, *inputs, out=f"t{index}", **more)
    width = 6 if nodes[-1][0] == "Concat" else 3
    model = ir.from_proto(
        onnx.shape_inference.infer_shapes(net.finish({"x": (FLOAT, ["N", 4])}, value, width))
    )
    output = map_values(model.graph)[value]
    found = find_repeated_activation(output, output, loss)
    return None if found is None else found.kind


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


def list_spellings() -> dict[str, tuple[str, list[Node]]]:
    """Return spellings of sigmoids that no loss skips, each with the loss that would repeat it."""
    return {
        "sigmoid of 3x": (
            "bce-with-logits",
            [("Mul", ["scores", "minus3"]), ("Exp", ["t0"]), ("Add", ["t1", "one"]),
             ("Reciprocal", ["t2"])],
        ),
        "two classes": (
            "cross-entropy",
            [("Sigmoid", ["scores"]), ("Sub", ["one", "t0"]), ("Concat", ["t1", "t0"])],
        ),
        "softmax kept from zero": (
            "cross-entropy",
            [("Softmax", ["scores"]), ("Max", ["t0", "tiny"])],
        ),
        "softmax between two bounds": (
            "cross-entropy",
            [("Softmax", ["scores"]), ("Max", ["t0", "tiny"]), ("Min", ["t1", "one"])],
        ),
        "softmax scaled to a sum of 1 again": (
            "cross-entropy",
            [("Softmax", ["scores"]), ("ReduceSum", ["t0", "axis"]), ("Div", ["t0", "t1"])],
        ),
        "softmax sharpened": (
            "cross-entropy",
            [("Softmax", ["scores"]), ("Pow", ["t0", "one"]), ("ReduceSum", ["t1", "axis"]),
             ("Div", ["t1", "t2"])],
        ),
        "root of softmax": ("cross-entropy", [("Softmax", ["scores"]), ("Sqrt", ["t0"])]),
        "mean of two": (
            "bce-with-logits",
            [("Sigmoid", ["scores"]), ("Sigmoid", ["t0"]), ("Mean", ["t0", "t1"])],
        ),
        "softmax without small numbers": (
            "cross-entropy",
            [("Softmax", ["scores"]), ("Less", ["t0", "tiny"]), ("Where", ["t1", "tiny", "t0"])],
        ),
        "guarded softmax": (
            "cross-entropy",
            [("Exp", ["scores"]), ("ReduceSum", ["t0", "axis"]), ("Add", ["t1", "tiny"]),
             ("Div", ["t0", "t2"])],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list_spellings())
def test_an_activation_of_several_nodes_that_cannot_be_skipped_is_found(name: str) -> None:
    loss, nodes = list_spellings()[name]
    assert find_spelled_out(nodes, loss) in ("Sigmoid", "Softmax")
    assert find_spelled_out(nodes, "mse") is None


def test_a_concat_of_which_one_part_is_not_squashed_is_none() -> None:
    nodes: list[Node] = [("Sigmoid", ["scores"]), ("Concat", ["t0", "scores"])]
    assert find_spelled_out(nodes, "bce-with-logits") is None


def test_a_gate_times_what_is_not_squashed_is_none() -> None:
    nodes: list[Node] = [("Sigmoid", ["scores"]), ("Mul", ["t0", "scores"])]
    assert find_spelled_out(nodes, "bce-with-logits") is None


def test_many_joins_of_one_value_are_searched_once_each() -> None:
    nodes: list[Node] = [("Softmax", ["scores"])]
    for index in range(60):
        nodes.append(("Mul", [f"t{index}"] * 2))
    assert find_spelled_out(nodes, "cross-entropy") == "Softmax"
