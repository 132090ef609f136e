"""Small models that between them have what makes cutting hard, for the tests to cut everywhere.

Each is a few dozen weights, seeded, with a dynamic batch.  Parameters whose gradient is zero by
construction (a bias right before BatchNormalization) are left out: Adam would turn their rounding
noise into whole steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.support.nets import FLOAT, INT64, Arrays, Net
from tests.support.zoo_images import (
    build_batchnorm_frozen,
    build_batchnorm_trained,
    build_convolutions,
    build_dropout,
    build_pools,
    build_upsampling,
    build_wide_convolutions,
)

__all__ = ["FLOAT", "INT64", "ZOO", "Arrays", "Entry", "Net"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of the zoo with the data that it takes.

    ``several`` names a set of tensors that only together divide the model.
    """

    build: Callable[[], onnx.ModelProto]
    inputs: Mapping[str, tuple[int, ...]]
    labels: Callable[[np.random.Generator, int], np.ndarray]
    loss: str = "cross-entropy"
    several: tuple[str, ...] = ()
    integers: Mapping[str, int] = field(default_factory=dict)

    def data(self, samples: int, seed: int = 7) -> Arrays:
        """Draw inputs and labels."""
        random = np.random.default_rng(seed)
        arrays: Arrays = {}
        for name, shape in self.inputs.items():
            if name in self.integers:
                arrays[name] = random.integers(0, self.integers[name], (samples, *shape))
            else:
                arrays[name] = random.standard_normal((samples, *shape), np.float32)
        return {**arrays, "labels": self.labels(random, samples)}


def _classes(count: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda random, samples: random.integers(0, count, samples)


def _targets(width: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda random, samples: random.standard_normal((samples, width), np.float32)


def _bits(width: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda random, samples: random.integers(0, 2, (samples, width)).astype(np.float32)


def _mlp(net: Net, source: str, sizes: Sequence[int], kinds: Sequence[str]) -> str:
    for index, (width, size, kind) in enumerate(zip(sizes[:-1], sizes[1:], kinds, strict=True)):
        weight, bias = net.weight(f"w{index}", size, width), net.weight(f"b{index}", size)
        source = net.op("Gemm", source, weight, bias, out=f"linear{index}", transB=1)
        if kind:
            source = net.op(kind, source, out=f"act{index}")
    return source


def build_chain() -> onnx.ModelProto:
    """A multilayer perceptron with four kinds of activation."""
    net = Net()
    kinds = ["Relu", "Tanh", "Sigmoid", "LeakyRelu", ""]
    output = _mlp(net, "x", [6, 8, 7, 8, 6, 4], kinds)
    return net.finish({"x": (FLOAT, ["N", 6])}, output, 4)


def build_regression() -> onnx.ModelProto:
    """A perceptron with two real outputs."""
    net = Net()
    output = _mlp(net, "x", [5, 6, 6, 2], ["Tanh", "Relu", ""])
    return net.finish({"x": (FLOAT, ["N", 5])}, output, 2)


def build_residual() -> onnx.ModelProto:
    """A skip connection over two layers: between them no single tensor cuts."""
    net = Net()
    first = net.op("Relu", net.op("MatMul", "x", net.weight("w1", 6, 8), out="m1"), out="r1")
    inner = net.op("Tanh", net.op("MatMul", first, net.weight("w2", 8, 8), out="m2"), out="t2")
    inner = net.op("MatMul", inner, net.weight("w3", 8, 8), out="m3")
    joined = net.op("Relu", net.op("Add", inner, first, out="sum"), out="r3")
    output = net.op("MatMul", joined, net.weight("w4", 8, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 6])}, output, 3)


def build_two_inputs() -> onnx.ModelProto:
    """Two branches that join midway."""
    net = Net()
    left = net.op("Tanh", net.op("MatMul", "a", net.weight("wa", 5, 6), out="ma"), out="ta")
    right = net.op("Relu", net.op("MatMul", "b", net.weight("wb", 4, 6), out="mb"), out="rb")
    joined = net.op("Concat", left, right, out="both", axis=1)
    hidden = net.op("Tanh", net.op("MatMul", joined, net.weight("w1", 12, 6), out="m1"), out="t1")
    product = net.op("Mul", hidden, net.op("Sigmoid", hidden, out="gate"), out="gated")
    output = net.op("MatMul", product, net.weight("w2", 6, 3), out="scores")
    return net.finish({"a": (FLOAT, ["N", 5]), "b": (FLOAT, ["N", 4])}, output, 3)


def build_two_streams() -> onnx.ModelProto:
    """Two streams side by side, so that in the middle only pairs of tensors cut."""
    net = Net()
    stem = net.op("Tanh", net.op("MatMul", "x", net.weight("w0", 6, 8), out="m0"), out="t0")
    half = net.constant("halves", np.array([4, 4], np.int64))
    net.nodes.append(helper.make_node("Split", [stem, half], ["s1", "s2"], name="split", axis=1))
    left = net.op("Relu", net.op("MatMul", "s1", net.weight("w1", 4, 5), out="m1"), out="r1")
    right = net.op("Sigmoid", net.op("MatMul", "s2", net.weight("w2", 4, 5), out="m2"), out="g2")
    left = net.op("MatMul", left, net.weight("w3", 5, 5), out="m3")
    joined = net.op("Mul", left, right, out="product")
    output = net.op("MatMul", joined, net.weight("w4", 5, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 6])}, output, 3)


def build_shared_constant() -> onnx.ModelProto:
    """Constants that both sides of most cuts use: a scale, a shape, a node's value."""
    net = Net()
    scale = net.constant("scale", np.array(0.5, np.float32))
    shape = net.constant("shape", np.array([-1, 2, 4], np.int64))
    flat = net.constant("flat", np.array([0, -1], np.int64))
    net.nodes.append(
        helper.make_node(
            "Constant", [], ["shift"], name="shift_node",
            value=numpy_helper.from_array(np.array([0.1], np.float32)),
        )
    )  # fmt: skip
    value = net.op("Mul", net.op("MatMul", "x", net.weight("w1", 6, 8), out="m1"), scale, out="h1")
    value = net.op("Reshape", value, shape, out="grid")
    value = net.op("Add", net.op("Tanh", value, out="t1"), "shift", out="a1")
    value = net.op("Reshape", value, flat, out="row")
    value = net.op("Reshape", net.op("Mul", value, scale, out="h2"), shape, out="grid2")
    value = net.op("Add", net.op("Relu", value, out="r2"), "shift", out="a2")
    value = net.op("Reshape", value, flat, out="row2")
    output = net.op("MatMul", value, net.weight("w2", 8, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 6])}, output, 3)


def build_attention() -> onnx.ModelProto:
    """An encoder layer as torch exports it: attention, LayerNormalization, GELU through Erf."""
    net = Net()
    heads = net.constant("heads", np.array([0, 0, 2, 4], np.int64))
    merged = net.constant("merged", np.array([0, 0, 8], np.int64))

    def project(source: str, name: str) -> str:
        value = net.op("MatMul", source, net.weight(f"w{name}", 8, 8), out=f"{name}_flat")
        value = net.op("Reshape", value, heads, out=f"{name}_heads")
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        return net.op("Transpose", value, out=f"{name}_turned", perm=perm)

    query, key, value = (project("x", name) for name in "qkv")
    scores = net.op("MatMul", query, key, out="products")
    scale = net.constant("scale", np.array(0.5, np.float32))
    weights = net.op("Softmax", net.op("Mul", scores, scale, out="scaled"), out="w", axis=-1)
    mixed = net.op("MatMul", weights, value, out="mixed")
    mixed = net.op("Transpose", mixed, out="turned", perm=[0, 2, 1, 3])
    mixed = net.op("Reshape", mixed, merged, out="rows")
    mixed = net.op("MatMul", mixed, net.weight("wo", 8, 8), out="attended")
    mixed = net.op("Add", mixed, "x", out="residual")
    normal = net.op(
        "LayerNormalization", mixed, net.weight("ln.scale", 8), net.weight("ln.bias", 8),
        out="normal", axis=-1,
    )  # fmt: skip
    hidden = net.op("MatMul", normal, net.weight("w1", 8, 10), out="expanded")
    root = net.constant("root", np.array(np.sqrt(2), np.float32))
    one, half = (net.constant(n, np.array(v, np.float32)) for n, v in (("one", 1), ("half", 0.5)))
    erf = net.op("Erf", net.op("Div", hidden, root, out="divided"), out="erf")
    gelu = net.op("Mul", hidden, net.op("Add", erf, one, out="raised"), out="doubled")
    gelu = net.op("Mul", gelu, half, out="gelu")
    contracted = net.op("MatMul", gelu, net.weight("w2", 10, 8), out="contracted")
    mean = net.op("ReduceMean", contracted, net.constant("seq", np.array([1])), out="mean",
                  keepdims=0)  # fmt: skip
    output = net.op("MatMul", mean, net.weight("w3", 8, 3), out="scores_out")
    return net.finish({"x": (FLOAT, ["N", 5, 8])}, output, 3)


def build_embedding() -> onnx.ModelProto:
    """Integer input, a trained table, the mean over the sequence."""
    net = Net()
    value = net.op("Gather", net.weight("table", 11, 6), "tokens", out="vectors")
    value = net.op("Tanh", value, out="bent")
    value = net.op("ReduceMean", value, net.constant("seq", np.array([1])), out="mean", keepdims=0)
    value = net.op("Relu", net.op("MatMul", value, net.weight("w1", 6, 7), out="m1"), out="r1")
    output = net.op("MatMul", value, net.weight("w2", 7, 3), out="scores")
    return net.finish({"tokens": (INT64, ["N", 4])}, output, 3)


def build_shape_paths() -> onnx.ModelProto:
    """What exporters make of sizes: every target, position and mask comes from the input's Shape.

    A class token is expanded to the batch, positions are numbered to the length of the sequence,
    a mask lets no position look ahead, and the batch appears in a view near the end.
    """
    net = Net()
    first, ahead = net.constant("first", np.array([0])), net.constant("ahead", np.array([1]))
    eight, low = (
        net.constant("eight", np.array([8])),
        net.constant("low", np.array(-1e4, np.float32)),
    )
    shape = net.op("Shape", "x", out="shape")
    batch = net.op("Gather", shape, first, out="batch", axis=0)
    length = net.op("Add", net.op("Gather", shape, ahead, out="steps", axis=0), ahead, out="length")

    value = net.op("MatMul", "x", net.weight("w0", 6, 8), out="m0")
    target = net.op("Concat", batch, ahead, eight, out="token_shape", axis=0)
    token = net.op("Expand", net.weight("token", 1, 1, 8), target, out="tokens")
    value = net.op("Concat", token, value, out="joined", axis=1)
    zero, one = net.constant("zero", np.array(0)), net.constant("one", np.array(1))
    count = net.op("Squeeze", length, first, out="count")
    places = net.op("Range", zero, count, one, out="places")
    value = net.op("Add", value, net.op("Gather", net.weight("table", 9, 8), places, out="rows"),
                   out="placed")  # fmt: skip
    value = net.op("Tanh", value, out="t1")

    square = net.op("Concat", length, length, out="square", axis=0)
    full = numpy_helper.from_array(np.array([1], np.int64))
    ones = net.op("ConstantOfShape", square, out="full", value=full)
    mask = net.op(
        "Cast", net.op("Trilu", ones, out="below", upper=0), out="mask", to=TensorProto.BOOL
    )
    keys = net.op("Transpose", value, out="keys", perm=[0, 2, 1])
    query = net.op("MatMul", value, net.weight("wq", 8, 8), out="query")
    masked = net.op("Where", mask, net.op("MatMul", query, keys, out="products"), low, out="masked")
    weights = net.op("Softmax", masked, out="weights", axis=-1)
    value = net.op("Add", net.op("MatMul", weights, value, out="mixed"), value, out="sum")

    value = net.op("ReduceMean", value, ahead, out="mean", keepdims=0)
    scales = net.op("Expand", net.weight("scale", 1, 8), net.op("Concat", batch, eight, out="wide",
                    axis=0), out="scales")  # fmt: skip
    value = net.op("Mul", value, scales, out="scaled")
    rest = net.constant("rest", np.array([-1]))
    value = net.op(
        "Reshape", value, net.op("Concat", batch, rest, out="view", axis=0), out="viewed"
    )
    output = net.op("MatMul", value, net.weight("w1", 8, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", "T", 6])}, output, 3)


_IMAGE = {"x": (2, 5, 5)}

ZOO: Mapping[str, Entry] = {
    "chain": Entry(build=build_chain, inputs={"x": (6,)}, labels=_classes(4)),
    "residual": Entry(
        build=build_residual, inputs={"x": (6,)}, labels=_classes(3), several=("r1", "m2")
    ),
    "two_inputs": Entry(
        build=build_two_inputs,
        inputs={"a": (5,), "b": (4,)},
        labels=_classes(3),
        several=("ta", "rb"),
    ),
    "two_streams": Entry(
        build=build_two_streams, inputs={"x": (6,)}, labels=_classes(3), several=("r1", "g2")
    ),
    "shared_constant": Entry(build=build_shared_constant, inputs={"x": (6,)}, labels=_classes(3)),
    "batchnorm_trained": Entry(
        build=build_batchnorm_trained, inputs=_IMAGE, labels=_classes(3), several=("r1", "c2")
    ),
    "batchnorm_frozen": Entry(build=build_batchnorm_frozen, inputs=_IMAGE, labels=_classes(3)),
    "dropout": Entry(build=build_dropout, inputs=_IMAGE, labels=_classes(3), several=("d1", "n2")),
    "convolutions": Entry(build=build_convolutions, inputs={"x": (3, 9, 9)}, labels=_classes(3)),
    "wide_convolutions": Entry(
        build=build_wide_convolutions, inputs={"x": (3, 6, 6)}, labels=_classes(3)
    ),
    "pools": Entry(build=build_pools, inputs={"x": (2, 9, 9)}, labels=_classes(3)),
    "upsampling": Entry(build=build_upsampling, inputs={"x": (2, 6, 6)}, labels=_classes(3)),
    "attention": Entry(
        build=build_attention,
        inputs={"x": (5, 8)},
        labels=_classes(3),
        several=("w", "v_turned", "x"),
    ),
    "embedding": Entry(
        build=build_embedding, inputs={"tokens": (4,)}, labels=_classes(3), integers={"tokens": 11}
    ),
    "shape_paths": Entry(build=build_shape_paths, inputs={"x": (4, 6)}, labels=_classes(3)),
    "mse": Entry(build=build_regression, inputs={"x": (5,)}, labels=_targets(2), loss="mse"),
    "l1": Entry(build=build_regression, inputs={"x": (5,)}, labels=_targets(2), loss="l1"),
    "bce": Entry(
        build=build_regression, inputs={"x": (5,)}, labels=_bits(2), loss="bce-with-logits"
    ),
}
