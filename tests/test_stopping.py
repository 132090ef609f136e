"""Which evaluation is the best, and when training stops."""

from __future__ import annotations

import math
from typing import Any

import pytest

from splitonnx.errors import UsageError
from splitonnx.stopping import EarlyStopping


@pytest.mark.parametrize(
    ("metric", "mode", "is_lower"),
    [
        ("loss", None, True),
        ("accuracy", None, False),
        ("mae", None, True),
        ("f1", None, False),
        ("loss.boxes", None, True),
        ("rmse.boxes", None, True),
        ("accuracy.loss", None, False),
        ("loss", "max", False),
        ("anything", "min", True),
    ],
)
def test_the_direction_is_the_metric_s_unless_it_is_given(
    metric: str, mode: Any, is_lower: bool
) -> None:
    stopping = EarlyStopping(metric=metric, mode=mode)
    assert stopping.is_lower_better is is_lower
    assert stopping.is_better(1, 2) is is_lower
    assert stopping.is_better(2, 1) is not is_lower
    assert not stopping.is_better(1, 1)


def test_only_a_finite_number_is_better() -> None:
    stopping = EarlyStopping(metric="accuracy")
    assert stopping.is_better(0, None)
    for value in (math.nan, math.inf, -math.inf):
        assert not stopping.is_better(value, None)
        assert not stopping.is_better(value, 0)


def test_a_difference_up_to_min_delta_does_not_count() -> None:
    stopping = EarlyStopping(metric="loss", min_delta=0.25)
    assert not stopping.is_better(0.75, 1)
    assert stopping.is_better(0.5, 1)


def test_without_patience_training_does_not_stop() -> None:
    assert not EarlyStopping(metric="loss", patience=None).is_over(10**6)
    assert not EarlyStopping(metric="loss", patience=2).is_over(1)
    assert EarlyStopping(metric="loss", patience=2).is_over(2)


def test_the_text_holds_all_settings() -> None:
    assert str(EarlyStopping(metric="loss")) == "loss min, patience 5"
    stopping = EarlyStopping(metric="f1", patience=None, min_delta=0.1)
    assert str(stopping) == "f1 max, min_delta 0.1"


@pytest.mark.parametrize(
    "change", [{"patience": 0}, {"mode": "up"}, {"min_delta": -1.0}, {"min_delta": math.nan}]
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EarlyStopping(metric="loss", **change)
