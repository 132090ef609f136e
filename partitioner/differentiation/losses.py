"""Add losses and their metrics to a graph, using standard ONNX operators.

A loss is the mean over the batch.  The labels are read from a graph input, usually named
``labels``.  This module does not depend on cuts or gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.names import LOSS
from splitonnx.partitioner.differentiation.final_activations import (
    Activation,
    invert_activation,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.tensors import TensorSpec

LABELS = "labels"
ACCURACY = "accuracy"


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Options of a loss: the axis of the classes and the name of the labels.

    ``class_axis`` is the axis of the scores that holds the classes; if it is ``None``, the axis is
    derived from the shape of the scores (:func:`choose_class_axis`).  ``labels`` is the name of the
    labels, both as a graph input and in the data.
    """

    class_axis: int | None = None
    labels: str = LABELS


USUAL = LossOptions()


@dataclass(frozen=True, kw_only=True)
class AttachedLoss:
    """A loss that was added to a graph.

    ``labels`` describes the labels that the loss reads; it is ``None`` if the loss is computed by
    the model itself.  ``results`` names the loss and, for losses with a metric, the metric.
    """

    labels: TensorSpec | None
    results: tuple[str, ...]


def list_losses() -> list[str]:
    """List the names of the losses that ``--loss`` accepts."""
    return [*_LOSSES, "from-model"]


def attach_loss(
    graph: ir.Graph, loss: str, output: str, options: LossOptions = USUAL
) -> AttachedLoss:
    """Add graph outputs that hold ``loss`` and its metric, computed from ``output``.

    Return a description of the labels, and the names of the outputs.  The losses are:

    - ``cross-entropy``: the output (N, C, ...) holds raw scores for C classes; the labels (N, ...)
      are int64 in [0, C); the metric is accuracy.  If the classes are on an axis other than 1,
      the labels have the output's shape without that axis.
    - ``mse``, ``l1``: the labels are float32 and have the output's shape; there is no metric.
    - ``bce-with-logits``: the output holds raw scores; the labels are float32 from 0 to 1 and have
      the output's shape; the metric is accuracy.
    - ``from-model``: the output is itself the loss, a scalar.

    Raises:
        UsageError: there is no loss of this name, or ``options`` do not fit the loss.
        UnsupportedModel: the output does not fit the loss.
    """
    value = map_values(graph)[output]
    labels = fit_loss(graph, loss, output, options)
    _clear_names(graph, _list_names(loss, value, options))
    if labels is None:
        return _adopt_loss(graph, value)
    source = _make_input(labels)
    graph.inputs.append(source)
    builder = NodeBuilder("splitonnx.loss")
    scores = value
    if loss == CROSS_ENTROPY:
        scores = _move_classes(builder, value, choose_class_axis(value, options.class_axis))
    results = _LOSSES[loss](builder, scores, source)
    graph.extend(builder.nodes)
    for name, result in results.items():
        result.name = name
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.outputs.append(result)
    return AttachedLoss(labels=labels, results=tuple(results))


def fit_loss(
    graph: ir.Graph, loss: str, output: str, options: LossOptions = USUAL
) -> TensorSpec | None:
    """Return a description of the labels needed to compute ``loss`` from ``output``.

    Return ``None`` for ``from-model``, which needs no labels.  The graph is not changed.

    Raises:
        UsageError, UnsupportedModel: as raised by :func:`attach_loss`.
    """
    value = map_values(graph)[output]
    if loss != "from-model" and loss not in _LOSSES:
        raise UsageError(f"there is no loss '{loss}'; choose from {', '.join(list_losses())}")
    if loss == "from-model":
        _refuse_no_loss(value)
    _check_labels(options.labels, graph)
    _find_hidden(graph, _list_names(loss, value, options))
    if loss == "from-model":
        if options != USUAL:
            raise UsageError("--labels and --class-axis are for other losses than from-model")
        return None
    if value.shape is None or value.dtype is None or not value.dtype.is_floating_point():
        raise UnsupportedModel(f"output '{output}'", f"{loss} needs a float tensor of known rank")
    if options.class_axis is not None and loss != CROSS_ENTROPY:
        raise UsageError(f"--class-axis is for {CROSS_ENTROPY}; {loss} has no classes")
    if loss == CROSS_ENTROPY:
        return _describe_classes(value, options)
    return TensorSpec(name=options.labels, dtype="F32", shape=_dims(value))


def _refuse_no_loss(value: ir.Value) -> None:
    if value.dtype != ir.DataType.FLOAT or (value.shape is not None and len(value.shape)):
        raise UnsupportedModel(
            f"output '{value.name}'",
            f"a loss is a float32 scalar, this is {_write_type(value)}",
            "name the loss with --output",
        )


def _write_type(value: ir.Value) -> str:
    dims = ["?" if dim is None else str(dim) for dim in _dims(value)] if value.shape else []
    return f"{'of unknown type' if value.dtype is None else value.dtype}[{', '.join(dims)}]"


def _adopt_loss(graph: ir.Graph, value: ir.Value) -> AttachedLoss:
    if value.name != LOSS:
        node = ir.node("Identity", [value], name="splitonnx.loss/0_Identity")
        node.outputs[0].name, node.outputs[0].type = LOSS, value.type
        node.outputs[0].shape = ir.Shape([])
        graph.append(node)
        value = node.outputs[0]
    if value not in graph.outputs:
        graph.outputs.append(value)
    return AttachedLoss(labels=None, results=(LOSS,))


def _list_names(loss: str, output: ir.Value, options: LossOptions) -> Sequence[str]:
    """List the names that adding a loss gives to values in the graph."""
    if loss == "from-model":
        return () if output.name == LOSS else (LOSS,)
    return (options.labels, LOSS, ACCURACY)


def _check_labels(name: str, graph: ir.Graph) -> None:
    """Check that the labels' name is not used for anything else.

    Raises:
        UsageError: the name is empty, reserved, or that of a tensor of the model.
    """
    if not name:
        raise UsageError("--labels is empty; give the name of the labels in the data")
    reason = ""
    if name in (LOSS, ACCURACY):
        reason = f"training returns its results as '{LOSS}' and '{ACCURACY}'"
    elif "@" in name or name.startswith("splitonnx."):
        reason = "names with '@' or 'splitonnx.' are for what splitonnx adds"
    elif name != LABELS and name in map_values(graph):
        reason = "the model has a tensor of this name"
    if reason:
        raise UsageError(f"--labels {name}: {reason}; give the labels another name")


def _clear_names(graph: ir.Graph, names: Sequence[str]) -> None:
    """Rename intermediate values of the model whose names are needed for the loss."""
    for value in _find_hidden(graph, names):
        value.name = f"{value.name}.model"


def _find_hidden(graph: ir.Graph, names: Sequence[str]) -> list[ir.Value]:
    """Find intermediate values of the model that have one of the names in ``names``.

    Raises:
        UnsupportedModel: an input or output of the model has one of these names.
    """
    values = map_values(graph) if names else {}
    found = [(name, values[name]) for name in names if name in values]
    for name, value in found:
        if value in graph.inputs or value.is_graph_output():
            raise UnsupportedModel(
                f"'{name}'",
                "the model's own input or output bears the name of what the loss adds",
                "rename it, or use --loss from-model if the model ends in its loss; --labels gives "
                "the labels another name",
            )
    return [value for _, value in found]


def _make_input(spec: TensorSpec) -> ir.Value:
    dtype = ir.DataType.INT64 if spec.dtype == "I64" else ir.DataType.FLOAT
    return ir.Value(name=spec.name, type=ir.TensorType(dtype), shape=ir.Shape(list(spec.shape)))


def _dims(value: ir.Value) -> tuple[int | str | None, ...]:
    assert value.shape is not None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def find_class_axis(graph: ir.Graph, loss: str, output: str, options: LossOptions = USUAL) -> int:
    """Return the axis of ``output`` that holds the classes, or 1 for losses without classes.

    Raises:
        UsageError, UnsupportedModel: the output or the options do not fit the loss.
    """
    fit_loss(graph, loss, output, options)
    if loss != CROSS_ENTROPY:
        return 1
    return choose_class_axis(map_values(graph)[output], options.class_axis)


def choose_class_axis(output: ir.Value, given: int | None) -> int:
    """Return the axis of ``output`` that holds the classes, counted from 0.

    If ``given`` is a number, it is the axis; a negative number counts from the end.  If ``given``
    is ``None``, the result is axis 1, or the last axis if the size of axis 1 is not known.

    Raises:
        UnsupportedModel: the size of the axis is not known; or axis 1 and the last axis both fit,
            and the labels would have the same shape for both.
        UsageError: ``given`` is not an axis of ``output``, or is the axis of the batch.
    """
    dims = _dims(output)
    subject, rank = f"output '{output.name}'", len(dims)
    if given is not None and not (0 < given < rank or -rank < given < 0):
        raise UsageError(
            f"--class-axis {given} is not an axis of {subject} {list(dims)} behind the batch"
        )
    axes = (1, rank - 1) if given is None else (given % rank,)
    fitting = list(dict.fromkeys(axis for axis in axes if rank > 1 and isinstance(dims[axis], int)))
    if not fitting:
        raise UnsupportedModel(
            subject,
            f"cross-entropy needs scores of shape (N, C, ...) with C known, not {list(dims)}",
        )
    if len(fitting) > 1 and _without(dims, fitting[0]) == _without(dims, fitting[1]):
        raise UnsupportedModel(
            subject,
            f"its scores {list(dims)} may have their classes on axis 1 or on the last axis, and "
            f"labels {list(_without(dims, 1))} fit both",
            f"say which one is meant with --class-axis 1 or --class-axis {rank - 1}",
        )
    return fitting[0]


def describe_scores(graph: ir.Graph, output: str) -> str:
    """Return the name and shape of an output as text for error messages."""
    return f"output '{output}' {list(_dims(map_values(graph)[output]))}"


def _without(dims: Sequence[int | str | None], axis: int) -> tuple[int | str | None, ...]:
    return (*dims[:axis], *dims[axis + 1 :])


def _describe_classes(output: ir.Value, options: LossOptions) -> TensorSpec:
    """Describe labels that are class indices."""
    dims, axis = _dims(output), choose_class_axis(output, options.class_axis)
    classes = dims[axis]
    assert isinstance(classes, int)
    return TensorSpec(
        name=options.labels, dtype="I64", shape=_without(dims, axis), bounds=(0, classes)
    )


def _move_classes(builder: NodeBuilder, scores: ir.Value, axis: int) -> ir.Value:
    """Move the axis of the classes to axis 1."""
    rank = len(_dims(scores))
    if axis == 1:
        return scores
    order = [0, axis, *(other for other in range(1, rank) if other != axis)]
    moved = builder.op("Transpose", scores, perm=order)
    moved.type = scores.type
    moved.shape = ir.Shape([scores.shape[place] for place in order]) if scores.shape else None
    return moved


def _number(builder: NodeBuilder, number: float) -> ir.Value:
    return builder.number(number, ir.DataType.FLOAT)


def _mean(builder: NodeBuilder, value: ir.Value) -> ir.Value:
    return builder.op("ReduceMean", value, keepdims=0)


def _match_rate(builder: NodeBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    return _mean(builder, builder.cast(builder.op("Equal", left, right), ir.DataType.FLOAT))


def _cross_entropy(
    builder: NodeBuilder, scores: ir.Value, labels: ir.Value
) -> Mapping[str, ir.Value]:
    # the gradient builder wants the second output, log_prob, declared
    loss, _ = builder.ops("SoftmaxCrossEntropyLoss", [scores, labels], 2, {"reduction": "mean"})
    guess = builder.op("ArgMax", scores, axis=1, keepdims=0)
    return {LOSS: loss, ACCURACY: _match_rate(builder, guess, labels)}


def _mse(builder: NodeBuilder, output: ir.Value, labels: ir.Value) -> Mapping[str, ir.Value]:
    difference = builder.op("Sub", output, labels)
    return {LOSS: _mean(builder, builder.op("Mul", difference, difference))}


def _l1(builder: NodeBuilder, output: ir.Value, labels: ir.Value) -> Mapping[str, ir.Value]:
    return {LOSS: _mean(builder, builder.op("Abs", builder.op("Sub", output, labels)))}


def _bce(builder: NodeBuilder, scores: ir.Value, labels: ir.Value) -> Mapping[str, ir.Value]:
    """Build the binary cross-entropy of scores ``x`` and labels ``y``, and the accuracy.

    The loss is the mean of ``max(x, 0) - x*y + log(1 + exp(-|x|))``.  Here ``max(x, 0)`` is written
    as ``(x + |x|) / 2``, because then the derivative at 0 is ``1/2 - y``, which is correct: the
    derivative of Abs at 0 is 0.
    """
    size = builder.op("Abs", scores)
    positive = builder.op("Mul", builder.op("Add", scores, size), _number(builder, 0.5))
    decay = builder.op("Exp", builder.op("Neg", size))
    rest = builder.op("Log", builder.op("Add", decay, _number(builder, 1.0)))
    linear = builder.op("Sub", positive, builder.op("Mul", scores, labels))
    loss = _mean(builder, builder.op("Add", linear, rest))
    guess = builder.op("Greater", scores, _number(builder, 0.0))
    truth = builder.op("Greater", labels, _number(builder, 0.5))
    return {LOSS: loss, ACCURACY: _match_rate(builder, guess, truth)}


_Build = Callable[[NodeBuilder, ir.Value, ir.Value], Mapping[str, ir.Value]]
CROSS_ENTROPY = "cross-entropy"
_LOSSES: Mapping[str, _Build] = {
    CROSS_ENTROPY: _cross_entropy,
    "mse": _mse,
    "l1": _l1,
    "bce-with-logits": _bce,
}


def build_evaluation(
    loss: str, output: ir.Value, activation: Activation | None, options: LossOptions = USUAL
) -> tuple[ir.Model, AttachedLoss]:
    """Build a model that computes the loss and metric from a prediction and its labels.

    ``output`` describes the prediction.  If ``activation`` is given, the prediction is the result
    of this Softmax or Sigmoid.  The activation's inverse is then applied first,
    because the loss is computed from raw scores.
    """
    source = ir.Value(name=output.name, type=output.type, shape=output.shape)
    builder = NodeBuilder("splitonnx.scores")
    scores = source if activation is None else invert_activation(builder, source, activation.kind)
    graph = ir.Graph([source], [], nodes=builder.nodes, name="evaluate", opset_imports={"": 18})
    attached = attach_loss(graph, loss, scores.name or "", options)
    return ir.Model(graph, ir_version=10), attached
