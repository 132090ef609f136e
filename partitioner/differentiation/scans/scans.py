"""Compute the gradients of Scan nodes by Scan nodes that run in the opposite direction.

The forward Scan also stacks the values that the backward Scan reads.  The backward Scan starts with
the gradients of the last states, reads the gradients of the sequences that the forward Scan
computes, and ends with the gradients of the first states.  :mod:`steps` derives the steps of both.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx_ir as ir

from splitonnx.partitioner.differentiation.derived.supplied_gradients import (
    SuppliedGradients,
    add_argument,
)
from splitonnx.partitioner.differentiation.scans.backward import BackwardScan, DerivedScan
from splitonnx.partitioner.differentiation.scans.bodies import BodyWriter
from splitonnx.partitioner.differentiation.scans.steps import differentiate_step, open_step
from splitonnx.partitioner.graphs.bodies import build_scan, runs_backwards
from splitonnx.partitioner.graphs.builders import DIFFERENTIABLE, NodeBuilder
from splitonnx.partitioner.graphs.traversals import (
    disconnect,
    find_moving,
    is_float,
    list_inner,
    list_inputs,
    map_values,
    trace_gradients,
    walk_back,
)


def supply_gradients(model: ir.Model, parameters: Collection[str], loss: str) -> SuppliedGradients:
    """Write the gradient of each differentiable Scan through which a gradient passes.

    ``model`` is changed: each such Scan also stacks values for its gradient, and the values that it
    reads get copies whose gradients are graph inputs (:mod:`supplied_gradients`).
    """
    graph = model.graph
    trained = [value for value in graph.inputs if value.name in parameters]
    moving = set(map(_name, find_moving(graph, trained)))
    ends = [value for value in graph.outputs if value.name == loss]
    reached = set(map(_name, trace_gradients(ends)))
    nodes: list[onnx.NodeProto] = []
    results: list[str] = []
    arguments: list[str] = []
    for node in [node for node in graph if DIFFERENTIABLE in node.metadata_props]:
        if not _passes(node, moving, reached):
            continue
        scan = _derive(model, node, moving, reached)
        stacked = _replace_forward(graph, scan)
        results += [_name(scan.outputs[name]) for name in scan.ends]
        written = BackwardScan(scan, stacked)
        for value, gradient in written.gradients.items():
            arguments.append(add_argument(graph, value, gradient))
        nodes += written.serialize()
    return SuppliedGradients(nodes=nodes, results=results, arguments=arguments)


def _passes(node: ir.Node, moving: Collection[str], reached: Collection[str]) -> bool:
    """Return whether a gradient passes through a node."""
    read = any(value.name in moving for value in list_inputs(node))
    return read and any(value.name in reached for value in node.outputs)


def _derive(
    model: ir.Model, node: ir.Node, moving: Collection[str], reached: Collection[str]
) -> DerivedScan:
    step = open_step(node, f"{node.name}/step", model.graph.opset_imports, model.ir_version)
    read = [value for value in node.inputs if value is not None]
    inputs = dict(zip([*step.states, *step.rows], read, strict=True)) | dict(step.held)
    outputs = dict(zip([*step.nexts, *step.shown], node.outputs, strict=True))
    moved = [own for own, value in inputs.items() if value.name in moving and is_float(own)]
    ends = [own for own, value in outputs.items() if value.name in reached and value.uses()]
    return DerivedScan(
        node=node,
        step=step,
        derived=differentiate_step(step, moved, ends),
        inputs={_name(own): value for own, value in inputs.items()},
        outputs={_name(own): value for own, value in outputs.items()},
        starts=[_name(own) for own in moved],
        ends=[_name(own) for own in ends],
    )


def _replace_forward(graph: ir.Graph, scan: DerivedScan) -> dict[ir.Value, ir.Value]:
    """Replace a Scan by one that also stacks what its gradient reads.

    Return the stacked sequence of each value of the step.
    """
    values = map_values(scan.derived.graph)
    rows = [values[_name(row)] for row in scan.step.rows]
    stash = [value for value in scan.derived.stash if value not in rows]
    shown = [values[_name(value)] for value in (*scan.step.nexts, *scan.step.shown)]
    writer = BodyWriter(f"{scan.node.name}/forward")
    for value in (*scan.step.states, *scan.step.rows):
        writer.read(values[_name(value)])
    for value in scan.step.held:
        writer.hold(values[_name(value)], scan.inputs[_name(value)])
    needed, _ = walk_back([*shown, *stash])
    writer.copy(node for node in scan.derived.graph if node in needed)
    for value in (*shown, *stash):
        writer.show(value)
    old, builder = scan.node, NodeBuilder(f"{scan.node.name}/forward")
    read = [value for value in old.inputs if value is not None]
    states, sequences = read[: len(scan.step.states)], read[len(scan.step.states) :]
    made = build_scan(builder, writer.finish(), states, sequences, backwards=runs_backwards(old))
    for before, after in zip(old.outputs, made, strict=False):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.insert_before(old, builder.nodes)
    disconnect(list_inner(old))
    graph.remove(old, safe=True)
    stacked = dict(zip(stash, made[len(old.outputs) :], strict=True))
    length = None if sequences[0].shape is None else sequences[0].shape[0]
    for value, sequence in stacked.items():
        sequence.type = value.type
        if value.shape is not None:
            sequence.shape = ir.Shape([length, *value.shape])
    return stacked | dict(zip(rows, sequences, strict=True))


def _name(value: ir.Value) -> str:
    return value.name or ""
