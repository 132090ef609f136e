"""One operator with two results, of which the loss needs one."""

from __future__ import annotations

import pytest

from splitonnx.errors import NotACut
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model

NAME = "29_batch_axis_1"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("place", ["Y", "s"])
def test_a_cut_behind_one_of_them_predicts_both_as_the_model_given(
    place: str, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"client_target": target, "server_target": target}
    cut(load_model(NAME), at=place, loss="mse", check=True, **options)  # type: ignore[arg-type]
    assert not caplog.records


@pytest.mark.parametrize("target", TARGETS)
def test_its_gradients_are_those_of_the_model(target: Target) -> None:
    model = load_model(NAME)
    bundle = cut(model, at=None, loss="mse", client_target=target)
    hold_step(bundle, model, load_data(NAME), ["W", "R", "B", "fw"], loss="mse")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("place", ["Y", "s"])
def test_batches_along_axis_1_train_split_as_unsplit(place: str, target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    bundle = cut(model, at=place, loss="mse", client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    batches = [
        {name: array[:, start:stop] for name, array in data.items()}
        for start, stop in ((0, 8), (8, 9), (9, 32))
    ]
    assert verify(bundle, batches).ok


def test_inspect_lists_what_cut_takes() -> None:
    assert [found.tensor for found in inspect(load_model(NAME))] == ["Y", "s"]


def test_a_tensor_that_the_loss_does_not_need_is_refused_by_name() -> None:
    with pytest.raises(NotACut, match="output 'y', from which the loss is computed, does not"):
        cut(load_model(NAME), at="h1", loss="mse")
