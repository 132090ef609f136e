"""Give each normalization a scale and a bias of its own, for the gradient builder.

onnxruntime-training 1.19.2 computes the gradients of a normalization's scale and bias even if no
parameter needs them.  Such gradients are not added up, so if two normalizations share a scale that
is not trained, two nodes give their results the same name, and the builder refuses its own graph.
The graph optimizer also makes normalizations share equal constants.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import insert_copy

_NORMALIZATIONS = frozenset(
    {
        "BatchNormInternal",
        "BatchNormalization",
        "LayerNormalization",
        "SimplifiedLayerNormalization",
    }
)


def separate_scales(graph: ir.Graph) -> bool:
    """Insert an Identity where a normalization reads a scale or bias that another one reads too.

    The graph is changed in place.  Return whether any node was changed.  Call this after the
    optimizer, which would merge the Identity nodes.
    """
    read: set[ir.Value] = set()
    changed = False
    for node in [node for node in graph if node.op_type in _NORMALIZATIONS]:
        for index, value in enumerate(node.inputs[1:3], 1):
            if value is None or value not in read:
                read.update([] if value is None else [value])
                continue
            insert_copy(graph, node, index, f"{value.name}/own/{node.outputs[0].name}/{index}")
            changed = True
    return changed
