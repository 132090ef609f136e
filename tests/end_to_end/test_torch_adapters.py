"""Adapters of an exported transformer train as the same adapters do in PyTorch, step by step.

Needs PyTorch; `make test-torch` installs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import splitonnx.torch  # noqa: E402 - after the skip
from splitonnx.bundles import Bundle  # noqa: E402
from splitonnx.names import CLIENT, LOSS, SERVER  # noqa: E402
from splitonnx.optimizers import SGD, AdamW, Optimizer  # noqa: E402
from splitonnx.partitioner.adaptations import adapt  # noqa: E402
from splitonnx.partitioner.adapters import read_note  # noqa: E402
from splitonnx.partitioner.gate.gates import open_model  # noqa: E402
from splitonnx.partitioner.merges import merge, write_adapters  # noqa: E402
from splitonnx.partitioner.permissions import cut  # noqa: E402
from splitonnx.runtime.client.clients import Client  # noqa: E402
from splitonnx.runtime.engine.engines import Engine  # noqa: E402
from splitonnx.runtime.engine.executors import Executor  # noqa: E402
from splitonnx.runtime.memory import connect_in_memory  # noqa: E402
from tests.support.adapted_models import read_weights, run  # noqa: E402
from tests.support.torch_networks import Adapted, Transformer  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.long]

REGEX, RANK, ALPHA, STEPS = r"[qv]_proj|fc1|last", 3, 6.0, 6
TOKENS = torch.arange(15).reshape(3, 5) % 12


def export_documented(network: Any, path: Path) -> None:
    splitonnx.torch.export(network, TOKENS, path)


def export_legacy(network: Any, path: Path) -> None:
    axes = {"tokens": {0: "N"}}
    torch.onnx.export(
        network, (TOKENS,), path, dynamo=False, input_names=["tokens"], dynamic_axes=axes
    )


def export_plainly(network: Any, path: Path) -> None:
    """Export as everybody does first; the weights are transposed and have numbers for names."""
    batch = torch.export.Dim("N", min=2, max=64)
    torch.onnx.export(network, (TOKENS,), path, dynamo=True, dynamic_shapes=({0: batch},))


def pair_layers(content: bytes, network: Any) -> dict[str, str]:
    """Map the stem of each adapter's names to the Linear that has the same weight."""
    note, weights = read_note(open_model(content)), read_weights(content)
    assert note is not None
    layers = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}

    def find(weight: np.ndarray) -> str:
        arrays = {name: layer.weight.detach().numpy() for name, layer in layers.items()}
        same: list[str] = [
            n for n, a in arrays.items() for one in (a, a.T) if np.array_equal(one, weight)
        ]
        return same[0]

    return {one.first.removesuffix(".lora_A"): find(weights[one.weight]) for one in note.adapters}


def wrap(network: Any, content: bytes, pairs: dict[str, str]) -> Any:
    """Return a copy of the network whose layers have the adapters of a model."""
    copy, weights = deepcopy(network), read_weights(content)
    for parameter in copy.parameters():
        parameter.requires_grad = False
    for stem, name in pairs.items():
        parent, _, last = name.rpartition(".")
        first, second = (weights[f"{stem}.lora_{letter}"].T for letter in "AB")
        adapted = Adapted(copy.get_submodule(name), first, second, ALPHA / RANK)
        setattr(copy.get_submodule(parent), last, adapted)
    return copy


@contextmanager
def open_client(bundle: Bundle) -> Iterator[tuple[Client, Callable[[], dict[str, np.ndarray]]]]:
    """Yield a client, with a server in memory if there is one, and what reads the state of both."""
    server = bundle.parties.get(SERVER)
    link = None if server is None else connect_in_memory(Executor(server, Engine(threads=1)))
    with Client(bundle.parties[CLIENT], link, threads=1, seed=0) as client:

        def read() -> dict[str, np.ndarray]:
            if link is None:
                return dict(client.state())
            link.drain()
            return {**client.state(), **link.executor.state()}

        yield client, read


def train_alike(network: Any, bundle: Bundle, content: bytes, make: Callable[[Any], Any]) -> None:
    """Train a bundle and the network beside it, and compare losses and adapters in every step."""
    pairs = pair_layers(content, network)
    wrapped, random = wrap(network, content, pairs), np.random.default_rng(1)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(pairs)
    optimizer = make(list(trained.values()))
    (name,) = (spec.name for spec in bundle.parties[CLIENT].manifest.phase("predict").data)
    with open_client(bundle) as (client, read):
        for _ in range(STEPS):
            tokens, labels = random.integers(0, 12, (8, 5)), random.integers(0, 12, 8)
            optimizer.zero_grad()
            scores = wrapped(torch.from_numpy(tokens))
            loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels))
            loss.backward()
            optimizer.step()
            found = client.step({name: tokens, "labels": labels})[LOSS]
            np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
            state = read()
            for stem, layer in pairs.items():
                for letter in "AB":
                    expected = trained[f"{layer}.lora_{letter}"].detach().numpy()
                    actual = state[f"{stem}.lora_{letter}"].T
                    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert min(p.detach().abs().max() for n, p in trained.items() if n.endswith("lora_B")) > 1e-3


OPTIMIZERS: dict[str, tuple[Optimizer, Callable[[Any], Any]]] = {
    "sgd": (SGD(lr=0.3, momentum=0.9), lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)),
    "adamw": (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, 0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("export", [export_documented, export_legacy, export_plainly])
def test_adapters_train_as_in_pytorch(
    export: Callable[[Any, Path], None], name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, (optimizer, make) = Transformer(), OPTIMIZERS[name]
    export(network, tmp_path / "model.onnx")
    content = adapt(tmp_path / "model.onnx", lora=REGEX, rank=RANK, alpha=ALPHA, seed=4)
    bundle = cut(content, at=None, optimizer=optimizer)
    train_alike(network, bundle, content, make)


def test_adapters_of_both_parties_train_as_in_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, (optimizer, make) = Transformer(), OPTIMIZERS["adamw"]
    export_documented(network, tmp_path / "model.onnx")
    content = adapt(tmp_path / "model.onnx", lora=REGEX, rank=RANK, alpha=ALPHA, seed=4)
    middle = find_middle(content)
    bundle = cut(content, at=middle, optimizer=optimizer, send_labels=True)
    for party in bundle.parties.values():
        assert any("lora" in spec.tensor.name for spec in party.manifest.state)
    train_alike(network, bundle, content, make)


def find_middle(content: bytes) -> str:
    cuts = [found for found in splitonnx.inspect(content) if found.client_parameters > 0]
    return cuts[len(cuts) // 2].tensor


def test_trained_adapters_are_saved_alone_and_folded_into_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, path = Transformer(), tmp_path / "model.onnx"
    export_documented(network, path)
    content = adapt(path, lora=REGEX, rank=RANK, alpha=ALPHA)
    bundle = cut(content, at=None, optimizer=SGD(lr=0.3))
    tokens = np.random.default_rng(2).integers(0, 12, (8, 5))
    with open_client(bundle) as (client, _):
        for _ in range(4):
            client.step({"tokens": tokens, "labels": tokens[:, 0]})
        trained = dict(client.state())
    bundle = trained_bundle(bundle, trained)
    size = write_adapters(bundle, tmp_path / "adapters.safetensors")
    elements = sum(array.size for name, array in trained.items() if name.endswith(("_A", "_B")))
    assert size < 4 * elements + 2048 < path.stat().st_size
    folded, plain = merge(bundle, fold=True), merge(bundle)
    data = {"tokens": tokens}
    np.testing.assert_allclose(run(folded, data), run(plain, data), rtol=1e-6, atol=1e-6)
    again = merge(adapt(path, adapters=tmp_path / "adapters.safetensors"), fold=True)
    np.testing.assert_allclose(run(again, data), run(plain, data), rtol=1e-6, atol=1e-6)
    (tmp_path / "folded.onnx").write_bytes(folded)
    splitonnx.torch.load(tmp_path / "folded.onnx", network)
    scores = network.eval()(torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_allclose(scores, run(plain, data), rtol=1e-4, atol=1e-5)


def trained_bundle(bundle: Bundle, state: dict[str, np.ndarray]) -> Bundle:
    client = replace(bundle.parties[CLIENT], trained=state, step=4)
    return replace(bundle, parties={CLIENT: client})
