"""Rewrite LSTM, GRU and RNN as a Scan over time.

A single matrix product multiplies the inputs of all steps by their weights, for both directions at
once.  Each step of the Scan then needs only one more product, that of the hidden state and its
weights.  Neither the sequence length nor the batch size need be known.  Sequences of different
lengths are masked: after its end, a sequence keeps its state, and its outputs are zero.  The
batch-first layout is converted earlier, by :mod:`recurrence_layouts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.assertions import check_lengths
from splitonnx.partitioner.graphs.bodies import build_scan
from splitonnx.partitioner.graphs.builders import (
    NodeBuilder,
    known_array,
    known_dims,
)
from splitonnx.partitioner.rewrites.cells import (
    Cell,
    RecurrentState,
    read_functions,
    step_gru,
    step_linear_gru,
    step_lstm,
    step_rnn,
)

Values = Sequence[ir.Value | None]
Step = Callable[[NodeBuilder, Cell, Sequence[ir.Value], RecurrentState], RecurrentState]


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """The sizes and inputs of a recurrent node; inputs that the node does not have are ``None``."""

    node: ir.Node
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
    """Rewrite an RNN as a Scan for each direction, for which :mod:`differentiation` has a gradient.

    Each step computes H' = f(X W^T + H R^T + b) from the input X and the previous state H.  W and R
    are the weights, b is the sum of the biases, and f is the activation function.
    """
    layer = _read_layer(node, states=1)
    bias = _add_biases(builder, layer, 1)
    inputs = [[x] for x in _project(builder, layer, layer.weights, bias, [1])]
    cells = _make_cells(builder, layer, layer.recurrent, ["Tanh"])
    return _run(builder, layer, step_rnn, cells, inputs)


def rewrite_gru(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite a GRU as a Scan for each direction, for which :mod:`differentiation` has a gradient.

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
    return _run(builder, layer, step, cells, [inputs[i : i + 2] for i in range(0, len(inputs), 2)])


def rewrite_lstm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite an LSTM as a Scan for each direction; :mod:`differentiation` has a gradient for it.

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
    return _run(builder, layer, step_lstm, cells, inputs)


def _read_layer(node: ir.Node, *, states: int) -> _Layer:
    given = [*node.inputs, *[None] * 8]
    x, weights, recurrent = given[:3]
    assert x is not None
    assert weights is not None
    assert recurrent is not None
    sizes, hidden = known_dims(weights), known_dims(recurrent)
    if sizes is None or hidden is None or sizes[2] is None or hidden[2] is None:
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})", "the shapes of its weights are not known"
        )
    return _Layer(
        node=node,
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
) -> list[ir.Value]:
    """Return X W^T + b: a value of shape (T, N, gates * H) per direction and group of gates."""
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


def _part_steps(builder: NodeBuilder, layer: _Layer, value: ir.Value, size: int) -> ir.Value:
    """Reshape a value of shape (TN, size) to (T, N, size)."""
    shape = builder.op("Concat", builder.shape(layer.x, 0, 2), builder.integers([size]), axis=0)
    return _note(layer, builder.op("Reshape", value, shape), 0, size)


def _note(layer: _Layer, value: ir.Value, start: int, size: int) -> ir.Value:
    """Declare a value to have the dimensions of X from ``start`` to the batch, and then ``size``.

    Dimensions that are not known keep their names.
    """
    dims = [None, None] if layer.x.shape is None else [*layer.x.shape[:2]]
    value.type, value.shape = layer.x.type, ir.Shape([*dims[start:], size])
    return value


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


def _run(
    builder: NodeBuilder,
    layer: _Layer,
    step: Step,
    cells: Sequence[Cell],
    inputs: Sequence[Sequence[ir.Value]],
) -> Values:
    """Compute all directions and return Y, Y_h and Y_c.

    ``inputs`` is indexed by direction and group of gates.
    """
    mask = _make_mask(builder, layer)
    starts = _read_states(builder, layer)
    sequences, ends = [], []
    for index, cell in enumerate(cells):
        first = [start[index] for start in starts]
        body = _write_step(layer, step, cell, inputs[index], mask, index)
        rows = [*inputs[index], *([] if mask is None else [mask])]
        backwards = index == 1 or _read_direction(layer.node) == "reverse"
        *last, sequence = build_scan(builder, body, first, rows, backwards=backwards)
        if mask is not None:
            zero = builder.number(0.0, layer.x.dtype)
            sequence = builder.op("Where", mask, sequence, zero)
        sequences.append(sequence)
        ends.append(last)
    return [
        _stack(builder, sequences, 1),
        *(_stack(builder, v, 0) for v in zip(*ends, strict=True)),
    ]


def _stack(builder: NodeBuilder, values: Sequence[ir.Value], axis: int) -> ir.Value:
    rows = [builder.op("Unsqueeze", value, builder.integers([axis])) for value in values]
    return rows[0] if len(rows) == 1 else builder.op("Concat", *rows, axis=axis)


def _write_step(
    layer: _Layer,
    step: Step,
    cell: Cell,
    inputs: Sequence[ir.Value],
    mask: ir.Value | None,
    direction: int,
) -> ir.Graph:
    """Write one step of a direction as the body of a Scan.

    The body gets the previous states and the step's row of each of ``inputs`` and of ``mask``.  It
    returns the next states, and once more the first of them.
    """
    name = f"{layer.node.outputs[0].name or layer.node.name}/step{direction}"
    builder = NodeBuilder(name)
    states = [_declare(layer, f"{name}/state{i}", layer.hidden) for i in range(len(layer.states))]
    rows = [
        ir.Value(
            name=f"{name}/row{i}", type=value.type, shape=ir.Shape(list(value.shape or ())[1:])
        )
        for i, value in enumerate(inputs)
    ]
    new = step(builder, cell, rows, tuple(states))
    given = [*states, *rows]
    if mask is not None:
        given.append(_declare(layer, f"{name}/mask", 1, ir.DataType.BOOL))
        pairs = zip(new, states, strict=True)
        new = tuple(builder.op("Where", given[-1], after, before) for after, before in pairs)
    results = [builder.op("Identity", value) for value in (*new, new[0])]
    for value in results:
        _note(layer, value, 1, layer.hidden)
    return ir.Graph(given, results, nodes=builder.nodes, name=name)


def _declare(layer: _Layer, name: str, size: int, dtype: ir.DataType | None = None) -> ir.Value:
    value = _note(layer, ir.Value(name=name), 1, size)
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    return value


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
            _note(layer, zero, 1, layer.hidden)
        found.append([zero] * layer.directions)
    return found


def _make_mask(builder: NodeBuilder, layer: _Layer) -> ir.Value | None:
    """Return a mask of shape (T, N, 1), which is true for sequences that have not ended.

    Return ``None`` if no sequence ends before the last step.
    """
    if layer.lengths is None:
        return None
    checked = check_lengths(builder, layer.node, layer.lengths)
    constant = known_array(layer.lengths)
    dims = known_dims(layer.x)
    steps = None if dims is None else dims[0]
    if constant is not None and steps is not None and (constant >= steps).all():
        return None
    length = builder.op("Squeeze", builder.shape(layer.x, 0, 1), builder.integers([0]))
    times = builder.op("Range", builder.integer(0), length, builder.integer(1))
    column = builder.op("Unsqueeze", times, builder.integers([1, 2]))  # (T, 1, 1)
    lengths = builder.op("Cast", checked, to=ir.DataType.INT64.value)
    row = builder.op("Unsqueeze", lengths, builder.integers([0, 2]))  # (1, N, 1)
    return builder.op("Greater", row, column)
