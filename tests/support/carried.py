"""Models that read their own outputs of the step before, with data for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.support.nets import FLOAT, INT64, Arrays, Net

Shapes = Mapping[str, tuple[int, Sequence[int | str]]]
"""Element types and sizes of inputs or outputs, by name."""
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
    inputs: Shapes = {"x": (FLOAT, ["N", 3]), "h_in": (FLOAT, [size, 5])}
    outputs: Shapes = {"y": (FLOAT, ["N", 2]), "h_out": (FLOAT, ["N", 5])}
    if initial is not None:
        net.constant("h_in", initial)
    return close(net, inputs, outputs)


def build_averages(*, is_stored: bool = False) -> onnx.ModelProto:
    """A layer that is centred by a moving average, and one that counts the steps.

    Neither state has a batch.  ``z`` lies between the two.  ``is_stored`` puts zeros into the file
    as their initial values.
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
    if is_stored:
        net.constant("mean_in", np.zeros(5, np.float32))
        net.constant("count_in", np.array(0))
    inputs: Shapes = {"x": (FLOAT, ["N", 3]), "mean_in": (FLOAT, [5]), "count_in": (INT64, [])}
    outputs: Shapes = {"y": (FLOAT, ["N", 2]), "mean_out": (FLOAT, [5]), "count_out": (INT64, [])}
    return close(net, inputs, outputs)


def close(net: Net, inputs: Shapes, outputs: Shapes) -> onnx.ModelProto:
    """Close a net with several outputs."""
    graph = helper.make_graph(net.nodes, "net", declare(inputs), declare(outputs), net.weights)
    opsets = [helper.make_opsetid("", net.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model


def declare(shapes: Shapes) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in shapes.items()]


def draw_data(samples: int) -> Arrays:
    """Draw inputs and labels for either model."""
    random = np.random.default_rng(5)
    return {
        "x": random.standard_normal((samples, 3), np.float32),
        "labels": random.standard_normal((samples, 2), np.float32),
    }


def build_lstm() -> onnx.ModelProto:
    """An LSTM over three steps whose last states are its first ones in the next step."""
    net = Net()
    rows = net.op("Transpose", "x", out="rows", perm=[1, 0, 2])
    weights = [net.weight("W", 1, 16, 3), net.weight("R", 1, 16, 4), net.weight("B", 1, 32)]
    net.nodes.append(
        helper.make_node(
            "LSTM",
            [rows, *weights, "", "h0", "c0"],
            ["Y", "hn", "cn"],
            name="lstm",
            hidden_size=4,
        )
    )
    axes = net.constant("axes", np.array([0]))
    net.op("Squeeze", "hn", axes, out="last")
    net.op("MatMul", "last", net.weight("u", 4, 2), out="y")
    state: tuple[int, Sequence[int | str]] = (FLOAT, [1, "N", 4])
    inputs: Shapes = {"x": (FLOAT, ["N", 3, 3]), "h0": state, "c0": state}
    outputs: Shapes = {"y": (FLOAT, ["N", 2]), "hn": state, "cn": state}
    return close(net, inputs, outputs)


def build_fed_back() -> onnx.ModelProto:
    """A model that reads its prediction of the step before, at two places."""
    net = Net()
    read = net.op("MatMul", "x", net.weight("w", 3, 4), out="a")
    mixed = net.op("MatMul", "before", net.weight("r", 2, 4), out="b")
    hidden = net.op("Tanh", net.op("Add", read, mixed, out="s"), out="h")
    net.op("Add", net.op("MatMul", hidden, net.weight("u", 4, 2), out="z"), "again", out="y")
    inputs: Shapes = {
        "x": (FLOAT, ["N", 3]),
        "before": (FLOAT, ["N", 2]),
        "again": (FLOAT, ["N", 2]),
    }
    return close(net, inputs, {"y": (FLOAT, ["N", 2])})


def build_delayed(initial: np.ndarray | None = None) -> onnx.ModelProto:
    """A layer beside which the raw input of the step before is added: ``s`` holds it.

    ``initial`` is stored in the file as the state's value.
    """
    net = Net()
    mixed = net.op("MatMul", "x", net.weight("w1", 3, 3), out="m")
    value = net.op("Relu", net.op("Add", mixed, "before", out="s"), out="p")
    net.op("MatMul", value, net.weight("w2", 3, 4), out="z")
    net.op("MatMul", net.op("Tanh", "z", out="t"), net.weight("w3", 4, 2), out="y")
    net.op("Identity", "x", out="after")
    size = "N" if initial is None else BATCH
    inputs: Shapes = {"x": (FLOAT, ["N", 3]), "before": (FLOAT, [size, 3])}
    outputs: Shapes = {"y": (FLOAT, ["N", 2]), "after": (FLOAT, ["N", 3])}
    if initial is not None:
        net.constant("before", initial)
    return close(net, inputs, outputs)


def build_replaced(kind: str) -> onnx.ModelProto:
    """Two layers between which a state is added: ``s``; it is replaced by what no data change.

    ``kind`` is ``stored`` for a constant of the file, ``sizes`` for the sizes of the batch, and
    ``sum`` for a constant that is added to the state.
    """
    net = Net()
    hidden = net.op("Tanh", net.op("MatMul", "x", net.weight("w1", 3, 3), out="m"), out="h")
    net.op("Add", net.op("MatMul", hidden, net.weight("w2", 3, 2), out="z"), "old", out="s")
    net.op("MatMul", net.op("Tanh", "s", out="t"), net.weight("w3", 2, 2), out="y")
    if kind == "sizes":
        net.op("Cast", net.op("Shape", "x", out="shape"), out="new", to=TensorProto.FLOAT)
    else:
        stored = net.constant("k", np.array([0.5, -0.25], np.float32))
        net.op(*(("Identity",) if kind == "stored" else ("Add", "old")), stored, out="new")
    inputs: Shapes = {"x": (FLOAT, ["N", 3]), "old": (FLOAT, [2])}
    return close(net, inputs, {"y": (FLOAT, ["N", 2]), "new": (FLOAT, [2])})
