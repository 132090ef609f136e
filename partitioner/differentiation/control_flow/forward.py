"""Supply the gradients of Scan, Loop and If nodes.

The gradient of a Scan or Loop is computed by another one that runs in the opposite direction.  The
forward node also stacks the values that the backward node reads.  The backward node starts with the
gradients of the last states, reads the gradients of the sequences that the forward node computes,
and ends with the gradients of the first states.  :mod:`steps` derives the steps of both.  The
gradient of an If is computed by another If (:mod:`branches`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx
import onnx_ir as ir

from splitonnx.partitioner.differentiation.control_flow.backward import DerivedLoop, write_backward
from splitonnx.partitioner.differentiation.control_flow.bodies import BodyWriter
from splitonnx.partitioner.differentiation.control_flow.branches import write_branches
from splitonnx.partitioner.differentiation.control_flow.gradient_nodes import GradientNodes
from splitonnx.partitioner.differentiation.control_flow.obstacles import CONTROL_FLOW, find_obstacle
from splitonnx.partitioner.differentiation.control_flow.steps import differentiate_step, open_step
from splitonnx.partitioner.differentiation.derived.supplied_gradients import (
    SuppliedGradients,
    add_argument,
)
from splitonnx.partitioner.graphs.bodies import build_scan, runs_backwards
from splitonnx.partitioner.graphs.builders import NodeBuilder
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


def supply_gradients(
    model: ir.Model, parameters: Collection[str], ends: Collection[str]
) -> SuppliedGradients:
    """Write the gradient of each Scan, Loop and If through which a gradient passes.

    The gradient is that of the graph outputs ``ends`` with respect to ``parameters``.  ``model`` is
    changed: each Scan and Loop also stacks values for its gradient, and the values that a node
    reads get copies whose gradients are graph inputs (:mod:`supplied_gradients`).

    Raises:
        NotDifferentiable: a node of a body has no gradient.
    """
    graph = model.graph
    trained = [value for name, value in map_values(graph).items() if name in parameters]
    moving = set(map(_name, find_moving(graph, trained)))
    reached = set(map(_name, trace_gradients(v for v in graph.outputs if v.name in ends)))
    protos: list[onnx.NodeProto] = []
    declarations: list[onnx.ValueInfoProto] = []
    results: list[str] = []
    arguments: list[str] = []
    for node in [node for node in graph if node.op_type in CONTROL_FLOW and not node.domain]:
        read = any(value.name in moving and is_float(value) for value in list_inputs(node))
        made = [v for v in node.outputs if v.name in reached and v.uses()]
        if not read or not made or find_obstacle(node) is not None:
            continue
        nodes = GradientNodes(node.name or "")
        results += map(_name, made)
        if node.op_type == "If":
            gradients = write_branches(model, node, moving, made, nodes, supply_gradients)
        else:
            loop = _derive(model, node, moving, reached)
            gradients = write_backward(loop, _replace_forward(graph, loop), nodes)
        for value, gradient in gradients.items():
            arguments.append(add_argument(graph, value, gradient))
        protos += nodes.serialize()
        declarations += nodes.declare()
    return SuppliedGradients(
        nodes=protos, declarations=declarations, results=results, arguments=arguments
    )


def _derive(
    model: ir.Model, node: ir.Node, moving: Collection[str], reached: Collection[str]
) -> DerivedLoop:
    step = open_step(node, f"{node.name}/step", model.graph.opset_imports, model.ir_version)
    read = [value for value in node.inputs[len(step.counted) :] if value is not None]
    inputs = dict(zip([*step.states, *step.rows], read, strict=True)) | dict(step.held)
    outputs = dict(zip([*step.nexts, *step.shown], node.outputs, strict=True))
    moved = [own for own, value in inputs.items() if value.name in moving and is_float(own)]
    ends = [own for own, value in outputs.items() if value.name in reached and value.uses()]
    return DerivedLoop(
        node=node,
        step=step,
        derived=differentiate_step(step, moved, ends, supply_gradients),
        inputs={_name(own): value for own, value in inputs.items()},
        outputs={_name(own): value for own, value in outputs.items()},
        starts=[_name(own) for own in moved],
        ends=[_name(own) for own in ends],
    )


def _replace_forward(graph: ir.Graph, loop: DerivedLoop) -> Mapping[ir.Value, ir.Value]:
    """Replace a Scan or Loop by one that also stacks what its gradient reads.

    Return the stacked sequence of each value of the step.
    """
    step, old = loop.step, loop.node
    values = map_values(loop.derived.graph)
    rows = [values[_name(row)] for row in step.rows]
    stash = [value for value in loop.derived.stash if value not in rows]
    if step.counted:  # the numbers of the iterations say how many there were
        stash = list(dict.fromkeys([*stash, values[_name(step.counted[0])]]))
    shown = [values[_name(value)] for value in (*step.again, *step.nexts, *step.shown)]
    writer = BodyWriter(f"{old.name}/forward")
    for value in step.given:
        writer.read(values[_name(value)])
    for value in step.held:
        writer.hold(values[_name(value)], loop.inputs[_name(value)])
    needed, _ = walk_back([*shown, *stash])
    writer.copy(node for node in loop.derived.graph if node in needed)
    for value in (*shown, *stash):
        writer.show(value)
    builder = NodeBuilder(f"{old.name}/forward")
    made = _build(builder, old, writer.finish(), len(step.states))
    for before, after in zip(old.outputs, made, strict=False):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.insert_before(old, builder.nodes)
    sequences = [value for value in old.inputs if value is not None][len(step.states) :]
    length = sequences[0].shape[0] if step.rows and sequences[0].shape else None
    disconnect(list_inner(old))
    graph.remove(old, safe=True)
    stacked = dict(zip(stash, made[len(old.outputs) :], strict=True))
    for value, sequence in stacked.items():
        sequence.type = value.type
        if value.shape is not None:
            sequence.shape = ir.Shape([length, *value.shape])
    return stacked | dict(zip(rows, sequences, strict=False))


def _build(builder: NodeBuilder, old: ir.Node, body: ir.Graph, states: int) -> Sequence[ir.Value]:
    """Build a node like ``old`` with another body, and return its outputs."""
    if old.op_type == "Loop":
        attribute = ir.AttrGraph("body", body)
        return builder.ops("Loop", old.inputs, len(body.outputs) - 1, {"body": attribute})
    read = [value for value in old.inputs if value is not None]
    return build_scan(builder, body, read[:states], read[states:], backwards=runs_backwards(old))


def _name(value: ir.Value) -> str:
    return value.name or ""
