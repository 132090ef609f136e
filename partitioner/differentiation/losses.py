"""Add losses and their metrics to a graph, using standard ONNX operators.

A loss is the mean over the batch.  The labels are read from a graph input named ``labels``.  This
module does not depend on cuts or gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.names import LOSS
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.tensors import TensorSpec

LABELS = "labels"
ACCURACY = "accuracy"

EDGE = 1e-3
"""How far a Clip may keep probabilities from 0 and 1 and still only keep a logarithm finite."""


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


def attach_loss(graph: ir.Graph, loss: str, output: str) -> AttachedLoss:
    """Add graph outputs that hold ``loss`` and its metric, computed from ``output``.

    - ``cross-entropy``: the output (N, C, ...) holds raw scores for C classes, the labels (N, ...)
      are int64 in [0, C); the metric is accuracy.
    - ``mse``, ``l1``: the labels are float32 and have the output's shape; there is no metric.
    - ``bce-with-logits``: the output holds raw scores; the labels are float32 from 0 to 1 and have
      the output's shape; the metric is accuracy.
    - ``from-model``: the output is itself the loss, a scalar.

    Raises:
        UsageError: there is no loss of this name.
        UnsupportedModel: the output does not fit the loss.
    """
    value = map_values(graph)[output]
    labels = fit_loss(graph, loss, output)
    _clear_names(graph, _list_names(loss, value))
    if labels is None:
        return _adopt_loss(graph, value)
    _, build = _LOSSES[loss]
    source = _make_input(labels)
    graph.inputs.append(source)
    builder = NodeBuilder("splitonnx.loss")
    results = build(builder, value, source)
    graph.extend(builder.nodes)
    for name, result in results.items():
        result.name = name
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.outputs.append(result)
    return AttachedLoss(labels=labels, results=tuple(results))


def fit_loss(graph: ir.Graph, loss: str, output: str) -> TensorSpec | None:
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
    _find_hidden(graph, _list_names(loss, value))
    if loss == "from-model":
        return None
    if value.shape is None or value.dtype is None or not value.dtype.is_floating_point():
        raise UnsupportedModel(f"output '{output}'", f"{loss} needs a float tensor of known rank")
    return _LOSSES[loss][0](value)


def skip_activation(graph: ir.Graph, loss: str, output: str, cut: Collection[ir.Value]) -> str:
    """Return the name of the tensor from which the loss should be computed.

    Usually this is ``output``.  However, ``cross-entropy`` itself applies a Softmax, and
    ``bce-with-logits`` a Sigmoid.  If the model applies the same activation last, the loss is
    computed from the input of this activation, so that it is not applied twice.  Nodes that move
    or convert the activation's result are then applied to its input instead.

    If a tensor in ``cut``, the cut tensors, is between the activation and the loss, the party
    with the loss does not have this input.  The activation is then inverted.
    """
    value = map_values(graph)[output]
    found = find_activation(value, loss)
    if found is None:
        return output
    builder = NodeBuilder("splitonnx.scores")
    if {value, *found.passed} & set(cut):
        scores = _invert(builder, value, found.kind)
    else:
        scores = _replay(builder, found)
    graph.extend(builder.nodes)
    return scores.name or output


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The activation that a model applies last: its operator, and its input.

    ``passed`` are the results of the activation and of the nodes between it and the output, and
    ``nodes`` are those of these nodes that move or convert elements, in order.
    """

    kind: str
    source: ir.Value
    passed: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


def find_activation(output: ir.Value, loss: str) -> Activation | None:
    """Return the activation that ``output`` ends with, if ``loss`` itself applies this activation.

    Otherwise, return ``None``.  ``cross-entropy`` applies Softmax, and ``bce-with-logits`` Sigmoid.
    Between the activation and ``output``, these are looked through: Identity, Cast between floats,
    a Clip that only keeps a logarithm finite, and nodes that change the shape but, for Softmax, not
    the first two dimensions (N and the classes).
    """
    kind, value = _ACTIVATIONS.get(loss), output
    if kind is None:
        return None
    passed: list[ir.Value] = []
    nodes: list[ir.Node] = []
    while (node := value.producer()) is not None and not node.domain:
        passed.append(value)
        source = node.inputs[0] if node.inputs else None
        if node.op_type == kind and source is not None:
            if kind == "Softmax" and not _is_over_classes(node, value):
                return None
            made = tuple(reversed(nodes))
            return Activation(kind=kind, source=source, passed=tuple(passed), nodes=made)
        if source is None or not _is_looked_through(node, source, value, kind):
            return None
        if node.op_type in (_MOVES | {"Cast"}):
            nodes.append(node)
        value = source
    return None


_MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


def _is_over_classes(node: ir.Node, value: ir.Value) -> bool:
    rank = len(value.shape) if value.shape is not None else 0
    return node.attributes.get_int("axis", -1) in (1, 1 - rank)


def _is_looked_through(node: ir.Node, source: ir.Value, result: ir.Value, kind: str) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        return all(v.dtype is not None and v.dtype.is_floating_point() for v in (source, result))
    if node.op_type == "Clip":
        low, high = (known_array(v) for v in (*node.inputs[1:3], None, None)[:2])
        return low is not None and high is not None and _keeps_probabilities(low, high)
    if node.op_type not in _MOVES:
        return False
    before, after = (list(v.shape)[:2] if v.shape is not None else None for v in (source, result))
    return kind == "Sigmoid" or (before is not None and len(before) == 2 and before == after)


def _keeps_probabilities(low: np.ndarray, high: np.ndarray) -> bool:
    return bool(np.all((low >= 0) & (low <= EDGE) & (high >= 1 - EDGE) & (high <= 1)))


def _replay(builder: NodeBuilder, found: Activation) -> ir.Value:
    """Apply the nodes behind an activation to its input."""
    value = found.source
    for node in found.nodes:
        value = builder.ops(node.op_type, [value, *node.inputs[1:]], 1, node.attributes)[0]
        result = node.outputs[0]
        value.type, value.shape = result.type, result.shape
    return value


def _invert(builder: NodeBuilder, value: ir.Value, kind: str) -> ir.Value:
    """Compute raw scores from which the activation computes ``value``."""
    floor = _number(builder, 1e-30)
    scores = builder.op("Log", builder.op("Max", value, floor))  # softmax(log p) is p
    if kind == "Sigmoid":
        rest = builder.op("Sub", _number(builder, 1.0), value)
        scores = builder.op("Sub", scores, builder.op("Log", builder.op("Max", rest, floor)))
    scores.type, scores.shape = value.type, value.shape
    return scores


def _refuse_no_loss(value: ir.Value) -> None:
    if value.dtype != ir.DataType.FLOAT or (value.shape is not None and len(value.shape)):
        raise UnsupportedModel(
            f"output '{value.name}'",
            f"a loss is a float32 scalar, this is {value.type}{list(value.shape or [])}",
            "name the loss with --output",
        )


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


def _list_names(loss: str, output: ir.Value) -> Sequence[str]:
    """List the names that adding a loss gives to values in the graph."""
    if loss == "from-model":
        return () if output.name == LOSS else (LOSS,)
    return (LABELS, LOSS, ACCURACY)


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
                "rename it, or use --loss from-model if the model ends in its loss",
            )
    return [value for _, value in found]


def _make_input(spec: TensorSpec) -> ir.Value:
    dtype = ir.DataType.INT64 if spec.dtype == "I64" else ir.DataType.FLOAT
    return ir.Value(name=spec.name, type=ir.TensorType(dtype), shape=ir.Shape(list(spec.shape)))


def _dims(value: ir.Value) -> tuple[int | str | None, ...]:
    assert value.shape is not None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def _class_labels(output: ir.Value) -> TensorSpec:
    dims = _dims(output)
    if len(dims) < 2 or not isinstance(dims[1], int):
        raise UnsupportedModel(
            f"output '{output.name}'",
            f"cross-entropy needs scores of shape (N, C, ...) with C known, not {list(dims)}",
        )
    return TensorSpec(name=LABELS, dtype="I64", shape=(dims[0], *dims[2:]), bounds=(0, dims[1]))


def _float_labels(output: ir.Value) -> TensorSpec:
    return TensorSpec(name=LABELS, dtype="F32", shape=_dims(output))


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


_ACTIVATIONS = {"cross-entropy": "Softmax", "bce-with-logits": "Sigmoid"}

_Spec = Callable[[ir.Value], TensorSpec]
_Build = Callable[[NodeBuilder, ir.Value, ir.Value], Mapping[str, ir.Value]]
_LOSSES: Mapping[str, tuple[_Spec, _Build]] = {
    "cross-entropy": (_class_labels, _cross_entropy),
    "mse": (_float_labels, _mse),
    "l1": (_float_labels, _l1),
    "bce-with-logits": (_float_labels, _bce),
}


def build_evaluation(
    loss: str, output: ir.Value, activation: Activation | None
) -> tuple[ir.Model, AttachedLoss]:
    """Build a model that computes the loss and metric from a prediction and its labels.

    ``output`` describes the prediction.  If ``activation`` is given, the prediction is the result
    of this Softmax or Sigmoid.  The activation's inverse is then applied first,
    because the loss is computed from raw scores.
    """
    source = ir.Value(name=output.name, type=output.type, shape=output.shape)
    builder = NodeBuilder("splitonnx.scores")
    scores = source if activation is None else _invert(builder, source, activation.kind)
    graph = ir.Graph([source], [], nodes=builder.nodes, name="evaluate", opset_imports={"": 18})
    attached = attach_loss(graph, loss, scores.name or "")
    return ir.Model(graph, ir_version=10), attached
