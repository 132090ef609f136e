"""Add losses and their metrics to a graph, using standard ONNX operators.

A loss is the mean over the batch.  Labels and weights of samples are read from graph inputs.  This
module does not depend on cuts or gradients; :mod:`loss_formulas` has the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UsageError
from splitonnx.losses import CROSS_ENTROPY, FROM_FILE, FROM_MODEL, Loss
from splitonnx.manifests import ScoredOutput, ScoreKind
from splitonnx.names import COUNTED, LOSS, TOTAL, WEIGHT
from splitonnx.partitioner.differentiation.activations.final_activations import (
    find_activation,
    invert_activation,
)
from splitonnx.partitioner.differentiation.class_axes import (
    choose_class_axis,
    move_classes,
)
from splitonnx.partitioner.differentiation.label_shapes import check_labels, list_sizes
from splitonnx.partitioner.differentiation.loss_arrays import (
    LossGraph,
    LossGraphs,
    find_class_axis,
    find_graph,
    find_hidden,
    fit_loss,
    list_new_names,
    list_reads,
)
from splitonnx.partitioner.differentiation.loss_formulas import LossInputs, Mean, build_loss
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.graphs.traversals import list_bodies, list_nodes, map_values
from splitonnx.partitioner.lowerings.losses import MEANS, count_labels
from splitonnx.partitioner.normalization.parameters import find_stored
from splitonnx.partitioner.normalization.weights import read_array
from splitonnx.tensors import TensorSpec

_log = logging.getLogger(__name__)

NO_SCORES: Mapping[str, str] = {}
"""Nothing, where no scores are predicted beside the model's outputs."""


@dataclass(frozen=True, kw_only=True)
class AttachedLosses:
    """Losses that were added to a graph.

    ``data`` describes the arrays that they read, by name: labels and weights of samples.
    ``results`` names the graph outputs: the loss, and the metrics.  ``nodes`` are the nodes of the
    user's own losses, which may read data that their kernels do not check.
    """

    data: Mapping[str, TensorSpec]
    results: tuple[str, ...]
    nodes: tuple[ir.Node, ...] = ()


def attach_losses(
    graph: ir.Graph,
    losses: Sequence[Loss],
    scores: Sequence[str],
    graphs: LossGraphs,
    *,
    evaluating: bool = False,
) -> AttachedLosses:
    """Add graph outputs that hold the losses and their metrics.

    ``scores`` names the tensor from which each loss is computed.  Several losses are added up, each
    multiplied by its weight, to the output ``loss``; then ``loss.NAME`` and ``accuracy.NAME`` are
    each loss's own results.  ``graphs`` holds the user's own losses.  ``evaluating`` means that
    nothing is differentiated, and adds what combines the means of several batches
    (:data:`COUNTED`).  The losses are:

    - ``cross-entropy``: the output (N, C, ...) holds raw scores for C classes; the labels (N, ...)
      are int64 in [0, C); the metric is accuracy.  If the classes are on an axis other than 1,
      the labels have the output's shape without that axis.
    - ``mse``, ``l1``: the labels are float32 and have the output's shape; there is no metric.
    - ``bce-with-logits``: the output holds raw scores; the labels are float32 from 0 to 1 and have
      the output's shape; the metric is accuracy.
    - ``from-model``: the output is itself the loss, a scalar.
    - ``from-file``: a graph of the user's computes the loss from outputs and arrays.

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
        for spec in fit_loss(graph, loss, graphs, source.name or "")
    )
    reads = [
        {name: values[name] for name in list_reads(loss, graphs)}
        if find_graph(loss, graphs)
        else {}
        for loss in losses
    ]
    for value in find_hidden(graph, list_new_names(losses, sources[0], graphs)):
        value.name = f"{value.name}.model"
    if [loss.kind for loss in losses] == [FROM_MODEL] and not graphs:
        return _adopt_loss(graph, sources[0])
    sizes = set() if evaluating else list_sizes(graph.inputs)  # predictions have sizes of their own
    inputs = {name: _make_input(spec) for name, spec in data.items()}
    graph.inputs.extend(inputs.values())
    builder = NodeBuilder("splitonnx.loss")
    counting = evaluating and (
        len(losses) > 1 or any(loss.weighs or find_graph(loss, graphs) for loss in losses)
    )
    means, own = [], []
    for number, (loss, source) in enumerate(zip(losses, sources, strict=True)):
        file = find_graph(loss, graphs)
        if file is None:
            means.append(_build(builder, loss, source, inputs, sizes, counting=counting))
            continue
        known = {**reads[number], **inputs}
        model = file.inference if evaluating else file.training
        made = _graft(builder, model, file, known, f"splitonnx.loss.{number}/")
        own += made
        counted = _count(builder, made[-1], list(reads[number].values())) if counting else None
        means.append({LOSS: Mean(value=made[-1].outputs[0], counted=counted)})
    if len(losses) == 1:
        results = dict(_list_results(means[0], "", counting=counting))
    else:
        results = _sum_up(builder, losses, means, counting=counting)
    graph.extend(builder.nodes)
    for name, result in results.items():
        result.name = name
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.outputs.append(result)
    return AttachedLosses(data=data, results=tuple(results), nodes=tuple(own))


def _graft(
    builder: NodeBuilder,
    model: ir.Model,
    file: LossGraph,
    known: Mapping[str, ir.Value],
    prefix: str,
) -> list[ir.Node]:
    """Copy the nodes of a loss behind those of ``builder``, and return them; the last one is new.

    ``known`` holds the values that the loss reads.  ``prefix`` is put before all names of the loss,
    and the new node's name has no such prefix, so that the loss can have no node of that name.
    """
    graph = copy_model(model).graph
    (result,) = graph.outputs
    last = ir.node("Identity", [result], name=f"{prefix.rstrip('/')}_Identity")
    last.outputs[0].name = last.name
    nodes = [*graph, last]
    for value in [*graph.inputs, *graph.initializers.values()]:
        name = value.name or ""
        tensor = file.weights.get(name, value.const_value)
        replacement = known[name] if tensor is None else _store(builder, tensor, value)
        ir.convenience.replace_all_uses_with(value, replacement)
    for node in list_nodes(graph):
        node.name = f"{prefix}{node.name}"
        inner = [value for body in list_bodies(node) for value in body.inputs]
        for value in [*node.outputs, *inner]:
            value.name = f"{prefix}{value.name}"
    graph.outputs.clear()
    graph.remove(nodes[:-1])
    builder.nodes += nodes
    return nodes


def _store(builder: NodeBuilder, tensor: ir.TensorProtocol, value: ir.Value) -> ir.Value:
    """Return a constant of a value's type and shape."""
    stored = builder.array(read_array(tensor), value.dtype)
    stored.shape = value.shape
    return stored


def _count(builder: NodeBuilder, result: ir.Node, outputs: Sequence[ir.Value]) -> ir.Value | None:
    """Return what counted in a loss of the user's own, whose result is an Identity.

    Unless its last operator tells what it is the mean of, this is the number of samples, if an
    output of the model has one row for each.
    """
    source = result.inputs[0]
    maker = None if source is None else find_stored(source).producer()
    counted = None if maker is None else count_labels(builder, maker)
    if counted is not None:
        return builder.cast(counted, ir.DataType.FLOAT)
    for output in outputs:
        if output.shape is not None and len(output.shape):
            rows = builder.op("Squeeze", builder.op("Shape", output, start=0, end=1))
            return builder.cast(rows, ir.DataType.FLOAT)
    return None


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
    sizes: Collection[str],
    *,
    counting: bool,
) -> Mapping[str, Mean]:
    if loss.kind == FROM_MODEL:
        return {LOSS: Mean(value=builder.op("Identity", source), counted=None)}
    scores = source
    if loss.kind == CROSS_ENTROPY:
        scores = move_classes(builder, source, choose_class_axis(source, loss.class_axis))
    has_classes = loss.kind == CROSS_ENTROPY
    labels = check_labels(builder, inputs[loss.array], scores, sizes, has_classes=has_classes)
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
        if counting and mean.total is not None:
            yield f"{name}{suffix}{TOTAL}", mean.total


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


def _make_input(spec: TensorSpec) -> ir.Value:
    dtype = ir.DataType.INT64 if spec.dtype == "I64" else ir.DataType.FLOAT
    return ir.Value(name=spec.name, type=ir.TensorType(dtype), shape=ir.Shape(list(spec.shape)))


def build_evaluation(
    graph: ir.Graph,
    trained: ir.Graph,
    losses: Sequence[Loss],
    graphs: LossGraphs,
    predicted: Mapping[str, str] = NO_SCORES,
) -> tuple[ir.Model, tuple[ir.Value, ...], AttachedLosses]:
    """Build a model that computes the losses and metrics from predictions and their labels.

    ``graph`` is the model in inference form.  Return the model, the predictions that it reads, and
    its losses.  If a prediction is the result of a Softmax or Sigmoid that the loss contains, the
    loss is computed from raw scores: those that ``predicted`` names by output, or else the result
    of the activation's inverse, which loses what the activation rounds away.  The graph
    ``trained``, in training form, decides this, as it did for training.
    """
    values, decisive = map_values(graph), map_values(trained)
    sources: dict[str, ir.Value] = {}

    def read(name: str, output: str) -> ir.Value:
        like = values[output]
        return sources.setdefault(name, ir.Value(name=name, type=like.type, shape=like.shape))

    builder = NodeBuilder("splitonnx.scores")
    scores = []
    for loss in losses:
        first, *others = list_reads(loss, graphs)
        axis = find_class_axis(graph, loss, graphs)
        found = find_activation(decisive[first], loss.kind, axis)
        source = read(first if found is None else predicted.get(first, first), first)
        if found is not None and first not in predicted:
            source = invert_activation(builder, source, found.kind)
        for name in others:
            read(name, name)
        if remark := _describe_uneven(loss, values, graphs):
            _log.warning("%s", remark)
        scores.append(source.name or "")
    opsets = {"": graph.opset_imports[""] if graphs else 18}
    given = tuple(sources.values())
    made = ir.Graph(given, [], nodes=builder.nodes, name="evaluate", opset_imports=opsets)
    attached = attach_losses(made, losses, scores, graphs, evaluating=True)
    return ir.Model(made, ir_version=10), given, attached


def _describe_uneven(loss: Loss, values: Mapping[str, ir.Value], graphs: LossGraphs) -> str:
    """Return a remark about a loss for which an evaluation depends on the size of the batches."""
    file = find_graph(loss, graphs)
    if loss.kind not in (FROM_MODEL, FROM_FILE):
        return ""
    result = values[loss.output or ""] if file is None else file.inference.graph.outputs[0]
    maker = find_stored(result).producer()
    if maker is None:
        return ""
    name = f"the loss '{result.name}'"
    is_sum = maker.attributes.get_string("reduction", "mean") == "sum"
    if (is_sum and maker.op_type in MEANS) or maker.op_type == "ReduceSum":
        return (
            f"{name} is a sum over the batch: evaluate gives the mean of the batches' sums, which "
            "depends on the batch size; make it a mean to compare evaluations"
        )
    if file is None and count_labels(NodeBuilder("splitonnx.counted"), maker) is not None:
        return (
            f"{name} ignores labels or weighs classes, and is not computed from another output: "
            "evaluate weighs each batch by its samples, so its loss depends on the batch size; "
            "make the scores an output of the model, too"
        )
    return ""


def list_scored(
    graph: ir.Graph,
    trained: ir.Graph,
    losses: Sequence[Loss],
    predicted: Mapping[str, str] = NO_SCORES,
) -> tuple[ScoredOutput, ...]:
    """List the outputs that losses compare with labels; the user's own losses say nothing of them.

    ``graph`` and ``trained`` are the model in inference and in training form, and ``predicted``
    names scores, as in :func:`build_evaluation`.
    """
    decisive = map_values(trained)
    kinds = {CROSS_ENTROPY: ScoreKind.CLASSES, "bce-with-logits": ScoreKind.BINARY}
    scored = []
    for loss in losses:
        if loss.kind in (FROM_MODEL, FROM_FILE):
            continue
        output = loss.output or ""
        axis = find_class_axis(graph, loss, {})
        found = find_activation(decisive[output], loss.kind, axis)
        read = output if found is None else predicted.get(output, output)
        scored.append(
            ScoredOutput(
                output=read,
                labels=loss.array,
                kind=kinds.get(loss.kind, ScoreKind.VALUES),
                loss=loss.name or "",
                class_axis=axis if loss.kind == CROSS_ENTROPY else None,
                ignore_index=loss.ignore_index,
                sample_weights=loss.sample_weights,
                are_probabilities=found is not None and output not in predicted,
            )
        )
    return tuple(scored)
