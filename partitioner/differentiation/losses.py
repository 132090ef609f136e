"""Add losses and their metrics to a graph, using standard ONNX operators.

A loss is the mean over the batch.  Labels and weights of samples are read from graph inputs.  This
module does not depend on cuts or gradients; :mod:`loss_formulas` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.losses import CROSS_ENTROPY, FROM_MODEL, LABELS, Loss
from splitonnx.names import COUNTED, LOSS, WEIGHT
from splitonnx.partitioner.differentiation.class_axes import (
    choose_class_axis,
    count_classes,
    list_dims,
    list_label_dims,
    move_classes,
)
from splitonnx.partitioner.differentiation.final_activations import (
    find_activation,
    invert_activation,
)
from splitonnx.partitioner.differentiation.loss_formulas import (
    ACCURACY,
    LossInputs,
    Mean,
    build_loss,
    list_formulas,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class AttachedLosses:
    """Losses that were added to a graph.

    ``data`` describes the arrays that they read, by name: labels and weights of samples.
    ``results`` names the graph outputs: the loss, and the metrics.
    """

    data: Mapping[str, TensorSpec]
    results: tuple[str, ...]


def list_losses() -> list[str]:
    """List the names of the losses that ``--loss`` accepts."""
    return [*list_formulas(), FROM_MODEL]


def attach_losses(
    graph: ir.Graph, losses: Sequence[Loss], scores: Sequence[str], *, counting: bool = False
) -> AttachedLosses:
    """Add graph outputs that hold the losses and their metrics.

    ``scores`` names the tensor from which each loss is computed.  Several losses are added up, each
    multiplied by its weight, to the output ``loss``; then ``loss.NAME`` and ``accuracy.NAME`` are
    each loss's own results.  ``counting`` adds what combines the means of several batches
    (:data:`COUNTED`).  The losses are:

    - ``cross-entropy``: the output (N, C, ...) holds raw scores for C classes; the labels (N, ...)
      are int64 in [0, C); the metric is accuracy.  If the classes are on an axis other than 1,
      the labels have the output's shape without that axis.
    - ``mse``, ``l1``: the labels are float32 and have the output's shape; there is no metric.
    - ``bce-with-logits``: the output holds raw scores; the labels are float32 from 0 to 1 and have
      the output's shape; the metric is accuracy.
    - ``from-model``: the output is itself the loss, a scalar.

    Raises:
        UsageError: there is no loss of this name, settings do not fit the loss, or two losses read
            an array in different ways.
        UnsupportedModel: an output does not fit its loss.
    """
    values = map_values(graph)
    sources = [values[name] for name in scores]
    data = _join_data(
        spec
        for loss, source in zip(losses, sources, strict=True)
        for spec in fit_loss(graph, loss, source.name or "")
    )
    for value in _find_hidden(graph, _list_names(losses, sources[0])):
        value.name = f"{value.name}.model"
    if [loss.kind for loss in losses] == [FROM_MODEL]:
        return _adopt_loss(graph, sources[0])
    inputs = {name: _make_input(spec) for name, spec in data.items()}
    graph.inputs.extend(inputs.values())
    builder = NodeBuilder("splitonnx.loss")
    means = [
        _build(builder, loss, source, inputs, counting=counting)
        for loss, source in zip(losses, sources, strict=True)
    ]
    if len(losses) == 1:
        results = dict(_list_results(means[0], "", counting=counting))
    else:
        results = _sum_up(builder, losses, means, counting=counting)
    graph.extend(builder.nodes)
    for name, result in results.items():
        result.name = name
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.outputs.append(result)
    return AttachedLosses(data=data, results=tuple(results))


def _join_data(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """Map the names of arrays to their descriptions; losses may read the same array.

    Raises:
        UsageError: two losses read an array as two different things.
    """
    joined: dict[str, TensorSpec] = {}
    for spec in specs:
        known = joined.setdefault(spec.name, spec)
        if known != spec:
            raise UsageError(
                f"the losses read '{spec.name}' as {_describe(known)} and as {_describe(spec)}; "
                "give each an array of its own"
            )
    return joined


def _describe(spec: TensorSpec) -> str:
    return f"{spec}{f' in {list(spec.bounds)}' if spec.bounds else ''}"


def _build(
    builder: NodeBuilder,
    loss: Loss,
    source: ir.Value,
    inputs: Mapping[str, ir.Value],
    *,
    counting: bool,
) -> Mapping[str, Mean]:
    if loss.kind == FROM_MODEL:
        return {LOSS: Mean(value=builder.op("Identity", source), counted=None)}
    scores = source
    if loss.kind == CROSS_ENTROPY:
        scores = move_classes(builder, source, choose_class_axis(source, loss.class_axis))
    labels = inputs[loss.array]
    weights = None if loss.sample_weights is None else inputs[loss.sample_weights]
    rank = len(labels.shape or ())
    reads = LossInputs(scores=scores, labels=labels, weights=weights, rank=rank)
    return build_loss(builder, loss, reads, counting=counting)


def _list_results(
    means: Mapping[str, Mean], suffix: str, *, counting: bool
) -> Iterator[tuple[str, ir.Value]]:
    for name, mean in means.items():
        yield f"{name}{suffix}", mean.value
        if counting and mean.counted is not None:
            yield f"{name}{suffix}{COUNTED}", mean.counted


def _sum_up(
    builder: NodeBuilder,
    losses: Sequence[Loss],
    means: Sequence[Mapping[str, Mean]],
    *,
    counting: bool,
) -> dict[str, ir.Value]:
    """Add losses up, and return the sum and each loss's own results by name."""
    results: dict[str, ir.Value] = {}
    terms = []
    for loss, mean in zip(losses, means, strict=True):
        weight = builder.number(loss.weight, ir.DataType.FLOAT)
        terms.append(builder.op("Mul", mean[LOSS].value, weight))
        results.update(_list_results(mean, f".{loss.name}", counting=counting))
        if counting:
            results[f"{LOSS}.{loss.name}{WEIGHT}"] = builder.op("Identity", weight)
    total = terms[0]
    for term in terms[1:]:
        total = builder.op("Add", total, term)
    return {LOSS: total, **results}


def fit_loss(graph: ir.Graph, loss: Loss, scores: str | None = None) -> tuple[TensorSpec, ...]:
    """Return descriptions of the arrays that a loss reads: the labels, then weights of samples.

    Return nothing for ``from-model``, which reads no arrays.  The graph is not changed.  ``scores``
    names the tensor that the loss is computed from, if it is not the loss's output.

    Raises:
        UsageError, UnsupportedModel: as raised by :func:`attach_losses`.
    """
    output = scores or loss.output or ""
    value = map_values(graph)[output]
    if loss.kind not in list_losses():
        raise UsageError(f"there is no loss '{loss.kind}'; choose from {', '.join(list_losses())}")
    if loss.kind == FROM_MODEL:
        _refuse_no_loss(value)
    _check_array("--labels", loss.array, graph)
    if loss.sample_weights is not None:
        _check_array("--sample-weights", loss.sample_weights, graph)
    _find_hidden(graph, _list_names([loss], value))
    _refuse_settings(loss)
    if loss.kind == FROM_MODEL:
        return ()
    if value.shape is None or value.dtype is None or not value.dtype.is_floating_point():
        raise UnsupportedModel(
            f"output '{output}'", f"{loss.kind} needs a float tensor of known rank"
        )
    if loss.kind == CROSS_ENTROPY:
        labels = _describe_classes(value, loss)
    else:
        labels = TensorSpec(name=loss.array, dtype="F32", shape=list_dims(value))
    return (labels, *_describe_weights(loss, labels))


def _refuse_settings(loss: Loss) -> None:
    """Refuse settings that the loss does not have.

    Raises:
        UsageError: a setting does not fit the loss.
    """
    arrays = {"--labels": loss.labels, "--sample-weights": loss.sample_weights}
    if loss.kind == FROM_MODEL and any(arrays.values()):
        names = " and ".join(name for name, given in arrays.items() if given)
        raise UsageError(f"{names}: {FROM_MODEL} reads no arrays beside the model's inputs")
    classes = {
        "--class-axis": loss.class_axis is not None,
        "--label-smoothing": loss.label_smoothing != 0,
        "--class-weights": bool(loss.class_weights),
        "--ignore-index": loss.ignore_index is not None,
    }
    unfit = [name for name, given in classes.items() if given]
    if unfit and loss.kind != CROSS_ENTROPY:
        raise UsageError(f"{unfit[0]} is for {CROSS_ENTROPY}; {loss.kind} has no classes")


def _describe_classes(output: ir.Value, loss: Loss) -> TensorSpec:
    """Describe labels that are class indices."""
    axis = choose_class_axis(output, loss.class_axis)
    classes, ignored = count_classes(output, axis), loss.ignore_index
    if loss.class_weights and len(loss.class_weights) != classes:
        raise UsageError(
            f"--class-weights has {len(loss.class_weights)} numbers, but output '{output.name}' "
            f"has {classes} classes; give one number for each class"
        )
    is_class = ignored is None or 0 <= ignored < classes
    return TensorSpec(
        name=loss.array,
        dtype="I64",
        shape=list_label_dims(output, axis),
        bounds=(0, classes) if is_class or ignored is None else (0, classes, ignored),
    )


def _describe_weights(loss: Loss, labels: TensorSpec) -> Iterator[TensorSpec]:
    if loss.sample_weights is not None:
        if not labels.shape:
            raise UsageError("--sample-weights needs an output with one row for each sample")
        yield TensorSpec(name=loss.sample_weights, dtype="F32", shape=labels.shape[:1])


def _refuse_no_loss(value: ir.Value) -> None:
    if value.dtype != ir.DataType.FLOAT or (value.shape is not None and len(value.shape)):
        raise UnsupportedModel(
            f"output '{value.name}'",
            f"a loss is a float32 scalar, this is {_write_type(value)}",
            "name the loss with --output",
        )


def _write_type(value: ir.Value) -> str:
    dims = ["?" if dim is None else str(dim) for dim in list_dims(value)] if value.shape else []
    return f"{'of unknown type' if value.dtype is None else value.dtype}[{', '.join(dims)}]"


def _adopt_loss(graph: ir.Graph, value: ir.Value) -> AttachedLosses:
    if value.name != LOSS:
        node = ir.node("Identity", [value], name="splitonnx.loss/0_Identity")
        node.outputs[0].name, node.outputs[0].type = LOSS, value.type
        node.outputs[0].shape = ir.Shape([])
        graph.append(node)
        value = node.outputs[0]
    if value not in graph.outputs:
        graph.outputs.append(value)
    return AttachedLosses(data={}, results=(LOSS,))


def _list_names(losses: Sequence[Loss], output: ir.Value) -> Sequence[str]:
    """List the names that adding losses gives to values in the graph.

    ``output`` is what the first loss is computed from.
    """
    if [loss.kind for loss in losses] == [FROM_MODEL] and losses[0].name is None:
        return () if output.name == LOSS else (LOSS,)
    own = [f"{result}.{loss.name}" for loss in losses if loss.name for result in (LOSS, ACCURACY)]
    arrays = [
        name
        for loss in losses
        if loss.kind != FROM_MODEL
        for name in (loss.array, loss.sample_weights)
        if name is not None
    ]
    return tuple(dict.fromkeys([*arrays, LOSS, ACCURACY, *own]))


def _check_array(option: str, name: str, graph: ir.Graph) -> None:
    """Check that the name of an array that a loss reads is not used for anything else.

    Raises:
        UsageError: the name is empty, reserved, or that of a tensor of the model.
    """
    meant = option.removeprefix("--").replace("-", " ")
    if not name:
        raise UsageError(f"{option} is empty; give the name of the {meant} in the data")
    reason = ""
    if name.partition(".")[0] in (LOSS, ACCURACY):
        reason = f"training returns its results as '{LOSS}' and '{ACCURACY}'"
    elif "@" in name or name.startswith("splitonnx."):
        reason = "names with '@' or 'splitonnx.' are for what splitonnx adds"
    elif name != LABELS and name in map_values(graph):
        reason = "the model has a tensor of this name"
    if reason:
        raise UsageError(f"{option} {name}: {reason}; give the {meant} another name")


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


def find_class_axis(graph: ir.Graph, loss: Loss) -> int:
    """Return the axis of the loss's output that holds the classes, or 1 if there are no classes.

    Raises:
        UsageError, UnsupportedModel: the output or the settings do not fit the loss.
    """
    fit_loss(graph, loss)
    if loss.kind != CROSS_ENTROPY:
        return 1
    return choose_class_axis(map_values(graph)[loss.output or ""], loss.class_axis)


def describe_scores(graph: ir.Graph, output: str) -> str:
    """Return the name and shape of an output as text for error messages."""
    return f"output '{output}' {list(list_dims(map_values(graph)[output]))}"


def build_evaluation(
    graph: ir.Graph, trained: ir.Graph, losses: Sequence[Loss]
) -> tuple[ir.Model, tuple[ir.Value, ...], AttachedLosses]:
    """Build a model that computes the losses and metrics from predictions and their labels.

    ``graph`` is the model in inference form.  Return the model, the predictions that it reads, and
    its losses.  If a prediction is the result of a Softmax or Sigmoid that the loss contains, the
    activation's inverse is applied first, because the loss is computed from raw scores.  The graph
    ``trained``, in training form, decides this, as it did for training.
    """
    values, decisive = map_values(graph), map_values(trained)
    outputs = {loss.output or "": values[loss.output or ""] for loss in losses}
    sources = {
        name: ir.Value(name=name, type=value.type, shape=value.shape)
        for name, value in outputs.items()
    }
    builder = NodeBuilder("splitonnx.scores")
    scores = []
    for loss in losses:
        source = sources[loss.output or ""]
        axis = find_class_axis(graph, loss)
        found = find_activation(decisive[loss.output or ""], loss.kind, axis)
        if found is not None:
            source = invert_activation(builder, source, found.kind)
        scores.append(source.name or "")
    made = ir.Graph(
        list(sources.values()), [], nodes=builder.nodes, name="evaluate", opset_imports={"": 18}
    )
    counting = len(losses) > 1 or any(loss.weighs for loss in losses)
    attached = attach_losses(made, losses, scores, counting=counting)
    return ir.Model(made, ir_version=10), tuple(outputs.values()), attached
