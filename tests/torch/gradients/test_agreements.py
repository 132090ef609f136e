"""Gradients that an export changes are kept by stops, or refused with the parameters they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from splitonnx import SGD, Client, cut  # noqa: E402
from splitonnx.errors import WrongExport  # noqa: E402
from splitonnx.torch import Export, export  # noqa: E402
from tests.support.torch_networks import Convolutional, Gated, Padded, Recurrent, Rounding  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
CLASSES = torch.arange(16) % 3
TOKENS = torch.arange(80).reshape(16, 5) % 7


def step_once(network: Any, made: Export, data: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the gradient of each parameter, as splitonnx and as PyTorch computes it."""
    torch.nn.functional.cross_entropy(network(data), CLASSES).backward()
    bundle = cut(made.model, at=None, optimizer=SGD(lr=1.0))
    with Client(bundle.client, threads=1) as client:
        client.step({made.inputs[0]: data.numpy(), "labels": CLASSES.numpy()})
        after = client.state()
    return {
        name: (parameter.detach().numpy() - after[name], parameter.grad.numpy())
        for name, parameter in network.named_parameters()
    }


@pytest.mark.parametrize(
    ("stop", "data"),
    [
        (lambda hidden: hidden.detach(), ROWS),
        (lambda hidden: hidden + (torch.round(3 * hidden) / 3 - hidden).detach(), ROWS),
        (lambda hidden: (hidden * 2).detach().clone() - hidden, ROWS),
    ],
    ids=["partial", "straight-through", "cloned"],
)
def test_a_detach_beside_another_path_trains_as_in_the_network(
    stop: Callable[[Any], Any], data: Any
) -> None:
    network = Gated(stop)
    made = export(network, data)
    assert len(made.stop_gradients) == 1
    assert made.gradient_difference is not None
    assert made.gradient_difference < 1e-4
    for found, expected in step_once(network, made, data).values():
        np.testing.assert_allclose(found, expected, atol=1e-5)


class Detached(Recurrent):
    """A recurrent layer with dropout, which only the dynamo exporter writes, and a detach."""

    def forward(self, series: Any) -> Any:
        """(N, 3, 3) to (N, 5)."""
        hidden = self.layers(series)[0][:, -1]
        return self.last(self.norm(hidden) * hidden.detach())


def test_a_detach_that_the_dynamo_exporter_writes_is_named() -> None:
    pytest.importorskip("onnxscript")
    made = export(Detached(), torch.randn(4, 3, 3))
    assert made.exporter == "dynamo"
    assert made.stop_gradients == ("detach",)
    assert made.gradient_difference is not None


def test_the_padding_of_an_embedding_is_not_trained() -> None:
    network = Padded()
    made = export(network, TOKENS)
    gradients = step_once(network, made, TOKENS)
    for found, expected in gradients.values():
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not gradients["embedding.weight"][0][network.embedding.padding_idx].any()


def pass_without_gradient(hidden: Any) -> Any:
    with torch.no_grad():
        return torch.sin(hidden)


@pytest.mark.parametrize("stop", [pass_without_gradient, Rounding.apply])
def test_a_gradient_that_is_not_in_the_file_is_refused_with_the_parameters(
    stop: Callable[[Any], Any],
) -> None:
    words = r"in the gradient of 'enc\.weight', 'enc\.bias': .* write tensor\.detach\(\) for"
    with pytest.raises(WrongExport, match=words):
        export(Gated(stop), ROWS)


def test_the_advised_words_for_a_straight_through_gradient_are_exported() -> None:
    advised = Gated(lambda hidden: hidden + (Rounding.apply(hidden) - hidden).detach())
    own = Gated(Rounding.apply)
    own.load_state_dict(advised.state_dict())
    made = export(advised, ROWS)
    for found, expected in step_once(own, made, ROWS).values():
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_block_without_gradient_is_exported_with_the_advised_detach() -> None:
    advised = Gated(lambda hidden: pass_without_gradient(hidden).detach())
    made = export(advised, ROWS)
    for found, expected in step_once(advised, made, ROWS).values():
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_detach_before_a_layer_of_zeros_is_found_though_its_gradient_is_zero() -> None:
    network = Gated(pass_without_gradient)
    torch.nn.init.zeros_(network.out.weight)
    with pytest.raises(WrongExport, match=r"in the gradient of 'enc\.weight'"):
        export(network, ROWS)


def test_kinks_of_an_example_of_zeros_are_no_difference() -> None:
    made = export(Convolutional(), torch.zeros(2, 1, 6, 6))
    assert made.stop_gradients == ()
    assert made.gradient_difference is not None
