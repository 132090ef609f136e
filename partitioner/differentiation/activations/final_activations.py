"""Find the activation that a model ends with, if the loss applies the same one.

``cross-entropy`` contains a Softmax, and ``bce-with-logits`` a Sigmoid.  If a model already ends
with the same activation, the loss must skip it.  Otherwise, the activation would be applied twice.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.differentiation.activations.spelled_activations import find_spelled
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.graphs.traversals import map_values

_log = logging.getLogger(__name__)

EDGE = 1e-3
"""The largest distance from 0 and 1 at which a Clip is assumed only to keep logarithms finite."""

CONTAINED = {"cross-entropy": "Softmax", "bce-with-logits": "Sigmoid"}
"""Maps a loss to the activation that it contains."""
_MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


def skip_activation(
    graph: ir.Graph, loss: str, output: str, cut: Collection[ir.Value], class_axis: int = 1
) -> str:
    """Return the name of the tensor from which the loss should be computed.

    Usually this is ``output``.  However, ``cross-entropy`` itself applies a Softmax, and
    ``bce-with-logits`` a Sigmoid.  If the model applies the same activation last, the loss is
    computed from the input of this activation, so that it is not applied twice.  Nodes that move or
    convert the activation's result are then applied to its input instead.

    ``cut`` contains the cut tensors.  If one of them is between the activation and the loss, the
    party that computes the loss does not have the activation's input.  In this case, the activation
    is inverted, and a warning says what this loses.  ``class_axis`` is the axis of ``output`` that
    holds the classes.
    """
    value = map_values(graph)[output]
    found = find_activation(value, loss, class_axis)
    if found is None:
        return output
    builder = NodeBuilder("splitonnx.scores")
    if {value, *found.passed} & set(cut):
        scores = invert_activation(builder, value, found.kind)
        _log.warning("%s", describe_inverted("training", loss, output))
    else:
        scores = replay(builder, found)
    graph.extend(builder.nodes)
    return scores.name or output


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The activation that a model applies last: its operator, and its input.

    ``passed`` contains the results of the activation and of the nodes after it, from the output
    back to the activation, and the tensors inside an activation that several nodes compute
    together (:mod:`spelled_activations`).  ``nodes`` contains the nodes after the activation that
    move or convert elements, in graph order.
    """

    kind: str
    source: ir.Value
    passed: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


def find_activation(output: ir.Value, loss: str, class_axis: int = 1) -> Activation | None:
    """Return the activation at the end of ``output``, if ``loss`` itself applies this activation.

    Otherwise, return ``None``.  ``cross-entropy`` applies Softmax, and ``bce-with-logits`` Sigmoid.
    ``class_axis`` is the axis of ``output`` that holds the classes.  A Softmax must be computed
    along this axis.  Several nodes may compute the activation, as in ``1 / (1 + exp(-x))``.

    Only these nodes may follow the activation:

    - Identity, and Cast between float types;
    - a Clip that only keeps logarithms finite;
    - nodes that only change the shape.  After a Softmax, ``class_axis`` must be 1, and the first
      two dimensions (the batch and the classes) must stay the same.
    """
    kind, value = CONTAINED.get(loss), output
    if kind is None:
        return None
    passed: list[ir.Value] = []
    nodes: list[ir.Node] = []
    while (node := value.producer()) is not None and not node.domain:
        passed.append(value)
        source = node.inputs[0] if node.inputs else None
        if node.op_type == kind and source is not None:
            if kind == "Softmax" and not _is_over_classes(node, value, class_axis):
                return None
            made = tuple(reversed(nodes))
            return Activation(kind=kind, source=source, passed=tuple(passed), nodes=made)
        spelled = find_spelled(value)
        if spelled is not None:
            if spelled.kind != kind or spelled.source is None:
                return None
            if kind == "Softmax" and spelled.axes != (class_axis % _rank(value),):
                return None
            passed += spelled.inner
            made = tuple(reversed(nodes))
            return Activation(kind=kind, source=spelled.source, passed=tuple(passed), nodes=made)
        if source is None or not _is_looked_through(node, source, value, kind, class_axis):
            return None
        if node.op_type in (_MOVES | {"Cast"}):
            nodes.append(node)
        value = source
    return None


def _is_over_classes(node: ir.Node, value: ir.Value, class_axis: int) -> bool:
    return node.attributes.get_int("axis", -1) in (class_axis, class_axis - _rank(value))


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0


def _is_looked_through(
    node: ir.Node, source: ir.Value, result: ir.Value, kind: str, class_axis: int
) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        return all(v.dtype is not None and v.dtype.is_floating_point() for v in (source, result))
    if node.op_type == "Clip":
        low, high = (known_array(v) for v in (*node.inputs[1:3], None, None)[:2])
        return low is not None and high is not None and _keeps_probabilities(low, high)
    if node.op_type not in _MOVES:
        return False
    before, after = (list(v.shape)[:2] if v.shape is not None else None for v in (source, result))
    if kind == "Sigmoid":
        return True
    return class_axis == 1 and before is not None and len(before) == 2 and before == after


def _keeps_probabilities(low: np.ndarray, high: np.ndarray) -> bool:
    return bool(np.all((low >= 0) & (low <= EDGE) & (high >= 1 - EDGE) & (high <= 1)))


def replay(builder: NodeBuilder, found: Activation) -> ir.Value:
    """Apply the nodes that follow an activation to its input instead."""
    value = found.source
    for node in found.nodes:
        value = builder.ops(node.op_type, [value, *node.inputs[1:]], 1, node.attributes)[0]
        result = node.outputs[0]
        value.type, value.shape = result.type, result.shape
    return value


def invert_activation(builder: NodeBuilder, value: ir.Value, kind: str) -> ir.Value:
    """Compute raw scores for which the activation ``kind`` returns ``value``."""
    floor = builder.number(1e-30, ir.DataType.FLOAT)
    scores = builder.op("Log", builder.op("Max", value, floor))  # softmax(log p) is p
    if kind == "Sigmoid":
        rest = builder.op("Sub", builder.number(1.0, ir.DataType.FLOAT), value)
        scores = builder.op("Sub", scores, builder.op("Log", builder.op("Max", rest, floor)))
    scores.type, scores.shape = value.type, value.shape
    return scores


def describe_inverted(task: str, loss: str, output: str) -> str:
    """Return a remark about a loss that a task computes from an activation's result."""
    kind = CONTAINED[loss]
    rounded = "is 1 from a score of 17 on" if kind == "Sigmoid" else "is 0 far below the others"
    return (
        f"{task} computes {loss} from '{output}', the result of a {kind}, because the cut is "
        f"behind its scores; in float32 this {rounded}, and where the label says the opposite, "
        f"the loss is 69 whatever the score; cut before the {kind}"
    )
