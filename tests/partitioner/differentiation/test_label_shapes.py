"""Labels whose shape can be compared with that of the scores only while the graph runs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.errors import StageFailed
from splitonnx.losses import Loss
from splitonnx.names import Target
from splitonnx.partitioner.differentiation.label_shapes import REFUSED, check_labels, list_sizes
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.partitions import cut
from tests.support.case_trials import TARGETS, run_step
from tests.support.zoo import FLOAT, INT64, Arrays, Net

RANDOM = np.random.default_rng(5)
DATA: Arrays = {"x": RANDOM.standard_normal((4, 3, 6), np.float32), "count": np.array([2])}
LOSSES = {
    "cross-entropy": Loss(class_axis=-1),
    "weighted": Loss(class_axis=-1, class_weights=(1.0, 2.0, 3.0), ignore_index=-100),
    "mse": Loss(kind="mse"),
    "l1": Loss(kind="l1"),
    "bce-with-logits": Loss(kind="bce-with-logits"),
}


def build() -> onnx.ModelProto:
    """Scores of as many positions as an input says."""
    net = Net()
    net.op("MatMul", "x", net.weight("w", 6, 3), out="all")
    start, axis = net.constant("start", np.array([0])), net.constant("axis", np.array([1]))
    net.op("Slice", "all", start, "count", axis, out="y")
    return net.finish({"x": (FLOAT, ["N", "T", 6]), "count": (INT64, [1])}, "y", "K", 3)


def draw(loss: Loss, *shape: int) -> np.ndarray:
    if loss.kind == "cross-entropy":
        return RANDOM.integers(0, 3, shape)
    return RANDOM.random((*shape, 3), np.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_too_few_or_too_many_rows_or_positions_are_refused(
    name: str, target: Target
) -> None:
    loss = LOSSES[name]
    bundle = cut(build(), at=None, loss=loss, client_target=target)
    assert np.isfinite(run_step(bundle, {**DATA, "labels": draw(loss, 4, 2)})["loss"])
    for shape in ((4, 1), (1, 2), (4, 3), (2, 4)):
        with pytest.raises(StageFailed, match=REFUSED):
            run_step(bundle, {**DATA, "labels": draw(loss, *shape)})


def test_labels_whose_sizes_are_those_of_inputs_are_read_as_they_are() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["N", "T", 6]), type=ir.TensorType(ir.DataType.FLOAT))
    sizes = list_sizes([x])
    assert sizes == {"N", "T"}
    scores = ir.Value(name="y", shape=ir.Shape(["N", 3, "2*T"]))
    for dims, is_read in ((["N", "2*T"], True), (["N", "K"], False), (["N", None], False)):
        labels = ir.Value(name="labels", shape=ir.Shape(dims))
        found = check_labels(NodeBuilder("b"), labels, scores, sizes, has_classes=True)
        assert (found is labels) == is_read
