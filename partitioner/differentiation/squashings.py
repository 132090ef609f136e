"""Find an activation at a model's end that a loss would apply a second time.

:func:`final_activations.find_activation` finds those that the loss skips.  This module finds the
others: where something behind the activation changes the numbers, or where the loss contains
another activation.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.differentiation.final_activations import find_activation
from splitonnx.partitioner.graphs.builders import known_array

CONTAINED = {"cross-entropy": "Softmax", "bce-with-logits": "Sigmoid"}
"""Maps a loss to the activation that it contains."""
SQUASHING = frozenset({"HardSigmoid", "Sigmoid", "Softmax"})
_BEHIND = frozenset(
    {"Add", "Cast", "Clip", "Div", "Flatten", "Identity", "Mul", "Reshape", "Slice", "Squeeze",
     "Sub", "Transpose", "Unsqueeze"}
)  # fmt: skip
"""Operators between an activation and the output, if their other inputs are constants."""


def find_repeated_activation(output: ir.Value, loss: str, class_axis: int = 1) -> ir.Node | None:
    """Return the activation behind which ``loss`` would apply its own, if there is one.

    Between it and ``output`` stand only moves, casts and arithmetic with constants.  ``class_axis``
    is the axis of the classes.
    """
    if loss not in CONTAINED or find_activation(output, loss, class_axis) is not None:
        return None
    value = output
    while (node := value.producer()) is not None and not node.domain:
        if node.op_type in SQUASHING:
            return node
        open_inputs = [v for v in node.inputs if v is not None and known_array(v) is None]
        if node.op_type not in _BEHIND or len(open_inputs) != 1:
            return None
        value = open_inputs[0]
    return None
