"""Replace softmax cross-entropy and its gradient with standard ONNX operators.

Class weights and an ignored index are supported.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims

Values = Sequence[ir.Value | None]


def lower_cross_entropy(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SoftmaxCrossEntropyLoss, for which mobile builds of ONNX Runtime have no kernel.

    For each label, the loss is -w[label] * log_softmax(scores)[label], where w contains the class
    weights.  The losses are then reduced as the node's attribute ``reduction`` requires.  The
    second output is log_softmax(scores).
    """
    scores, labels = node.inputs[:2]
    assert scores is not None
    assert labels is not None
    log_prob = builder.op("LogSoftmax", scores, axis=1)
    index, factor = _read_labels(builder, node, labels, _optional(node, 2), scores.dtype)
    axis = builder.integers([1])
    picked = builder.op("GatherElements", log_prob, builder.op("Unsqueeze", index, axis), axis=1)
    each = builder.op("Neg", builder.op("Squeeze", picked, axis))
    reduction = node.attributes.get_string("reduction", "mean")
    if factor is not None:
        each = builder.op("Mul", each, factor)
    if reduction == "none":
        return [each, log_prob]
    if reduction == "mean" and factor is None:
        return [builder.op("ReduceMean", each, keepdims=0), log_prob]
    total = builder.op("ReduceSum", each, keepdims=0)
    if reduction == "sum":
        return [total, log_prob]
    assert factor is not None
    return [builder.op("Div", total, builder.op("ReduceSum", factor, keepdims=0)), log_prob]


def lower_cross_entropy_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SoftmaxCrossEntropyLossGrad with its formula.

    The formula is (softmax(scores) - one_hot(label)) * w[label] * dy, where w contains the class
    weights and dy is the gradient of the loss.  If the loss is a mean, the result is divided by the
    sum of w[label] over all labels.
    """
    dy, log_prob, labels = node.inputs[:3]
    assert dy is not None
    assert log_prob is not None
    assert labels is not None
    dtype = log_prob.dtype
    index, factor = _read_labels(builder, node, labels, _optional(node, 3), dtype)
    dims = known_dims(log_prob)
    classes = dims[1] if dims is not None else None
    depth = builder.integers([classes]) if classes else builder.shape(log_prob, 1, 2)
    span = builder.op("Concat", builder.integers([0]), builder.integers([1]), axis=0)
    hot = builder.op("OneHot", index, depth, builder.op("Cast", span, to=dtype.value), axis=1)  # type: ignore[union-attr]
    difference = builder.op("Sub", builder.op("Exp", log_prob), hot)
    scale = dy
    reduction = node.attributes.get_string("reduction", "mean")
    if reduction == "mean":
        count = builder.op("Size", index) if factor is None else None
        total = builder.cast(count, dtype) if count else builder.op("ReduceSum", factor, keepdims=0)
        scale = builder.op("Div", dy, total)
    if factor is not None:
        scale = builder.op("Mul", scale, factor)
    if factor is not None or reduction == "none":
        scale = builder.op("Unsqueeze", scale, builder.integers([1]))
    return [builder.op("Mul", difference, scale)]


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _read_labels(
    builder: NodeBuilder,
    node: ir.Node,
    labels: ir.Value,
    weights: ir.Value | None,
    dtype: ir.DataType | None,
) -> tuple[ir.Value, ir.Value | None]:
    """Return valid indices for the labels, and each label's weight, or ``None`` if all are 1."""
    index = builder.cast(labels, ir.DataType.INT64)
    ignored = node.attributes.get("ignore_index")
    factor = None
    if ignored is None:
        if weights is not None:
            factor = builder.op("Gather", weights, index, axis=0)
        return index, factor
    skip = builder.op("Equal", index, builder.integer(ignored.as_int()))
    index = builder.op("Where", skip, builder.integer(0), index)
    counted = builder.cast(builder.op("Not", skip), dtype)
    if weights is not None:
        counted = builder.op("Mul", counted, builder.op("Gather", weights, index, axis=0))
    return index, counted
