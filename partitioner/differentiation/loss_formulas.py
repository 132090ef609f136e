"""Formulas of losses and their metrics in standard ONNX operators.

Each is a mean: a sum of terms, multiplied by weights, divided by the sum of the weights.  This
module knows tensors and settings; it does not know models, names or cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.losses import CROSS_ENTROPY, Loss
from splitonnx.names import LOSS
from splitonnx.partitioner.graphs.builders import NodeBuilder

ACCURACY = "accuracy"
"""The name of the metric among the results of a phase."""
_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean, the sum of the weights of what it is the mean of, and the sum of the weighted terms.

    ``counted`` is ``None`` if it was not asked for.  ``total`` is ``None`` unless the terms have
    weights, too: then it may differ from ``value * counted``, since the smoothing of labels of a
    class of weight 0 has terms although nothing counts, and the value is 0.
    """

    value: ir.Value
    counted: ir.Value | None
    total: ir.Value | None = None


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What a loss is computed from: scores, labels, and weights of samples (N), if it has any.

    Where there are classes, they are on axis 1 of the scores.  ``rank`` is the rank of the labels.
    """

    scores: ir.Value
    labels: ir.Value
    weights: ir.Value | None
    rank: int


def list_formulas() -> list[str]:
    """List the kinds of losses that have a formula."""
    return list(_FORMULAS)


def build_loss(
    builder: NodeBuilder, loss: Loss, inputs: LossInputs, *, counting: bool
) -> Mapping[str, Mean]:
    """Build a loss, and its metric if it has one; map their names to the means.

    ``counting`` asks for the sums of the weights, too.
    """
    return _FORMULAS[loss.kind](_Means(builder, counting=counting), loss, inputs)


def count_labels(
    builder: NodeBuilder, loss: Loss, labels: ir.Value, weights: ir.Value | None
) -> Mapping[str, ir.Value]:
    """Return what counts in a loss and in its metric, by their names, from the labels alone.

    It is what ``counting`` adds to :func:`build_loss`, or is in proportion to it.  ``weights`` are
    those of samples, if there are any.
    """
    means = _Means(builder, counting=True)
    inputs = LossInputs(scores=labels, labels=labels, weights=weights, rank=len(labels.shape or ()))
    index, _, factor = _find_places(means, loss, inputs)
    counted = means.sum_weights(factor, labels)
    counts = {LOSS: counted}
    if loss.class_weights:
        each = builder.op("Gather", builder.array(np.array(loss.class_weights), _FLOAT), index)
        each = each if factor is None else builder.op("Mul", each, factor)
        counts[LOSS] = means.sum_weights(each, labels)
    return {**counts, ACCURACY: counted} if loss.kind in _MEASURED else counts


class _Means:
    """Builds the means of one loss."""

    def __init__(self, builder: NodeBuilder, *, counting: bool) -> None:
        self.builder = builder
        self._counting = counting

    def average(self, terms: ir.Value, factor: ir.Value | None) -> Mean:
        """Return the mean of ``terms``, weighted by ``factor``, which has the terms' shape."""
        if factor is not None:
            return self.divide(self.builder.op("Mul", terms, factor), factor)
        mean = self.builder.op("ReduceMean", terms, keepdims=0)
        return Mean(value=mean, counted=self.count(terms))

    def count(self, terms: ir.Value) -> ir.Value | None:
        """Return the number of elements, if it is asked for."""
        if not self._counting:
            return None
        return self.builder.cast(self.builder.op("Size", terms), _FLOAT)

    def divide(self, terms: ir.Value, weights: ir.Value) -> Mean:
        """Return the sum of ``terms`` divided by the sum of ``weights``, or 0 if that sum is 0."""
        builder = self.builder
        zero, one = self.number(0.0), self.number(1.0)
        counted = builder.op("ReduceSum", weights, keepdims=0)
        is_empty = builder.op("Equal", counted, zero)
        share = builder.op("Div", one, builder.op("Where", is_empty, one, counted))
        scale = builder.op("Where", is_empty, zero, share)
        total = builder.op("ReduceSum", terms, keepdims=0)
        value = builder.op("Mul", total, scale)
        if not self._counting:
            return Mean(value=value, counted=None)
        return Mean(value=value, counted=counted, total=total)

    def sum_weights(self, weights: ir.Value | None, labels: ir.Value) -> ir.Value:
        """Return the sum of the weights of labels, which all weigh 1 if ``weights`` is ``None``."""
        if weights is not None:
            return self.builder.op("ReduceSum", weights, keepdims=0)
        return self.builder.cast(self.builder.op("Size", labels), _FLOAT)

    def match(self, left: ir.Value, right: ir.Value, factor: ir.Value | None) -> Mean:
        """Return the share of equal elements."""
        return self.average(
            self.builder.cast(self.builder.op("Equal", left, right), _FLOAT), factor
        )

    def spread(self, inputs: LossInputs) -> ir.Value | None:
        """Return each sample's weight at each of its labels, or ``None`` without weights."""
        weights = inputs.weights
        if weights is None:
            return None
        if inputs.rank > 1:
            column = self.builder.integers([-1, *[1] * (inputs.rank - 1)])
            weights = self.builder.op("Reshape", weights, column)
        return self.builder.op("Expand", weights, self.builder.op("Shape", inputs.labels))

    def number(self, number: float) -> ir.Value:
        return self.builder.number(number, _FLOAT)


def _cross_entropy(means: _Means, loss: Loss, inputs: LossInputs) -> Mapping[str, Mean]:
    builder, scores, labels = means.builder, inputs.scores, inputs.labels
    index, skip, factor = _find_places(means, loss, inputs)
    if loss.weighs or loss.label_smoothing:
        value = _sum_up(means, loss, scores, (index, skip), factor)
    else:
        # the gradient builder wants the second output, log_prob, declared
        mean, _ = builder.ops("SoftmaxCrossEntropyLoss", [scores, labels], 2, {"reduction": "mean"})
        value = Mean(value=mean, counted=means.count(labels))
    guess = builder.op("ArgMax", scores, axis=1, keepdims=0)
    return {LOSS: value, ACCURACY: means.match(guess, labels, factor)}


def _find_places(
    means: _Means, loss: Loss, inputs: LossInputs
) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """Return the labels with 0 in place of ignored ones, where these are, and labels' factors.

    The factors are those of samples, and 0 for ignored labels.
    """
    builder, labels = means.builder, inputs.labels
    factor = means.spread(inputs)
    if loss.ignore_index is None:
        return labels, None, factor
    skip = builder.op("Equal", labels, builder.integer(loss.ignore_index))
    index = builder.op("Where", skip, builder.integer(0), labels)
    counts = builder.cast(builder.op("Not", skip), _FLOAT)
    return index, skip, counts if factor is None else builder.op("Mul", counts, factor)


def _sum_up(
    means: _Means,
    loss: Loss,
    scores: ir.Value,
    places: tuple[ir.Value, ir.Value | None],
    factor: ir.Value | None,
) -> Mean:
    """Build the cross-entropy from its formula, as PyTorch defines it.

    With the smoothing e, the number of classes C, class weights w and p = log_softmax(scores), the
    term of a label y is ``-(1 - e) * w[y] * p[y] - e / C * sum(w * p)``.  Terms are multiplied by
    ``factor`` and added up, and divided by the sum of ``factor * w[y]``.
    ``places`` are the labels, with 0 in place of ignored ones, and where these are, if any may be.
    """
    builder, smoothing = means.builder, loss.label_smoothing
    index, skip = places
    axis = builder.integers([1])
    log_prob = builder.op("LogSoftmax", scores, axis=1)
    picked = builder.op("GatherElements", log_prob, builder.op("Unsqueeze", index, axis), axis=1)
    terms = builder.op("Neg", builder.op("Squeeze", picked, axis))
    weights = counted = None
    if loss.class_weights:
        weights = builder.array(np.array(loss.class_weights), _FLOAT)
        counted = builder.op("Gather", weights, index, axis=0)
        terms = builder.op("Mul", terms, counted)
    if smoothing:
        rank, classes = len(scores.shape or ()), scores.shape[1] if scores.shape else 0
        assert isinstance(classes, int)
        if weights is not None:
            column = builder.integers([1, classes, *[1] * (rank - 2)])
            log_prob = builder.op("Mul", log_prob, builder.op("Reshape", weights, column))
        every = builder.op("ReduceSum", log_prob, axis, keepdims=0)
        spread = builder.op("Mul", every, means.number(smoothing / classes))
        kept = builder.op("Mul", terms, means.number(1 - smoothing))
        terms = builder.op("Sub", kept, spread)
    if skip is not None:  # a product with 0 would keep infinity and NaN
        terms = builder.op("Where", skip, means.number(0.0), terms)
    if factor is not None and loss.sample_weights is not None:
        terms = builder.op("Mul", terms, factor)
    if factor is not None:
        counted = factor if counted is None else builder.op("Mul", counted, factor)
    return means.average(terms, None) if counted is None else means.divide(terms, counted)


def _mse(means: _Means, loss: Loss, inputs: LossInputs) -> Mapping[str, Mean]:
    difference = means.builder.op("Sub", inputs.scores, inputs.labels)
    square = means.builder.op("Mul", difference, difference)
    return {LOSS: means.average(square, means.spread(inputs))}


def _l1(means: _Means, loss: Loss, inputs: LossInputs) -> Mapping[str, Mean]:
    difference = means.builder.op("Sub", inputs.scores, inputs.labels)
    return {LOSS: means.average(means.builder.op("Abs", difference), means.spread(inputs))}


def _bce(means: _Means, loss: Loss, inputs: LossInputs) -> Mapping[str, Mean]:
    """Build the binary cross-entropy of scores ``x`` and labels ``y``, and the accuracy.

    The loss is the mean of ``max(x, 0) - x*y + log(1 + exp(-|x|))``.  Here ``max(x, 0)`` is written
    as ``(x + |x|) / 2``, because then the derivative at 0 is ``1/2 - y``, which is correct: the
    derivative of Abs at 0 is 0.
    """
    builder, scores, labels = means.builder, inputs.scores, inputs.labels
    size = builder.op("Abs", scores)
    positive = builder.op("Mul", builder.op("Add", scores, size), means.number(0.5))
    decay = builder.op("Exp", builder.op("Neg", size))
    rest = builder.op("Log", builder.op("Add", decay, means.number(1.0)))
    linear = builder.op("Sub", positive, builder.op("Mul", scores, labels))
    factor = means.spread(inputs)
    value = means.average(builder.op("Add", linear, rest), factor)
    guess = builder.op("Greater", scores, means.number(0.0))
    truth = builder.op("Greater", labels, means.number(0.5))
    return {LOSS: value, ACCURACY: means.match(guess, truth, factor)}


_Formula = Callable[[_Means, Loss, LossInputs], Mapping[str, Mean]]
_FORMULAS: Mapping[str, _Formula] = {
    CROSS_ENTROPY: _cross_entropy,
    "mse": _mse,
    "l1": _l1,
    "bce-with-logits": _bce,
}
_MEASURED = (CROSS_ENTROPY, "bce-with-logits")
"""The losses that have a metric."""
