"""Let slices of one row in the body of a Loop have the shape that they are meant to have.

What a Slice from ``i`` to ``i + 1`` gives has one row, or none where the row ``i`` does not exist.
So onnx does not know its size, nor the size of what a Loop carries if such a slice is added to it.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, known_dims
from splitonnx.partitioner.graphs.traversals import list_bodies

_PASSING = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that pass on a single integer."""

_NOWHERE = 1 << 62
"""A row that no tensor has."""

_MOST_STEPS = 100
"""The largest number of nodes that are searched, backwards, for what a number is computed from."""


def check_single_rows(body: ir.Graph) -> bool:
    """Replace each Slice from ``i`` to ``i + 1`` with a Gather, which always gives one row.

    The Gather fails where the Slice has no row: if the row does not exist, and from -1 to 0.
    Slices of known size, and those with a Squeeze behind them, are left unchanged.  Bodies in
    ``body`` are changed as well.  Return whether any node was changed.
    """
    changed = False
    for node in list(body):
        for inner in list_bodies(node):
            changed |= check_single_rows(inner)
        axis = _find_single_axis(node)
        if axis is None:
            continue
        builder = NodeBuilder(f"{node.outputs[0].name or node.name}/row")
        place = builder.op("Reshape", node.inputs[1], builder.integers([1]))
        place = builder.op("Cast", place, to=ir.DataType.INT64.value)
        is_empty = builder.op("Equal", place, builder.integers([-1]))
        place = builder.op("Where", is_empty, builder.integers([_NOWHERE]), place)
        builder.replace(node, [builder.op("Gather", node.inputs[0], place, axis=axis)])
        changed = True
    return changed


def _find_single_axis(node: ir.Node) -> int | None:
    """Return the axis along which a node is a Slice of one row at most, of no known size."""
    if node.op_type != "Slice" or node.domain or len(node.inputs) < 3:
        return None
    axes, steps = (node.inputs[i] if i < len(node.inputs) else None for i in (3, 4))
    axis, step = _read_integer(axes, 0), _read_integer(steps, 1)
    shape = node.outputs[0].shape
    if axis is None or step != 1 or shape is None or not -len(shape) <= axis < len(shape):
        return None
    users = [use.node for use in node.outputs[0].uses()]
    is_squeezed = len(users) == 1 and users[0].op_type == "Squeeze" and len(users[0].inputs) > 1
    if isinstance(shape[axis], int) or is_squeezed:
        return None
    start, end = (_read_sum(value) for value in node.inputs[1:3])
    if start is None or end is None or start[0] is not end[0] or end[1] - start[1] != 1:
        return None
    is_single = axes is not None or known_dims(start[0]) in ([], [1])
    return axis if is_single else None


def _read_integer(value: ir.Value | None, default: int) -> int | None:
    """Return a constant integer, or ``default`` if it is omitted; ``None`` if it is not one."""
    if value is None:
        return default
    array = known_array(value)
    return int(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _read_sum(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Return the value and the constant of which a single integer is the sum."""
    total = 0
    for _ in range(_MOST_STEPS):
        if value is None:
            return None
        node = value.producer()
        if node is None or node.domain:
            break
        if node.op_type in _PASSING:
            value = node.inputs[0]
        elif node.op_type in ("Add", "Sub"):
            numbers = [None if v is None else known_array(v) for v in node.inputs]
            place = 0 if node.op_type == "Add" and numbers[0] is not None else 1
            number = numbers[place]
            if number is None or number.size != 1 or number.dtype.kind != "i":
                break
            sign = -1 if node.op_type == "Sub" else 1
            total += sign * int(number.reshape(-1)[0])
            value = node.inputs[1 - place]
        else:
            break
    return None if value is None else (value, total)
