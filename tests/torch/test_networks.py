"""A network's tensors are known under all of their names, and its state is kept."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from splitonnx.torch.networks import (  # noqa: E402 - after the skip
    keeping_state,
    list_outputs,
    read_arrays,
    read_layout,
    start_training,
    without_dropout,
)
from tests.support.torch_networks import Recurrent, Tied  # noqa: E402


def test_a_tied_weight_has_two_names_and_frozen_ones_are_not_learnt() -> None:
    network = Tied()
    network.linear.bias.requires_grad_(False)
    layout = read_layout(network)
    assert layout.groups["last.weight"] == ("embedding.weight", "last.weight")
    assert layout.parameters - layout.learnt == {"linear.bias"}
    assert layout.statistics == {"norm.running_mean", "norm.running_var"}
    assert "norm.num_batches_tracked" in layout.buffers


def test_modes_buffers_and_random_numbers_are_as_before() -> None:
    network = Tied()
    network.norm.eval()
    network.dropout.eval()
    before, modes = read_arrays(network), [m.training for m in network.modules()]
    state = torch.random.get_rng_state()
    with keeping_state(torch, network):
        network.train()
        network(torch.randint(0, 12, (4, 5)))
        assert read_arrays(network)["norm.num_batches_tracked"] == 1
    assert [m.training for m in network.modules()] == modes
    assert all((array == before[name]).all() for name, array in read_arrays(network).items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_a_network_in_eval_mode_is_put_into_training_mode() -> None:
    network = Tied().eval()
    start_training(network)
    assert network.norm.training
    network.norm.eval()
    start_training(network)
    assert not network.norm.training


def test_without_dropout_training_mode_is_not_random() -> None:
    network, series = Recurrent(), torch.randn(4, 3, 3)
    with without_dropout(torch, network):
        assert torch.equal(network(series), network(series))
    assert network.layers.dropout == 0.3
    assert not torch.equal(network(series), network(series))


def test_outputs_are_named_by_keys_or_numbers() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert [name for name, _ in list_outputs(one)] == ["output"]
    assert [name for name, _ in list_outputs({"a": one, "b": None, "c": (one, two)})] == [
        "a", "c_0", "c_1",
    ]  # fmt: skip
    assert [name for name, _ in list_outputs((one, two))] == ["output_0", "output_1"]
