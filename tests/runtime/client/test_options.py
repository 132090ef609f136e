"""What a fit is asked to do, checked before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError

import msgspec
import numpy as np
import pytest

from splitonnx.errors import UsageError
from splitonnx.manifests import Phase, ScoredOutput, ScoreKind
from splitonnx.runtime.client.datasets import open_dataset
from splitonnx.runtime.client.options import (
    FitOptions,
    check_stopping,
    choose_measures,
    fit_schedule,
    require_positive,
)
from splitonnx.schedules import CosineSchedule
from splitonnx.stopping import EarlyStopping
from splitonnx.tensors import TensorSpec
from tests.support import tiny
from tests.support.scored_manifests import make_manifest


def test_counts_from_one_on_are_taken() -> None:
    require_positive(epochs=1, batch_size=32)
    require_positive()


@pytest.mark.parametrize("count", [0, -1, -100])
def test_a_count_below_one_is_refused_by_its_name(count: int) -> None:
    with pytest.raises(UsageError, match=f"batch_size must be at least 1, not {count}"):
        require_positive(epochs=3, batch_size=count)


def test_the_options_of_a_fit_do_not_change_while_it_runs() -> None:
    options = FitOptions(
        training=open_dataset(tiny.batch(0)),
        held_out=None,
        epochs=2,
        learning_rate=None,
        rates=None,
        stopping=None,
        checkpoint_every=None,
        when_unsaved="stop",
        save=False,
        on_step=None,
        on_epoch=None,
    )
    with pytest.raises(FrozenInstanceError):
        options.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(("rows", "steps"), [("N", 6), (4, 4)])
def test_a_schedule_counts_the_steps_of_the_run_that_it_is_for(rows: int | str, steps: int) -> None:
    data = open_dataset({"x": np.zeros((10, 3), np.float32)})
    specs = [TensorSpec(name="x", dtype="F32", shape=(rows, 3))]
    plan = fit_schedule(CosineSchedule(), 0.1, data, specs, epochs=2, batch_size=4)
    assert plan is not None
    assert plan.steps == steps
    assert fit_schedule(None, 0.1, data, specs, epochs=2, batch_size=4) is None


def test_a_schedule_needs_a_rate_and_a_number_of_steps() -> None:
    data = open_dataset({"x": np.zeros((10, 3), np.float32)})
    with pytest.raises(UsageError, match="a number, not a function"):
        fit_schedule(CosineSchedule(), lambda step: 0.1, data, [], epochs=2, batch_size=4)
    batches = open_dataset([{"x": np.zeros((2, 3), np.float32)}])
    with pytest.raises(UsageError, match="number of batches is known"):
        fit_schedule(CosineSchedule(), 0.1, batches, [], epochs=2, batch_size=4)


def test_early_stopping_needs_an_evaluation_with_its_metric_and_a_way_back() -> None:
    stopping = EarlyStopping(metric="f1")
    check_stopping(stopping, ["loss", "f1"], can_return=True)
    check_stopping(None, [], can_return=False)
    with pytest.raises(UsageError, match="eval_data"):
        check_stopping(stopping, [], can_return=True)
    with pytest.raises(UsageError, match="no metric 'f1' to stop by; an evaluation has loss, mae"):
        check_stopping(stopping, ["loss", "mae"], can_return=True)
    with pytest.raises(UsageError, match="a function that connects"):
        check_stopping(stopping, ["f1"], can_return=False)


def test_the_metrics_of_a_run_are_fitted_to_its_bundle() -> None:
    scored = ScoredOutput(output="y", labels="labels", kind=ScoreKind.CLASSES, class_axis=1)
    results = ("loss", "loss@counted", "accuracy", "accuracy@counted")
    manifest = msgspec.structs.replace(
        make_manifest(scored, y=("N", 3)), phases=(Phase(name="evaluate", results=results),)
    )

    def choose(
        names: Sequence[str], metric: str | None = None, *, has_data: bool = True
    ) -> list[str]:
        stopping = None if metric is None else EarlyStopping(metric=metric)
        chosen = choose_measures(manifest, names, stopping, has_data=has_data, can_return=True)
        return [one.name for one in chosen]

    assert choose(["f1"], "f1") == ["f1"]
    assert choose([], "accuracy") == []
    assert choose([], has_data=False) == []
    with pytest.raises(UsageError, match="metrics need data to evaluate on"):
        choose(["f1"], has_data=False)
    with pytest.raises(UsageError, match="an evaluation has loss, accuracy, f1; others"):
        choose(["f1"], "accuracy@counted")
