"""The models that attacks are made with, and bundles cut from them by the command line."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.attacks.processes import Checkout
from tests.support.zoo import FLOAT, Net


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A bundle on disk."""

    bundle: Path

    @property
    def client(self) -> Path:
        return self.bundle / "client"

    @property
    def server(self) -> Path:
        return self.bundle / "server"

    def copy(self, folder: Path) -> Cut:
        """Copy the bundle into a folder of its own."""
        return Cut(bundle=Path(shutil.copytree(self.bundle, folder / "bundle")))


def cut_model(checkout: Checkout, model: Path, folder: Path, *options: object) -> Cut:
    """Cut a model by the command line."""
    checkout.must("cut", model, *options, "-o", folder / "bundle")
    return Cut(bundle=folder / "bundle")


def cut_digits(checkout: Checkout, folder: Path) -> Cut:
    """Cut the quickstart's model as the quickstart does."""
    return cut_model(
        checkout, checkout.root / "examples" / "digits.onnx", folder,
        "--at", "/block1/Relu_output_0", "--tail-at", "/block3/MaxPool_1_output_0",
        "--optimizer", "adamw", "--lr", "1e-3",
    )  # fmt: skip


def save(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a model into a folder."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def build_pictures() -> onnx.ModelProto:
    """Conv-Relu, 1x1 Conv-Relu, pool, MatMul, on pictures of any size; weights above zero."""
    net = Net()
    net.constant("w1", np.full((4, 2, 3, 3), 0.05, np.float32))
    net.constant("w2", np.full((4, 4, 1, 1), 0.25, np.float32))
    value = net.op("Conv", "x", "w1", out="c1", pads=[1, 1, 1, 1])
    value = net.op("Relu", value, out="r1")
    value = net.op("Conv", value, "w2", out="c2")
    value = net.op("Relu", value, out="r2")
    value = net.op("Flatten", net.op("GlobalAveragePool", value, out="pool"), out="flat")
    output = net.op("MatMul", value, net.weight("w3", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 2, "H", "W"])}, output, 3)


def build_rows() -> onnx.ModelProto:
    """Sequences of any length: MatMul-Relu, a mean over the sequence, two wide layers."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 16, 16), out="m1")
    value = net.op("Relu", value, out="r1")
    value = net.op("ReduceMean", value, net.constant("axes", np.array([1])), out="mean", keepdims=0)
    value = net.op("MatMul", value, net.weight("w2", 16, 64), out="wide")
    value = net.op("Relu", value, out="r2")
    output = net.op("MatMul", value, net.weight("w3", 64, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", "T", 16])}, output, 3)


def build_wide() -> onnx.ModelProto:
    """Rows of 16 numbers that become 1,024 behind the cut."""
    net = Net()
    value = net.op("Relu", net.op("MatMul", "x", net.weight("w1", 16, 16), out="m1"), out="r1")
    value = net.op("MatMul", value, net.weight("w2", 16, 1024), out="wide")
    value = net.op("MatMul", net.op("Relu", value, out="r2"), net.weight("w3", 1024, 16), out="m3")
    value = net.op("Relu", value, out="r3")
    output = net.op("MatMul", value, net.weight("w4", 16, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 16])}, output, 3)


def build_polynomials(rounds: int = 25) -> onnx.ModelProto:
    """Nodes that each join what came before with itself: dimensions that are ever longer sums."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 4), out="first")
    shape = net.op("Shape", "x", out="shape")
    size = net.op("Gather", shape, net.constant("zero", np.array(0)), out="n")
    other = net.op("Gather", shape, net.constant("one", np.array(1)), out="m")
    for number in range(rounds):
        total = net.op("Add", size, other, out=f"sum{number}")
        size, other = other, net.op("Mul", total, size, out=f"product{number}")
    ones = net.op("Unsqueeze", other, net.constant("axis", np.array([0])), out="ones")
    filler = net.op("Expand", net.constant("zeros", np.zeros(1, np.float32)), ones, out="filler")
    least = net.op("ReduceMin", filler, out="least", keepdims=0)
    output = net.op("Add", value, least, out="y")
    graph = helper.make_graph(
        net.nodes,
        "polynomials",
        [helper.make_tensor_value_info("x", FLOAT, ["N", "M", 4])],
        [helper.make_tensor_value_info(output, FLOAT, ["N", "M", 4])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def build_loop(trips: int = 1000) -> onnx.ModelProto:
    """A Loop of constant length."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("MatMul", ["carried", "w1"], ["moved"]),
            helper.make_node("Tanh", ["moved"], ["carried_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried_out", FLOAT, None),
        ],
    )
    net = Net()
    net.weight("w1", 4, 4)
    net.constant("trips", np.array(trips))
    net.constant("go", np.array(True))
    net.op("Loop", "trips", "go", "x", out="first", body=body)
    output = net.op("MatMul", "first", net.weight("w2", 4, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 3)


def build_plain(nodes: int) -> onnx.ModelProto:
    """Plain nodes in a row."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 4), out="first")
    for number in range(nodes):
        value = net.op("Tanh" if number % 2 else "Relu", value, out=f"a{number}")
    output = net.op("MatMul", value, net.weight("w2", 4, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 3)


def build_recurrence(steps: int = 10_000) -> onnx.ModelProto:
    """An LSTM over a sequence of constant length."""
    net = Net()
    net.weight("w", 1, 16, 4)
    net.weight("r", 1, 16, 4)
    net.nodes.append(
        helper.make_node("LSTM", ["x", "w", "r"], ["", "last"], name="lstm", hidden_size=4)
    )
    value = net.op("Squeeze", "last", net.constant("axis", np.array([0])), out="first")
    output = net.op("MatMul", value, net.weight("w2", 4, 3), out="y")
    return net.finish({"x": (FLOAT, [steps, "N", 4])}, output, 3)


def make_endless(graph: bytes) -> bytes:
    """Put a Loop that never ends before a stage's first node."""
    model = onnx.load_from_string(graph)
    first = model.graph.node[0]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["endless.go_in"], ["endless.go_out"]),
            helper.make_node("Identity", ["endless.carried"], ["endless.carried_out"]),
        ],
        "endless",
        [
            helper.make_tensor_value_info("endless.number", TensorProto.INT64, []),
            helper.make_tensor_value_info("endless.go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("endless.carried", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("endless.go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("endless.carried_out", FLOAT, None),
        ],
    )
    kept = first.input[0]
    loop = helper.make_node(
        "Loop", ["endless.trips", "endless.go", kept], ["endless.out"], body=body, name="endless"
    )
    first.input[0] = "endless.out"
    model.graph.node.insert(0, loop)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(2**62), "endless.trips"),
            numpy_helper.from_array(np.array(True), "endless.go"),
        ]
    )
    return bytes(model.SerializeToString())
