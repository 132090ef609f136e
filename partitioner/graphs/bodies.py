"""Copy the subgraph body of a control-flow node, such as a Loop, into the surrounding graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


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
