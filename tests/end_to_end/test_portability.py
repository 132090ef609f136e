"""Portable parts train on stock ONNX Runtime, without onnx, as the training wheel trains them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.client.clients import Client
from tests.conftest import build_once
from tests.support import portable_training
from tests.support.zoo import ZOO

RTOL = 1e-4
STEPS = 5


def list_places(prepared: PreparedModel) -> list[tuple[str, str | None]]:
    """List every vanilla cut, and one U-shaped cut around the middle."""
    cuts = [found.tensor for found in list_cuts(prepared, None)]
    return [*((tensor, None) for tensor in cuts), (cuts[0], cuts[-1])]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """The whole zoo in portable parts, each in a folder with its data, beside its name.

    Pytest's processes cut it once together.
    """
    root = build_once(tmp_path_factory, "portable-zoo", cut_zoo)
    return {folder: name for name in ZOO for folder in sorted((root / name).iterdir())}


def cut_zoo(root: Path) -> Path:
    """Cut the whole zoo into portable parts in folders of ``root``."""
    for name, entry in ZOO.items():
        prepared = prepare(open_model(entry.build()))
        data: dict[str, Any] = {**entry.data(STEPS * portable_training.BATCH)}
        for number, (at, tail) in enumerate(list_places(prepared)):
            bundle = cut_prepared(
                prepared,
                at=at,
                tail_at=tail or (),
                loss=entry.loss,
                client_target="portable",
                server_target="portable",
            )
            folder = root / name / str(number)
            bundle.save(folder / "bundle")
            np.savez(folder / "data.npz", **data)
    return root


@pytest.mark.long
def test_the_zoo_trains_on_stock_onnxruntime(
    bundles: dict[Path, str], portable_python: Path
) -> None:
    script = Path(portable_training.__file__)
    command = [portable_python, script, *bundles]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_trained(bundles)


def check_trained(folders: Mapping[Path, str]) -> None:
    """Check that what was trained in each folder is what the model named beside it comes to."""
    expected = {name: train_whole(name) for name in ZOO}
    for folder, name in folders.items():
        trained = np.load(folder / "trained.npz")
        for key, value in expected[name].items():
            scale = float(np.abs(value).max()) or 1.0
            difference = float(np.abs(trained[key] - value).max())
            assert difference <= RTOL * scale, (name, folder.name, key, difference / scale)


def train_whole(name: str) -> dict[str, np.ndarray]:
    """Train the model unsplit with the training wheel's fused kernels."""
    entry = ZOO[name]
    data = entry.data(STEPS * portable_training.BATCH)
    whole = cut(entry.build(), at=None, loss=entry.loss).client
    losses = []
    with Client(whole, threads=1) as client:
        for start in range(0, len(data["labels"]), portable_training.BATCH):
            end = start + portable_training.BATCH
            batch = {key: array[start:end] for key, array in data.items()}
            losses.append(client.step(batch)["loss"])
        kept = [s.tensor.name for s in whole.manifest.state if s.role != "optimizer"]
        state = client.state()
    return {**{key: state[key] for key in kept}, "#losses": np.array(losses)}


def test_portable_parts_hold_standard_operators_only(bundles: dict[Path, str]) -> None:
    for folder in bundles:
        for path in folder.glob("bundle/*/*.onnx"):
            model = onnx.load(path)
            assert {entry.domain for entry in model.opset_import} == {""}
            onnx.checker.check_model(model)
            version = model.opset_import[0].version
            for node in model.graph.node:
                onnx.defs.get_schema(node.op_type, version, "")
                assert node.op_type != "SoftmaxCrossEntropyLoss"


def test_training_parts_keep_their_fused_kernels() -> None:
    entry = ZOO["batchnorm_trained"]
    bundle = cut(entry.build(), at="r1", client_target="portable", server_target="training")
    assert bundle.server is not None
    kinds = {
        party.manifest.target: {
            node.op_type
            for name, graph in party.graphs.items()
            if "backward" in name or "step" in name
            for node in onnx.load_from_string(graph).graph.node
        }
        for party in (bundle.client, bundle.server)
    }
    assert "ConvGrad" in kinds["training"]
    assert "ConvGrad" not in kinds["portable"]
