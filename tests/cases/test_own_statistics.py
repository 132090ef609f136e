"""Normalizations with statistics of their own, which exporters write as BatchNormalization."""

from __future__ import annotations

import pytest

from splitonnx.names import BatchNormMode, Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model

CASES = {
    "32_stdconv": ("c", ["k", "gain", "zb", "kb", "fw", "fb"]),
    "13_instancenorm_as_bn": ("rl", ["k", "g", "be", "fw", "fb"]),
}
"""Where each is cut, and what it trains."""


@pytest.mark.parametrize("mode", [None, "train", "frozen"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_they_predict_with_their_own_statistics_whatever_the_mode(
    name: str, target: Target, mode: BatchNormMode | None
) -> None:
    model, data = load_model(name), load_data(name)
    at, _ = CASES[name]
    for place in (at, None):
        bundle = cut(model, at=place, batchnorm=mode, client_target=target, server_target=target)
        hold_predictions(bundle, model, data)


@pytest.mark.parametrize("mode", [None, "frozen"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_they_are_trained_through_their_own_statistics(
    name: str, target: Target, mode: BatchNormMode | None
) -> None:
    model, data = load_model(name), load_data(name, rows=4)
    _, trained = CASES[name]
    bundle = cut(model, at=None, batchnorm=mode, client_target=target, server_target=target)
    hold_step(bundle, model, data, trained)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_they_train_split_as_unsplit_and_their_statistics_stay(name: str, target: Target) -> None:
    at, trained = CASES[name]
    bundle = cut(load_model(name), at=at, client_target=target, server_target=target)
    compared = verify(bundle, load_data(name), batch_size=8)
    assert compared.ok
    assert set(compared.steps[0].differences) == {"loss", *trained}
