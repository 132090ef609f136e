"""Dropout with a mask that depends only on the seed, the step, the micro-batch and the node.

:mod:`random_numbers` computes a random 32-bit number for each element.  The element is kept if its
number is less than ``(1 - ratio) * 2**32``.
"""

from __future__ import annotations

import shlex

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError, quote
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.random_numbers import draw_words, find_key
from splitonnx.partitioner.inference.node_faults import attribute_errors_to


def list_dropouts(graph: ir.Graph) -> list[ir.Node]:
    """List the Dropout nodes of a graph in graph order."""
    return [node for node in graph if node.op_type == "Dropout" and not node.domain]


def remove_dropouts(graph: ir.Graph) -> None:
    """Replace every Dropout with an Identity of the same name, as for inference."""
    for node in list_dropouts(graph):
        _bypass(graph, node)


def seed_dropouts(graph: ir.Graph, *, mode: str | None) -> None:
    """Replace each active Dropout with a multiplication by a reproducible random mask.

    The mask is computed from the random key, which is an input of the graph.  A Dropout that is
    inactive or has the ratio 0 is replaced with an Identity.  ``mode`` is ``"keep"`` to activate
    all nodes, or ``"off"`` to deactivate them; if it is ``None``, each node's own mode applies.

    Raises:
        UnsupportedModel: the ratio or the mode of a node is not a constant, or the ratio is not in
            [0, 1).
        UsageError: ``mode`` is ``"keep"``, but no node could drop anything.
    """
    nodes = list_dropouts(graph)
    if mode == "keep" and not any(_read_ratio(node) for node in nodes):
        found = f"the ratio of {quote(node.name or '' for node in nodes)} is 0" if nodes else ""
        raise UsageError(
            f"--dropout keep has no effect: {found or 'the model has no Dropout'}; leave it out, "
            "or export the model in training mode"
        )
    for node in nodes:
        with attribute_errors_to(node, "given a seeded mask"):
            ratio = _read_ratio(node)
            on = _is_on(node) if mode is None else mode == "keep"
            if not on or ratio == 0.0:
                _bypass(graph, node)
                continue
            _write_out(graph, node, find_key(graph), ratio)


def _read_ratio(node: ir.Node) -> float:
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None:
        return 0.5
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        name = value.name or ""
        raise UnsupportedModel(
            f"node '{node.name}' (Dropout)",
            "its ratio is not a constant",
            f"give its value with --bind {shlex.quote(f'{name}=RATIO')}"
            if value.is_graph_input()
            else "export it with a constant ratio",
        )
    ratio = float(tensor.numpy().item())
    if not 0.0 <= ratio < 1.0:
        raise UnsupportedModel(
            f"node '{node.name}' (Dropout)", f"its ratio {ratio} is not in [0, 1)"
        )
    return ratio


def _is_on(node: ir.Node) -> bool:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return False
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise UnsupportedModel(
            f"node '{node.name}' (Dropout)",
            "its training_mode is not a constant",
            "choose with --dropout keep|off",
        )
    return bool(tensor.numpy().item())


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    identity = ir.node("Identity", [node.inputs[0]], name=node.name)
    builder = NodeBuilder(f"{node.name}/mask")
    mask = None
    if _uses_mask(node):
        assert node.inputs[0] is not None
        everything = builder.number(1, ir.DataType.BOOL)
        mask = builder.op("Expand", everything, builder.shape(node.inputs[0]))
    _take_over(graph, node, [identity, *builder.nodes], identity.outputs[0], mask)


def _uses_mask(node: ir.Node) -> bool:
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    return mask is not None and (bool(mask.uses()) or mask.is_graph_output())


def _write_out(graph: ir.Graph, node: ir.Node, key: ir.Value, ratio: float) -> None:
    x = node.inputs[0]
    assert x is not None
    builder = NodeBuilder(node.name or "")
    mask = _draw_mask(builder, x, key, node.name or "", 1.0 - ratio)
    scale = builder.number(1.0 / (1.0 - ratio), x.dtype)
    factor = builder.op("Mul", builder.cast(mask, x.dtype), scale)
    factor.type, factor.shape = (
        x.type,
        x.shape,
    )  # so that the gradient needs no analysis of broadcasts
    output = builder.op("Mul", x, factor)
    _take_over(graph, node, builder.nodes, output, mask)


def _draw_mask(
    builder: NodeBuilder, x: ir.Value, key: ir.Value, name: str, keep: float
) -> ir.Value:
    """Compute the boolean mask in the shape of ``x``."""
    words = draw_words(builder, key, name, builder.op("Shape", x))
    return builder.op("Less", words, builder.integer(round(keep * 2**32)))


def _take_over(
    graph: ir.Graph, node: ir.Node, nodes: list[ir.Node], output: ir.Value, mask: ir.Value | None
) -> None:
    old, new = [node.outputs[0]], [output]
    if _uses_mask(node) and mask is not None:
        old.append(node.outputs[1])
        new.append(mask)
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, old, new)
