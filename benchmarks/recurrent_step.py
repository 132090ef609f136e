"""What a Scan costs: a training step of an LSTM against that of the same LSTM unrolled, in one run.

The LSTM is cut as it is, and of unknown length.  The unrolled model is written in standard
operators, one product for the inputs of all steps and about a dozen nodes a step, as splitonnx did
before it wrote Scans.  Both have the same weights, and their losses are compared.  Steps alternate,
so that a drifting machine strikes both alike; the ratio is the median of the pairs' ratios.

    python benchmarks/recurrent_step.py [--steps 100] [--pairs 30] [--target training]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from splitonnx.names import Target
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.rewrites.cells import Cell, Function, step_lstm
from splitonnx.runtime.client.clients import Client

SIZES = ((4, 8, 6), (64, 64, 32), (128, 256, 32), (64, 128, 1))
"""Inputs, hidden units, and sequences of a batch."""
FLOAT = ir.DataType.FLOAT
Arrays = Mapping[str, np.ndarray]


def draw_weights(size: int, hidden: int) -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"w": (4 * hidden, size), "r": (4 * hidden, hidden), "b": (8 * hidden,)}
    shapes["v"] = (hidden, 4)
    return {n: random.normal(0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()}


def write_lstm(weights: Arrays) -> onnx.ModelProto:
    """Write an LSTM of unknown length; the loss is computed from its last state."""
    hidden, size = weights["v"].shape[0], weights["w"].shape[1]
    stored = {n: weights[n][None] for n in "wrb"} | {"v": weights["v"]}
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r", "b"], ["", "last"], hidden_size=hidden),
        helper.make_node("Squeeze", ["last", "axis"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "lstm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "N", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(a, n) for n, a in {**stored, "axis": np.array([0])}.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def write_unrolled(weights: Arrays, steps: int) -> onnx.ModelProto:
    """Write the same network with ``steps`` steps, one after the other."""
    hidden, size = weights["v"].shape[0], weights["w"].shape[1]
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape([steps, "N", size]))
    held = {n: ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in weights.items()}
    for value in held.values():
        assert value.const_value is not None
        value.type, value.shape = ir.TensorType(FLOAT), value.const_value.shape  # type: ignore[assignment]
    builder = NodeBuilder("unrolled")
    rows = builder.op("Reshape", x, builder.integers([-1, size]))
    biases = builder.op("Reshape", held["b"], builder.integers([2, -1]))
    bias = builder.op("ReduceSum", biases, builder.integers([0]), keepdims=0)
    product = builder.op("Gemm", rows, held["w"], bias, transB=1)
    parts = builder.ops("Split", [product], steps, {"axis": 0, "num_outputs": steps})
    functions = [Function(kind="sigmoid"), Function(kind="tanh"), Function(kind="tanh")]
    cell = Cell(hidden=hidden, functions=functions, recurrent=held["r"], dtype=FLOAT)
    shape = builder.op("Concat", builder.shape(x, 1, 2), builder.integers([hidden]), axis=0)
    zero = builder.op("Expand", builder.number(0.0, FLOAT), shape)
    state: tuple[ir.Value, ...] = (zero, zero)
    for part in parts:
        state = step_lstm(builder, cell, [part], state)
    y = builder.op("MatMul", state[0], held["v"])
    y.name, y.type, y.shape = "y", ir.TensorType(FLOAT), ir.Shape(["N", 4])
    graph = ir.Graph(
        [x], [y], nodes=builder.nodes, initializers=[*held.values()],
        opset_imports={"": 18}, name="unrolled",
    )  # fmt: skip
    proto: onnx.ModelProto = ir.to_proto(ir.Model(graph, ir_version=8))
    return proto


def measure(client: Client, batch: Arrays) -> tuple[float, float]:
    """Time one step, in seconds, and return its loss as well."""
    start = time.perf_counter()
    loss = float(client.step(dict(batch))["loss"])
    return time.perf_counter() - start, loss


def open_client(model: onnx.ModelProto, target: Target) -> tuple[Client, float]:
    """Cut a model whole, and return its client and the seconds that the cut took."""
    start = time.perf_counter()
    bundle = cut(model, at=None, loss="mse", client_target=target)
    return Client(bundle.client, threads=1), time.perf_counter() - start


def compare(sizes: tuple[int, int, int], steps: int, pairs: int, target: Target) -> None:
    size, hidden, rows = sizes
    weights, random = draw_weights(size, hidden), np.random.default_rng(1)
    batch = {
        "x": random.standard_normal((steps, rows, size), np.float32),
        "labels": random.standard_normal((rows, 4), np.float32),
    }
    scan, scan_cut = open_client(write_lstm(weights), target)
    unrolled, unrolled_cut = open_client(write_unrolled(weights, steps), target)
    with scan, unrolled:
        for _ in range(3):
            measure(scan, batch), measure(unrolled, batch)
        timed = [(measure(scan, batch), measure(unrolled, batch)) for _ in range(pairs)]
    losses = np.array([[one[1] for one in pair] for pair in timed])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-3)
    seconds = np.array([[one[0] for one in pair] for pair in timed])
    ratio = float(np.median(seconds[:, 0] / seconds[:, 1]))
    scanning, unrolling = np.median(seconds, axis=0) * 1e3
    print(
        f"{steps} steps, {size} inputs, {hidden} units, {rows} sequences, {target}: "
        f"Scan {scanning:.2f} ms (cut {scan_cut:.1f} s), unrolled {unrolling:.2f} ms "
        f"(cut {unrolled_cut:.1f} s), ratio {ratio:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100, help="steps of each sequence")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of steps that count")
    parser.add_argument("--target", choices=["training", "portable"], default="training")
    options = parser.parse_args()
    for sizes in SIZES:
        compare(sizes, options.steps, options.pairs, options.target)


if __name__ == "__main__":
    main()
