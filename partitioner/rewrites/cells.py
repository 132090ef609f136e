"""Compute one time step of LSTM, GRU and RNN with operators that have a gradient.

The formulas are those of LSTM-14, GRU-14 and RNN-14 at onnx.ai/onnx/operators.  Where these
definitions leave details open, the cells behave like ONNX Runtime's kernels: ``clip`` limits the
inputs of the gates but not the cell state, a coupled forget gate is 1 minus the input gate, and the
values of ``alpha`` and ``beta`` are assigned, in order, to the activation functions that use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import Attribute, NodeBuilder

_PLAIN = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "softplus": "Softplus",
    "softsign": "Softsign",
    "tanh": "Tanh",
}
_DEFAULTS: dict[str, tuple[float, ...]] = {
    "affine": (0.0, 0.0),
    "elu": (1.0,),
    "hardsigmoid": (0.2, 0.5),
    "leakyrelu": (0.01,),
    "scaledtanh": (0.0, 0.0),
    "thresholdedrelu": (0.0,),
}
"""Activation functions with an alpha, or an alpha and a beta, and ONNX Runtime's defaults."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """An activation function of a recurrent node.

    ``kind`` is the function's name in lower case.  ``settings`` contains the values of its
    parameters, first alpha and then beta, if the function has them.
    """

    kind: str
    settings: tuple[float, ...] = ()

    def apply(self, builder: NodeBuilder, x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """Apply the function to ``x``, a value of type ``dtype``, and return the result.

        The nodes that compute the result are added to ``builder``.
        """
        if self.kind in _PLAIN:
            return builder.op(_PLAIN[self.kind], x)
        alpha, beta = (*self.settings, 0.0)[:2]
        if self.kind == "affine":
            scaled = builder.op("Mul", x, builder.number(alpha, dtype))
            return builder.op("Add", scaled, builder.number(beta, dtype))
        if self.kind == "scaledtanh":
            inner = builder.op("Tanh", builder.op("Mul", x, builder.number(beta, dtype)))
            return builder.op("Mul", inner, builder.number(alpha, dtype))
        attributes: dict[str, Attribute] = {"alpha": alpha}
        if self.kind == "hardsigmoid":
            attributes["beta"] = beta
        kinds = {"elu": "Elu", "hardsigmoid": "HardSigmoid", "leakyrelu": "LeakyRelu"}
        return builder.ops(kinds.get(self.kind, "ThresholdedRelu"), [x], 1, attributes)[0]


def read_functions(node: ir.Node, defaults: Sequence[str], directions: int) -> list[Function]:
    """List the activation functions of a recurrent node, with those of the forward direction first.

    ``directions`` is the number of directions.  If the node does not name its functions,
    ``defaults`` is used for each direction.

    Raises:
        UnsupportedModel: a function is unknown, or the node has the wrong number of functions.
    """
    names = list(node.attributes.get_strings("activations", [])) or [*defaults] * directions
    alphas = iter(node.attributes.get_floats("activation_alpha", []))
    betas = iter(node.attributes.get_floats("activation_beta", []))
    functions = []
    for name in names:
        kind = name.lower()
        if kind not in _PLAIN and kind not in _DEFAULTS:
            raise UnsupportedModel(
                f"node '{node.name}' ({node.op_type})", f"it names no known activation '{name}'"
            )
        sources = zip(_DEFAULTS.get(kind, ()), (alphas, betas), strict=False)
        settings = tuple(next(given, default) for default, given in sources)
        functions.append(Function(kind=kind, settings=settings))
    if len(functions) != len(defaults) * directions:
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            f"it has {len(functions)} activations instead of {len(defaults) * directions}",
        )
    return functions


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The weights and settings of a recurrent node for one direction.

    ``hidden`` is the size of the hidden state, and ``dtype`` is the type of all values.
    ``functions`` are the activation functions; the inputs of gates are limited to [-clip, clip]
    first, unless ``clip`` is ``None``.

    ``recurrent`` is the matrix R of shape (gates * hidden, hidden).  ``parts`` contains the same
    weights with one matrix per gate, for cells that need them separately.  ``bias`` is the
    recurrent bias, unless it has already been added to the bias of the input.  ``peepholes``
    contains the weights with which the input, output and forget gates read the cell state, each of
    shape (hidden).  A ``coupled`` cell has no weights for its forget gate.
    """

    hidden: int
    functions: Sequence[Function]
    recurrent: ir.Value
    dtype: ir.DataType | None
    clip: float | None = None
    bias: ir.Value | None = None
    peepholes: Sequence[ir.Value] = ()
    coupled: bool = False
    parts: Sequence[ir.Value] = field(default_factory=tuple)

    def activate(self, builder: NodeBuilder, index: int, x: ir.Value) -> ir.Value:
        """Apply the activation function at ``index`` to ``x``, the input of a gate.

        Unless ``clip`` is ``None``, ``x`` is limited to the range [-clip, clip] first.
        """
        if self.clip is not None:
            bounds = [builder.number(sign * self.clip, self.dtype) for sign in (-1, 1)]
            x = builder.op("Clip", x, *bounds)
        return self.functions[index].apply(builder, x, self.dtype)


RecurrentState = tuple[ir.Value, ...]


def step_rnn(
    builder: NodeBuilder, cell: Cell, inputs: Sequence[ir.Value], state: RecurrentState
) -> RecurrentState:
    """Compute the next state of an RNN: f(x + H R^T).

    H is the previous state, R contains the recurrent weights, and f is the activation function.
    The term x already includes all biases and the product of the input and its weights.
    """
    pre = builder.op("Gemm", state[0], cell.recurrent, inputs[0], transB=1)
    return (cell.activate(builder, 0, pre),)


def step_gru(
    builder: NodeBuilder, cell: Cell, inputs: Sequence[ir.Value], state: RecurrentState
) -> RecurrentState:
    """Compute the next state of a GRU: (1 - z) * h + z * H.

    H is the previous state, z is the update gate, and h is the candidate for the new state.  To
    compute h, H is multiplied by the reset gate and then by the recurrent weights.
    """
    (before,) = state
    for_gates, for_hidden = inputs
    pre = builder.op("Gemm", before, cell.parts[0], for_gates, transB=1)
    update, reset = _split(builder, cell.activate(builder, 0, pre), [cell.hidden] * 2)
    kept = builder.op("Mul", reset, before)
    pre = builder.op("Gemm", kept, cell.parts[1], for_hidden, transB=1)
    return _blend(builder, update, cell.activate(builder, 1, pre), before)


def step_linear_gru(
    builder: NodeBuilder, cell: Cell, inputs: Sequence[ir.Value], state: RecurrentState
) -> RecurrentState:
    """Compute the next state of a GRU with ``linear_before_reset``: (1 - z) * h + z * H.

    The symbols have the same meaning as in :func:`step_gru`.  To compute h, H is multiplied by the
    recurrent weights first and by the reset gate afterwards.  torch uses this form.
    """
    (before,) = state
    for_gates, for_hidden = inputs
    mapped = builder.op("Gemm", before, cell.recurrent, cell.bias, transB=1)
    gates, hidden = _split(builder, mapped, [2 * cell.hidden, cell.hidden])
    gates = cell.activate(builder, 0, builder.op("Add", for_gates, gates))
    update, reset = _split(builder, gates, [cell.hidden] * 2)
    pre = builder.op("Add", for_hidden, builder.op("Mul", reset, hidden))
    return _blend(builder, update, cell.activate(builder, 1, pre), before)


def _blend(
    builder: NodeBuilder, update: ir.Value, new: ir.Value, before: ir.Value
) -> RecurrentState:
    difference = builder.op("Sub", before, new)
    return (builder.op("Add", new, builder.op("Mul", update, difference)),)


def step_lstm(
    builder: NodeBuilder, cell: Cell, inputs: Sequence[ir.Value], state: RecurrentState
) -> RecurrentState:
    """Compute the next states of an LSTM: C' = f * C + i * c and H' = o * h(C').

    C is the previous cell state, and C' and H' are the next cell state and hidden state.  The gates
    are i (input), f (forget) and o (output); c is the candidate for the cell state, and h is an
    activation function.  A coupled cell has no weights for its forget gate and uses f = 1 - i.
    """
    hidden, before = state
    size = cell.hidden
    pre = builder.op("Gemm", hidden, cell.recurrent, inputs[0], transB=1)
    count = 2 if cell.coupled else 3
    if cell.peepholes:
        opening, out, *forgetting, block = _split(builder, pre, [size] * (count + 1))
        opening = _peep(builder, cell, 0, opening, before)
        forgetting = [_peep(builder, cell, 2, gate, before) for gate in forgetting]
    else:
        gates, block = _split(builder, pre, [count * size, size])
        gates = cell.activate(builder, 0, gates)
        opening, out, *forgetting = _split(builder, gates, [size] * count)
    if not forgetting:
        forgetting = [builder.op("Sub", builder.number(1.0, cell.dtype), opening)]
    entering = builder.op("Mul", opening, cell.activate(builder, 1, block))
    memory = builder.op("Add", builder.op("Mul", forgetting[0], before), entering)
    if cell.peepholes:
        out = _peep(builder, cell, 1, out, memory)
    shown = cell.functions[2].apply(builder, memory, cell.dtype)
    return builder.op("Mul", out, shown), memory


def _peep(
    builder: NodeBuilder, cell: Cell, index: int, gate: ir.Value, memory: ir.Value
) -> ir.Value:
    seen = builder.op("Mul", cell.peepholes[index], memory)
    return cell.activate(builder, 0, builder.op("Add", gate, seen))


def _split(builder: NodeBuilder, value: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    return builder.ops("Split", [value, builder.integers(sizes)], len(sizes), {"axis": 1})
