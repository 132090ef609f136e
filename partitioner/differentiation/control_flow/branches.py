"""Compute the gradients of an If by another If on the same condition.

The forward If stays as it is.  Each branch of the other If computes the gradients of all values
that either branch reads: those that the branch itself does not read get zeros.  It computes again
what it reads of the forward branch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.differentiation.control_flow.bodies import BodyWriter
from splitonnx.partitioner.differentiation.control_flow.gradient_nodes import GradientNodes
from splitonnx.partitioner.differentiation.control_flow.steps import (
    DerivedStep,
    Step,
    Supply,
    differentiate_step,
    open_branch,
)
from splitonnx.partitioner.differentiation.derived.supplied_gradients import GRADIENT
from splitonnx.partitioner.graphs.traversals import is_float, map_values

_BRANCHES = ("then_branch", "else_branch")


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """A branch with its gradients, or without if no gradient passes through it.

    ``ends`` maps the gradients of the branch's outputs to the outputs of the If.
    """

    step: Step
    derived: DerivedStep | None
    ends: Mapping[str, ir.Value]


def write_branches(
    model: ir.Model,
    node: ir.Node,
    moving: Collection[str],
    results: Collection[ir.Value],
    nodes: GradientNodes,
    supply: Supply,
) -> dict[ir.Value, ir.Value]:
    """Add the If that computes the gradients of an If, and the nodes around it, to ``nodes``.

    ``moving`` names the values that depend on trained parameters, and ``results`` are the outputs
    of ``node`` whose gradients are given.  ``supply`` writes the gradients of the control flow
    inside.  Return the gradients of the values that the branches read.
    """
    branches = [_derive(model, node, name, moving, results, supply) for name in _BRANCHES]
    read = [value for branch in branches for value in branch.step.held.values()]
    wanted = [v for v in dict.fromkeys(read) if v.name in moving and is_float(v)]
    bodies = [
        ir.AttrGraph(name, _write(branch, f"{node.name}/backward/{name}", wanted, nodes))
        for name, branch in zip(_BRANCHES, branches, strict=True)
    ]
    condition = node.inputs[0]
    assert condition is not None
    attributes = {body.name: body for body in bodies}
    made = nodes.builder.ops("If", [nodes.refer(condition)], len(wanted), attributes)
    for value, gradient in zip(wanted, made, strict=True):
        gradient.type, gradient.shape = value.type, value.shape
        nodes.add(value, gradient)
    return nodes.total(wanted)


def _derive(
    model: ir.Model,
    node: ir.Node,
    name: str,
    moving: Collection[str],
    results: Collection[ir.Value],
    supply: Supply,
) -> _Branch:
    prefix = f"{node.name}/{name}"
    body = node.attributes[name].as_graph()
    step = open_branch(body, prefix, model.graph.opset_imports, model.ir_version)
    pairs = list(zip(step.shown, node.outputs, strict=True))
    reached = [own for own, value in pairs if value in results]
    moved = [own for own, value in step.held.items() if value.name in moving and is_float(own)]
    derived = differentiate_step(step, moved, reached, supply) if moved and reached else None
    ends = {f"{own.name}{GRADIENT}": value for own, value in pairs}
    return _Branch(step=step, derived=derived, ends=ends)


def _write(
    branch: _Branch, prefix: str, wanted: Sequence[ir.Value], nodes: GradientNodes
) -> ir.Graph:
    """Write a branch that returns the gradient of each value in ``wanted``."""
    writer = BodyWriter(prefix)
    own = {value: held.name or "" for held, value in branch.step.held.items()}
    derived = branch.derived
    if derived is not None:
        values = map_values(derived.graph)
        for value, name in own.items():
            writer.hold(values[name], nodes.refer(value))
        for name, value in branch.ends.items():
            if name in values:
                writer.hold(values[name], nodes.refer(value, GRADIENT))
        writer.copy(derived.backward)
    for value in wanted:
        name = own.get(value, "")
        if derived is not None and name in derived.gradients:
            writer.show(derived.gradients[name])
        else:
            writer.show_zeros_like(nodes.refer(value))
    return writer.finish()
