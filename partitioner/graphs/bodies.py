"""Copy the body of a control-flow node, such as a Loop, into a graph, and build Scan nodes.

:func:`list_entries` and :func:`list_exits` tell which values inside and outside of bodies hold the
same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import Attribute, NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_bodies

Sources = Sequence[ir.Value]
"""Values that another one may be, or of which it holds rows."""


def copy_body(
    body: ir.Graph, prefix: str, bound: Sequence[ir.Value]
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Copy a subgraph body's nodes so that they can be inserted into the surrounding graph.

    ``bound`` holds the value that replaces each of the body's inputs.  All new names start with
    ``prefix``.  Return the new nodes in order, and the values that correspond to the body's
    outputs.  The new nodes do not belong to any graph yet.
    """
    copy = body.clone(allow_outer_scope_values=True)
    outputs = list(copy.outputs)
    copy.outputs.clear()
    bindings = dict(zip(copy.inputs, bound, strict=True))
    for own, value in bindings.items():
        own.replace_all_uses_with(value)
    constants = NodeBuilder(f"{prefix}/constant")
    for initializer in list(copy.initializers.values()):
        tensor = initializer.const_value
        assert tensor is not None
        initializer.replace_all_uses_with(constants.tensor(tensor))
    nodes = list(copy)
    copy.remove(nodes)
    for index, node in enumerate(nodes):
        node.name = f"{prefix}/{node.name or f'{node.op_type}_{index}'}"
        for value in node.outputs:
            value.name = f"{prefix}/{value.name}" if value.name else value.name
            value.shape = None  # a body's shapes may differ from those of this run
    return [*constants.nodes, *nodes], [bindings.get(value, value) for value in outputs]


def list_entries(node: ir.Node) -> list[tuple[ir.Value, Sources]]:
    """Pair each input of a Loop's or Scan's body with the values that it holds in turn.

    These are the node's input and, of what is carried, the body's output of the step before.  An If
    has no entries, and the number of the iteration holds no value of the graph.
    """
    if node.op_type == "If":
        return []
    (body,) = list_bodies(node)
    shift = int(node.op_type == "Loop")
    carried = _count_carried(node) + shift
    entries: list[tuple[ir.Value, Sources]] = []
    for i, value in enumerate(body.inputs):
        held = [node.inputs[i], *([body.outputs[i - shift]] if i < carried else [])]
        entries.append((value, [] if i < shift else [v for v in held if v is not None]))
    return entries


def list_exits(node: ir.Node) -> list[tuple[ir.Value, Sources]]:
    """Pair each output of an If, Loop or Scan with the values that it may be or consist of.

    These are outputs of the bodies and, of what is carried, the node's input if no step runs.
    """
    bodies, count = list_bodies(node), _count_carried(node)
    shift = int(node.op_type == "Loop")
    exits: list[tuple[ir.Value, Sources]] = []
    for i, value in enumerate(node.outputs):
        inner = [body.outputs[i + shift] for body in bodies]
        outer = [node.inputs[i + 2 * shift]] if i + shift < count else []
        exits.append((value, [v for v in (*inner, *outer) if v is not None]))
    return exits


def _count_carried(node: ir.Node) -> int:
    """Count the first inputs of a body that its outputs replace, with a Loop's condition."""
    if node.op_type == "If":
        return 0
    scanned = node.attributes.get_int("num_scan_inputs", 0)
    return len(node.inputs) - scanned - int(node.op_type == "Loop")


def build_scan(
    builder: NodeBuilder,
    body: ir.Graph,
    states: Sequence[ir.Value],
    rows: Sequence[ir.Value],
    *,
    backwards: bool = False,
) -> Sequence[ir.Value]:
    """Build a Scan, and return the last states and the stacked outputs of its steps.

    ``states`` are the first states, and ``rows`` the sequences, of which each step reads one row
    along the first axis.  ``backwards`` means that the Scan starts at the end of all sequences,
    those that it computes included.
    """
    stacked = len(body.outputs) - len(states)
    attributes: dict[str, Attribute] = {
        "body": ir.AttrGraph("body", body),
        "num_scan_inputs": len(rows),
    }
    if backwards:
        attributes["scan_input_directions"] = [1] * len(rows)
        attributes["scan_output_directions"] = [1] * stacked
    return builder.ops("Scan", [*states, *rows], len(body.outputs), attributes)


def runs_backwards(node: ir.Node) -> bool:
    """Return whether a Scan of :func:`build_scan` starts at the end of its sequences."""
    return any(node.attributes.get_ints("scan_input_directions", []) or [])


def reverse_rows(builder: NodeBuilder, value: ir.Value) -> ir.Value:
    """Return the rows of a sequence in the opposite order."""
    lowest = int(np.iinfo(np.int64).min)
    one = builder.integers([-1])
    return builder.op("Slice", value, one, builder.integers([lowest]), builder.integers([0]), one)
