"""Recurrences in batch-first layout, for which ONNX Runtime has no kernel."""

from __future__ import annotations

import pytest

from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model

NAME = "39_lstm_layout1"


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_first_lstm_trains_split_as_unsplit(target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    bundle = cut(model, at="f", client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_predictions(whole, model, load_data(NAME, 3))
    hold_step(whole, model, load_data(NAME, 4), ["W", "R", "B", "fw", "fb"])
