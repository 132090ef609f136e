"""Name the optional outputs of nodes that their gradients read.

onnxruntime-training's gradient of a LayerNormalization reads the mean and the inverse of the
standard deviation, and that of a SoftmaxCrossEntropyLoss the log-probabilities.  Its builder
refuses a node that does not compute them.
"""

from __future__ import annotations

import onnx_ir as ir

_KEPT_OUTPUTS = {
    "LayerNormalization": ("mean", "inv_std"),
    "SoftmaxCrossEntropyLoss": ("log_prob",),
}
"""Map operators to their optional outputs that the operator's gradient reads."""


def name_kept_outputs(graph: ir.Graph) -> bool:
    """Add to each node, in place, the optional outputs that its gradient reads.

    Nodes in bodies are left as they are, since each body is differentiated as a graph of its own.
    Return whether any output was added.
    """
    changed = False
    for node in graph:
        kinds = _KEPT_OUTPUTS.get(node.op_type, ())
        if node.domain or len(node.outputs) > 1 + len(kinds) or not kinds:
            continue
        node.resize_outputs(1 + len(kinds))
        for value, kind in zip(node.outputs[1:], kinds, strict=True):
            if not value.name:
                value.name, changed = f"{node.outputs[0].name}#{kind}", True
    return changed
