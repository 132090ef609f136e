"""Find what a gradient cannot pass through, before the gradient builder is called."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import onnx_ir as ir

from splitonnx.errors import NotDifferentiable
from splitonnx.partitioner.differentiation.control_flow.single_rows import check_single_rows
from splitonnx.partitioner.differentiation.derived.derivations import ADVICE
from splitonnx.partitioner.differentiation.derived.missing_gradients import WITHOUT_GRADIENT
from splitonnx.partitioner.graphs.builders import known_array
from splitonnx.partitioner.graphs.traversals import (
    RANDOM,
    find_moving,
    is_float,
    list_bodies,
    list_inputs,
    map_values,
    walk_back,
)
from splitonnx.partitioner.inference.control_flows import KEPT
from splitonnx.partitioner.normalization.batchnorms import is_training
from splitonnx.partitioner.normalization.parameters import find_stored
from splitonnx.partitioner.rewrites import REWRITES

CONTROL_FLOW = ("If", "Loop", "Scan")
"""The operators with bodies that are differentiated here."""

_QUANTIZED = ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear")
"""Operators that the gradient builder's optimizer fuses to operators of its own in any body."""

_MOST_ITERATIONS = 1 << 31
"""The largest trip count that is taken for one; above it are limits of loops that end before."""

_CARRIED = 2
"""The number of inputs of a Loop, and of its body, before the values that it carries."""


def list_undifferentiable(
    graph: ir.Graph, parameters: Sequence[str], ends: Collection[str]
) -> Iterator[NotDifferentiable]:
    """Yield an error for each node without a gradient that is between a parameter and the loss.

    ``ends`` names the loss, or whatever else is differentiated.  Call this before running the
    gradient builder, which aborts the process on some of these nodes.
    """
    trained = set(parameters)
    moving = find_moving(graph, [v for name, v in map_values(graph).items() if name in trained])
    needed, _ = walk_back(value for value in graph.outputs if value.name in ends)
    for node in graph:
        if node not in needed or node.op_type not in WITHOUT_GRADIENT or node.domain:
            continue
        if not any(v in moving and is_float(v) for v in list_inputs(node)):
            continue
        obstacle = find_obstacle(node) if node.op_type in CONTROL_FLOW else ""
        if obstacle is not None:
            yield NotDifferentiable(node.name or "", node.op_type, _advise(node, obstacle))


def _advise(node: ir.Node, obstacle: str) -> str:
    """Return why a node has no gradient, if that is known, and what to do."""
    advice = f"{obstacle}; {ADVICE}" if obstacle else ADVICE
    kept = node.metadata_props.get(KEPT)
    if not kept:
        return advice
    link = "; otherwise " if "--" in kept else ": "  # an option settles it
    return f"{kept}{link}{advice}"


def has_gradient(node: ir.Node) -> bool:
    """Return whether a gradient can pass through a node with bodies."""
    return find_obstacle(node) is None


def find_obstacle(node: ir.Node) -> str | None:
    """Return why no gradient can pass through an If, Loop or Scan, or ``None`` if one can.

    Operators inside that have no gradient count if they read any float that comes from outside.
    """
    values = [*node.inputs, *node.outputs]
    for body in list_bodies(node):
        values += [*body.inputs, *body.outputs]
    for value in values:
        if value is not None and value.type is not None and not _is_tensor(value):
            return f"'{value.name}' is not a tensor, but a sequence or an optional value"
    if _is_endless(node):
        return "no iteration changes its condition, and its trip count would never be reached"
    if changing := _find_changing(node):
        return f"the shape of '{changing}', which it carries, may differ from step to step"
    return next(filter(None, map(_find_obstacle_inside, list_bodies(node))), None)


def _is_tensor(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType)


def note_carried_shapes(nodes: Iterable[ir.Node]) -> bool:
    """Set the shapes of what Loops carry to their ends where no iteration changes them.

    onnx does not infer these shapes.  Where an iteration may change one, as far as is known, slices
    of one row check their size first (:func:`check_single_rows`).  Return whether anything was
    changed; shapes then have to be inferred again.
    """
    changed = False
    for node in nodes:
        for body in list_bodies(node):
            changed |= note_carried_shapes(body)
            if _find_changing(node):
                changed |= check_single_rows(body)
        for before, after, value in _list_carried(node):
            if value.shape is None and _is_same(before, after):
                value.type, value.shape = value.type or before.type, before.shape
                changed = True
    return changed


def _list_carried(node: ir.Node) -> list[tuple[ir.Value, ir.Value, ir.Value]]:
    """List what a Loop carries: as an iteration reads it, as it returns it, and at the end."""
    if node.op_type != "Loop" or node.domain:
        return []
    (body,) = list_bodies(node)
    return list(zip(body.inputs[_CARRIED:], body.outputs[1:], node.outputs, strict=False))


def _is_endless(node: ir.Node) -> bool:
    """Return whether a Loop without a limit has a condition that no iteration changes."""
    if node.op_type != "Loop" or node.domain:
        return False
    limit = known_array(node.inputs[0])
    if node.inputs[0] is not None and (limit is None or limit.max(initial=0) <= _MOST_ITERATIONS):
        return False
    (body,) = list_bodies(node)
    return find_stored(body.outputs[0]) is body.inputs[1]


def _find_changing(node: ir.Node) -> str | None:
    """Return the name of a value whose shape an iteration of a Loop may change, if there is one."""
    carried = _list_carried(node)
    return next((before.name for before, after, _ in carried if not _is_same(before, after)), None)


def _is_same(before: ir.Value, after: ir.Value) -> bool:
    """Return whether the shapes of two values are known to be the same."""
    if before.shape is None or after.shape is None:
        return False
    shapes = (before.shape, after.shape)
    dims = [[d if isinstance(d, int) else d.value for d in shape] for shape in shapes]
    return dims[0] == dims[1] and None not in dims[0]


def _find_obstacle_inside(body: ir.Graph) -> str | None:
    captured = {value for node in body for value in list_inputs(node)}
    captured -= {value for node in body for value in node.outputs}
    roots = [v for v in captured if is_float(v) and not v.is_initializer()]
    moving = find_moving(body, roots)
    for node in body:
        if node.op_type in CONTROL_FLOW and not node.domain:
            obstacle = find_obstacle(node)
            if obstacle is not None:
                return f"{obstacle}, in '{node.name}' ({node.op_type}) inside"
        elif reason := _judge(node, moving):
            return f"'{node.name}' ({node.op_type}) in its body {reason}"
    return None


def _judge(node: ir.Node, moving: Collection[ir.Value]) -> str | None:
    """Return why a node in a body is an obstacle, or ``None`` if it is none."""
    if node.domain not in ("", "ai.onnx"):
        return "has no gradient" if any(v in moving for v in list_inputs(node)) else None
    if node.op_type in RANDOM or (node.op_type == "Dropout" and _may_drop(node)):
        return "draws random numbers, and the gradient would need the same ones"
    if node.op_type == "BatchNormalization" and is_training(node):
        return "is in training mode"
    if node.op_type in _QUANTIZED:
        return "rounds to integers"
    if any(value.type is not None and not _is_tensor(value) for value in node.outputs):
        is_passed = any(value in moving for value in list_inputs(node))
        made = "makes a sequence or an optional value, whose length or places are not constants"
        return made if is_passed else None
    without = node.op_type in WITHOUT_GRADIENT and node.op_type not in REWRITES
    if without and any(value in moving for value in list_inputs(node)):
        return "has no gradient"
    return None


def _may_drop(node: ir.Node) -> bool:
    """Return whether a Dropout may be in training mode."""
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return False
    tensor = ir.convenience.get_const_tensor(mode)
    return tensor is None or bool(tensor.numpy().any())
