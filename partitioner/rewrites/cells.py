"""The cells of LSTM, GRU and RNN: one step in time, in operators that have a gradient.

Formulas are those of LSTM-14, GRU-14 and RNN-14 at onnx.ai/onnx/operators.  Where they leave
something open it is done as ONNX Runtime's own kernels do it: ``clip`` bounds what goes into the
gates and not the cell state, a coupled forget gate is 1 less the input gate, and ``alpha`` and
``beta`` are handed out in order to those functions that take them.
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
"""Functions that take alpha, or alpha and beta, and what ONNX Runtime takes where none is given."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """An activation with its settings, as one of a recurrence's ``activations``."""

    kind: str
    settings: tuple[float, ...] = ()

    def apply(self, draft: NodeBuilder, x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """Write the activation of ``x``."""
        if self.kind in _PLAIN:
            return draft.op(_PLAIN[self.kind], x)
        alpha, beta = (*self.settings, 0.0)[:2]
        if self.kind == "affine":
            scaled = draft.op("Mul", x, draft.number(alpha, dtype))
            return draft.op("Add", scaled, draft.number(beta, dtype))
        if self.kind == "scaledtanh":
            inner = draft.op("Tanh", draft.op("Mul", x, draft.number(beta, dtype)))
            return draft.op("Mul", inner, draft.number(alpha, dtype))
        attributes: dict[str, Attribute] = {"alpha": alpha}
        if self.kind == "hardsigmoid":
            attributes["beta"] = beta
        kinds = {"elu": "Elu", "hardsigmoid": "HardSigmoid", "leakyrelu": "LeakyRelu"}
        return draft.ops(kinds.get(self.kind, "ThresholdedRelu"), [x], 1, attributes)[0]


def read_functions(node: ir.Node, defaults: Sequence[str], directions: int) -> list[Function]:
    """List a recurrence's activations, those of the forward direction first."""
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
    """What one direction of a recurrence needs for a step; ``dtype`` is that of its values.

    ``recurrent`` is R of shape (gates * hidden, hidden); ``bias`` its own bias, where that does
    not go with the input's; ``peepholes`` those of input, output and forget gate, each (hidden).
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

    def activate(self, draft: NodeBuilder, index: int, x: ir.Value) -> ir.Value:
        """Apply the function of this number to what goes into a gate, bounded by ``clip``."""
        if self.clip is not None:
            bounds = [draft.number(sign * self.clip, self.dtype) for sign in (-1, 1)]
            x = draft.op("Clip", x, *bounds)
        return self.functions[index].apply(draft, x, self.dtype)


State = tuple[ir.Value, ...]


def step_rnn(draft: NodeBuilder, cell: Cell, inputs: Sequence[ir.Value], state: State) -> State:
    """H = f(x + H R^T), where x holds the input's part and all biases."""
    pre = draft.op("Gemm", state[0], cell.recurrent, inputs[0], transB=1)
    return (cell.activate(draft, 0, pre),)


def step_gru(draft: NodeBuilder, cell: Cell, inputs: Sequence[ir.Value], state: State) -> State:
    """H = (1 - z) * h + z * H, with the reset gate before the linear map."""
    (before,) = state
    for_gates, for_hidden = inputs
    pre = draft.op("Gemm", before, cell.parts[0], for_gates, transB=1)
    update, reset = _split(draft, cell.activate(draft, 0, pre), [cell.hidden] * 2)
    kept = draft.op("Mul", reset, before)
    pre = draft.op("Gemm", kept, cell.parts[1], for_hidden, transB=1)
    return _blend(draft, update, cell.activate(draft, 1, pre), before)


def step_linear_gru(
    draft: NodeBuilder, cell: Cell, inputs: Sequence[ir.Value], state: State
) -> State:
    """The same with ``linear_before_reset``, as torch has it."""
    (before,) = state
    for_gates, for_hidden = inputs
    mapped = draft.op("Gemm", before, cell.recurrent, cell.bias, transB=1)
    gates, hidden = _split(draft, mapped, [2 * cell.hidden, cell.hidden])
    gates = cell.activate(draft, 0, draft.op("Add", for_gates, gates))
    update, reset = _split(draft, gates, [cell.hidden] * 2)
    pre = draft.op("Add", for_hidden, draft.op("Mul", reset, hidden))
    return _blend(draft, update, cell.activate(draft, 1, pre), before)


def _blend(draft: NodeBuilder, update: ir.Value, new: ir.Value, before: ir.Value) -> State:
    difference = draft.op("Sub", before, new)
    return (draft.op("Add", new, draft.op("Mul", update, difference)),)


def step_lstm(draft: NodeBuilder, cell: Cell, inputs: Sequence[ir.Value], state: State) -> State:
    """C = f * C + i * c and H = o * h(C); a coupled cell has no rows for its forget gate."""
    hidden, before = state
    size = cell.hidden
    pre = draft.op("Gemm", hidden, cell.recurrent, inputs[0], transB=1)
    count = 2 if cell.coupled else 3
    if cell.peepholes:
        opening, out, *forgetting, block = _split(draft, pre, [size] * (count + 1))
        opening = _peep(draft, cell, 0, opening, before)
        forgetting = [_peep(draft, cell, 2, gate, before) for gate in forgetting]
    else:
        gates, block = _split(draft, pre, [count * size, size])
        gates = cell.activate(draft, 0, gates)
        opening, out, *forgetting = _split(draft, gates, [size] * count)
    if not forgetting:
        forgetting = [draft.op("Sub", draft.number(1.0, cell.dtype), opening)]
    entering = draft.op("Mul", opening, cell.activate(draft, 1, block))
    memory = draft.op("Add", draft.op("Mul", forgetting[0], before), entering)
    if cell.peepholes:
        out = _peep(draft, cell, 1, out, memory)
    shown = cell.functions[2].apply(draft, memory, cell.dtype)
    return draft.op("Mul", out, shown), memory


def _peep(draft: NodeBuilder, cell: Cell, index: int, gate: ir.Value, memory: ir.Value) -> ir.Value:
    seen = draft.op("Mul", cell.peepholes[index], memory)
    return cell.activate(draft, 0, draft.op("Add", gate, seen))


def _split(draft: NodeBuilder, value: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    return draft.ops("Split", [value, draft.integers(sizes)], len(sizes), {"axis": 1})
