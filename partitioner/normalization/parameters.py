"""Classify each stored float tensor by its use: as a parameter, a setting or a constant.

A scalar is a constant.  The rules for other tensors are:

- A tensor that an operator uses as a setting (a Pad's value, a Resize's scales) cannot be trained.
- BatchNormalization's mean and variance are running statistics.
- A tensor that an operator uses as weights (a Conv's kernel, a Gather's table) is a parameter, and
  so is one whose parts are put together as the weights of a recurrent layer.
- A tensor that is used only in additions, multiplications and similar operations is a parameter,
  with three exceptions: a single number (such as an epsilon or a scale, but not the bias of a layer
  with one output), a mask (a tensor with infinities) and a grid (distinct whole numbers).
- Any other initializer is a parameter.  Any other tensor of a Constant node is not, because
  exporters use Constant nodes for literals.

With the option ``--train``, a constant that the user names also becomes a parameter.  Parameters
that only normalize a raw input, such as an image's mean and deviation, are not trained unless the
user names them (:func:`find_input_scalings`).  This module depends on the meaning of operators, but
not on how a model is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.bodies import list_entries, list_exits
from splitonnx.partitioner.graphs.traversals import list_bodies, list_inputs, list_nodes

_ALL = frozenset(range(64))

_SETTINGS: Mapping[str, Collection[int]] = {
    "Bernoulli": {0},
    "CastLike": {1},
    "DequantizeLinear": {1},
    "Dropout": {1},
    "MaxRoiPool": {1},
    "MelWeightMatrix": _ALL,
    "Mod": {1},
    "Multinomial": {0},
    "NegativeLogLikelihoodLoss": {2},
    "NonMaxSuppression": _ALL,
    "OneHot": {0, 1},
    "Pad": {2},
    "QLinearConv": _ALL,
    "QLinearMatMul": _ALL,
    "QuantizeLinear": {1},
    "Range": {1},
    "Resize": {1, 2},
    "RoiAlign": {1},
    "STFT": {2},
    "SoftmaxCrossEntropyLoss": {2},
    "Upsample": {1},
}
"""Maps an operator to its inputs without a gradient, which the user cannot train either."""

_USUAL: Mapping[str, Collection[int]] = {
    "Attention": {3, 4, 5},
    "CausalConvWithState": {3},
    "Clip": {1, 2},
    "GRU": {5},
    "GridSample": {1},
    "LSTM": {5, 6},
    "LinearAttention": {3},
    "OneHot": {2},
    "Pow": {1},
    "RNN": {5},
    "Range": {0, 2},
    "RotaryEmbedding": {1, 2, 3},
}
"""Maps an operator to inputs that have a gradient but often are masks, first states, exponents.

:mod:`kept` tells those that may have been learned all the same.
"""

_PLACES: Mapping[str, Collection[int]] = {
    "BatchNormalization": {1, 2},
    "CausalConvWithState": {1, 2},
    "Conv": {1, 2},
    "ConvTranspose": {1, 2},
    "DeformConv": {1, 3},
    "Einsum": _ALL,
    "GRU": {1, 2, 3},
    "Gather": {0},
    "Gemm": _ALL,
    "GroupNormalization": {1, 2},
    "InstanceNormalization": {1, 2},
    "LSTM": {1, 2, 3, 7},
    "LayerNormalization": {1, 2},
    "MatMul": _ALL,
    "PRelu": {1},
    "RMSNormalization": {1},
    "RNN": {1, 2, 3},
}
"""Maps an operator to its inputs for weights, where even a Constant node is a parameter."""

_ELEMENTWISE = frozenset({"Add", "Div", "Max", "Mean", "Min", "Mul", "Sub", "Sum", "Where"})
_LEARNT = frozenset({"Add", "Mul"})
"""Operators for which a Constant node may be a bias or a scale."""
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_LINEAR = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
LOOKERS = frozenset(
    {
        "ArgMax",
        "ArgMin",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Shape",
        "Size",
    }
)
"""Operators that pass no gradient to a tensor; the tensor can be trained through its other uses."""
_PASSING = frozenset(
    {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators between a weight and the operator that uses it as a weight."""
_SCALINGS = frozenset({"Add", "Div", "Mul", "Sub"})
"""Operators that apply a mean and a deviation to a raw input."""
_PICKING = frozenset({"Clip", "Gather", "Pad", "Resize", "Slice"})
"""Operators that prepare a raw input, for example resize an image or reorder its channels."""
_STATISTICS = frozenset({("BatchNormalization", 3), ("BatchNormalization", 4)})
_LOOKED_AT = 1 << 16
"""The number of elements that are read to recognise a mask or a grid."""


class TensorKind(Enum):
    """The classes of stored tensors.

    A constant can become a parameter if the user requests it.  Settings and running statistics can
    never be trained.
    """

    PARAMETER = auto()
    CONSTANT = auto()
    SETTING = auto()
    STATISTIC = auto()


@dataclass(frozen=True, kw_only=True)
class Classification:
    """The class of a tensor and, if the tensor cannot be trained, the reason."""

    kind: TensorKind
    reason: str = ""


def classify_tensor(value: ir.Value, tensor: ir.TensorProtocol) -> Classification:
    """Classify a stored float tensor by the operators that use it.

    ``value`` is the graph value that holds ``tensor``.
    """
    uses = [(node, index) for node, index in list_uses(value) if node.op_type not in LOOKERS]
    places = {(node.op_type, index) for node, index in uses}
    if places and places <= _STATISTICS:
        return Classification(
            kind=TensorKind.STATISTIC, reason="it is a running statistic, never trained"
        )
    for node, index in uses:
        if index in _SETTINGS.get(node.op_type, ()):
            reason = f"it is a setting of node '{node.name}' ({node.op_type}), without a gradient"
            return Classification(kind=TensorKind.SETTING, reason=reason)
    if not uses:
        return Classification(kind=TensorKind.SETTING, reason="nothing that has a gradient uses it")
    trained = len(tensor.shape) > 0 and _is_parameter(value, tensor, uses)
    return Classification(kind=TensorKind.PARAMETER if trained else TensorKind.CONSTANT)


def _is_parameter(
    value: ir.Value, tensor: ir.TensorProtocol, uses: Collection[tuple[ir.Node, int]]
) -> bool:
    if any(index in _PLACES.get(node.op_type, ()) for node, index in uses):
        return True
    if any(index in _USUAL.get(node.op_type, ()) for node, index in uses):
        return False
    kinds = {node.op_type for node, _ in uses}
    literal = value.producer() is not None
    if kinds <= _ELEMENTWISE:
        if tensor.size == 1:
            return any(_is_bias(node, index) for node, index in uses)
        return not (literal and not kinds & _LEARNT) and not _is_table(tensor)
    return not literal or any(_is_recurrent_weight(node, index) for node, index in uses)


def _is_recurrent_weight(node: ir.Node, index: int) -> bool:
    """Return whether parts of an input become the weights of a recurrent layer.

    Exporters of PyTorch models change the order of the gates by Slice, or Split, and Concat.
    """
    if node.domain:
        return False
    if node.op_type in _RECURRENT:
        return index in _PLACES[node.op_type]
    if node.op_type == "Concat" or (node.op_type in ("Slice", "Split") and index == 0):
        return any(_is_recurrent_weight(*use) for part in node.outputs for use in list_uses(part))
    return False


def _is_bias(node: ir.Node, index: int) -> bool:
    """Return whether an input is added to a linear layer's result, like the bias of one output."""
    other = node.inputs[1 - index] if index < 2 and len(node.inputs) == 2 else None
    source = other.producer() if other is not None else None
    return node.op_type == "Add" and source is not None and source.op_type in _LINEAR


def _is_table(tensor: ir.TensorProtocol) -> bool:
    """Return whether a tensor looks like a mask (infinities) or a grid (distinct whole numbers)."""
    values = tensor.numpy().reshape(-1)[:_LOOKED_AT].astype(np.float64)
    if not np.isfinite(values).all():
        return True
    return values.size > 0 and bool(
        (values == np.rint(values)).all() and values.min() != values.max()
    )


def is_weight_input(node: ir.Node, index: int) -> bool:
    """Return whether the input of a node at ``index`` is one that usually holds weights."""
    return not node.domain and index in _PLACES.get(node.op_type, ())


def list_uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield each use of a value, as a node and the index of the input that reads the value.

    If the value is cast to a float type, reshaped or transposed, the uses of the result are yielded
    instead.  Casts to other types are ignored.
    """
    for use in value.uses():
        node, index = use.node, use.idx
        if node.op_type in _PASSING and index == 0 and not node.domain:
            if node.op_type != "Cast" or ir.DataType(_read_type(node)).is_floating_point():
                yield from list_uses(node.outputs[0])
        else:
            yield node, index


def find_stored(value: ir.Value) -> ir.Value:
    """Return the value from which ``value`` is computed by casts and shape changes alone.

    Return ``value`` itself if no cast or shape change computes it.
    """
    while (node := value.producer()) is not None and node.op_type in _PASSING and not node.domain:
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return value


def _read_type(node: ir.Node) -> int:
    attribute = node.attributes["to"]
    if attribute.type is ir.AttributeType.STRING:  # before opset 6
        return ir.DataType[attribute.as_string()].value
    return attribute.as_int()


def find_input_scalings(
    graph: ir.Graph, weights: Mapping[str, ir.TensorProtocol], states: Collection[str] = ()
) -> list[str]:
    """Return the names of the weights that only normalize a raw input, such as an image's mean.

    Such a weight is added to a raw input, subtracted from it, multiplied by it, or used to divide
    it.  It is applied before all other weights, and at least one other weight is applied
    afterwards.  An addend or a factor must be a vector, such as one number for each channel, but a
    subtrahend or a divisor may have any shape.  An addend of zeros and a factor of ones are not
    included, because a learned bias or scale begins with these values.

    ``weights`` maps the names of the graph inputs that are weights to their tensors.  Graph inputs
    in ``states`` are neither weights nor raw inputs.
    """
    weights = {name: tensor for name, tensor in weights.items() if name not in states}
    holders = {value.name or "": value for value in graph.inputs}
    refused: set[str] = set()
    while True:
        found = _follow_inputs(graph, weights, {*refused, *states})
        leading = _find_leading(graph, weights.keys() - found.keys())
        stray = {
            name
            for name, nodes in found.items()
            if not leading.intersection(nodes)
            or not _is_scaling(holders[name], nodes, weights[name])
        }
        if not stray:
            return [name for name in weights if name in found]
        refused |= stray


def _follow_inputs(
    graph: ir.Graph, weights: Mapping[str, ir.TensorProtocol], refused: Collection[str]
) -> dict[str, list[ir.Node]]:
    """Follow raw inputs up to the first weight that does more than scale or shift them.

    Return the weights that scale or shift them, except those in ``refused``, each with its nodes.
    Inputs in ``refused`` are not followed either.  Raw inputs are followed into bodies, also by
    rows that a Scan hands out or that a Loop gathers by the number of the iteration.
    """
    raw = {v for v in graph.inputs if v.name not in weights and v.name not in refused}
    holders = {v: v.name or "" for v in graph.inputs if v.name in weights and v.name not in refused}
    counters: set[ir.Value] = set()
    found: dict[str, list[ir.Node]] = {}

    def follow(node: ir.Node) -> None:
        sources = [value for value in node.inputs if value is not None]
        if node.op_type in _PASSING:
            for known in (raw, counters):
                if sources[0] in known:
                    known.add(node.outputs[0])
            if sources[0] in holders:
                holders[node.outputs[0]] = holders[sources[0]]
        elif node.op_type in _PICKING and sources[0] in raw:
            own = [value for value in sources[1:] if value not in counters]
            if all(ir.convenience.get_const_tensor(value) is not None for value in own):
                raw.add(node.outputs[0])
        elif node.op_type in _SCALINGS and len(sources) == 2:
            others = [value for value in sources if value not in raw]
            name = holders.get(others[0]) if len(others) == 1 else None
            if name is not None:
                found.setdefault(name, []).append(node)
                raw.add(node.outputs[0])
            elif len(others) == 1 and ir.convenience.get_const_tensor(others[0]) is not None:
                raw.add(node.outputs[0])

    def follow_all(nodes: ir.Graph) -> None:
        for node in nodes:
            for value, held in list_entries(node) if list_bodies(node) else ():
                if not held:
                    counters.add(value)
                elif {find_stored(one) for one in held[1:]} <= {value} and held[0] in raw:
                    raw.add(value)
            for body in list_bodies(node):
                follow_all(body)
            for value, held in list_exits(node) if list_bodies(node) else ():
                if raw.issuperset(held):
                    raw.add(value)
            if not node.domain and node.inputs and len(node.outputs) == 1 and not list_bodies(node):
                follow(node)

    follow_all(graph)
    return found


def _find_leading(graph: ir.Graph, others: Collection[str]) -> set[ir.Node]:
    """Find the nodes on which a node depends that uses a weight in ``others``."""
    weights = {value for value in graph.inputs if value.name in others}
    nodes = list_nodes(graph)
    holders = [node for node in nodes if list_bodies(node)]
    held = dict(pair for node in holders for pair in (*list_entries(node), *list_exits(node)))
    users = [node for node in nodes if not weights.isdisjoint(list_inputs(node))]
    pending = [value for node in users for value in list_inputs(node)]
    leading: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        pending.extend(held.get(value, ()))
        node = value.producer()
        if node is not None and node not in leading:
            leading.add(node)
            pending.extend(list_inputs(node))
    return leading


def _is_scaling(value: ir.Value, nodes: Collection[ir.Node], tensor: ir.TensorProtocol) -> bool:
    """Return whether a weight has no other use than to scale or shift raw inputs in ``nodes``."""
    if {node for node, _ in list_uses(value) if node.op_type not in LOOKERS} != set(nodes):
        return False
    kinds = {node.op_type for node in nodes}
    if not kinds & _LEARNT:
        return True
    if sum(dim != 1 for dim in tensor.shape.numpy()) > 1:
        return False
    array = tensor.numpy()
    return not ((kinds == {"Add"} and not array.any()) or (kinds == {"Mul"} and (array == 1).all()))
