"""What a fit is asked to do, checked before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import msgspec
import numpy as np
import pytest

from splitonnx.errors import UnusableData, UsageError
from splitonnx.manifests import Phase, Role, ScoredOutput, ScoreKind, StateSpec
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.datasets import open_dataset
from splitonnx.runtime.client.options import (
    FitOptions,
    check_client,
    check_stopping,
    choose_measures,
    fit_schedule,
    has_batch_states,
    open_fitting,
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


def test_a_client_needs_its_own_part_a_server_where_that_is_split_and_a_seed() -> None:
    parties = tiny.split_bundle().parties
    client, server = (parties[name].manifest for name in ("client", "server"))
    check_client(client, has_server=True, seed=0)
    with pytest.raises(UsageError, match="name the client's folder"):
        check_client(server, has_server=True, seed=0)
    with pytest.raises(UsageError, match="name the server that holds the other"):
        check_client(client, has_server=False, seed=0)
    with pytest.raises(UsageError, match="must not be negative, not -1"):
        check_client(client, has_server=True, seed=-1)


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


FIXED = [TensorSpec(name="x", dtype="F32", shape=(8, 3))]
DATA = {
    name: np.concatenate([tiny.batch(index)[name] for index in range(3)]) for name in tiny.batch(0)
}
SEVERAL = r"or cut the model with --dim x:0=N, which frees its batch$"


def give(rows: int) -> dict[str, np.ndarray]:
    return {"x": np.zeros((rows, 3), np.float32)}


@pytest.mark.parametrize("rows", [8, 9, 16, 31])
def test_training_with_a_fixed_batch_takes_every_number_of_rows_from_one_batch_on(
    rows: int,
) -> None:
    assert open_fitting(give(rows), FIXED, 8, is_training=True).size == rows


@pytest.mark.parametrize(("rows", "batch_size"), [(8, 8), (24, 8), (8, 32)])
def test_an_evaluation_with_a_fixed_batch_takes_whole_batches(rows: int, batch_size: int) -> None:
    assert open_fitting(give(rows), FIXED, batch_size).size == rows


@pytest.mark.parametrize("batch_size", [4, 8, 32])
@pytest.mark.parametrize("is_training", [True, False])
def test_fewer_rows_than_a_fixed_batch_are_refused(batch_size: int, is_training: bool) -> None:
    reason = f"fixes its batch at 8 rows, in 'x', and there are only 4 rows; give 8 or.*{SEVERAL}"
    with pytest.raises(UnusableData, match=reason):
        open_fitting(give(4), FIXED, batch_size, is_training=is_training)


@pytest.mark.parametrize(
    ("rows", "batch_size", "is_training"),
    [(20, 32, True), (40, 32, True), (8, 32, True), (20, 4, True), (16, 4, False), (8, 4, False)],
)
def test_another_batch_size_than_the_models_is_refused_before_any_batch(
    rows: int, batch_size: int, is_training: bool
) -> None:
    with pytest.raises(UsageError, match=rf"use batch_size=8 \(--batch-size 8\), {SEVERAL}"):
        open_fitting(give(rows), FIXED, batch_size, is_training=is_training)


def test_an_evaluation_refuses_the_smaller_last_batch_that_training_skips() -> None:
    with pytest.raises(UnusableData, match=f"20 rows leave a last batch of 4; give a.*{SEVERAL}"):
        open_fitting(give(20), FIXED, 8)


def test_data_that_a_fixed_batch_cannot_take_are_refused_before_the_first_step() -> None:
    few = {name: array[:5] for name, array in DATA.items()}
    uneven = {name: array[:12] for name, array in DATA.items()}
    client = Client(tiny.fixed_bundle())
    with pytest.raises(UnusableData, match="only 5 rows; give 8 or more"):
        client.fit(few, batch_size=8)
    with pytest.raises(UsageError, match="--batch-size 8"):
        client.fit(DATA)
    for use in (
        lambda: client.evaluate(uneven, batch_size=8),
        lambda: client.fit(DATA, batch_size=8, eval_data=uneven),
        lambda: client.predict(uneven, batch_size=8),
    ):
        with pytest.raises(UnusableData, match="12 rows leave a last batch of 4"):
            use()
    assert client.steps == 0


@pytest.mark.parametrize("use", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize("remote", [(), ("h0",)])
def test_no_cut_is_advised_where_a_state_may_hold_the_batch(
    use: str, remote: tuple[str, ...]
) -> None:
    """A cut that frees the batch would refuse the state, the shape of which must be fixed."""
    few = {name: array[:5] for name, array in DATA.items()}
    bundle = tiny.fixed_bundle()
    shape = (1, 3) if remote else (1, 8, 3)  # another party's state, or one with a batch of 8
    held = StateSpec(tensor=TensorSpec(name="h", dtype="F32", shape=shape), role=Role.BUFFER)
    manifest = msgspec.structs.replace(
        bundle.manifest, state=(*bundle.manifest.state, held), remote_states=remote
    )
    assert not has_batch_states(bundle.manifest)
    weights = {**bundle.weights, "h": np.zeros(shape, np.float32)}
    client = Client(replace(bundle, manifest=manifest, weights=weights))
    with pytest.raises(UnusableData, match=r"there are only 5 rows; give 8 or more$"):
        getattr(client, use)(few, batch_size=8)


def test_data_with_batches_of_their_own_are_not_counted_in_rows() -> None:
    assert open_fitting([give(8)], FIXED, 32, is_training=True).has_own_batches


@pytest.mark.parametrize("rows", ["N", None])
def test_a_batch_that_is_not_fixed_takes_any_number_of_rows(rows: str | None) -> None:
    specs = [TensorSpec(name="x", dtype="F32", shape=(rows, 3))]
    assert open_fitting(give(5), specs, 8, is_training=True).size == 5


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
    results = ("loss", "loss@counted", "loss@total", "accuracy", "accuracy@counted")
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


def test_labels_with_samples_on_another_axis_are_not_taken_for_a_fixed_batch() -> None:
    specs = [
        TensorSpec(name="x", dtype="F32", shape=("N", 3)),
        TensorSpec(name="labels", dtype="F32", shape=(3, "N", 2)),
    ]
    data = {"x": np.zeros((3, 3), np.float32), "labels": np.zeros((3, 3, 2), np.float32)}
    for batch_size, is_training in ((2, False), (2, True), (3, True)):  # training shuffles
        with pytest.raises(
            UnusableData, match=r"'labels', .* on axis 1.*one .npz file in a folder"
        ):
            open_fitting(data, specs, batch_size, is_training=is_training)
    assert open_fitting(data, specs, 3).size == 3  # one batch, in order
    open_fitting([data, data], specs, 2, is_training=True)  # as it says
