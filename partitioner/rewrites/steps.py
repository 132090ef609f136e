"""Step functions: constant between their jumps, so their gradient is zero wherever it exists."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


def rewrite_step(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """The operator itself on inputs that no gradient leaves: Ceil, Floor, Round, Sign, ..."""
    inputs = [value if value is None else draft.detach(value) for value in node.inputs]
    return draft.ops(node.op_type, inputs, len(node.outputs), dict(node.attributes))


def rewrite_dynamic_quantize(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """The integers as they are; their scale is (max(x, 0) - min(x, 0)) / 255 and has a gradient."""
    x = node.inputs[0]
    assert x is not None
    made = draft.ops(node.op_type, [draft.detach(x)], 3, {})
    zero = draft.number(0.0, x.dtype)
    most = draft.op("Max", draft.op("ReduceMax", x, keepdims=0), zero)
    least = draft.op("Min", draft.op("ReduceMin", x, keepdims=0), zero)
    scale = draft.op("Div", draft.op("Sub", most, least), draft.number(255.0, x.dtype))
    return [made[0], scale, made[2]]
