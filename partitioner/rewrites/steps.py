"""Rewrite step functions so that no gradient passes through them.

Step functions are constant between their jumps, and therefore their derivative is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


def rewrite_step(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """Keep a step function such as Ceil, Floor, Round or Sign, but let no gradient pass through it.

    The derivative of a step function is zero wherever it exists, and onnxruntime-training has no
    gradient for these operators.
    """
    inputs = [value if value is None else builder.detach(value) for value in node.inputs]
    return builder.ops(node.op_type, inputs, len(node.outputs), dict(node.attributes))


def rewrite_dynamic_quantize(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """Rewrite DynamicQuantizeLinear so that its scale gets a gradient.

    The scale is computed as (max(x, 0) - min(x, 0)) / 255.  The other outputs, the integers and the
    zero point, get no gradient.  onnxruntime-training has no gradient for DynamicQuantizeLinear.
    """
    x = node.inputs[0]
    assert x is not None
    made = builder.ops(node.op_type, [builder.detach(x)], 3, {})
    zero = builder.number(0.0, x.dtype)
    most = builder.op("Max", builder.op("ReduceMax", x, keepdims=0), zero)
    least = builder.op("Min", builder.op("ReduceMin", x, keepdims=0), zero)
    scale = builder.op("Div", builder.op("Sub", most, least), builder.number(255.0, x.dtype))
    return [made[0], scale, made[2]]
