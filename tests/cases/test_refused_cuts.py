"""Cuts that are refused name what stands in their way."""

from __future__ import annotations

import pytest

from splitonnx.errors import NotACut, quote
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model

IN_THE_WAY = {
    ("34_passed_through", "b"): ("x",),
}
"""Cuts, and the raw inputs that the server would need for an output of its own."""


@pytest.mark.parametrize(("name", "at"), IN_THE_WAY)
def test_a_cut_that_would_need_a_raw_input_names_it(name: str, at: str) -> None:
    with pytest.raises(NotACut) as refused:
        cut(load_model(name), at=at, loss="mse")
    assert f"'{at}' does not divide the model: {quote(IN_THE_WAY[name, at])}" in str(refused.value)
    assert "stays home" in str(refused.value)


def test_inspect_lists_such_a_cut_only_where_the_raw_input_may_leave() -> None:
    model = load_model("34_passed_through")
    assert inspect(model) == []
    assert [found.tensor for found in inspect(model, sent=["x"])] == ["a", "b"]


@pytest.mark.parametrize("target", TARGETS)
def test_with_the_raw_input_in_the_cut_it_trains_split_as_unsplit(target: Target) -> None:
    model, data = load_model("34_passed_through"), load_data("34_passed_through")
    bundle = cut(model, at=["b", "x"], client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_predictions(whole, model, data)
    hold_step(whole, model, load_data("34_passed_through", 4), ["w1", "b1", "w2", "b2"])
