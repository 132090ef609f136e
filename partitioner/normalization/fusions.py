"""Pads and poolings kept apart, which ONNX Runtime's optimizer would merge wrongly.

Its rule PadFusion adds a Pad's widths to the ``pads`` of the pooling behind it.  What a Pad puts
there counts in an average and can be the largest of a window, what ``pads`` put there does not:
ONNX Runtime 1.19.2 is wrong for AveragePool and MaxPool, 1.30 for MaxPool, without a word.  A Pad
that names its axes is not merged, and means the same.  It knows no other rule of the optimizer.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.graphs.traversals import list_bodies

_POOLINGS = frozenset({"AveragePool", "MaxPool"})
_PASSING = frozenset({"Dropout", "Identity"})
"""Operators that the optimizer takes out before it looks."""


def separate_pads(graph: ir.Graph) -> None:
    """Let each Pad before a pooling name all of its axes, in bodies as well, in place."""
    for node in list(graph):
        for body in list_bodies(node):
            separate_pads(body)
        if node.op_type == "Pad" and not node.domain and _names_no_axes(node):
            widths = known_array(node.inputs[1])
            if widths is not None and _feeds_pooling(node):
                _name_axes(node, len(widths) // 2)


def _names_no_axes(node: ir.Node) -> bool:
    return len(node.inputs) < 4 or node.inputs[3] is None


def _feeds_pooling(node: ir.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        for reader in pending.pop().outputs[0].consumers():
            if reader.op_type in _POOLINGS and not reader.domain:
                return True
            if reader.op_type in _PASSING and not reader.domain and reader not in seen:
                seen.add(reader)
                pending.append(reader)
    return False


def _name_axes(node: ir.Node, rank: int) -> None:
    graph = node.graph
    assert graph is not None
    builder = NodeBuilder(f"{node.outputs[0].name}/axes")
    axes = builder.integers(list(range(rank)))
    graph.insert_before(node, builder.nodes)
    node.resize_inputs(4)
    node.replace_input_with(3, axes)
