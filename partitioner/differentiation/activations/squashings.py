"""Find an activation at the end of a model to which a loss would apply a second activation.

:func:`final_activations.find_activation` finds activations that the loss skips.  This module finds
activations that the loss cannot skip, either because later nodes change the activation's result, or
because the loss contains a different activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.differentiation.activations.final_activations import (
    CONTAINED,
    find_activation,
)
from splitonnx.partitioner.differentiation.activations.spelled_activations import find_spelled
from splitonnx.partitioner.graphs.builders import known_array

SQUASHING = frozenset({"HardSigmoid", "Sigmoid", "Softmax"})
_BEHIND = frozenset(
    {"Add", "Cast", "Clip", "Concat", "Div", "Expand", "Flatten", "Greater", "GreaterOrEqual",
     "Identity", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mul", "Pow", "ReduceMax",
     "ReduceMean", "ReduceSum", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub", "Sum", "Transpose",
     "Unsqueeze", "Where"}
)  # fmt: skip
"""Operators that may follow activations, if all their other inputs are constants."""
_MOST_VALUES = 256
"""Limit on the number of values after which the search for activations ends."""


@dataclass(frozen=True, kw_only=True)
class Squashing:
    """An activation before a loss: its operator, the node that computes its result, and its input.

    ``source`` is ``None`` if no tensor holds the input.
    """

    kind: str
    node: ir.Node
    source: ir.Value | None


def find_repeated_activation(
    given: ir.Value, trained: ir.Value, loss: str, class_axis: int = 1
) -> Squashing | None:
    """Return the final activation of an output, if ``loss`` would apply a second one after it.

    Return ``None`` if the output has no final activation, or if the loss skips the activation.
    Only nodes that move or convert elements, and arithmetic, may follow the activation.  Each of
    their inputs must be a constant or come from an activation.

    ``given`` is the output in the model before its operators were rewritten, and ``trained`` the
    same output in the training form, in which the loss skips activations.  ``class_axis`` is the
    axis that holds the classes.
    """
    if loss not in CONTAINED or find_activation(trained, loss, class_axis) is not None:
        return None
    return _find_squashing(given, {}) or _find_squashing(trained, {})


def _find_squashing(value: ir.Value, known: dict[ir.Value, Squashing | None]) -> Squashing | None:
    """Return an activation from which a value comes; ``known`` holds what was found for others."""
    if value not in known:
        known[value] = None  # until it is found
        known[value] = _search(value, known) if len(known) <= _MOST_VALUES else None
    return known[value]


def _search(value: ir.Value, known: dict[ir.Value, Squashing | None]) -> Squashing | None:
    while (node := value.producer()) is not None and not node.domain:
        if node.op_type in SQUASHING:
            return Squashing(kind=node.op_type, node=node, source=node.inputs[0])
        if (spelled := find_spelled(value)) is not None:
            return Squashing(kind=spelled.kind, node=node, source=spelled.source)
        open_inputs = [v for v in node.inputs if v is not None and known_array(v) is None]
        if node.op_type not in _BEHIND or not open_inputs:
            return None
        if len(open_inputs) > 1:
            found = [_find_squashing(own, known) for own in open_inputs]
            return found[0] if all(found) else None
        value = open_inputs[0]
    return None
