"""Build graphs of standard ONNX operators that update parameters as an optimizer does.

An update graph reads parameters, gradients and optimizer state, and computes new parameters and
state.  The learning rate and the step number are scalar inputs, so they can change from step to
step.  The formulas are the same as in ``torch.optim``.  The cut matters only for gradient clipping,
for which the parties exchange the norms of their gradients.

Where a scalar meets a tensor whose last dimension is 1, it gets as many dimensions as the tensor
has, because ONNX Runtime would broadcast it slowly (:mod:`kernels.scalars`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.element_types import ELEMENT_TYPES
from splitonnx.manifests import LEARNING_RATE, STEP, Role, StateSpec
from splitonnx.optimizers import SGD, Adam, AdamW, Optimizer, ParameterGroup, assign_groups
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.tensors import TensorSpec

OPSET = 18
NEXT = "#next"

_DTYPES = {kind.name: ir.DataType(kind.code) for kind in ELEMENT_TYPES}
_SINGLE, _DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE

_DOUBLINGS = 6
_TERMS = 7
"""Number of terms of the series; its argument is below 0.3, so the rest is below rounding error."""
_SATURATED = 18.0
"""Limit of the exponent: 1 - exp(-18) rounds to 1 in single precision."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The vectors of squared gradient norms that the parties compute for clipping.

    ``sizes`` maps the name of each party's vector to its length.  ``order[i]`` is the position of
    the model's ``i``-th parameter in the concatenated vectors.  If the squares are added in this
    order, the norm has exactly the same bits as without a cut.
    """

    sizes: Mapping[str, int]
    order: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update graph and its optimizer state.

    ``state`` lists the tensors of the optimizer state.  ``commits`` maps the name of each parameter
    and each of these tensors to the graph output that holds its new value.
    """

    graph: ir.Graph
    state: tuple[StateSpec, ...]
    commits: Mapping[str, str]


def name_norms(party: str) -> str:
    """Return the name of a party's vector of squared gradient norms."""
    return f"splitonnx.norms.{party}"


def order_norms(own: Mapping[str, Sequence[TensorSpec]], names: Iterable[str]) -> Norms:
    """Find each parameter's position in the parties' vectors of squared gradient norms.

    ``own`` maps each party to the parameters that it updates, and ``names`` are all in the model's
    order.  The positions count through the vectors of all parties, one after the other.
    """
    places: dict[str, int] = {}
    for place, spec in enumerate(spec for specs in own.values() for spec in specs):
        places.setdefault(spec.name, place)
    return Norms(
        sizes={name_norms(party): len(specs) for party, specs in own.items() if specs},
        order=[places[name] for name in names],
    )


def build_norms(
    parameters: Sequence[TensorSpec], gradients: Mapping[str, str], output: str
) -> ir.Graph:
    """Build a graph that computes the squared gradient norm of each parameter.

    ``gradients`` maps each parameter to the name of its gradient.  The graph's only output is a
    float32 vector of the norms in the order of ``parameters``; ``output`` is its name.
    """
    builder = InputGraph("norms")
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

    ``gradients`` maps each parameter of the model to the name of its gradient.  If
    ``optimizer.clip_norm`` is set, the graph also reads the squared norms that ``norms`` describes.
    A ``portable`` graph uses double precision only if a parameter has double precision, because
    ONNX Runtime has no such kernels for GPUs in browsers.
    """
    builder = InputGraph("update")
    rate = builder.input(LEARNING_RATE, "F32", ())
    clip = _clip_factor(builder, optimizer, norms)
    is_single = portable and all(spec.dtype != "F64" for spec in parameters)
    shared = _SharedTerms(builder, optimizer, rate, _SINGLE if is_single else _DOUBLE)
    groups = assign_groups(optimizer.groups, gradients)
    state: list[StateSpec] = []
    outputs: dict[str, ir.Value] = {}
    for spec in parameters:
        parameter = builder.input(spec.name, spec.dtype, spec.shape)
        gradient = builder.input(gradients[spec.name], spec.dtype, spec.shape)
        if clip is not None:
            factor = builder.fit(builder.cast(clip, _DTYPES[spec.dtype]), spec)
            gradient = builder.op("Mul", gradient, factor)
        rule = shared.choose_rule(groups.get(spec.name))
        step = _update_sgd if isinstance(optimizer, SGD) else _update_adam
        for name, value in step(builder, spec, parameter, gradient, optimizer, rule).items():
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


def _clip_factor(builder: InputGraph, optimizer: Optimizer, norms: Norms | None) -> ir.Value | None:
    """Build the factor by which gradients are multiplied, or return ``None`` without clipping.

    Like in ``torch.nn.utils.clip_grad_norm_``, it is ``min(1, clip_norm / (norm + 1e-6))``.
    """
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


class _Rule:
    """The scalars of the update of one group of parameters; each is computed only once."""

    def __init__(
        self, builder: InputGraph, scalars: Mapping[str, ir.Value], weight_decay: float
    ) -> None:
        self.weight_decay = weight_decay
        self._builder = builder
        self._scalars = scalars
        self._terms: dict[tuple[str, ir.DataType], ir.Value] = {}

    def get(self, name: str, spec: TensorSpec) -> ir.Value:
        """Return the scalar ``name`` for a tensor, in its type; the cast is built only once."""
        dtype = _DTYPES[spec.dtype]
        if (name, dtype) not in self._terms:
            self._terms[name, dtype] = self._builder.cast(self._scalars[name], dtype)
        return self._builder.fit(self._terms[name, dtype], spec)


class _SharedTerms:
    """The scalars that the updates of all parameters share, and the rules of parameter groups."""

    def __init__(
        self, builder: InputGraph, optimizer: Optimizer, rate: ir.Value, exact: ir.DataType
    ) -> None:
        self._builder = builder
        self._optimizer = optimizer
        self._rate = rate
        self._exact = exact
        self._corrections: Sequence[ir.Value] = ()
        if isinstance(optimizer, Adam):
            betas = (optimizer.beta1, optimizer.beta2)
            step = builder.cast(builder.input(STEP, "I64", ()), _SINGLE)
            correct = _correct_single if exact is _SINGLE else _correct_double
            self._corrections = correct(builder, betas, step)
        self._spread: ir.Value | None = None
        self._rules: dict[tuple[float, float], _Rule] = {}

    def choose_rule(self, group: ParameterGroup | None) -> _Rule:
        """Return the scalars of a group, or those of the parameters that are in no group."""
        factor = 1.0 if group is None else group.lr_factor
        decay = self._optimizer.weight_decay
        if group is not None and group.weight_decay is not None:
            decay = group.weight_decay
        if (factor, decay) not in self._rules:
            scalars = self._build_scalars(factor, decay)
            self._rules[factor, decay] = _Rule(self._builder, scalars, decay)
        return self._rules[factor, decay]

    def _build_scalars(self, factor: float, weight_decay: float) -> dict[str, ir.Value]:
        builder, exact, rate = self._builder, self._exact, self._rate
        if not self._corrections:
            return {"rate": rate if factor == 1 else self._scale(factor)}
        first, second = self._corrections
        wide = builder.cast(rate, exact) if factor == 1 else self._scale(factor)
        decay = builder.op("Mul", wide, builder.number(weight_decay, exact))
        step_size = builder.op("Div", wide, first)
        if self._spread is None:
            self._spread = builder.op("Sqrt", second)
        keep = builder.op("Sub", builder.number(1.0, exact), decay)
        return {"step_size": step_size, "spread": self._spread, "keep": keep}

    def _scale(self, factor: float) -> ir.Value:
        """Multiply the learning rate by a group's factor, in the precision of the scalars."""
        wide = self._builder.cast(self._rate, self._exact)
        return self._builder.op("Mul", wide, self._builder.number(factor, self._exact))


def _correct_double(
    builder: InputGraph, betas: Sequence[float], step: ir.Value
) -> Sequence[ir.Value]:
    """Build Adam's bias corrections ``1 - beta**step`` in double precision.

    In single precision, this formula would lose too many digits for a beta of 0.999.
    """
    exponent = builder.cast(step, _DOUBLE)
    powers = [builder.op("Pow", builder.number(beta, _DOUBLE), exponent) for beta in betas]
    return [builder.op("Sub", builder.number(1.0, _DOUBLE), power) for power in powers]


def _correct_single(
    builder: InputGraph, betas: Sequence[float], step: ir.Value
) -> Sequence[ir.Value]:
    """Build Adam's bias corrections in single precision, accurate to a few units in the last place.

    The correction is ``q(-log(beta) * step)`` for the function ``q(y) = 1 - exp(-y)``.  The
    argument is first divided by 64, so that few terms of the series
    ``q(y) = y * (1 - y/2 * (1 - y/3 * ...))`` are enough.  Then ``q(2 * y) = q(y) * (2 - q(y))`` is
    applied six times.  This avoids cancellation, and uses only sums and products, which all
    runtimes round in the same way.
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
    builder: InputGraph, spec: TensorSpec, parameter: ir.Value, gradient: ir.Value, decay: float
) -> ir.Value:
    if not decay:
        return gradient
    penalty = builder.op("Mul", parameter, builder.constant(decay, spec))
    return builder.op("Add", gradient, penalty)


def _update_sgd(
    builder: InputGraph,
    spec: TensorSpec,
    parameter: ir.Value,
    gradient: ir.Value,
    optimizer: Optimizer,
    rule: _Rule,
) -> dict[str, ir.Value]:
    assert isinstance(optimizer, SGD)
    outputs = {}
    direction = _decay_gradient(builder, spec, parameter, gradient, rule.weight_decay)
    if optimizer.momentum:
        name = f"{spec.name}#momentum"
        velocity = builder.input(name, spec.dtype, spec.shape)
        kept = builder.op("Mul", velocity, builder.constant(optimizer.momentum, spec))
        direction = outputs[name] = builder.op("Add", kept, direction)
    change = builder.op("Mul", direction, rule.get("rate", spec))
    return {spec.name: builder.op("Sub", parameter, change), **outputs}


def _update_adam(
    builder: InputGraph,
    spec: TensorSpec,
    parameter: ir.Value,
    gradient: ir.Value,
    optimizer: Optimizer,
    rule: _Rule,
) -> dict[str, ir.Value]:
    """Build the update of one parameter by Adam or AdamW.

    It subtracts ``lr / (1 - b1**t) * m / (sqrt(v) / sqrt(1 - b2**t) + eps)``, where ``m`` and ``v``
    are the running averages of the gradient and its square, and ``t`` is the number of the update.
    """
    assert isinstance(optimizer, Adam)
    if isinstance(optimizer, AdamW):
        if rule.weight_decay:
            parameter = builder.op("Mul", parameter, rule.get("keep", spec))
    else:
        gradient = _decay_gradient(builder, spec, parameter, gradient, rule.weight_decay)

    def blend(name: str, beta: float, value: ir.Value) -> ir.Value:
        old = builder.input(name, spec.dtype, spec.shape)
        kept = builder.op("Mul", old, builder.constant(beta, spec))
        return builder.op("Add", kept, builder.op("Mul", value, builder.constant(1.0 - beta, spec)))

    first, second = f"{spec.name}#exp_avg", f"{spec.name}#exp_avg_sq"
    mean = blend(first, optimizer.beta1, gradient)
    square = blend(second, optimizer.beta2, builder.op("Mul", gradient, gradient))
    spread = builder.op("Div", builder.op("Sqrt", square), rule.get("spread", spec))
    ratio = builder.op(
        "Div", mean, builder.op("Add", spread, builder.constant(optimizer.eps, spec))
    )
    change = builder.op("Mul", ratio, rule.get("step_size", spec))
    return {spec.name: builder.op("Sub", parameter, change), first: mean, second: square}


class InputGraph(NodeBuilder):
    """A graph that is being built: its nodes and its inputs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._name = name
        self._inputs: dict[str, ir.Value] = {}
        self._fitted: dict[tuple[ir.Value, int], ir.Value] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int | str | None]) -> ir.Value:
        """Return the graph input ``name``; declare it if it does not exist yet."""
        if name not in self._inputs:
            self._inputs[name] = ir.Value(
                name=name, type=ir.TensorType(_DTYPES[dtype]), shape=ir.Shape(list(shape))
            )
        return self._inputs[name]

    def fit(self, scalar: ir.Value, spec: TensorSpec) -> ir.Value:
        """Return a scalar with as many dimensions as a tensor has, if that makes a difference."""
        rank = len(spec.shape)
        if rank == 0 or spec.shape[-1] != 1:
            return scalar
        if (scalar, rank) not in self._fitted:
            fitted = self.op("Reshape", scalar, self.integers([1] * rank))
            fitted.type = scalar.type
            self._fitted[scalar, rank] = fitted
        return self._fitted[scalar, rank]

    def constant(self, value: float, spec: TensorSpec) -> ir.Value:
        """Return a number as a constant for a tensor, in its type."""
        return self.fit(self.number(value, _DTYPES[spec.dtype]), spec)

    def finish(self, outputs: Mapping[str, ir.Value]) -> ir.Graph:
        """Return the finished graph, with its outputs renamed to the keys of ``outputs``."""
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
