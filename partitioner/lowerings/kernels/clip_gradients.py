"""Where a Clip passes its input on, found by one comparison instead of three operators.

The gradient builder asks whether ``low <= x`` and ``x <= high``.  Where ``low <= high``, that is so
exactly where Clip returned its input.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array


def compare_with_output(node: ir.Node, clips: Collection[ir.Node]) -> None:
    """Replace ``And(low <= x, x <= high)`` by ``x == y``, if y is the output of one of ``clips``.

    ``clips`` are the Clips that come before the node.  Nodes whose limits are not constants, or not
    in this order, are left unchanged.
    """
    above, below = (None if value is None else value.producer() for value in node.inputs)
    if above is None or below is None:
        return
    if (above.op_type, below.op_type) != ("GreaterOrEqual", "LessOrEqual"):
        return
    x, low = above.inputs
    clip = _find_clip(x, low, below.inputs[1], clips)
    if below.inputs[0] is not x or clip is None:
        return
    builder = NodeBuilder(f"{node.outputs[0].name}/equal")
    builder.replace(node, [builder.op("Equal", x, clip.outputs[0])])
    graph = clip.graph
    for unused in (above, below):
        if graph is not None and not unused.outputs[0].uses():
            graph.remove(unused, safe=True)


def _find_clip(
    x: ir.Value | None,
    low: ir.Value | None,
    high: ir.Value | None,
    clips: Collection[ir.Node],
) -> ir.Node | None:
    """Return the Clip of a value between two constants, if the first is not above the second."""
    least, most = known_array(low), known_array(high)
    if x is None or least is None or most is None or not (least <= most).all():
        return None
    readers = (reader for reader in x.consumers() if reader in clips)
    return next((reader for reader in readers if tuple(reader.inputs) == (x, low, high)), None)
