"""Find an activation at the end of a model after which a loss would apply another one.

:func:`final_activations.find_activation` finds activations that the loss skips.  This module finds
the others.  The loss cannot skip an activation if later nodes change its result, or if the loss
contains a different activation.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.differentiation.final_activations import CONTAINED, find_activation
from splitonnx.partitioner.graphs.builders import known_array

SQUASHING = frozenset({"HardSigmoid", "Sigmoid", "Softmax"})
_BEHIND = frozenset(
    {"Add", "Cast", "Clip", "Div", "Flatten", "Identity", "Mul", "Reshape", "Slice", "Squeeze",
     "Sub", "Transpose", "Unsqueeze"}
)  # fmt: skip
"""Operators that may follow an activation, if all their other inputs are constants."""


def find_repeated_activation(output: ir.Value, loss: str, class_axis: int = 1) -> ir.Node | None:
    """Return the final activation of ``output``, if ``loss`` would apply another one after it.

    Return ``None`` if there is no such activation, or if the loss skips it.  Only nodes that move
    or convert elements, and arithmetic with constants, may follow the activation.  ``class_axis``
    is the axis of ``output`` that holds the classes.
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
