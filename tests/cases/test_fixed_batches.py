"""Models whose exporter saw one sample, and wrote its number into shapes or inputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from splitonnx.errors import ArrayMismatch
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import (
    Arrays,
    evaluate,
    hold_predictions,
    hold_step,
    load_data,
    load_model,
)

BAKED, FIXED = "12_batch_baked", "42_fixed_batch"
TRAINED = ["w1", "b1", "w2", "b2"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_of_1_in_shapes_is_that_of_the_data(target: Target) -> None:
    model, data, meant = load_model(BAKED), load_data(BAKED), _write_freely(load_model(BAKED))
    np.testing.assert_allclose(evaluate(meant, data)["y"], _evaluate_each(model, data), rtol=1e-5)
    bundle = cut(model, at="a", client_target=target, server_target=target)
    hold_predictions(bundle, meant, data)
    hold_predictions(bundle, model, load_data(BAKED, 1))
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, meant, load_data(BAKED, 4), TRAINED)


def test_it_is_said_which_shapes_they_are() -> None:
    (remark,) = check(load_model(BAKED)).remarks
    assert remark.kind is Kind.BATCH
    assert "'Reshape_1', 'Reshape_3' have a batch of 1" in remark.sentence


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_that_the_input_fixes_is_freed_as_the_remark_says(target: Target) -> None:
    model, data = load_model(FIXED), load_data(FIXED)
    bundle = cut(model, at="b", client_target=target, server_target=target)
    with pytest.raises(ArrayMismatch, match=r"'x' should be F32\[1, 4\].*`splitonnx check` says"):
        verify(bundle, data, batch_size=8)
    (remark,) = check(model).remarks
    assert remark.sentence.endswith("--dim x:0=N frees it")
    freed = cut(model, at="b", dims={"x:0": "N"}, client_target=target, server_target=target)
    assert verify(freed, data, batch_size=8).ok


def test_a_batch_that_stays_fixed_is_said_with_the_node() -> None:
    model = load_model(BAKED)
    shape = next(tensor for tensor in model.graph.initializer if tensor.name == "rs")
    shape.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 1, 2, -1]), "rs"))  # fits any batch
    model.graph.node[2].attribute[0].ints[:] = [0, 1, 3, 2]
    (remark,) = check(model).remarks
    assert remark.sentence == "the batch is fixed at 1 by node 'Reshape_1' (Reshape)"
    with pytest.raises(ArrayMismatch, match=r"'labels' should be I64\[1\].*`splitonnx check` says"):
        verify(cut(model, at="a"), load_data(BAKED), batch_size=8)


def _write_freely(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write the model with shapes that keep the batch."""
    for tensor in model.graph.initializer:
        if tensor.name in ("rs", "rs2"):
            sizes = onnx.numpy_helper.to_array(tensor).copy()
            sizes[0] = -1
            tensor.CopyFrom(onnx.numpy_helper.from_array(sizes, tensor.name))
    return model


def _evaluate_each(model: onnx.ModelProto, data: Arrays) -> np.ndarray:
    rows = [evaluate(model, {"x": data["x"][row : row + 1]})["y"] for row in range(len(data["x"]))]
    return np.concatenate(rows)
