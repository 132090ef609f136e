"""Replace reductions without axes before any other pass reads them.

If a reduction has no axes but ``noop_with_empty_axes`` is set, it still applies its function to
each element: ReduceL1 computes absolute values and ReduceLogSum computes logarithms (see
ReduceSum-13 and related operators at onnx.ai/onnx/operators).  However, onnxruntime 1.19.2 only
copies the input, or fails if the ``axes`` input is missing.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array

_REMAINDERS = {
    "ReduceL1": "Abs",
    "ReduceL2": "Abs",
    "ReduceLogSum": "Log",
    "ReduceLogSumExp": "Identity",
    "ReduceMax": "Identity",
    "ReduceMean": "Identity",
    "ReduceMin": "Identity",
    "ReduceProd": "Identity",
    "ReduceSum": "Identity",
    "ReduceSumSquare": "Mul",
}
"""Maps a reduction to the operator that it applies to a single element."""


def make_reductions_explicit(graph: ir.Graph) -> None:
    """Replace each reduction that reduces no axes with the function that it applies to an element.

    Such a reduction has ``noop_with_empty_axes`` set and no axes.  Other reductions are left
    unchanged.
    """
    for node in list(graph):
        kind = None if node.domain else _REMAINDERS.get(node.op_type)
        x = node.inputs[0] if kind else None
        if kind is None or x is None or not _reduces_nothing(node):
            continue
        builder = NodeBuilder(f"{node.outputs[0].name}/explicit")
        builder.replace(node, [builder.op(kind, x, *([x] if kind == "Mul" else []))])


def _reduces_nothing(node: ir.Node) -> bool:
    if not node.attributes.get_int("noop_with_empty_axes", 0):
        return False
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    array = known_array(axes)
    return axes is None or (array is not None and array.size == 0)
