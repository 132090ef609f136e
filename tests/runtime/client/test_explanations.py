"""Tests of what is said to leave a client, against what a recorded connection saw leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitonnx import SGD, Client, cut
from splitonnx.bundles import Bundle
from splitonnx.errors import ForbiddenGraph, UsageError
from splitonnx.manifests import PartyManifest
from splitonnx.names import PREDICT, TRAIN
from splitonnx.runtime.client.explanations import ArrayExplanation, Explanation, explain
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from tests.support import tiny
from tests.support.recordings import RecordingTransport, check_explained
from tests.support.zoo import ZOO

CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla": ("chain", {"at": "act1", "send_labels": True}),
    "U-shaped": ("chain", {"at": "act1", "tail_at": "act3"}),
    "a raw input": ("chain", {"at": "x", "send_labels": True, "send_inputs": ["x"]}),
    "clipped": ("chain", {"at": "act1", "tail_at": "act3", "optimizer": SGD(lr=0.1, clip_norm=1)}),
    "two tensors": ("two_streams", {"at": ZOO["two_streams"].several, "send_labels": True}),
    "running statistics": ("batchnorm_trained", {"at": "r1", "send_labels": True}),
}
BATCH = 8


def make(name: str) -> Bundle:
    model, options = CUTS[name]
    return cut(ZOO[model].build(), loss=ZOO[model].loss, **options)


def find_phase(explanation: Explanation, phase: str) -> Any:
    return next(found for found in explanation.phases if found.leaves.phase == phase)


def find_array(explanation: Explanation, phase: str, name: str) -> ArrayExplanation:
    arrays: tuple[ArrayExplanation, ...] = find_phase(explanation, phase).arrays
    return next(array for array in arrays if array.name == name)


@pytest.mark.parametrize("name", CUTS)
def test_what_leaves_and_arrives_is_what_is_explained_byte_for_byte(name: str) -> None:
    bundle = make(name)
    assert bundle.server is not None
    recording = RecordingTransport(Executor(bundle.server, Engine(threads=1)))
    data = ZOO[CUTS[name][0]].data(2 * BATCH)
    with Client(bundle.client, recording, threads=1) as client:
        client.fit(data, epochs=2, batch_size=BATCH, eval_data=data)
        client.predict({n: a for n, a in data.items() if n != "labels"}, batch_size=BATCH)
    check_explained(bundle.client, recording, BATCH, {TRAIN: 4, PREDICT: 6})


def test_a_raw_input_reaches_what_leaves_through_its_first_layer() -> None:
    explanation = explain(make("U-shaped").client)
    (way,) = find_array(explanation, TRAIN, "x").ways
    assert way.tensor.tensor == "act1"
    assert [layer.weights for layer in way.dependence.layers] == [("w0", "b0")]
    assert not way.dependence.is_bare
    assert not way.is_itself


def test_what_is_named_leaves_as_it_is() -> None:
    explanation = explain(make("a raw input").client)
    for name, kind in (("x", "raw input"), ("labels", "labels")):
        array = find_array(explanation, TRAIN, name)
        assert array.kind == kind
        assert [str(way) for way in array.ways] == ["leaves as it is"]


def test_labels_shape_the_gradient_that_a_tail_sends() -> None:
    labels = find_array(explain(make("U-shaped").client), TRAIN, "labels")
    (way,) = labels.ways
    assert way.tensor.name == "gradient of 'act3'"
    assert way.dependence.layers
    bare = cut(ZOO["chain"].build(), at="act1", tail_at="linear4", send_labels=True)
    (way,) = find_array(explain(bare.client), TRAIN, "labels").ways
    assert str(way) == (
        "gradient of 'linear4' depends on it without any layer of weights between them"
    )


def test_labels_that_are_only_measured_have_no_path_to_what_leaves() -> None:
    array = find_array(explain(make("U-shaped").client), "evaluate", "labels")
    assert (array.ways, array.updates) == ((), 0)


def test_a_step_changes_the_clients_weights_by_its_inputs() -> None:
    bundle = make("vanilla")
    trained = [spec.name for spec in _list_trained(bundle.client.manifest)]
    assert find_array(explain(bundle.client), TRAIN, "x").updates == len(trained)
    assert find_array(explain(bundle.client), PREDICT, "x").updates == 0


def _list_trained(manifest: PartyManifest) -> list[Any]:
    return [spec.tensor for spec in manifest.state if spec.role == "parameter"]


def test_a_device_explains_without_onnx_and_onnx_runtime(tmp_path: Path) -> None:
    make("U-shaped").save(tmp_path / "bundle")
    script = """
import sys
from splitonnx import explain
print(len(explain(sys.argv[1]).phases), {"onnx", "onnx_ir", "onnxruntime"} & sys.modules.keys())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "bundle" / "client"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "6 set()\n"


def test_only_a_clients_part_is_explained() -> None:
    server = make("vanilla").server
    assert server is not None
    with pytest.raises(UsageError, match="the server's part; explain reads the client's"):
        explain(server)


def test_a_graph_that_cannot_be_read_is_refused() -> None:
    party = tiny.split_bundle().client
    graphs = dict.fromkeys(party.graphs, b"0000ORTM")
    with pytest.raises(ForbiddenGraph, match="ONNX Runtime's own format"):
        explain(type(party)(manifest=party.manifest, graphs=graphs, weights=party.weights))
