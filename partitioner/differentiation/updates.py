"""Build optimizer updates as graphs of standard ONNX operators.

An update graph reads parameters, gradients and optimizer state, and returns new parameters and
state.  The learning rate and the number of the update are scalar inputs, so the runtime may change
them from step to step.  This module implements the formulas of torch.optim.  It depends on the
cut only through the gradient norms that the parties exchange.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.element_types import ELEMENT_TYPES
from splitonnx.manifests import LEARNING_RATE, STEP, Role, StateSpec
from splitonnx.optimizers import SGD, Adam, AdamW, Optimizer
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.tensors import TensorSpec

OPSET = 18
NEXT = "#next"

_DTYPES = {kind.name: ir.DataType(kind.code) for kind in ELEMENT_TYPES}
_SINGLE, _DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE

_DOUBLINGS = 6
_TERMS = 7
"""Terms of a series whose argument is below 0.3; the omitted rest is smaller than the rounding."""
_SATURATED = 18.0
"""1 - exp(-18) rounds to 1 in single precision."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The vectors of squared gradient norms that all parties together compute, for clipping.

    ``sizes`` maps each vector's name to its length.  Element ``order[i]`` of the vectors,
    concatenated in the order of ``sizes``, belongs to the whole model's ``i``-th parameter.  Summed
    in this order, the norm is bit for bit that of the uncut model.
    """

    sizes: Mapping[str, int]
    order: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update graph, its optimizer state, and which output replaces which state."""

    graph: ir.Graph
    state: tuple[StateSpec, ...]
    commits: Mapping[str, str]


def build_norms(
    parameters: Sequence[TensorSpec], gradients: Mapping[str, str], output: str
) -> ir.Graph:
    """Build the graph that computes each parameter's squared gradient norm, in order, as F32[n]."""
    builder = _Graph("norms")
    squares = []
    for spec in parameters:
        gradient = builder.input(gradients[spec.name], spec.dtype, spec.shape)
        square = builder.op("ReduceSumSquare", gradient, keepdims=0)
        squares.append(builder.op("Reshape", builder.cast(square, _SINGLE), builder.integers([1])))
    joined = builder.op("Concat", *squares, axis=0)
    joined.type = ir.TensorType(ir.DataType.FLOAT)
    joined.shape = ir.Shape([len(squares)])
    return builder.finish({output: joined})


def build_update(
    parameters: Sequence[TensorSpec],
    gradients: Mapping[str, str],
    optimizer: Optimizer,
    norms: Norms | None = None,
    *,
    portable: bool = False,
) -> Update:
    """Build the graph that updates ``parameters``.

    ``gradients`` maps a parameter to the name of its gradient.  If ``optimizer.clip_norm`` is set,
    the vectors of squared norms in ``norms`` become inputs too.  With ``portable``, the graph uses
    double precision only if a parameter has it: ONNX Runtime's builds for GPUs in browsers have no
    kernels for it.
    """
    builder = _Graph("update")
    rate = builder.input(LEARNING_RATE, "F32", ())
    clip = _clip_factor(builder, optimizer, norms)
    is_single = portable and all(spec.dtype != "F64" for spec in parameters)
    shared = _SharedTerms(builder, optimizer, rate, _SINGLE if is_single else _DOUBLE)
    state: list[StateSpec] = []
    outputs: dict[str, ir.Value] = {}
    for spec in parameters:
        parameter = builder.input(spec.name, spec.dtype, spec.shape)
        gradient = builder.input(gradients[spec.name], spec.dtype, spec.shape)
        if clip is not None:
            gradient = builder.op("Mul", gradient, builder.cast(clip, _DTYPES[spec.dtype]))
        step = _update_sgd if isinstance(optimizer, SGD) else _update_adam
        for name, value in step(builder, spec, parameter, gradient, optimizer, shared).items():
            value.type, value.shape = parameter.type, parameter.shape
            outputs[name + NEXT] = value
            if name != spec.name:
                tensor = TensorSpec(name=name, dtype=spec.dtype, shape=spec.shape)
                state.append(StateSpec(tensor=tensor, role=Role.OPTIMIZER))
    return Update(
        graph=builder.finish(outputs),
        state=tuple(state),
        commits={name.removesuffix(NEXT): name for name in outputs},
    )


def _clip_factor(builder: _Graph, optimizer: Optimizer, norms: Norms | None) -> ir.Value | None:
    """min(1, clip_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_."""
    if optimizer.clip_norm is None:
        return None
    assert norms is not None
    vectors = [builder.input(name, "F32", (size,)) for name, size in norms.sizes.items()]
    joined = builder.op("Concat", *vectors, axis=0)
    ordered = builder.op("Gather", joined, builder.integers(list(norms.order)), axis=0)
    norm = builder.op("Sqrt", builder.op("ReduceSum", ordered, keepdims=0))
    padded = builder.op("Add", norm, builder.number(1e-6, _SINGLE))
    factor = builder.op("Div", builder.number(optimizer.clip_norm, _SINGLE), padded)
    return builder.op("Min", factor, builder.number(1.0, _SINGLE))


class _SharedTerms:
    """Scalars that every parameter's update needs, cast to the requested dtype."""

    def __init__(
        self, builder: _Graph, optimizer: Optimizer, rate: ir.Value, exact: ir.DataType
    ) -> None:
        self._builder = builder
        self._terms: dict[tuple[str, ir.DataType], ir.Value] = {}
        self._scalars = {"rate": rate}
        if isinstance(optimizer, Adam):
            betas = (optimizer.beta1, optimizer.beta2)
            step = builder.cast(builder.input(STEP, "I64", ()), _SINGLE)
            correct = _correct_single if exact is _SINGLE else _correct_double
            first, second = correct(builder, betas, step)
            wide = builder.cast(rate, exact)
            decay = builder.op("Mul", wide, builder.number(optimizer.weight_decay, exact))
            self._scalars |= {
                "step_size": builder.op("Div", wide, first),
                "spread": builder.op("Sqrt", second),
                "keep": builder.op("Sub", builder.number(1.0, exact), decay),
            }

    def get(self, name: str, dtype: ir.DataType) -> ir.Value:
        """Return a scalar in ``dtype``, cast once."""
        if (name, dtype) not in self._terms:
            self._terms[name, dtype] = self._builder.cast(self._scalars[name], dtype)
        return self._terms[name, dtype]


def _correct_double(builder: _Graph, betas: Sequence[float], step: ir.Value) -> Sequence[ir.Value]:
    """Build the corrections ``1 - beta**step`` in double precision; beta 0.999 needs the digits."""
    exponent = builder.cast(step, _DOUBLE)
    powers = [builder.op("Pow", builder.number(beta, _DOUBLE), exponent) for beta in betas]
    return [builder.op("Sub", builder.number(1.0, _DOUBLE), power) for power in powers]


def _correct_single(builder: _Graph, betas: Sequence[float], step: ir.Value) -> Sequence[ir.Value]:
    """Build the same corrections in single precision, accurate to some units in the last place.

    With ``q(y) = 1 - exp(-y)`` a correction is ``q(-log(beta) * step)``, and nothing cancels: a
    small y has the series ``y * (1 - y/2 * (1 - y/3 * ...))``, and ``q(2 * y) = q * (2 - q)``.
    Only sums and products are used, which all runtimes round alike.
    """
    rates = [min(-math.log(beta), _SATURATED) if beta else _SATURATED for beta in betas]
    one, two = builder.number(1.0, _SINGLE), builder.number(2.0, _SINGLE)
    y = builder.op("Mul", builder.array(np.array(rates), _SINGLE), step)
    y = builder.op("Min", y, builder.number(_SATURATED, _SINGLE))
    y = builder.op("Mul", y, builder.number(0.5**_DOUBLINGS, _SINGLE))
    series = one
    for term in range(_TERMS, 1, -1):
        share = builder.op("Mul", y, builder.number(1 / term, _SINGLE))
        series = builder.op("Sub", one, builder.op("Mul", share, series))
    made = builder.op("Mul", y, series)
    for _ in range(_DOUBLINGS):
        made = builder.op("Mul", made, builder.op("Sub", two, made))
    return [builder.op("Gather", made, builder.integer(index)) for index in range(len(betas))]


def _decay_gradient(
    builder: _Graph, spec: TensorSpec, parameter: ir.Value, gradient: ir.Value, decay: float
) -> ir.Value:
    if not decay:
        return gradient
    penalty = builder.op("Mul", parameter, builder.number(decay, _DTYPES[spec.dtype]))
    return builder.op("Add", gradient, penalty)


def _update_sgd(
    builder: _Graph,
    spec: TensorSpec,
    parameter: ir.Value,
    gradient: ir.Value,
    optimizer: Optimizer,
    shared: _SharedTerms,
) -> dict[str, ir.Value]:
    assert isinstance(optimizer, SGD)
    outputs = {}
    direction = _decay_gradient(builder, spec, parameter, gradient, optimizer.weight_decay)
    if optimizer.momentum:
        name = f"{spec.name}#momentum"
        velocity = builder.input(name, spec.dtype, spec.shape)
        kept = builder.op("Mul", velocity, builder.number(optimizer.momentum, _DTYPES[spec.dtype]))
        direction = outputs[name] = builder.op("Add", kept, direction)
    change = builder.op("Mul", direction, shared.get("rate", _DTYPES[spec.dtype]))
    return {spec.name: builder.op("Sub", parameter, change), **outputs}


def _update_adam(
    builder: _Graph,
    spec: TensorSpec,
    parameter: ir.Value,
    gradient: ir.Value,
    optimizer: Optimizer,
    shared: _SharedTerms,
) -> dict[str, ir.Value]:
    """p -= lr / (1 - b1**t) * m / (sqrt(v) / sqrt(1 - b2**t) + eps)."""
    assert isinstance(optimizer, Adam)
    dtype = _DTYPES[spec.dtype]
    if isinstance(optimizer, AdamW):
        if optimizer.weight_decay:
            parameter = builder.op("Mul", parameter, shared.get("keep", dtype))
    else:
        gradient = _decay_gradient(builder, spec, parameter, gradient, optimizer.weight_decay)

    def blend(name: str, beta: float, value: ir.Value) -> ir.Value:
        old = builder.input(name, spec.dtype, spec.shape)
        kept = builder.op("Mul", old, builder.number(beta, dtype))
        return builder.op("Add", kept, builder.op("Mul", value, builder.number(1.0 - beta, dtype)))

    first, second = f"{spec.name}#exp_avg", f"{spec.name}#exp_avg_sq"
    mean = blend(first, optimizer.beta1, gradient)
    square = blend(second, optimizer.beta2, builder.op("Mul", gradient, gradient))
    spread = builder.op("Div", builder.op("Sqrt", square), shared.get("spread", dtype))
    ratio = builder.op("Div", mean, builder.op("Add", spread, builder.number(optimizer.eps, dtype)))
    change = builder.op("Mul", ratio, shared.get("step_size", dtype))
    return {spec.name: builder.op("Sub", parameter, change), first: mean, second: square}


class _Graph(NodeBuilder):
    """A graph under construction: nodes and their graph inputs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._name = name
        self._inputs: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int | str | None]) -> ir.Value:
        """Declare a graph input, or return it if already declared."""
        if name not in self._inputs:
            self._inputs[name] = ir.Value(
                name=name, type=ir.TensorType(_DTYPES[dtype]), shape=ir.Shape(list(shape))
            )
        return self._inputs[name]

    def finish(self, outputs: Mapping[str, ir.Value]) -> ir.Graph:
        """Return the finished graph; each output is renamed to its key in ``outputs``."""
        for output, value in outputs.items():
            value.name = output
        inputs = [value for value in self._inputs.values() if value.uses()]
        return ir.Graph(
            inputs,
            list(outputs.values()),
            nodes=self.nodes,
            name=self._name,
            opset_imports={"": OPSET},
        )
