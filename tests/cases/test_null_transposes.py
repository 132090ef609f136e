"""Transposes that permute nothing, which ONNX Runtime 1.19 fuses wrongly."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from splitonnx.names import Target
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import evaluate, hold_predictions, hold_step, load_data, load_model

NAME = "09_identity_transpose"


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_they_are_told_from_those_that_swap_two_axes(target: Target, rows: int) -> None:
    model = load_model(NAME)
    for at in ("b", None):
        bundle = cut(model, at=at, client_target=target, server_target=target)
        hold_predictions(bundle, model, load_data(NAME, rows))


@pytest.mark.parametrize("target", TARGETS)
def test_they_train_as_the_model_says(target: Target) -> None:
    model = load_model(NAME)
    bundle = cut(model, at=None, client_target=target, server_target=target)
    hold_step(bundle, model, load_data(NAME, 4), ["w1", "b1", "w2", "b2"])
    split = cut(model, at="b", client_target=target, server_target=target)
    assert verify(split, load_data(NAME), batch_size=8).ok


def test_the_fault_of_the_runtime_is_still_there() -> None:
    """If this fails, ONNX Runtime is mended, and nothing need be replaced any more."""
    model, data = load_model(NAME), load_data(NAME, 4)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"x": data["x"]})
    assert not np.allclose(found, evaluate(model, data)["y"], atol=0.1)
    mended = onnxruntime.InferenceSession(merge(cut(model, at="b")))
    np.testing.assert_allclose(
        mended.run(None, {"x": data["x"]})[0], evaluate(model, data)["y"], rtol=1e-5, atol=1e-6
    )
