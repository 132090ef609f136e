"""Replace cross-entropy, its gradient, and negative log-likelihood with standard ONNX operators.

Class weights and an ignored index are supported.  Where nothing counts, as in a batch whose labels
are all ignored, a mean and its gradient are 0, as in ONNX Runtime's kernels for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims

Values = Sequence[ir.Value | None]
MEANS = ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")
"""Operators whose results are means of labels' losses, if their attribute ``reduction`` is mean."""


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """Labels as valid indices, each one's weight, and which are ignored.

    ``factor`` is ``None`` if all weigh 1, and ``skip`` is ``None`` if none can be ignored.
    """

    index: ir.Value
    factor: ir.Value | None
    skip: ir.Value | None


def lower_cross_entropy(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SoftmaxCrossEntropyLoss, for which mobile builds of ONNX Runtime have no kernel.

    For each label, the loss is -w[label] * log_softmax(scores)[label], where w contains the class
    weights.  The losses are then reduced as the node's attribute ``reduction`` requires.  The
    second output is log_softmax(scores).
    """
    scores = node.inputs[0]
    assert scores is not None
    log_prob = builder.op("LogSoftmax", scores, axis=1)
    return [pick_losses(builder, node, log_prob, scores.dtype), log_prob]


def lower_nll_loss(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace NegativeLogLikelihoodLoss, whose mean in ONNX Runtime is NaN where nothing counts."""
    log_prob = node.inputs[0]
    assert log_prob is not None
    return [pick_losses(builder, node, log_prob, log_prob.dtype)]


def pick_losses(
    builder: NodeBuilder, node: ir.Node, log_prob: ir.Value, dtype: ir.DataType | None
) -> ir.Value:
    """Return -w[label] * log_prob[label], reduced as the attribute ``reduction`` requires.

    The labels are the node's second input, and the class weights w are its third, if it has one.
    ``dtype`` is the type of ``log_prob``, whose classes are on axis 1.
    """
    labels = _read_labels(builder, node, node.inputs[1:], dtype)
    axis = builder.integers([1])
    index = builder.op("Unsqueeze", labels.index, axis)
    picked = builder.op("GatherElements", log_prob, index, axis=1)
    each = builder.op("Neg", builder.op("Squeeze", picked, axis))
    if labels.skip is not None:  # a product with 0 would keep infinity and NaN
        each = builder.op("Where", labels.skip, builder.number(0.0, dtype), each)
    if labels.factor is not None:
        each = builder.op("Mul", each, labels.factor)
    reduction = node.attributes.get_string("reduction", "mean")
    if reduction == "none":
        return each
    if reduction == "mean" and labels.factor is None:
        return builder.op("ReduceMean", each, keepdims=0)
    total = builder.op("ReduceSum", each, keepdims=0)
    if reduction == "sum":
        return total
    assert labels.factor is not None
    return builder.op("Div", total, _count(builder, labels.factor, dtype))


def lower_cross_entropy_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SoftmaxCrossEntropyLossGrad with its formula.

    The formula is (softmax(scores) - one_hot(label)) * w[label] * dy, where w contains the class
    weights and dy is the gradient of the loss.  If the loss is a mean, the result is divided by the
    sum of w[label] over all labels.
    """
    dy, log_prob = node.inputs[:2]
    assert dy is not None
    assert log_prob is not None
    dtype = log_prob.dtype
    held = _read_labels(builder, node, node.inputs[2:], dtype)
    index, factor = held.index, held.factor
    dims = known_dims(log_prob)
    classes = dims[1] if dims is not None else None
    depth = builder.integers([classes]) if classes else builder.shape(log_prob, 1, 2)
    span = builder.op("Concat", builder.integers([0]), builder.integers([1]), axis=0)
    hot = builder.op("OneHot", index, depth, builder.op("Cast", span, to=dtype.value), axis=1)  # type: ignore[union-attr]
    difference = builder.op("Sub", builder.op("Exp", log_prob), hot)
    axis = builder.integers([1])
    if held.skip is not None:
        skip = builder.op("Unsqueeze", held.skip, axis)
        difference = builder.op("Where", skip, builder.number(0.0, dtype), difference)
    scale = dy
    reduction = node.attributes.get_string("reduction", "mean")
    if reduction == "mean" and factor is None:
        scale = builder.op("Div", dy, builder.cast(builder.op("Size", index), dtype))
    elif reduction == "mean":
        assert factor is not None
        scale = builder.op("Div", dy, _count(builder, factor, dtype))
    if factor is not None:
        scale = builder.op("Mul", scale, factor)
    if factor is not None or reduction == "none":
        scale = builder.op("Unsqueeze", scale, axis)
    return [builder.op("Mul", difference, scale)]


def count_labels(builder: NodeBuilder, node: ir.Node) -> ir.Value | None:
    """Return the sum of the weights of what a node's loss is the mean of.

    Return ``None`` unless the node is a SoftmaxCrossEntropyLoss or NegativeLogLikelihoodLoss that
    is a mean of labels which may count unequally, or not at all.
    """
    is_mean = node.attributes.get_string("reduction", "mean") == "mean"
    if node.op_type not in MEANS or node.domain or not is_mean or node.inputs[0] is None:
        return None
    factor = _read_labels(builder, node, node.inputs[1:], node.inputs[0].dtype).factor
    return None if factor is None else builder.op("ReduceSum", factor, keepdims=0)


def _count(builder: NodeBuilder, factor: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Return the sum of the labels' weights, or 1 where it is 0; what it divides is 0 there."""
    counted = builder.op("ReduceSum", factor, keepdims=0)
    is_empty = builder.op("Equal", counted, builder.number(0.0, dtype))
    return builder.op("Where", is_empty, builder.number(1.0, dtype), counted)


def _read_labels(
    builder: NodeBuilder,
    node: ir.Node,
    given: Sequence[ir.Value | None],
    dtype: ir.DataType | None,
) -> _Labels:
    """Read what a node knows of each label; ``given`` are the labels, then the class weights."""
    labels, weights = given[0], given[1] if len(given) > 1 else None
    assert labels is not None
    index, skip, factor = builder.cast(labels, ir.DataType.INT64), None, None
    ignored = node.attributes.get("ignore_index")
    if ignored is not None:
        skip = builder.op("Equal", index, builder.integer(ignored.as_int()))
        index = builder.op("Where", skip, builder.integer(0), index)
        factor = builder.cast(builder.op("Not", skip), dtype)
    if weights is not None:
        each = builder.op("Gather", weights, index, axis=0)
        factor = each if factor is None else builder.op("Mul", factor, each)
    return _Labels(index=index, factor=factor, skip=skip)
