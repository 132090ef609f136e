"""Find the values and the states that hold raw inputs: no layer of weights is in between.

A state may hold the raw inputs of an earlier step, which the next step reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from splitonnx.layers import may_mix
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.differentiation.label_traces import find_positions
from splitonnx.partitioner.graphs.traversals import list_inputs, reads_size


def trace_raw_inputs(
    graph: ir.Graph,
    raw: Collection[str],
    prepared: PreparedModel,
    held: Mapping[str, frozenset[str]],
) -> dict[ir.Value, frozenset[str]]:
    """Map each value to the raw inputs that reach it along a path without a layer of weights.

    ``raw`` names the raw inputs among the graph's inputs.  ``held`` maps states to the raw inputs
    that they hold.
    """
    weights = {value for value in graph.inputs if value.name in prepared.value_layers}
    scalings = prepared.value_scalings
    bare = {v: frozenset({v.name or ""}) for v in graph.inputs if v.name in raw}
    bare |= {v: held[v.name] for v in graph.inputs if v.name is not None and held.get(v.name)}
    for node in graph:
        if reads_size(node):
            continue
        read = list_inputs(node)
        reached = frozenset().union(*(bare.get(value, frozenset()) for value in read))
        if not reached and weights.intersection(read):
            weights.update(value for value in node.outputs if value.name not in scalings)
        if reached and not may_mix(node.op_type, find_positions(node, weights)):
            bare.update(dict.fromkeys(node.outputs, reached))
    return bare


def trace_held_inputs(
    graph: ir.Graph, raw: Collection[str], prepared: PreparedModel, carried: Mapping[str, str]
) -> dict[str, frozenset[str]]:
    """Map each state to the raw inputs of earlier steps that it holds, as for a sent tensor.

    ``carried`` maps states to the values that replace them.
    """
    held: dict[str, frozenset[str]] = dict.fromkeys(carried, frozenset())
    while True:
        bare = trace_raw_inputs(graph, raw, prepared, held)
        by_name = {value.name: inputs for value, inputs in bare.items()}
        found = {name: by_name.get(made, frozenset()) for name, made in carried.items()}
        if found == held:
            return held
        held = found
