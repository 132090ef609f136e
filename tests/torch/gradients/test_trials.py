"""Trials hold gradients near the given point, and leave the network as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from splitonnx.torch.examples import read_example  # noqa: E402
from splitonnx.torch.gradients.trials import list_trials  # noqa: E402
from splitonnx.torch.networks import read_arrays  # noqa: E402
from tests.support.torch_networks import Gated  # noqa: E402


def test_parameters_are_moved_for_a_trial_and_put_back() -> None:
    network = Gated(lambda hidden: hidden.detach())
    before = read_arrays(network)
    example = read_example(torch, network, torch.ones(3, 4))
    trials = list_trials(torch, network, example, ["output"])
    for name, array in read_arrays(network).items():
        np.testing.assert_array_equal(array, before[name])
        assert all(np.abs(trial.values[name] - array).max() > 0 for trial in trials)
    assert all(trial.is_training for trial in trials)
    assert len(trials) == 2


def test_a_gradient_is_that_of_the_outputs_times_the_directions() -> None:
    network = torch.nn.Linear(4, 3)
    example = read_example(torch, network, torch.ones(5, 4))
    for trial in list_trials(torch, network, example, ["y"]):
        expected = trial.directions["y"].T @ trial.inputs["input"]
        np.testing.assert_allclose(trial.gradients["weight"], expected, rtol=1e-5)
        np.testing.assert_allclose(trial.gradients["bias"], trial.directions["y"].sum(0), rtol=1e-5)


def test_where_moved_numbers_are_out_of_the_domain_the_given_ones_are_used() -> None:
    network = Gated(lambda hidden: hidden)
    whole = Gated.forward

    def forward(rows: Any) -> Any:
        return whole(network, rows) * torch.where((rows == 1).all(), 1.0, torch.nan)

    network.forward = forward  # type: ignore[method-assign,unused-ignore]
    example = read_example(torch, network, torch.ones(5, 4))
    found = list_trials(torch, network, example, ["output"])
    assert [float(trial.inputs["rows"].max()) for trial in found] == [1.0]
