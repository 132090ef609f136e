"""Models that read their own outputs of the step before, with data for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.support.nets import FLOAT, INT64, Arrays, Net

RECURRENT = {"h_out": "h_in"}
"""The state of :func:`build_recurrent`."""
AVERAGES = {"mean_out": "mean_in", "count_out": "count_in"}
"""The states of :func:`build_averages`."""
BATCH = 4


def build_recurrent(initial: np.ndarray | None = None) -> onnx.ModelProto:
    """A recurrent cell whose state decays, and two layers behind it.

    ``a`` is read from the data alone, ``s`` from data and state, and ``h`` is the new state.
    ``initial`` is stored in the file as the state's value.
    """
    net = Net()
    read = net.op("MatMul", "x", net.weight("w", 3, 5), out="a")
    kept = net.op("Mul", "h_in", net.constant("decay", np.full(5, 0.5, np.float32)), out="kept")
    joined = net.op("Add", read, net.op("MatMul", kept, net.weight("r", 5, 5), out="b"), out="s")
    hidden = net.op("Tanh", joined, out="h")
    net.op("Identity", hidden, out="h_out")
    value = net.op("Relu", net.op("MatMul", hidden, net.weight("v", 5, 6), out="z"), out="p")
    net.op("MatMul", value, net.weight("u", 6, 2), out="y")
    size = "N" if initial is None else BATCH
    inputs = {"x": (FLOAT, ["N", 3]), "h_in": (FLOAT, [size, 5])}
    outputs = {"y": (FLOAT, ["N", 2]), "h_out": (FLOAT, ["N", 5])}
    if initial is not None:
        net.constant("h_in", initial)
    return close(net, inputs, outputs)


def build_averages() -> onnx.ModelProto:
    """A layer that is centred by a moving average, and one that counts the steps.

    Neither state has a batch.  ``z`` lies between the two.
    """
    net = Net()
    hidden = net.op("Tanh", net.op("MatMul", "x", net.weight("w1", 3, 5), out="m"), out="h")
    own = net.op("ReduceMean", hidden, net.constant("axis", np.array([0])), out="own", keepdims=0)
    rate = net.constant("rate", np.array(0.25, np.float32))
    step = net.op("Mul", net.op("Sub", own, "mean_in", out="gap"), rate, out="step")
    net.op("Add", "mean_in", step, out="mean_out")
    centred = net.op("Sub", hidden, "mean_in", out="centred")
    value = net.op("MatMul", centred, net.weight("w2", 5, 4), out="z")
    net.op("Add", "count_in", net.constant("one", np.array(1)), out="count_out")
    count = net.op("Cast", "count_in", out="count", to=TensorProto.FLOAT)
    shifted = net.op("Add", net.op("Relu", value, out="p"), count, out="shifted")
    net.op("MatMul", shifted, net.weight("w3", 4, 2), out="y")
    inputs = {"x": (FLOAT, ["N", 3]), "mean_in": (FLOAT, [5]), "count_in": (INT64, [])}
    outputs = {"y": (FLOAT, ["N", 2]), "mean_out": (FLOAT, [5]), "count_out": (INT64, [])}
    return close(net, inputs, outputs)


def close(
    net: Net,
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Mapping[str, tuple[int, Sequence[int | str]]],
) -> onnx.ModelProto:
    """Close a net with several outputs."""
    declared = [
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in values.items()]
        for values in (inputs, outputs)
    ]
    graph = helper.make_graph(net.nodes, "net", *declared, net.weights)
    opsets = [helper.make_opsetid("", net.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model


def draw_data(samples: int) -> Arrays:
    """Draw inputs and labels for either model."""
    random = np.random.default_rng(5)
    return {
        "x": random.standard_normal((samples, 3), np.float32),
        "labels": random.standard_normal((samples, 2), np.float32),
    }
