"""Explain why a parameter gets no gradient from an output."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from splitonnx.partitioner.graphs.traversals import is_float, list_inputs, walk_back


def explain_untrained(
    graph: ir.Graph, output: ir.Value, names: Collection[str], reached: Collection[str]
) -> dict[str, str]:
    """Return the reason why each parameter in ``names`` gets no gradient from ``output``.

    The result maps the name of each parameter to its reason.  A reason may name the node at which
    the gradient ends: a step function, or a node that computes integers.  ``graph`` is the model
    as the user knows it, before rewrites.  ``reached`` names the values to which a gradient flows
    after rewrites.
    """
    causes = _find_causes(graph, output, reached)
    return {
        name: _tell(causes.get(value), output)
        for value in graph.inputs
        if (name := value.name or "") in names
    }


def _find_causes(
    graph: ir.Graph, output: ir.Value, reached: Collection[str]
) -> dict[ir.Value, ir.Node]:
    """Map each value without a gradient that ``output`` depends on to the node that stops it."""
    needed, _ = walk_back([output])
    causes: dict[ir.Value, ir.Node] = {}
    for node in reversed(graph):
        if node not in needed:
            continue
        passes = any(value.name in reached for value in node.outputs)
        makes_floats = any(is_float(value) for value in node.outputs)
        later = next((causes[value] for value in node.outputs if value in causes), node)
        for value in list_inputs(node):
            if passes and value.name in reached:
                continue
            ends_here = passes or (is_float(value) and not makes_floats)
            causes.setdefault(value, node if ends_here else later)
    return causes


def _tell(cause: ir.Node | None, output: ir.Value) -> str:
    if cause is None:
        return f"'{output.name}' does not depend on"
    return f"no gradient passes through node '{cause.name}' ({cause.op_type}) to"
