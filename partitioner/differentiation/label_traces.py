"""Find the values from which labels can be computed because no layer of weights is in between.

A layer of weights mixes the numbers of its input.  Who does not know the weights cannot undo this.
Everything else, such as an activation, a loss or a scale, is taken for something that can be
undone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from splitonnx.layers import LAYERS, may_mix
from splitonnx.partitioner.graphs.traversals import list_inner, list_inputs, reads_size

_LINEAR = (
    *("Add", "AveragePool", "Cast", "Concat", "Expand", "Flatten", "GlobalAveragePool", "Identity"),
    *("Mean", "Neg", "Pad", "ReduceMean", "ReduceSum", "Reshape", "Slice", "Split", "Squeeze"),
    *("Sub", "Sum", "Transpose", "Unsqueeze"),
)
"""Operators whose gradient does not depend on the values that they read."""


def trace_labels(
    graph: ir.Graph,
    labels: Collection[str],
    weights: Collection[str],
    scalings: Collection[str] = (),
) -> set[ir.Value]:
    """Find the values that are computed from labels along a path without a layer of weights.

    ``labels`` names the graph inputs that are labels, and ``weights`` those that are weights of
    layers (``PreparedModel.gradient_layers``) and that only the client knows.
    ``scalings`` names values that are computed from weights, but are no weights of layers
    (``PreparedModel.gradient_scalings``).
    """
    reached = {value for value in graph.inputs if value.name in labels}
    layers = _find_layers(graph, weights, scalings)
    for node in graph:
        if node not in layers and not reads_size(node) and reached.intersection(list_inputs(node)):
            reached.update(node.outputs)
    return reached


def find_bare_ends(
    graph: ir.Graph, weights: Collection[str], scalings: Collection[str] = ()
) -> set[ir.Value]:
    """Find the values from which a path without a layer of weights leads to an output.

    If the server sends one of these values back and receives its gradient, it can compute the
    labels.  ``weights`` and ``scalings`` are as for :func:`trace_labels`.
    """
    layers = _find_layers(graph, weights, scalings)
    found = set(graph.outputs)
    for node in reversed(graph):
        if node not in layers and not reads_size(node) and found.intersection(node.outputs):
            found.update(list_inputs(node))
    return found


def trace_told_inputs(
    graph: ir.Graph,
    raw: Mapping[ir.Value, frozenset[str]],
    weights: Collection[str],
    scalings: Collection[str] = (),
) -> dict[ir.Value, frozenset[str]]:
    """Map values to the inputs that their gradients tell, in a model that ends in its own loss.

    These are the inputs that ``raw`` has of what is read on a path without a layer of weights to an
    output, except by sums and the like, whose gradients do not depend on what these read.
    ``weights`` and ``scalings`` are as for :func:`trace_labels`.
    """
    layers = _find_layers(graph, weights, scalings)
    told: dict[ir.Value, frozenset[str]] = dict.fromkeys(graph.outputs, frozenset())
    for node in reversed(graph):
        behind = [told[value] for value in node.outputs if value in told]
        if node in layers or reads_size(node) or not behind:
            continue
        read = list_inputs(node)
        held = [raw.get(value, frozenset()) for value in read if node.op_type not in _LINEAR]
        for value in read:
            told[value] = told.get(value, frozenset()).union(*behind, *held)
    return told


def _find_layers(
    graph: ir.Graph, weights: Collection[str], scalings: Collection[str]
) -> set[ir.Node]:
    """Find the nodes that mix numbers by some weights, or by values computed from these alone."""
    secret = {value for value in graph.inputs if value.name in weights}
    layers = set()
    for node in graph:
        read = list_inputs(node)
        if not secret.intersection(read):
            continue
        if _is_layer(node, secret):
            layers.add(node)
        if all(v in secret or ir.convenience.get_const_tensor(v) is not None for v in read):
            secret.update(value for value in node.outputs if value.name not in scalings)
    return layers


def _is_layer(node: ir.Node, weights: Collection[ir.Value]) -> bool:
    """Return whether a node, or a node in its bodies, mixes numbers by weights."""
    if may_mix(node.op_type, find_positions(node, weights)):
        return True
    return any(inner.op_type.removesuffix("Grad") in LAYERS for inner in list_inner(node))


def find_positions(node: ir.Node, weights: Collection[ir.Value]) -> list[int]:
    """Return the positions of weights among a node's inputs."""
    return [position for position, value in enumerate(node.inputs) if value in weights]
