"""Portable parts train on another execution provider, OpenVINO, as they do on the CPU.

It stands in an environment of its own, since its build of ONNX Runtime shares the folder with any
other.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from tests.conftest import ROOT, find_python
from tests.end_to_end.test_portability import STEPS, check_trained
from tests.support import portable_training
from tests.support.zoo import ZOO

pytestmark = pytest.mark.openvino

WHOLLY_THERE = frozenset({
    "batchnorm_trained", "bce", "chain", "l1", "mse", "pools", "residual", "shape_paths",
    "shared_constant", "two_inputs", "two_streams",
})  # fmt: skip
"""The models of which this build leaves no stage as a whole to the CPU."""
U_SHAPED = frozenset({"chain", "batchnorm_trained", "dropout", "attention", "embedding"})
"""The models that are also cut U-shaped."""


@pytest.fixture(scope="module")
def openvino_python(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The python of an environment with splitonnx[openvino].

    SPLITONNX_OPENVINO_PYTHON names one that stands already.
    """
    return find_python("openvino", request, tmp_path_factory)


def train_there(python: Path, provider: str, folders: list[Path]) -> str:
    """Train bundles on a provider, in two processes, and return what these wrote to stderr."""
    script = Path(portable_training.__file__)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [python, script, f"--provider={provider}", *own],
            cwd=script.parent,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in (folders[::2], folders[1::2])
    ]
    return "".join(process.communicate()[1] for process in running)


@pytest.fixture(scope="module")
def trained(openvino_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """The zoo, each model cut in its middle and some U-shaped, trained on OpenVINO."""
    root = tmp_path_factory.mktemp("openvino-zoo")
    folders: dict[Path, str] = {}
    for name, entry in ZOO.items():
        prepared = prepare(open_model(entry.build()))
        cuts = [found.tensor for found in list_cuts(prepared, None)]
        data: dict[str, Any] = {**entry.data(STEPS * portable_training.BATCH)}
        places: list[tuple[str, str | tuple[()]]] = [(cuts[len(cuts) // 2], ())]
        if name in U_SHAPED:
            places.append((cuts[0], cuts[-1]))
        for at, tail in places:
            bundle = cut_prepared(
                prepared,
                at=at,
                tail_at=tail,
                loss=entry.loss,
                client_target="portable",
                server_target="portable",
            )
            folder = root / name / ("u" if tail else "vanilla")
            bundle.save(folder / "bundle")
            np.savez(folder / "data.npz", **data)
            folders[folder] = name
    assert train_there(openvino_python, "openvino", list(folders)) == ""
    return folders


def read_placement(folder: Path) -> list[dict[str, Any]]:
    """Read where each stage of both parties ran."""
    stages: list[dict[str, Any]] = json.loads((folder / "placement.json").read_text())
    return stages


def test_the_zoo_trains_on_openvino_as_whole_models_train_on_the_cpu(
    trained: dict[Path, str],
) -> None:
    check_trained(trained)


def test_most_models_leave_no_whole_stage_to_the_cpu(trained: dict[Path, str]) -> None:
    left = {
        name
        for folder, name in trained.items()
        if any(stage["reason"] for stage in read_placement(folder))
    }
    assert ZOO.keys() >= WHOLLY_THERE
    assert WHOLLY_THERE.isdisjoint(left)


def test_dropout_s_64_bit_integers_are_computed_wrongly_there_and_so_on_the_cpu(
    trained: dict[Path, str],
) -> None:
    for folder, name in trained.items():
        if name == "dropout":
            reasons = [stage["reason"] for stage in read_placement(folder) if stage["reason"]]
            assert reasons
            assert all("differ by" in reason for reason in reasons)


def test_a_refused_graph_is_left_to_the_cpu_with_the_node_that_is_not_supported(
    trained: dict[Path, str],
) -> None:
    reasons = {
        name: [stage["reason"] for stage in read_placement(folder) if stage["reason"]]
        for folder, name in trained.items()
    }
    assert any("LayerNormalization" in reason for reason in reasons["attention"])
    assert any("ScatterND" in reason for reason in reasons["embedding"])


def test_a_provider_that_the_build_lacks_is_refused_with_what_to_install(
    openvino_python: Path, trained: dict[Path, str]
) -> None:
    error = train_there(openvino_python, "cuda", [next(iter(trained))])
    assert "with cpu and openvino alone" in error
    assert "splitonnx[gpu]" in error
