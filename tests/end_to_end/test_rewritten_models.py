"""Whole networks of recurrences, normalizations and Einsum: cut, trained, merged, run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from splitonnx.names import Target
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.verifications import verify
from tests.support.wholes import share_wholes
from tests.support.zoo import FLOAT, Net

STEPS, BATCH, LENGTH = 3, 6, 3


def _recur(net: Net, kind: str, source: str, size: int, *, out: str) -> tuple[str, str]:
    """Append a recurrence of 5 units both ways as torch exports it; return its Y and Y_h."""
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[kind]
    weights = [
        net.weight(f"{out}.w", 2, gates * 5, size),
        net.weight(f"{out}.r", 2, gates * 5, 5),
        net.weight(f"{out}.b", 2, 2 * gates * 5),
    ]
    attributes: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
    outputs = [f"{out}.y", f"{out}.h"]
    net.nodes.append(
        helper.make_node(
            kind, [source, *weights], outputs, hidden_size=5, direction="bidirectional",
            **attributes,
        )
    )  # fmt: skip
    turned = net.op("Transpose", f"{out}.y", out=f"{out}.turned", perm=[0, 2, 1, 3])
    shape = net.constant(f"{out}.shape", np.array([0, 0, -1]))
    return net.op("Reshape", turned, shape, out=out), f"{out}.h"


def build_recurrent() -> onnx.ModelProto:
    net = Net()
    value = net.op("Transpose", "x", out="turned", perm=[1, 0, 2])
    value, _ = _recur(net, "LSTM", value, 3, out="lstm")
    value, _ = _recur(net, "GRU", net.op("Relu", value, out="bent"), 10, out="gru")
    _, state = _recur(net, "RNN", value, 10, out="rnn")
    last = net.op("Gather", state, net.constant("one", np.array(1)), out="last", axis=0)
    output = net.op("MatMul", last, net.weight("w", 5, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", LENGTH, 3])}, output, 3)


def build_normalized() -> onnx.ModelProto:
    net = Net(opset=21)
    value = net.op("Conv", "x", net.weight("c1", 4, 3, 3, 3), out="conv1", pads=[1, 1, 1, 1])
    scales = [net.weight("i.scale", 4), net.weight("i.bias", 4)]
    value = net.op("InstanceNormalization", value, *scales, out="instance")
    value = net.op("Conv", net.op("Relu", value, out="bent"), net.weight("c2", 4, 4, 2, 2), out="c")
    scales = [net.weight("g.scale", 4), net.weight("g.bias", 4)]
    value = net.op("GroupNormalization", value, *scales, out="group", num_groups=2)
    value = net.op("GlobalAveragePool", net.op("Relu", value, out="bent2"), out="pooled")
    value = net.op("LpNormalization", net.op("Flatten", value, out="flat"), out="unit", axis=1)
    output = net.op("MatMul", value, net.weight("w", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 3, 4, 4])}, output, 3)


def build_einsum() -> onnx.ModelProto:
    net = Net()

    def project(name: str) -> str:
        weight = net.weight(f"w{name}", 3, 2, 5)
        return net.op("Einsum", "x", weight, out=name, equation="bsi,ihd->bshd")

    scores = net.op("Einsum", project("q"), project("k"), out="s", equation="bqhd,bkhd->bhqk")
    weights = net.op("Softmax", scores, out="soft", axis=-1)
    mixed = net.op("Einsum", weights, project("v"), out="mixed", equation="bhqk,bkhd->bqhd")
    output = net.op("Einsum", mixed, net.weight("wo", 2, 5, 3), out="scores", equation="bshd,hdo")
    mean = net.op("ReduceMean", output, net.constant("s.axis", np.array([2])), out="y", keepdims=0)
    return net.finish({"x": (FLOAT, ["N", LENGTH, 3])}, mean, 3)


MODELS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "einsum": build_einsum,
    "normalized": build_normalized,
    "recurrent": build_recurrent,
}


def draw(name: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(4)
    shape = (3, 4, 4) if name == "normalized" else (LENGTH, 3)
    x = random.standard_normal((STEPS * BATCH, *shape)).astype(np.float32)
    return {"x": x, "labels": random.integers(0, 3, STEPS * BATCH)}


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_trains_as_the_whole_model(
    name: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_wholes(monkeypatch)
    prepared = prepare(open_model(MODELS[name]()))
    tensors = [found.tensor for found in list_cuts(prepared, None)]
    assert len(tensors) > 1
    tensors = tensors[:: max(1, len(tensors) // 3)]
    pairs = list(combinations(tensors, 2))[:2]
    for at, tail_at in [*((tensor, ()) for tensor in tensors), *pairs]:
        bundle = cut_prepared(
            prepared, at=at, tail_at=tail_at, loss="cross-entropy",
            client_target=target, server_target=target,
        )  # fmt: skip
        verification = verify(bundle, draw(name), steps=STEPS, batch_size=BATCH)
        assert len(verification.steps) == STEPS
        assert verification.largest_difference <= 1e-5, (at, tail_at)
