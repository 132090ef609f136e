"""Set BatchNormalization to its training, frozen or inference form.

The gradient builder of onnxruntime-training 1.19.2 sets every BatchNormalization to training mode,
even if the node should be frozen.  Therefore a frozen BatchNormalization is replaced by its
formula.

Exporters write two other normalizations as a BatchNormalization in training mode: weight
standardization, which has a weight as its input, and instance normalization, for which each channel
of each sample becomes a separate channel.  Neither has running statistics: both use the mean and
variance of their input, even in inference.  They are replaced by their formulas as well, so that no
mode applies to them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError, quote
from splitonnx.names import BatchNormMode, BatchNormModes
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import find_data, list_inner, walk_back
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.normalization.parameters import find_stored

NEXT = "#next"

_REPEATING = frozenset({"Concat", "ConstantOfShape", "Expand", "Tile"})
"""Operators with which statistics are repeated for each sample; a stored statistic has none."""


def list_batchnorms(graph: ir.Graph) -> list[ir.Node]:
    """List the BatchNormalization nodes of a graph in graph order."""
    return [node for node in graph if node.op_type == "BatchNormalization" and not node.domain]


def is_training(node: ir.Node) -> bool:
    """Return whether a BatchNormalization node normalises with the statistics of the batch."""
    return node.attributes.get_int("training_mode", 0) == 1


def train_batchnorms(
    graph: ir.Graph, *, mode: BatchNormModes, has_others: bool = False
) -> dict[str, str]:
    """Set the mode of every BatchNormalization, and return how running statistics are updated.

    If training updates a running statistic, the result maps its name to the name of the graph value
    that replaces it after each step.

    If a network calls a module several times, the nodes of these calls share their running
    statistics.  They update the statistics in graph order: each node starts from the values that
    the node before it computed.

    ``has_others`` means that earlier passes replaced other BatchNormalizations, which always use
    statistics of their own input, by formulas.  In this case, ``mode="train"`` is accepted even if
    no BatchNormalization is left.

    Raises:
        UnsupportedModel: a pattern in ``mode`` matches no BatchNormalization.
        UsageError: a pattern in ``mode`` is not a regular expression, or ``mode`` is ``"train"``,
            the graph has no BatchNormalization, and ``has_others`` is false.
    """
    successors: dict[str, ir.Value] = {}
    nodes = list_batchnorms(graph)
    _unchain_statistics(nodes)
    if not (mode == "train" and has_others):
        _refuse_idle(mode, [list_names(node) for node in nodes])
    for node in nodes:
        chosen = choose_mode(mode, list_names(node))
        training = is_training(node) if chosen is None else chosen == "train"
        node.attributes["training_mode"] = ir.AttrInt64("training_mode", int(training))
        if not training:
            continue
        with attribute_errors_to(node, "given running statistics"):
            if len(node.outputs) < 3:
                node.resize_outputs(3)
            for index, output in zip((3, 4), node.outputs[1:3], strict=True):
                statistic = node.inputs[index]
                assert statistic is not None
                start = successors.get(statistic.name or "", statistic)
                if start is not statistic:
                    _copy_statistic(graph, statistic, start.producer(), index)
                    node.replace_input_with(index, start)
                output.name = output.name or f"{start.name}{NEXT}"
                output.type, output.shape = statistic.type, statistic.shape
                successors[statistic.name or ""] = output
    return {name: value.name or "" for name, value in successors.items()}


def _unchain_statistics(nodes: Sequence[ir.Node]) -> None:
    """Have nodes that read the statistics which another node updated read what that one reads.

    Nodes that share stored statistics are handed on from one to the next again where they train.
    """
    for node in nodes:
        for index in (3, 4):
            statistic = node.inputs[index]
            while statistic is not None and (made := _find_update(statistic, index)) is not None:
                statistic = made.inputs[index]
            if statistic is not node.inputs[index]:
                node.replace_input_with(index, statistic)


def _find_update(value: ir.Value, index: int) -> ir.Node | None:
    """Return the node that updates the statistic at its input ``index`` to ``value``.

    Copies of the updated statistic count.
    """
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value, node = node.inputs[0], node.inputs[0].producer()
    is_norm = node is not None and node.op_type == "BatchNormalization" and not node.domain
    return node if is_norm and value.index() == index - 2 else None


def _copy_statistic(graph: ir.Graph, statistic: ir.Value, node: ir.Node | None, index: int) -> None:
    """Make the first of the nodes that share a running statistic start from a copy of it.

    The kernel of onnxruntime-training 1.19.2 overwrites the old statistic with the new one, unless
    the new one is a graph output.  For the first node it is not, and the old statistic belongs to
    the state of a party.  The copy is the Max of one tensor, because an Identity would share its
    input's memory.
    """
    assert node is not None
    if node.inputs[index] is statistic:
        builder = NodeBuilder(f"{statistic.name}/copy")
        copied = builder.op("Max", statistic)
        copied.type, copied.shape = statistic.type, statistic.shape
        node.replace_input_with(index, copied)
        graph.insert_before(node, builder.nodes)


def trace_statistic(value: ir.Value | None, kept: Collection[ir.Node]) -> ir.Value | None:
    """Find the last update of a running statistic that a node in ``kept`` computes.

    The search goes backwards from ``value``, the updated statistic.  Return ``None`` if no node in
    ``kept`` updates this statistic.
    """
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "BatchNormalization" and node in kept:
            return value
        is_norm = node.op_type == "BatchNormalization"
        value = node.inputs[(value.index() or 0) + 2 if is_norm else 0]
    return None


def list_names(node: ir.Node) -> list[str]:
    """List the names that a pattern can match to select a BatchNormalization.

    These are the names of the node, its weights, its running statistics and its output.
    """
    values = [*node.inputs[1:], *node.outputs[:1]]
    return [name for name in (node.name, *(v.name for v in values if v is not None)) if name]


def choose_mode(modes: BatchNormModes, names: Sequence[str]) -> BatchNormMode | None:
    """Return the mode that ``modes`` assigns to a BatchNormalization with these names.

    If several patterns match, the last one applies.  ``None`` means that the node keeps its mode.
    """
    if modes is None or isinstance(modes, str):
        return modes
    chosen = None
    for pattern, mode in modes.items():
        if any(re.search(pattern, name) for name in names):
            chosen = mode
    return chosen


def _refuse_idle(modes: BatchNormModes, names: Sequence[Sequence[str]]) -> None:
    """Refuse a mode for no BatchNormalization, and a pattern that is not a regular expression."""
    if modes == "train" and not names:
        raise UsageError(
            "--batchnorm train has no effect: the model has no BatchNormalization (exporters fold "
            "it into the layer before it; see splitonnx check); leave it out, or export again"
        )
    for pattern in modes if isinstance(modes, dict) else ():
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UsageError(
                f"--batchnorm '{pattern}' is not a regular expression: {error}"
            ) from error
        if not any(compiled.search(name) for known in names for name in known):
            offer = quote([known[0] for known in names if known][:8]) or "none"
            raise UnsupportedModel(
                f"--batchnorm '{pattern}'",
                f"it matches no BatchNormalization; the model has {offer}",
            )


def freeze_batchnorms(graph: ir.Graph) -> set[str]:
    """Replace each BatchNormalization in inference mode with its formula.

    This is necessary because onnxruntime-training would set the node to training mode.  Return the
    names of the running statistics that the replaced nodes used, either directly or after a cast or
    a reshape.
    """
    statistics: set[str] = set()
    for node in list_batchnorms(graph):
        if is_training(node):
            continue
        read = [find_stored(value) for value in node.inputs[3:5] if value is not None]
        statistics.update(value.name or "" for value in read)
        with attribute_errors_to(node, "written as its formula"):
            _keep_old_statistics(graph, node)
            _write_out(graph, node)  # removes the node's inputs
    return statistics


def find_inner_statistics(graph: ir.Graph) -> set[str]:
    """Return the names of the running statistics of all BatchNormalizations in subgraph bodies.

    They stay as they are: no gradient may change them, and no batch updates them.
    """
    inner = [part for node in graph for part in list_inner(node)]
    nodes = [n for n in inner if n.op_type == "BatchNormalization" and not n.domain]
    read = [find_stored(v) for node in nodes for v in node.inputs[3:5] if v is not None]
    return {value.name or "" for value in read}


def _write_out(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a node by (x - mean) * scale / sqrt(var + epsilon) + bias, computed per channel."""
    x, scale, bias, mean, variance = node.inputs
    assert x is not None
    if x.shape is None:
        raise UnsupportedModel(
            f"node '{node.name}' (BatchNormalization)",
            "the rank of its input is not known",
            "export the model with shapes",
        )
    rank = len(x.shape)
    builder = NodeBuilder(node.name or "")

    epsilon = builder.number(node.attributes.get_float("epsilon", 1e-5), x.dtype)
    deviation = builder.op("Sqrt", builder.op("Add", variance, epsilon))
    factor = builder.op("Div", scale, deviation)
    scaled = builder.op(
        "Mul", builder.op("Sub", x, _spread(builder, mean, rank)), _spread(builder, factor, rank)
    )
    output = builder.op("Add", scaled, _spread(builder, bias, rank))
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], builder.nodes, [node.outputs[0]], [output]
    )


def _spread(builder: NodeBuilder, value: ir.Value | None, rank: int) -> ir.Value | None:
    """Reshape [C] to [C, 1, ...], so that it is broadcast along axis 1 of a tensor."""
    if rank <= 2:
        return value
    return builder.op("Unsqueeze", value, builder.integers(range(1, rank - 1)))


def use_running_statistics(graph: ir.Graph) -> None:
    """Set every BatchNormalization to inference mode, in which it uses its running statistics.

    If the updated value of a running statistic is used, for example as a model output, it is
    replaced with the running statistic itself.
    """
    for node in list_batchnorms(graph):
        node.attributes["training_mode"] = ir.AttrInt64("training_mode", 0)
        _keep_old_statistics(graph, node)


def _keep_old_statistics(graph: ir.Graph, node: ir.Node) -> None:
    """Have readers of the statistics that a node updates read the old ones instead."""
    for statistic, output in zip(node.inputs[3:5], node.outputs[1:3], strict=False):
        if output.uses() or output.is_graph_output():
            stand_in = ir.node("Identity", [statistic], name=f"{node.name}/{output.name}")
            stand_in.outputs[0].type, stand_in.outputs[0].shape = output.type, output.shape
            name, output.name = output.name, None
            stand_in.outputs[0].name = name
            ir.convenience.replace_nodes_and_values(
                graph, node, [], [stand_in], [output], [stand_in.outputs[0]]
            )
    node.resize_outputs(1)


def write_out_own_statistics(graph: ir.Graph, weights: Collection[str]) -> bool:
    """Replace normalizations that compute their own statistics with their formulas, in place.

    Return whether any node was replaced.  These nodes are replaced:

    - MeanVarianceNormalization, because the kernel of ONNX Runtime 1.19.2 divides by zero where all
      elements are equal;
    - BatchNormalization in training mode, if its input depends only on weights, or if the graph
      repeats its running statistics once per sample.

    A MeanVarianceNormalization of 16-bit numbers is left unchanged, and so is a BatchNormalization
    if the rank of its input is not known.  ``weights`` contains the names of the graph inputs that
    are weights.
    """
    found = _write_out_mean_variances(graph)
    training = [node for node in list_batchnorms(graph) if is_training(node)]
    if not training:
        return found
    data = find_data(graph, [value for value in graph.inputs if value.name not in weights])
    for node in training:
        x, *_, mean, variance = node.inputs
        if x is None or x.shape is None:
            continue
        if x not in data or _is_repeated(mean, variance):
            with attribute_errors_to(node, "written as its formula"):
                _write_out_as_own(node, x, len(x.shape))
            found = True
    return found


def _write_out_mean_variances(graph: ir.Graph) -> bool:
    """Replace each MeanVarianceNormalization by (x - mean) / (deviation + 1e-9).

    The deviation is sqrt(variance + 1e-18), which has a finite gradient where all elements are
    equal.  A node with 16-bit elements is left to the rewrites, because these constants are 0 in
    float16.
    """
    found = False
    for node in list(graph):
        x = node.inputs[0] if node.op_type == "MeanVarianceNormalization" else None
        if node.domain or x is None or x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            continue
        builder = NodeBuilder(f"{node.outputs[0].name}/formula")
        axes = builder.integers(list(node.attributes.get_ints("axes", [0, 2, 3])))
        centred = builder.op("Sub", x, builder.op("ReduceMean", x, axes, keepdims=1))
        square = builder.op("Mul", centred, centred)
        variance = builder.op("ReduceMean", square, axes, keepdims=1)
        root = builder.op("Sqrt", builder.op("Add", variance, builder.number(1e-18, x.dtype)))
        divisor = builder.op("Add", root, builder.number(1e-9, x.dtype))
        builder.replace(node, [builder.op("Div", centred, divisor)])
        found = True
    return found


def _is_repeated(*statistics: ir.Value | None) -> bool:
    nodes, _ = walk_back([value for value in statistics if value is not None])
    return any(node.op_type in _REPEATING and not node.domain for node in nodes)


def _write_out_as_own(node: ir.Node, x: ir.Value, rank: int) -> None:
    """Replace a node by (x - mean) / sqrt(var + epsilon) * scale + bias, per channel.

    The variance is the biased one.  The two other outputs are the running statistics after one
    step, ``old * momentum + own * (1 - momentum)``, as the operator defines them.
    """
    _, scale, bias, mean, variance = node.inputs
    builder = NodeBuilder(node.name or "")
    axes = builder.integers([axis for axis in range(rank) if axis != 1])
    own_mean = builder.op("ReduceMean", x, axes, keepdims=1)
    centred = builder.op("Sub", x, own_mean)
    own_variance = builder.op("ReduceMean", builder.op("Mul", centred, centred), axes, keepdims=1)
    epsilon = builder.number(node.attributes.get_float("epsilon", 1e-5), x.dtype)
    deviation = builder.op("Sqrt", builder.op("Add", own_variance, epsilon))
    normal = builder.op("Div", centred, deviation)
    scaled = builder.op("Mul", normal, _spread(builder, scale, rank))
    output = builder.op("Add", scaled, _spread(builder, bias, rank))
    momentum = node.attributes.get_float("momentum", 0.9)

    def follow(old: ir.Value | None, own: ir.Value) -> ir.Value:
        flat = builder.op("Reshape", own, builder.integers([-1]))
        kept = builder.op("Mul", old, builder.number(momentum, x.dtype))
        return builder.op(
            "Add", kept, builder.op("Mul", flat, builder.number(1 - momentum, x.dtype))
        )

    made = [output]
    for old, value, own in zip(
        (mean, variance), node.outputs[1:3], (own_mean, own_variance), strict=False
    ):
        used = bool(value.uses()) or value.is_graph_output()
        made.append(follow(old, own) if used else output)
    builder.replace(node, made)
