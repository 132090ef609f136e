"""Rewrite loss operators that are part of a model: negative log-likelihood and cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder

Values = Sequence[ir.Value | None]


def rewrite_nll_loss(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite NegativeLogLikelihoodLoss as -w[label] * x[label], followed by the reduction.

    Here w contains the weights of the classes.  Elements with the label ``ignore_index`` do not
    count.  onnxruntime-training has no gradient for this operator.
    """
    x, labels = node.inputs[:2]
    assert x is not None
    assert labels is not None
    return [_pick(builder, node, x, labels)]


def rewrite_cross_entropy(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite SoftmaxCrossEntropyLoss if its second output, the log-probabilities, is used.

    The node is replaced with a LogSoftmax and a negative log-likelihood, because
    onnxruntime-training's gradient of SoftmaxCrossEntropyLoss covers only the first output.  If the
    second output of a node is unused, the node is left unchanged.
    """
    scores, labels = node.inputs[:2]
    assert scores is not None
    assert labels is not None
    if not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None
    log_prob = builder.op("LogSoftmax", scores, axis=1)
    return [_pick(builder, node, log_prob, labels, scores.dtype), log_prob]


def _pick(
    builder: NodeBuilder,
    node: ir.Node,
    x: ir.Value,
    labels: ir.Value,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Select the element at each label along axis 1, multiply it by its weight, and reduce."""
    weights = node.inputs[2] if len(node.inputs) > 2 else None
    index = builder.cast(labels, ir.DataType.INT64)
    ignored = node.attributes.get("ignore_index")
    factor = None
    if ignored is not None:
        skip = builder.op("Equal", index, builder.integer(ignored.as_int()))
        index = builder.op("Where", skip, builder.integer(0), index)
        factor = builder.cast(builder.op("Not", skip), dtype or x.dtype)
    if weights is not None:
        each = builder.op("Gather", weights, index, axis=0)
        factor = each if factor is None else builder.op("Mul", each, factor)
    axis = builder.integers([1])
    picked = builder.op("GatherElements", x, builder.op("Unsqueeze", index, axis), axis=1)
    loss = builder.op("Neg", builder.op("Squeeze", picked, axis))
    if factor is not None:
        loss = builder.op("Mul", loss, factor)
    reduction = node.attributes.get_string("reduction", "mean")
    if reduction == "none":
        return loss
    if reduction == "mean" and factor is None:
        return builder.op("ReduceMean", loss, keepdims=0)
    total = builder.op("ReduceSum", loss, keepdims=0)
    if reduction == "sum":
        return total
    return builder.op("Div", total, builder.op("ReduceSum", factor, keepdims=0))
