"""A recurrence over a symbolic length, which one size for all data makes trainable."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import ArrayMismatch
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import Arrays, hold_predictions, hold_step, load_model

NAME = "11_lstm_dynamic_time"
LENGTH = {"T": 100}


def draw(rows: int, length: int = LENGTH["T"]) -> Arrays:
    random = np.random.default_rng(2)
    return {
        "x": random.standard_normal((rows, length, 4), np.float32),
        "labels": random.integers(0, 4, rows),
    }


@pytest.mark.parametrize("target", TARGETS)
def test_a_length_of_100_trains_split_as_unsplit(target: Target) -> None:
    model, data = load_model(NAME), draw(12)
    bundle = cut(model, at="h", dims=LENGTH, client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=6, steps=2).ok
    whole = cut(model, at=None, dims=LENGTH, client_target=target, server_target=target)
    hold_predictions(whole, model, draw(3))
    hold_step(whole, model, draw(2), ["W", "R", "B", "fw", "fb"])


def test_data_of_another_length_are_refused() -> None:
    bundle = cut(load_model(NAME), at="h", dims=LENGTH)
    with pytest.raises(ArrayMismatch, match=r"\[N, 100, 4\], but is F32\[4, 99, 4\]"):
        verify(bundle, draw(4, length=99), batch_size=4)
