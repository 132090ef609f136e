"""What onnxruntime-training can put into a graph: each of it has a lowering, or cannot occur."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state

from splitonnx.partitioner.lowerings import LOWERINGS
from tests.support.derivatives import assert_differentiable
from tests.support.zoo import Net

DATA = {"x": np.random.default_rng(0).standard_normal((3, 4, 8), np.float32)}

ABSENT = {
    "BitmaskDropoutGrad": "Dropout is written out before differentiation",
    "ConcatGrad": "the file name of a kernel",
    "ConvTransposeGrad": "rewritten: it has no kernel for the CPU",
    "DropoutGrad": "Dropout is written out before differentiation",
    "FakeQuantGrad": "quantisation is written out before differentiation",
    "FusedSoftmaxCrossEntropyLossInternalGrad": "the name of an optimization for CUDA",
    "GRUGrad": "recurrences are Scans before differentiation",
    "InvertibleLayerNormGrad": "the name of a setting",
    "InvertibleLayerNormalizationGrad": "made by a setting that is off",
    "LSTMGrad": "recurrences are Scans before differentiation",
    "LayerNormGrad": "the name of a kernel's class",
    "LogSoftmaxGrad": "of opsets below 13",
    "PythonOpGrad": "of operators in Python, which no ONNX file holds",
    "ResizeGrad": "rewritten: it has no kernel for the CPU",
    "Scaled_Grad": "the name of a value",
    "SetGrad": "the name of a function",
    "Sized_Grad": "the name of a value",
    "SoftmaxCrossEntropyGrad": "of an operator outside of ONNX",
    "SoftmaxCrossEntropyLossInternalGrad": "its forward operator is made by ORTModule only",
    "SoftmaxDropoutGrad": "Dropout is written out before differentiation",
    "SparseSoftmaxCrossEntropyGrad": "of an operator outside of ONNX",
    "Unqueezed_Grad": "the name of a value",
    "Unsqueezed_Grad": "the name of a value",
}
"""Names that look like gradient operators, and why none of them is in a joint graph."""


def test_every_gradient_operator_of_the_wheel_has_a_lowering_or_cannot_occur() -> None:
    content = Path(onnxruntime_pybind11_state.__file__).read_bytes()
    found = {name.decode() for name in re.findall(rb"(?<!\w)[A-Z]\w*Grad(?:_13)?(?=\0)", content)}
    assert "ConvGrad" in found
    assert found - set(LOWERINGS) == found & set(ABSENT)
    assert not set(LOWERINGS) & set(ABSENT)


def scalar(net: Net, name: str, value: float) -> str:
    return net.constant(name, np.array(value, np.float32))


def project(net: Net, name: str = "w") -> str:
    return net.op("MatMul", "x", net.weight(name, 8, 8), out=f"{name}.product")


def gelu_by_erf(net: Net) -> None:
    h = net.op("Add", project(net), net.weight("b", 8), out="h")
    erf = net.op("Erf", net.op("Div", h, scalar(net, "root", 2**0.5), out="g1"), out="g2")
    doubled = net.op("Mul", h, net.op("Add", erf, scalar(net, "one", 1), out="g3"), out="g4")
    net.op("Mul", doubled, scalar(net, "half", 0.5), out="y")


def gelu_by_tanh(net: Net) -> None:
    h = net.op("Add", project(net), net.weight("b", 8), out="h")
    cube = net.op("Pow", h, scalar(net, "three", 3), out="p0")
    inner = net.op("Add", h, net.op("Mul", cube, scalar(net, "k", 0.044715), out="p1"), out="p2")
    inner = net.op("Mul", inner, scalar(net, "s", (2 / np.pi) ** 0.5), out="p3")
    raised = net.op("Add", net.op("Tanh", inner, out="p4"), scalar(net, "one", 1), out="p5")
    net.op("Mul", net.op("Mul", h, raised, out="p6"), scalar(net, "half", 0.5), out="y")


def gelu_by_sigmoid(net: Net) -> None:
    h = project(net)
    gate = net.op("Sigmoid", net.op("Mul", h, scalar(net, "a", 1.702), out="scaled"), out="gate")
    net.op("Mul", h, gate, out="y")


def scaled_sum(net: Net) -> None:
    parts = [
        net.op("Div", project(net, name), scalar(net, f"{name}.two", 2), out=f"{name}.half")
        for name in "uvw"
    ]
    net.op("Add", net.op("Add", parts[0], parts[1], out="both"), parts[2], out="y")


def biased_softmax(net: Net) -> None:
    net.op("Softmax", net.op("Add", project(net), net.weight("b", 8), out="h"), out="y", axis=-1)


def root_mean_square(net: Net) -> None:
    h = project(net)
    axis = net.constant("axis", np.array([-1]))
    square = net.op("Pow", h, scalar(net, "two", 2), out="square")
    mean = net.op("ReduceMean", square, axis, out="mean")
    root = net.op("Sqrt", net.op("Add", mean, scalar(net, "e", 1e-5), out="raised"), out="root")
    net.op("Mul", net.weight("g", 8), net.op("Div", h, root, out="normal"), out="y")


def scaled_product(net: Net) -> None:
    h = project(net)
    turned = net.op("Transpose", h, out="turned", perm=[0, 2, 1])
    product = net.op("MatMul", turned, h, out="product")
    net.op("Div", product, scalar(net, "eight", 8), out="y")


def rows_apart(net: Net) -> None:
    """get_optimized_model makes a Split of them, one part of which has no gradient."""
    h = project(net)
    rows = [
        net.op("Gather", h, net.constant(f"i{i}", np.array(i)), out=f"row{i}", axis=1)
        for i in range(4)
    ]
    best = net.op("ArgMax", rows[1], out="best", axis=1)
    net.op("Mul", net.op("Cast", best, out="weight", to=1), rows[0], out="y")


def used_mean(net: Net) -> None:
    h = project(net)
    net.op("LayerNormalization", h, net.weight("g", 8), out="normal")
    net.nodes[-1].output.append("mean")
    net.op("Add", "normal", "mean", out="y")


@pytest.mark.parametrize(
    "build",
    [
        biased_softmax,
        gelu_by_erf,
        gelu_by_sigmoid,
        gelu_by_tanh,
        root_mean_square,
        rows_apart,
        scaled_product,
        scaled_sum,
        used_mean,
    ],
    ids=lambda build: build.__name__,
)
def test_what_is_fused_before_differentiation_has_the_same_gradient(
    build: Callable[[Net], None],
) -> None:
    net = Net()
    build(net)
    assert_differentiable(net, DATA)
