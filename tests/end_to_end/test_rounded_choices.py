"""A choice that rounding decides is told in a remark, and hides no mistake of ours.

The model below takes the larger one of two equal products, of which ONNX Runtime's optimizer
computes one in another order.  So the model itself computes something else once it is optimized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import DifferentResult
from splitonnx.partitioner.cutting.assemblies import assemble
from splitonnx.partitioner.cutting.conformance.dataflow import run_merged
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from tests.support.nets import FLOAT, Arrays, Net

PARTITIONS = "splitonnx.partitioner.partitions"
COMPARISONS = "splitonnx.partitioner.cutting.conformance.comparisons"


def build_choosing(factor: float) -> onnx.ModelProto:
    """Build a model that takes the larger one of (x v) c and x (v c), where c is a factor."""
    net, kernel = Net(), {"kernel_shape": [1, 1]}
    part, times = np.full((1, 1, 1, 1), 0.7312345, np.float32), np.full((1, 1, 1), factor, "f")
    first = net.op("Conv", "x", net.constant("v", part), out="first", **kernel)
    scaled = net.op("Mul", first, net.constant("c", times), out="scaled")
    second = net.op("Conv", "x", net.constant("vc", part * times), out="second", **kernel)
    pair = net.op("Concat", scaled, second, axis=1, out="pair")
    chosen = net.op("ArgMax", pair, axis=1, keepdims=1, out="chosen")
    number = net.op("Cast", chosen, to=FLOAT, out="number")
    hidden = net.op("Conv", "x", net.weight("w", 1, 1, 1, 1), out="hidden", **kernel)
    joined = net.op("Add", net.op("Tanh", hidden, out="bent"), number, out="joined")
    output = net.op("Conv", joined, net.weight("u", 1, 1, 1, 1), out="y", **kernel)
    return net.finish({"x": (FLOAT, ["N", 1, 4, 4])}, output, 1, 4, 4)


UNDECIDED, DECIDED = 1.3123457, 1.0


def run(model: bytes, *, is_optimized: bool) -> np.ndarray:
    levels, options = ort.GraphOptimizationLevel, ort.SessionOptions()
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if is_optimized else levels.ORT_DISABLE_ALL
    )
    data = np.random.default_rng(0).standard_normal((3, 1, 4, 4)).astype(np.float32)
    result: np.ndarray = ort.InferenceSession(model, options).run(None, {"x": data})[0]
    return result


def test_a_choice_that_the_models_own_optimization_changes_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build_choosing(UNDECIDED)
    merged = merge(cut(model, at="joined", loss="mse", check=True))
    given = run(model.SerializeToString(), is_optimized=False)
    assert abs(run(model.SerializeToString(), is_optimized=True) - given).max() > 0.1
    np.testing.assert_allclose(run(merged, is_optimized=False), given, rtol=1e-5, atol=1e-6)
    told = [record.getMessage() for record in caplog.records]
    (remark,) = [text for text in told if "rounding decides" in text]
    assert "'y' in the model, by node 'chosen_node' (ArgMax): the merged model differs by" in remark


def drop_tanh(prepared: PreparedModel) -> None:
    for model in (prepared.inference, prepared.skeleton):
        node = next(node for node in model.graph if node.op_type == "Tanh")
        assert node.inputs[0] is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def choose_least(prepared: PreparedModel) -> None:
    for model in (prepared.inference, prepared.skeleton):
        next(node for node in model.graph if node.op_type == "ArgMax").op_type = "ArgMin"


@pytest.mark.parametrize("plant", [drop_tanh, choose_least])
def test_a_fault_beside_such_a_choice_is_caught(
    plant: Callable[[PreparedModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_wrongly(*arguments: ir.Model, **options: object) -> PreparedModel:
        prepared = prepare(*arguments, **options)  # type: ignore[arg-type]
        plant(prepared)
        return prepared

    monkeypatch.setattr(f"{PARTITIONS}.prepare", prepare_wrongly)
    with pytest.raises(DifferentResult):
        cut(build_choosing(UNDECIDED), at="joined", loss="mse", check=True)


def test_a_wrong_weight_beside_such_a_choice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def assemble_wrongly(*arguments: PreparedModel, **options: object) -> Bundle:
        bundle = assemble(*arguments, **options)  # type: ignore[arg-type]
        assert bundle.server is not None
        weights = {name: array * 1.01 for name, array in bundle.server.weights.items()}
        server = replace(bundle.server, weights=weights)
        return replace(bundle, parties={"client": bundle.client, "server": server})

    monkeypatch.setattr(f"{PARTITIONS}.assemble", assemble_wrongly)
    with pytest.raises(DifferentResult):
        cut(build_choosing(UNDECIDED), at="joined", loss="mse", check=True)


def test_what_optimizations_change_in_the_merged_model_alone_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def optimize_wrongly(*given: object, level: str, **named: object) -> list[Arrays]:
        outputs = run_merged(*given, level=level, **named)  # type: ignore[arg-type]
        factor = 1.0 if level == "none" else 1.5
        return [{name: array * factor for name, array in batch.items()} for batch in outputs]

    monkeypatch.setattr(f"{COMPARISONS}.run_merged", optimize_wrongly)
    with pytest.raises(DifferentResult) as caught:
        cut(build_choosing(DECIDED), at="joined", loss="mse", check=True)
    assert caught.value.made == "the merged model"
