"""Convert recurrences from batch-first to time-first layout.

ONNX Runtime has no kernel for layout 1 of LSTM, GRU and RNN, neither for training nor for
prediction.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder

_STATES = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
"""Recurrences and the inputs of theirs that hold a state."""


def normalize_layouts(graph: ir.Graph) -> None:
    """Rewrite each recurrence of layout 1 as one of layout 0 between Transpose nodes, in place."""
    for node in list(graph):
        if node.op_type not in _STATES or node.domain:
            continue
        if node.attributes.get_int("layout", 0) == 1:
            _transpose(node)


def _transpose(node: ir.Node) -> None:
    builder = NodeBuilder(f"{node.name}/layout")
    inputs = list(node.inputs)
    for index in (0, *_STATES[node.op_type]):
        if index < len(inputs) and inputs[index] is not None:
            inputs[index] = builder.op("Transpose", inputs[index], perm=[1, 0, 2])
    attributes = {name: value for name, value in node.attributes.items() if name != "layout"}
    made = builder.ops(node.op_type, inputs, len(node.outputs), attributes)
    perms = [[2, 0, 1, 3], [1, 0, 2], [1, 0, 2]]
    builder.replace(
        node, [builder.op("Transpose", v, perm=p) for v, p in zip(made, perms, strict=False)]
    )
