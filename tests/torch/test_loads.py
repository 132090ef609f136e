"""What was trained split goes back into the network, which then predicts the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from splitonnx.bundles import Bundle  # noqa: E402 - after the skip
from splitonnx.errors import BundleMismatch, UsageError, WeightsMismatch  # noqa: E402
from splitonnx.optimizers import SGD  # noqa: E402
from splitonnx.partitioner.adaptations import adapt  # noqa: E402
from splitonnx.partitioner.merges import merge, write_merged  # noqa: E402
from splitonnx.partitioner.permissions import cut  # noqa: E402
from splitonnx.runtime.client.clients import Client  # noqa: E402
from splitonnx.runtime.engine.engines import Engine  # noqa: E402
from splitonnx.runtime.engine.executors import Executor  # noqa: E402
from splitonnx.runtime.memory import connect_in_memory  # noqa: E402
from splitonnx.states import State, write_state  # noqa: E402
from splitonnx.torch import export, load  # noqa: E402
from tests.support.torch_networks import Convolutional, Tied  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def draw_data() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    image = random.standard_normal((32, 1, 6, 6), np.float32)
    return {"image": image, "labels": random.integers(0, 5, 32)}


def train_split(folder: Path, network: Any) -> tuple[Bundle, np.ndarray]:
    """Train a network split for 8 steps, and return the bundle and what it predicts."""
    data = draw_data()
    made = export(network, torch.from_numpy(data["image"][:3]))
    bundle = cut(
        made.model, at="/Relu_output_0", freeze=made.freeze, optimizer=SGD(lr=0.1), send_labels=True
    )
    bundle.save(folder)
    server = bundle.server
    assert server is not None
    link = connect_in_memory(Executor(server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1, seed=1) as client:
        client.fit(data, epochs=2, batch_size=8)
        predicted = client.predict({"image": data["image"]})["output"]
        states = {"client": dict(client.state()), "server": dict(link.executor.state())}
    for party, tensors in states.items():
        write_state(folder / party, State(tensors=tensors, step=8), bundle.manifest.digest)
    return Bundle.load(folder), predicted


def predict(network: Any) -> np.ndarray:
    network.eval()
    with torch.no_grad():
        found: np.ndarray = network(torch.from_numpy(draw_data()["image"])).numpy()
    return found


def test_weights_trained_split_predict_the_same_in_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Convolutional()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    bundle, expected = train_split(tmp_path / "bundle", network)
    done = load(tmp_path / "bundle", network)
    assert done.step == 8
    assert set(done.kept) == {"norm.num_batches_tracked"}
    assert torch.equal(network.table, before["table"])
    assert not torch.equal(network.norm.running_var, before["norm.running_var"])
    np.testing.assert_allclose(predict(network), expected, rtol=1e-4, atol=1e-5)
    for source in (merge(bundle), tmp_path / "merged.onnx"):
        if isinstance(source, Path):
            write_merged(bundle, source)
        other = Convolutional()
        other.table.copy_(before["table"])
        assert load(source, other).step is None
        np.testing.assert_array_equal(predict(other), predict(network))


def test_a_tied_weight_stays_tied_and_an_untrained_bundle_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network, other = Tied(), Tied()
    bundle = cut(export(network, torch.arange(15).reshape(3, 5) % 12).model, at=None)
    with caplog.at_level(logging.WARNING):
        done = load(bundle, other)
    assert "was not trained yet" in caplog.text
    assert {"embedding.weight", "last.weight"} <= set(done.loaded)
    assert other.last.weight is other.embedding.weight
    assert torch.equal(other.last.weight, network.last.weight)


def test_another_network_and_halves_of_other_steps_are_refused_whole(tmp_path: Path) -> None:
    bundle, _ = train_split(tmp_path / "bundle", Convolutional())
    other = Tied()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(WeightsMismatch, match=r"the network has no 'conv\.bias'"):
        load(bundle, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    state = State(tensors=bundle.client.state(), step=7)
    write_state(tmp_path / "bundle" / "client", state, bundle.manifest.digest)
    with pytest.raises(BundleMismatch):
        load(tmp_path / "bundle", Convolutional())


def test_a_model_that_was_never_merged_is_refused(tmp_path: Path) -> None:
    export(Tied(), torch.arange(15).reshape(3, 5) % 12, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="was not merged by splitonnx, but written by pytorch"):
        load(tmp_path / "model.onnx", Tied())


def test_adapters_are_folded_before_they_are_loaded() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4))
    adapted = adapt(export(network, torch.randn(2, 3)).model, lora="0.weight", rank=2)
    bundle = cut(adapted, at=None)
    for source in (bundle, merge(bundle)):
        with pytest.raises(UsageError, match="has adapters, which the network does not; fold"):
            load(source, network)
    assert load(merge(bundle, fold=True), network).loaded == ("0.weight", "0.bias")


def test_statistics_that_an_export_stored_with_parameters_are_loaded_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 5))
    path, series = tmp_path / "model.onnx", np.random.default_rng(3).standard_normal((4, 3))
    example = torch.from_numpy(series.astype(np.float32))
    plain = {"input_names": ["series"], "dynamic_axes": {"series": {0: "N"}}}
    torch.onnx.export(network, (example,), path, dynamo=False, **plain)
    bundle = cut(path, at=None, batchnorm="train", optimizer=SGD(lr=0.1), check=True)
    bundle.save(tmp_path / "bundle")
    with Client(bundle.client, None, threads=1, seed=1) as client:
        client.step({"series": example.numpy(), "labels": np.arange(4)})
        state = dict(client.state())
    digest = bundle.manifest.digest
    write_state(tmp_path / "bundle" / "client", State(tensors=state, step=1), digest)
    load(tmp_path / "bundle", network)
    norm = network[0]
    np.testing.assert_allclose(norm.running_mean, 0.1 * series.mean(0), rtol=1e-4)
    np.testing.assert_allclose(norm.running_var, 0.9 + 0.1 * series.var(0), rtol=1e-4)
    assert not np.allclose(norm.weight.detach(), norm.running_var)
