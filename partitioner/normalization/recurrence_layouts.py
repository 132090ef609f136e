"""Convert LSTM, GRU and RNN from batch-first to time-first layout.

ONNX Runtime has no kernel for the batch-first layout (layout 1), neither for training nor for
prediction.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_bodies

FIRST_STATES = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
"""Maps a recurrent operator to the indices of its inputs that contain an initial state.

Such a state has the shape ``[directions, batch, size]`` in layout 0.
"""


def normalize_layouts(graph: ir.Graph) -> None:
    """Convert each LSTM, GRU and RNN node from layout 1 to layout 0, in place and in all bodies.

    Transpose nodes before and after the new node convert its inputs and outputs.
    """
    for node in list(graph):
        for body in list_bodies(node):
            normalize_layouts(body)
        if node.op_type not in FIRST_STATES or node.domain:
            continue
        if node.attributes.get_int("layout", 0) == 1:
            _transpose(node)


def _transpose(node: ir.Node) -> None:
    named = (value.name for value in node.outputs if value.name)
    builder = NodeBuilder(f"{next(named, node.name)}/layout")  # a body may reuse names of nodes
    inputs = list(node.inputs)
    for index in (0, *FIRST_STATES[node.op_type]):
        if index < len(inputs) and inputs[index] is not None:
            inputs[index] = builder.op("Transpose", inputs[index], perm=[1, 0, 2])
    attributes = {name: value for name, value in node.attributes.items() if name != "layout"}
    made = builder.ops(node.op_type, inputs, len(node.outputs), attributes)
    perms = [[2, 0, 1, 3], [1, 0, 2], [1, 0, 2]]
    builder.replace(
        node, [builder.op("Transpose", v, perm=p) for v, p in zip(made, perms, strict=False)]
    )
