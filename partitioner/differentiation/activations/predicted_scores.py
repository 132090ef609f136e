"""Have the model that predicts return the scores before a final activation, for evaluations.

A loss that contains the model's last activation is computed from what comes before it.  The
activation's result does not hold this: in float32, a Sigmoid is 1 for every score above 17.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from splitonnx.names import SCORES
from splitonnx.partitioner.differentiation.activations.final_activations import (
    find_activation,
    replay,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import map_values


def predict_scores(
    graph: ir.Graph, trained: ir.Graph, losses: Iterable[tuple[str, str, int]]
) -> dict[str, str]:
    """Add graph outputs that hold the scores of losses, and return their names by output.

    ``losses`` has each loss's kind, its output and the axis of its classes.  ``graph`` is the model
    in inference form; ``trained``, in training form, decides whether the loss skips an activation.
    An output is left out if the two forms end differently.
    """
    values, decisive = map_values(graph), map_values(trained)
    found: dict[str, str] = {}
    for kind, output, axis in losses:
        value = values.get(output)
        if (
            value is None
            or output in found
            or find_activation(decisive[output], kind, axis) is None
        ):
            continue
        activation = find_activation(value, kind, axis)
        if activation is None:
            continue
        builder = NodeBuilder(f"{SCORES}{output}")
        scores = replay(builder, activation)
        if scores.dtype != value.dtype:
            continue
        if not scores.is_graph_output():
            scores = builder.op("Identity", scores)
            scores.name, scores.type, scores.shape = f"{SCORES}{output}", value.type, value.shape
            graph.outputs.append(scores)
        graph.extend(builder.nodes)
        found[output] = scores.name or ""
    return found
