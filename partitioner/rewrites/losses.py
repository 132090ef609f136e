"""Rewrite loss operators that are part of a model: negative log-likelihood and cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.lowerings.losses import lower_cross_entropy, lower_nll_loss

Values = Sequence[ir.Value | None]


def rewrite_nll_loss(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite NegativeLogLikelihoodLoss as -w[label] * x[label], followed by the reduction.

    Here w contains the weights of the classes.  Elements with the label ``ignore_index`` do not
    count.  onnxruntime-training has no gradient for this operator.
    """
    return lower_nll_loss(builder, node)


def rewrite_cross_entropy(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite SoftmaxCrossEntropyLoss if its second output, the log-probabilities, is used.

    The node is replaced with a LogSoftmax and a negative log-likelihood, because
    onnxruntime-training's gradient of SoftmaxCrossEntropyLoss covers only the first output.  If the
    second output of a node is unused, the node is left unchanged.
    """
    if not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None
    return lower_cross_entropy(builder, node)
