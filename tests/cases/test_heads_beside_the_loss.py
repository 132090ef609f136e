"""A head that the loss does not see: its tensors cross for prediction alone."""

from __future__ import annotations

import pytest

from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model

NAME = "04_aux_head"


@pytest.mark.parametrize("target", TARGETS)
def test_a_cut_through_it_trains_and_predicts(target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    bundle = cut(model, at=["r", "t"], client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    compared = verify(bundle, data, batch_size=8)
    assert compared.ok


@pytest.mark.parametrize("target", TARGETS)
def test_its_weights_stay_as_they_are(target: Target) -> None:
    model = load_model(NAME)
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, model, load_data(NAME, 4), ["w1", "b1", "w2", "b2"])
