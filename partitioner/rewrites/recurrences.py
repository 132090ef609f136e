"""Rewrite LSTM, GRU and RNN by unrolling them in time.

A single matrix product multiplies the inputs of all steps by their weights, for both directions at
once.  Each step then needs only one more product, that of the hidden state and its weights.  The
sequence length must be known, but the batch size may be unknown.  Sequences of different lengths
are masked: after its end, a sequence keeps its state, and its outputs are zero.  The batch-first
layout is converted earlier, by :mod:`recurrence_layouts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims
from splitonnx.partitioner.rewrites.cells import (
    Cell,
    RecurrentState,
    read_functions,
    step_gru,
    step_linear_gru,
    step_lstm,
    step_rnn,
)

MOST_STEPS = 2_000
"""The most steps of all recurrent nodes of a model together; each step becomes about 20 nodes."""

Values = Sequence[ir.Value | None]
Step = Callable[[NodeBuilder, Cell, Sequence[ir.Value], RecurrentState], RecurrentState]


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """The sizes and inputs of a recurrent node; inputs that the node does not have are ``None``."""

    node: ir.Node
    steps: int
    size: int
    hidden: int
    directions: int
    x: ir.Value
    weights: ir.Value
    recurrent: ir.Value
    bias: ir.Value | None
    lengths: ir.Value | None
    states: Sequence[ir.Value | None]
    peepholes: ir.Value | None


def rewrite_rnn(builder: NodeBuilder, node: ir.Node) -> Values:
    """Unroll an RNN in time; onnxruntime-training cannot train it in any other form.

    Each step computes H' = f(X W^T + H R^T + b) from the input X and the previous state H.  W and R
    are the weights, b is the sum of the biases, and f is the activation function.
    """
    layer = _read_layer(node, states=1)
    bias = _add_biases(builder, layer, 1)
    inputs = [[x] for x in _project(builder, layer, layer.weights, bias, [1])]
    cells = _make_cells(builder, layer, layer.recurrent, ["Tanh"])
    return _unroll(builder, layer, step_rnn, cells, inputs)


def rewrite_gru(builder: NodeBuilder, node: ir.Node) -> Values:
    """Unroll a GRU in time; onnxruntime-training cannot train it in any other form.

    If the attribute ``linear_before_reset`` is set, the reset gate also applies to the recurrent
    bias, and therefore this bias is kept separate from the bias of the input.
    """
    layer = _read_layer(node, states=1)
    functions = ["Sigmoid", "Tanh"]
    if node.attributes.get_int("linear_before_reset", 0):
        own, bias = _part_biases(builder, layer, 3)
        cells = _make_cells(builder, layer, layer.recurrent, functions, biases=own)
        step: Step = step_linear_gru
    else:
        bias, step = _add_biases(builder, layer, 3), step_gru
        cells = _make_cells(builder, layer, layer.recurrent, functions, parts=(2, 1))
    inputs = _project(builder, layer, layer.weights, bias, [2, 1])
    return _unroll(
        builder, layer, step, cells, [inputs[i : i + 2] for i in range(0, len(inputs), 2)]
    )


def rewrite_lstm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Unroll an LSTM in time; onnxruntime-training cannot train it in any other form.

    If the attribute ``input_forget`` is set, the forget gate is computed from the input gate, and
    the weights of the forget gate are removed.
    """
    layer = _read_layer(node, states=2)
    coupled = bool(node.attributes.get_int("input_forget", 0))
    weights, recurrent = layer.weights, layer.recurrent
    bias = _add_biases(builder, layer, 4)
    if coupled:
        weights, recurrent = (_drop_forget(builder, layer, v) for v in (weights, recurrent))
        bias = None if bias is None else _drop_forget(builder, layer, bias)
    inputs = [[x] for x in _project(builder, layer, weights, bias, [3 if coupled else 4])]
    cells = _make_cells(builder, layer, recurrent, ["Sigmoid", "Tanh", "Tanh"], coupled=coupled)
    return _unroll(builder, layer, step_lstm, cells, inputs)


def refuse_long(nodes: Iterable[ir.Node]) -> None:
    """Raise an error if the recurrent nodes in ``nodes`` have too many time steps to be unrolled.

    Raises:
        UnsupportedModel: all nodes together have more than :data:`MOST_STEPS` steps; the error
            names the node with the most steps.
    """
    steps = {node: _count_steps(node) for node in nodes if node.op_type in ("GRU", "LSTM", "RNN")}
    total = sum(steps.values())
    if total > MOST_STEPS:
        node = max(steps, key=lambda longest: steps[longest])
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            f"it can be trained only unrolled, and has {steps[node]} of {total} steps; at most "
            f"{MOST_STEPS} in all are written out",
            "export the model with shorter sequences, or freeze the parameters up to it",
        )


def _count_steps(node: ir.Node) -> int:
    x = node.inputs[0] if node.inputs else None
    dims = None if x is None else known_dims(x)
    length = dims[0] if dims else None
    return (length or 0) * (2 if _read_direction(node) == "bidirectional" else 1)


def _read_layer(node: ir.Node, *, states: int) -> _Layer:
    given = [*node.inputs, *[None] * 8]
    x, weights, recurrent = given[:3]
    assert x is not None
    assert weights is not None
    assert recurrent is not None
    dims, sizes, hidden = known_dims(x), known_dims(weights), known_dims(recurrent)
    if dims is None or dims[0] is None:
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            "it can be trained only unrolled, and its sequence length is not known",
            "fix it with --dim NAME=SIZE, or export the model with a fixed sequence length",
        )
    if sizes is None or hidden is None or sizes[2] is None or hidden[2] is None:
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})", "the shapes of its weights are not known"
        )
    return _Layer(
        node=node,
        steps=dims[0],
        size=sizes[2],
        hidden=hidden[2],
        directions=2 if _read_direction(node) == "bidirectional" else 1,
        x=x,
        weights=weights,
        recurrent=recurrent,
        bias=given[3],
        lengths=given[4],
        states=given[5 : 5 + states],
        peepholes=given[7] if states > 1 else None,
    )


def _read_direction(node: ir.Node) -> str:
    return node.attributes.get_string("direction", "forward") or "forward"


def _add_biases(builder: NodeBuilder, layer: _Layer, gates: int) -> ir.Value | None:
    """Return the sum of both biases: (D, 2GH) becomes (D, GH)."""
    if layer.bias is None:
        return None
    both = builder.op(
        "Reshape", layer.bias, builder.integers([layer.directions, 2, gates * layer.hidden])
    )
    return builder.op("ReduceSum", both, builder.integers([1]), keepdims=0)


def _part_biases(
    builder: NodeBuilder, layer: _Layer, gates: int
) -> tuple[Sequence[ir.Value], ir.Value | None]:
    """Split (D, 2GH) into the recurrent biases, (GH) per direction, and the input's, (D, GH)."""
    if layer.bias is None:
        return [], None
    size = gates * layer.hidden
    halves = builder.ops("Split", [layer.bias, builder.integers([size, size])], 2, {"axis": 1})
    return _part_directions(builder, layer, halves[1]), halves[0]


def _drop_forget(builder: NodeBuilder, layer: _Layer, value: ir.Value) -> ir.Value:
    """Remove the rows of the forget gate, the third of four, along axis 1."""
    size, axis, one = layer.hidden, builder.integers([1]), builder.integers
    first = builder.op("Slice", value, one([0]), one([2 * size]), axis)
    last = builder.op("Slice", value, one([3 * size]), one([4 * size]), axis)
    return builder.op("Concat", first, last, axis=1)


def _part_directions(builder: NodeBuilder, layer: _Layer, value: ir.Value) -> Sequence[ir.Value]:
    """Split a value of shape (D, ...) into D values of shape (...)."""
    parts: Sequence[ir.Value] = [value]
    if layer.directions > 1:
        parts = builder.ops("Split", [value, builder.integers([1, 1])], 2, {"axis": 0})
    return [builder.op("Squeeze", part, builder.integers([0])) for part in parts]


def _project(
    builder: NodeBuilder,
    layer: _Layer,
    weights: ir.Value,
    bias: ir.Value | None,
    groups: Sequence[int],
) -> list[Sequence[ir.Value]]:
    """Return X W^T + b: per direction and group of gates, one (N, gates * H) value per step."""
    rows = builder.op("Reshape", layer.x, builder.integers([-1, layer.size]))  # (TN, I)
    count = layer.directions * sum(groups) * layer.hidden
    weights = builder.op("Reshape", weights, builder.integers([count, layer.size]))
    inputs = [rows, weights]
    if bias is not None:
        inputs.append(builder.op("Reshape", bias, builder.integers([count])))
    product = builder.op("Gemm", *inputs, transB=1)
    sizes = [group * layer.hidden for group in groups] * layer.directions
    parts: Sequence[ir.Value] = [product]
    if len(sizes) > 1:
        parts = builder.ops("Split", [product, builder.integers(sizes)], len(sizes), {"axis": 1})
    return [_part_steps(builder, layer, p, size) for p, size in zip(parts, sizes, strict=True)]


def _part_steps(
    builder: NodeBuilder, layer: _Layer, value: ir.Value, size: int
) -> Sequence[ir.Value]:
    """Split a value of shape (TN, size) into T values of shape (N, size)."""
    if layer.steps == 1:
        return [value]
    attributes = {"axis": 0, "num_outputs": layer.steps}
    parts = builder.ops("Split", [value], layer.steps, attributes)
    for part in parts:
        _note(layer, part, size)
    return parts


def _note(layer: _Layer, value: ir.Value, size: int) -> None:
    """Set the shape of a value to (N, size), with the name of the batch size if it is not known."""
    assert layer.x.shape is not None
    value.type, value.shape = layer.x.type, ir.Shape([layer.x.shape[1], size])


def _make_cells(
    builder: NodeBuilder,
    layer: _Layer,
    recurrent: ir.Value,
    defaults: Sequence[str],
    *,
    biases: Sequence[ir.Value] = (),
    parts: Sequence[int] = (),
    coupled: bool = False,
) -> list[Cell]:
    """Make the cell of each direction; ``parts`` are the numbers of gates into which R is split."""
    functions = read_functions(layer.node, defaults, layer.directions)
    clip = layer.node.attributes.get_float("clip", 0.0)
    peepholes: list[Sequence[ir.Value]] = [()] * layer.directions
    if layer.peepholes is not None:
        sizes = builder.integers([layer.hidden] * 3)
        own = _part_directions(builder, layer, layer.peepholes)
        peepholes = [builder.ops("Split", [value, sizes], 3, {"axis": 0}) for value in own]
    cells = []
    for index, matrix in enumerate(_part_directions(builder, layer, recurrent)):
        pieces: Sequence[ir.Value] = ()
        if parts:
            sizes = builder.integers([part * layer.hidden for part in parts])
            pieces = builder.ops("Split", [matrix, sizes], len(parts), {"axis": 0})
        count = len(defaults)
        cells.append(
            Cell(
                hidden=layer.hidden,
                functions=functions[count * index : count * (index + 1)],
                recurrent=matrix,
                dtype=layer.x.dtype,
                clip=clip or None,
                bias=biases[index] if biases else None,
                peepholes=peepholes[index],
                coupled=coupled,
                parts=pieces,
            )
        )
    return cells


def _unroll(
    builder: NodeBuilder,
    layer: _Layer,
    step: Step,
    cells: Sequence[Cell],
    inputs: Sequence[Sequence[Sequence[ir.Value]]],
) -> Values:
    """Compute all directions and return Y, Y_h and Y_c.

    ``inputs`` is indexed by direction, group of gates, and step.
    """
    masks = _make_masks(builder, layer)
    starts = _read_states(builder, layer)
    zero = builder.number(0.0, layer.x.dtype)
    sequences, ends = [], []
    for index, cell in enumerate(cells):
        backwards = index == 1 or _read_direction(layer.node) == "reverse"
        state: RecurrentState = tuple(start[index] for start in starts)
        shown: dict[int, ir.Value] = {}
        for time in reversed(range(layer.steps)) if backwards else range(layer.steps):
            new = step(builder, cell, [group[time] for group in inputs[index]], state)
            mask = masks[time]
            shown[time] = new[0]
            if mask is not None:
                shown[time] = builder.op("Where", mask, new[0], zero)
                pairs = zip(new, state, strict=True)
                new = tuple(builder.op("Where", mask, after, before) for after, before in pairs)
            state = new
        sequences.append([shown[time] for time in range(layer.steps)])
        ends.append(state)
    outputs: list[ir.Value | None] = [_stack_sequences(builder, layer, sequences)]
    for values in zip(*ends, strict=True):
        rows = [builder.op("Unsqueeze", value, builder.integers([0])) for value in values]
        outputs.append(rows[0] if len(rows) == 1 else builder.op("Concat", *rows, axis=0))
    return outputs


def _stack_sequences(
    builder: NodeBuilder, layer: _Layer, sequences: Sequence[Sequence[ir.Value]]
) -> ir.Value | None:
    """Return Y of shape (T, D, N, H), or ``None`` if it is not used."""
    output = layer.node.outputs[0]
    if not output.uses() and not output.is_graph_output():
        return None
    axes = builder.integers([0, 1])
    stacked = []
    for sequence in sequences:
        rows = [builder.op("Unsqueeze", value, axes) for value in sequence]
        stacked.append(rows[0] if len(rows) == 1 else builder.op("Concat", *rows, axis=0))
    return stacked[0] if len(stacked) == 1 else builder.op("Concat", *stacked, axis=1)


def _read_states(builder: NodeBuilder, layer: _Layer) -> list[Sequence[ir.Value]]:
    """Return the initial states of each direction, of shape (N, H); a missing state is zero."""
    zero: ir.Value | None = None
    found: list[Sequence[ir.Value]] = []
    for value in layer.states:
        if value is not None:
            found.append(_part_directions(builder, layer, value))
            continue
        if zero is None:
            batch = builder.shape(layer.x, 1, 2)
            shape = builder.op("Concat", batch, builder.integers([layer.hidden]), axis=0)
            zero = builder.op("Expand", builder.number(0.0, layer.x.dtype), shape)
            _note(layer, zero, layer.hidden)
        found.append([zero] * layer.directions)
    return found


def _make_masks(builder: NodeBuilder, layer: _Layer) -> list[ir.Value | None]:
    """Return a mask of shape (N, 1) per step, true for sequences that have not ended.

    The mask is ``None`` if no sequence has ended.
    """
    masks: list[ir.Value | None] = [None] * layer.steps
    if layer.lengths is None:
        return masks
    constant = ir.convenience.get_const_tensor(layer.lengths)
    shortest = 0 if constant is None else int(constant.numpy().min(initial=layer.steps))
    column = builder.op("Unsqueeze", layer.lengths, builder.integers([1]))
    for time in range(shortest, layer.steps):
        limit = builder.number(time, ir.DataType.INT32)
        masks[time] = builder.op("Greater", column, limit)
    return masks
