"""Build random numbers that depend only on the seed, step, micro-batch and node.

ONNX Runtime draws random numbers from a generator whose state can be neither read nor set, so split
and unsplit training would draw different numbers.  Here, the graph computes the numbers with
integer operators from its input ``splitonnx.key``, so that every runtime can repeat a step exactly.

Element ``i`` of a random tensor is ``mix(i, key, node)``, where ``mix`` is the 32-bit finaliser
"lowbias32" of C. Wellons (public domain, nullprogram.com/blog/2018/07/31).  ONNX Runtime cannot
multiply uint32, so products are computed in 64 bits and truncated to 32
bits.  One half of the key is used before the mixing and the other half within it.

Only the random operators of the training form are computed from the key.  Those of the inference
form, and those in bodies, are drawn by ONNX Runtime: :func:`correct_draws` writes in other
operators what its kernels draw otherwise than ONNX says, or what would end the process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import KEY
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_bodies

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
"""Multipliers of lowbias32, reduced modulo 2**32 so that products with a uint32 fit in int64."""
_SPREAD = (0x3243F6A9, 0x2B7E1517, 0x1B873593)
"""Odd constants below 2**30; the key's seed, step and micro-batch are multiplied by them."""
_FLOAT = ir.DataType.FLOAT


def find_key(graph: ir.Graph) -> ir.Value:
    """Return the graph's input for the random key; add the input if it is missing."""
    for value in graph.inputs:
        if value.name == KEY:
            return value
    key = ir.Value(name=KEY, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([3]))
    graph.inputs.append(key)
    return key


def draw_words(builder: NodeBuilder, key: ir.Value, name: str, shape: ir.Value) -> ir.Value:
    """Build an int64 tensor of the given shape, with random integers from 0 to 2**32 - 1.

    Nodes with different names get different numbers for the same key.
    """

    def word(value: ir.Value) -> ir.Value:
        return builder.cast(value, ir.DataType.UINT32)

    def long(value: ir.Value) -> ir.Value:
        return builder.cast(value, ir.DataType.INT64)

    def xor(one: ir.Value, other: ir.Value) -> ir.Value:
        return _typed(builder.op("BitwiseXor", one, other), ir.DataType.UINT32)

    def fold(value: ir.Value, shift: int) -> ir.Value:
        places = builder.number(shift, ir.DataType.UINT32)
        return xor(value, builder.op("BitShift", value, places, direction="RIGHT"))

    def multiply(value: ir.Value, factor: int) -> ir.Value:
        product = builder.op("Mul", long(value), builder.integer(factor))
        return word(_typed(product, ir.DataType.INT64))

    def scramble(value: ir.Value, *, within: ir.Value | None = None) -> ir.Value:
        value = multiply(fold(value, 16), _MULTIPLIERS[0])
        if within is not None:
            value = xor(value, within)
        return fold(multiply(fold(value, 15), _MULTIPLIERS[1]), 16)

    spread = builder.op(
        "Mul", builder.op("Mod", key, builder.integer(2**31)), builder.integers(_SPREAD)
    )
    total = builder.op("ReduceSum", spread, keepdims=0)
    named = builder.op("Add", total, builder.integer(zlib.crc32(name.encode())))
    first = scramble(word(named))
    second = scramble(xor(first, builder.number(0x5BD1E995, ir.DataType.UINT32)))
    count = builder.op("ReduceProd", shape, keepdims=0)
    index = builder.op("Range", builder.integer(0), count, builder.integer(1))
    mixed = scramble(word(builder.op("Add", index, long(first))), within=second)
    return _typed(builder.op("Reshape", long(mixed), shape), ir.DataType.INT64)


def correct_draws(graph: ir.Graph) -> None:
    """Replace the random operators that ONNX Runtime draws wrongly, in place and in bodies too.

    ONNX Runtime's Bernoulli draws 1 with probability ``1 - p``.  It is written as a comparison of
    ``p`` with a RandomUniformLike, which keeps the node's name and seed; no gradient passes to
    ``p``, because the result is a step function of it.  A normal distribution of scale 0, which
    would end the process, is written as its mean.

    Raises:
        UnsupportedModel: the scale of a normal distribution is below 0, or the bounds of a uniform
            distribution are in the wrong order.
    """
    for node in list(graph):
        for body in list_bodies(node):
            correct_draws(body)
        if node.domain:
            continue
        _check_distribution(node)
        builder = NodeBuilder(f"{node.outputs[0].name}/drawn")
        if node.op_type == "Bernoulli":
            builder.replace(node, [_compare_with_uniform(builder, node)])
        elif node.op_type in _NORMAL and node.attributes.get_float("scale", 1.0) == 0:
            builder.replace(node, [_repeat_mean(builder, node)])


def _check_distribution(node: ir.Node) -> None:
    """Check the attributes of a normal or uniform distribution.

    Raises:
        UnsupportedModel: as :func:`correct_draws` says.
    """
    subject = f"node '{node.name}' ({node.op_type})"
    if node.op_type in _NORMAL:
        scale = node.attributes.get_float("scale", 1.0)
        if not scale >= 0:  # NaN is refused too
            raise UnsupportedModel(
                subject,
                f"its scale is {scale:g}, but a standard deviation is at least 0",
                f"export the model with a scale of {abs(scale):g}, which draws the same numbers"
                if scale < 0
                else "export the model with a number as the scale",
            )
    elif node.op_type in _UNIFORM:
        low, high = (node.attributes.get_float(*bound) for bound in (("low", 0.0), ("high", 1.0)))
        if not low <= high:
            raise UnsupportedModel(
                subject,
                f"it draws numbers from {low:g} to {high:g}, but 'low' is at most 'high'",
                "export the model with the smaller number as 'low'",
            )


def _compare_with_uniform(builder: NodeBuilder, node: ir.Node) -> ir.Value:
    """Build what a Bernoulli draws: 1 where a uniform number in [0, 1) is below ``p``, else 0."""
    (p,) = node.inputs
    assert p is not None
    seed = node.attributes.get_float("seed", None)
    drawn = builder.op(
        "RandomUniformLike", p, dtype=_FLOAT.value, **({} if seed is None else {"seed": seed})
    )
    drawn.shape = p.shape
    maker = _typed(drawn, _FLOAT).producer()
    assert maker is not None
    maker.name = node.name
    chance = builder.cast(builder.detach(p), _FLOAT)
    is_one = _typed(builder.op("Less", drawn, chance), ir.DataType.BOOL)
    return builder.cast(is_one, _find_dtype(node))


def _repeat_mean(builder: NodeBuilder, node: ir.Node) -> ir.Value:
    """Build the mean of a normal distribution, in the shape of what would be drawn."""
    mean = node.attributes.get_float("mean", 0.0)
    dtype = _find_dtype(node)
    filled = builder.op("Expand", builder.number(mean, dtype), _find_shape(builder, node))
    return _typed(filled, dtype or _FLOAT)


def _find_dtype(node: ir.Node) -> ir.DataType | None:
    """Return the type of what a random operator draws: its ``dtype``, or else that of its input."""
    declared = node.attributes.get_int("dtype", 0)
    if declared:
        return ir.DataType(declared)
    return node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else _FLOAT


def _find_shape(builder: NodeBuilder, node: ir.Node) -> ir.Value:
    """Return the shape of a node's output, which is that of its input if it has an input."""
    if node.inputs and node.inputs[0] is not None:
        return builder.shape(node.inputs[0])
    return builder.integers(node.attributes.get_ints("shape"))


def seed_random_operators(graph: ir.Graph) -> None:
    """Replace every random operator, in place, with nodes that compute its numbers from the key.

    The numbers depend on the node's name, and on its ``seed`` attribute if it is set.
    :func:`correct_draws` must have been called before, which leaves no Bernoulli.

    Raises:
        UnsupportedModel: the rank of a Multinomial's input is not known.
    """
    for node in [node for node in graph if node.op_type in _DRAWS and not node.domain]:
        builder = NodeBuilder(f"{node.outputs[0].name}/drawn")
        draw = _Source(builder=builder, key=find_key(graph), node=node)
        builder.replace(node, [_DRAWS[node.op_type](draw)])


class _Source:
    """Helper for building the random numbers of one node."""

    def __init__(self, builder: NodeBuilder, key: ir.Value, node: ir.Node) -> None:
        self.builder, self.node, self._key = builder, node, key
        seed = node.attributes.get_float("seed", None)
        self._name = (node.name or "") + ("" if seed is None else f"/{seed}")

    @property
    def x(self) -> ir.Value:
        """The node's input."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    def shape(self) -> ir.Value:
        """Return the shape of the node's output, which is that of its input if it has an input."""
        return _find_shape(self.builder, self.node)

    def number(self, name: str, default: float) -> ir.Value:
        """Return a float attribute of the node as a scalar."""
        return self.builder.number(self.node.attributes.get_float(name, default), _FLOAT)

    def uniform(self, shape: ir.Value, *, label: str = "", above_zero: bool = False) -> ir.Value:
        """Build uniform random multiples of 2**-24 in [0, 1), or in (0, 1] with ``above_zero``."""
        builder = self.builder
        words = draw_words(builder, self._key, f"{self._name}{label}", shape)
        steps = builder.op("Div", words, builder.integer(2**8))
        if above_zero:
            steps = builder.op("Add", steps, builder.integer(1))
        steps = builder.op("Cast", steps, to=_FLOAT.value)
        return builder.op("Mul", steps, builder.number(2.0**-24, _FLOAT))

    def finish(self, value: ir.Value) -> ir.Value:
        """Return ``value`` cast to the node's ``dtype``, which by default is that of its input."""
        declared = self.node.attributes.get_int("dtype", 0)
        dtype = self.x.dtype if not declared and self.node.inputs else None
        return self.builder.op("Cast", value, to=declared or (dtype or _FLOAT).value)


def _draw_uniform(source: _Source) -> ir.Value:
    """Build uniform random numbers ``low + u * (high - low)``, for ``u`` in [0, 1)."""
    builder = source.builder
    low, high = source.number("low", 0.0), source.number("high", 1.0)
    scaled = builder.op("Mul", source.uniform(source.shape()), builder.op("Sub", high, low))
    return source.finish(builder.op("Add", low, scaled))


def _draw_normal(source: _Source) -> ir.Value:
    """Build normal random numbers ``mean + scale * sqrt(-2 ln u) * cos(2 pi v)``.

    This is the Box-Muller transform, for uniform ``u`` in (0, 1] and ``v`` in [0, 1).
    """
    builder, shape = source.builder, source.shape()
    u = source.uniform(shape, label="/u", above_zero=True)
    v = source.uniform(shape, label="/v")
    radius = builder.op(
        "Sqrt", builder.op("Mul", builder.op("Log", u), builder.number(-2.0, _FLOAT))
    )
    angle = builder.op("Cos", builder.op("Mul", v, builder.number(2 * math.pi, _FLOAT)))
    scaled = builder.op("Mul", builder.op("Mul", radius, angle), source.number("scale", 1.0))
    return source.finish(builder.op("Add", scaled, source.number("mean", 0.0)))


def _draw_multinomial(source: _Source) -> ir.Value:
    """Build random classes: count the classes whose cumulative probability is at most ``u``.

    ``u`` is uniform in [0, 1).

    Raises:
        UnsupportedModel: the input is not known to have two dimensions.
    """
    builder, scores, node = source.builder, source.x, source.node
    samples = node.attributes.get_int("sample_size", 1)
    if scores.shape is None or len(scores.shape) != 2:
        raise UnsupportedModel(
            f"node '{node.name}' (Multinomial)", "its input is not known to be [batch, classes]"
        )
    scores = builder.op("Cast", builder.detach(scores), to=_FLOAT.value)
    chance = builder.op("Softmax", scores, axis=-1)
    cumulated = builder.op("CumSum", chance, builder.integer(1))  # (N, classes)
    shape = builder.op("Concat", builder.shape(source.x, 0, 1), builder.integers([samples]), axis=0)
    u = source.uniform(shape)  # (N, samples)
    last = builder.op("Unsqueeze", u, builder.integers([2]))
    passed = builder.op(
        "LessOrEqual", builder.op("Unsqueeze", cumulated, builder.integers([1])), last
    )  # (N, samples, classes)
    count = builder.op(
        "ReduceSum", builder.op("Cast", passed, to=ir.DataType.INT64.value),
        builder.integers([2]), keepdims=0,
    )  # fmt: skip
    most = builder.op(
        "Sub", builder.op("Squeeze", builder.shape(source.x, 1, 2)), builder.integer(1)
    )
    declared = node.attributes.get_int("dtype", ir.DataType.INT32.value)
    return builder.op("Cast", builder.op("Min", count, most), to=declared)


_NORMAL = frozenset({"RandomNormal", "RandomNormalLike"})
_UNIFORM = frozenset({"RandomUniform", "RandomUniformLike"})
_DRAWS: Mapping[str, Callable[[_Source], ir.Value]] = {
    "Multinomial": _draw_multinomial,
    "RandomNormal": _draw_normal,
    "RandomNormalLike": _draw_normal,
    "RandomUniform": _draw_uniform,
    "RandomUniformLike": _draw_uniform,
}
"""Map each random operator but Bernoulli to the function that computes its numbers from the key."""


def _typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Set a value's type so that no Cast to the same type is built, and return the value."""
    value.type = ir.TensorType(dtype)
    return value
