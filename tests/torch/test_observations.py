"""What a network uses is seen by calling it: modes, dropouts, parameters without effect."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from splitonnx.torch.examples import read_example  # noqa: E402 - after the skip
from splitonnx.torch.observations import observe  # noqa: E402
from tests.support.torch_networks import Masked, Recurrent, Tied  # noqa: E402


def test_modes_and_dropouts_are_seen() -> None:
    network = Tied()
    example = read_example(torch, network, torch.randint(0, 12, (4, 5)))
    seen = observe(torch, network, example)
    assert seen.training == {"norm.running_mean": 0.1}
    assert (seen.dropouts, seen.is_random, seen.recurrent_dropout) == (1, True, False)
    network.norm.eval()
    network.dropout.eval()
    seen = observe(torch, network, example)
    assert seen.frozen == {"norm.running_mean"}
    assert (seen.training, seen.dropouts, seen.is_random) == ({}, 0, False)


def test_dropout_between_recurrent_layers_is_seen() -> None:
    network = Recurrent()
    seen = observe(torch, network, read_example(torch, network, torch.randn(4, 3, 3)))
    assert seen.recurrent_dropout
    assert seen.dropouts == 1


def test_parameters_without_effect_are_seen() -> None:
    network = Masked()
    example = read_example(torch, network, (torch.randn(2, 6, 8), torch.zeros(2, 6).bool()))
    assert observe(torch, network, example).unused == {"unused.weight", "unused.bias"}
