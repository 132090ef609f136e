"""Inline branches and unroll loops if their conditions and lengths do not depend on data.

The gradient builder does not support If, Loop or Scan.  So, if possible, each of these nodes is
replaced by the nodes that it would run.  Otherwise, the node is left unchanged, and the reason is
stored in its metadata.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.bodies import copy_body
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import disconnect, list_inner, list_nodes
from splitonnx.partitioner.inference.dimensions import Dim
from splitonnx.partitioner.inference.inferences import Inference
from splitonnx.partitioner.inference.undecided_sizes import (
    explain_unknown,
    list_options,
    name_sizes,
)

KEPT = "splitonnx.kept"
"""Metadata key of the reason why a control-flow node could not be replaced."""

MOST_NODES = 20_000
"""Limit of nodes created by unrolling the loops of one model; further loops stay loops."""


class Unresolved(Exception):
    """Raised if an If, Loop or Scan cannot be replaced with the nodes that it would run.

    Either its condition or its length is not known in advance, or there would be too many nodes.
    """


def resolve_control_flow(node: ir.Node, known: Inference, spent: int) -> Sequence[ir.Node]:
    """Replace an If, Loop or Scan with the nodes that it would run.

    Return these nodes in order.  The names of the node's outputs do not change.

    ``known`` holds the shapes and contents inferred so far.  ``spent`` is the number of nodes that
    earlier calls created for this model; it counts towards :data:`MOST_NODES`.

    Raises:
        Unresolved: the node cannot be replaced, and is not changed.
    """
    builder = NodeBuilder(node.name or node.op_type)
    try:
        if node.op_type == "If":
            made = _inline_branch(builder, node, known)
        elif node.op_type == "Loop":
            made = _unroll_loop(builder, node, known, spent)
        else:
            made = _unroll_scan(builder, node, known, spent)
    except Unresolved:
        for written in builder.nodes:
            disconnect([written, *list_inner(written)])
        raise
    builder.replace(node, made)
    disconnect(list_inner(node))  # the other branch, or the body that was copied
    return builder.nodes


def _inline_branch(builder: NodeBuilder, node: ir.Node, known: Inference) -> list[ir.Value | None]:
    condition = known.constant(node.inputs[0])
    if condition is None:
        raise _refuse_unknown("its condition", node.inputs[0], node, known)
    body = node.attributes["then_branch" if condition.all() else "else_branch"].as_graph()
    _hoist_constants(body, node)
    taken = _list_names(node.graph)
    nodes = list(body)
    for inner in nodes:
        if inner.name in taken:
            inner.name = f"{node.name}/{inner.name}"
        for value in inner.outputs:
            if value.name in taken:
                value.name = f"{node.name}/{value.name}"
    outputs = list(body.outputs)
    body.outputs.clear()
    body.remove(nodes)
    builder.nodes.extend(nodes)
    return [*outputs]


def _unroll_loop(
    builder: NodeBuilder, node: ir.Node, known: Inference, spent: int
) -> list[ir.Value | None]:
    body = node.attributes["body"].as_graph()
    size = _measure_body(body)
    trips, condition = node.inputs[0], node.inputs[1]
    most = known.constant(trips)
    if trips is not None and most is None:
        raise _refuse_unknown("its trip count", trips, node, known)
    limit = None if most is None else int(most.reshape(-1)[0])
    going = condition is None or _decide(condition, node, known)
    carried = list(node.inputs[2:])
    scanned: list[list[ir.Value]] = [[] for _ in node.outputs[len(carried) :]]
    if going and limit is not None and _is_endless(body):
        _refuse_excess(size, limit, spent)
    _hoist_constants(body, node)
    step = 0
    while going and (limit is None or step < limit):
        _refuse_excess(size, step + 1, spent)
        bound = [builder.integer(step), condition, *carried]
        again, *results = _write_body(builder, body, f"{node.name}/{step}", bound, known)
        step += 1
        if limit is None or step < limit:
            going = _decide(again, node, known)
        carried = [*results[: len(carried)]]
        for row, value in zip(scanned, results[len(carried) :], strict=True):
            row.append(value)
    return [*carried, *(_stack(builder, row, 0) for row in scanned)]


def _is_endless(body: ir.Graph) -> bool:
    """Return whether a loop's body returns its condition unchanged, so it never stops the loop."""
    again = body.outputs[0]
    node = again.producer()
    passed = again if node is None or node.op_type != "Identity" else node.inputs[0]
    return passed is body.inputs[1]


def _measure_body(body: ir.Graph) -> int:
    """Count the nodes in a body, including nested bodies."""
    return max(len(list_nodes(body)), 1)


def _refuse_excess(size: int, runs: int, spent: int) -> None:
    if spent + runs * size > MOST_NODES:
        before = f" after the {spent} of others before it" if spent else ""
        raise Unresolved(
            f"{runs} runs of {size} nodes{before} would be more than {MOST_NODES} nodes in place "
            "of loops; export it with fewer runs"
        )


def _decide(condition: ir.Value, node: ir.Node, known: Inference) -> bool:
    content = known.constant(condition)
    if content is None:
        raise _refuse_unknown("its condition", condition, node, known)
    return bool(content.all())


def _refuse_unknown(
    what: str, value: ir.Value | None, node: ir.Node, known: Inference
) -> Unresolved:
    assert isinstance(node.graph, ir.Graph)
    return Unresolved(f"{what} {explain_unknown(value, node.graph, known)}")


def _unroll_scan(
    builder: NodeBuilder, node: ir.Node, known: Inference, spent: int
) -> list[ir.Value | None]:
    body = node.attributes["body"].as_graph()
    count = node.attributes.get_int("num_scan_inputs")
    split = len(node.inputs) - count
    carried = list(node.inputs[:split])
    sources = [value for value in node.inputs[split:] if value is not None]
    results = len(node.outputs) - split
    axes = _list_integers(node, "scan_input_axes", count)
    turned = _list_integers(node, "scan_input_directions", count)
    length = _measure_scan(node, sources, axes, known)
    _refuse_excess(_measure_body(body), length, spent)
    rows = [
        _take_apart(builder, source, length, axis, known)[:: -1 if turn else 1]
        for source, axis, turn in zip(sources, axes, turned, strict=True)
    ]
    _hoist_constants(body, node)
    scanned: list[list[ir.Value]] = [[] for _ in range(results)]
    for step in range(length):
        bound = [*carried, *(row[step] for row in rows)]
        made = _write_body(builder, body, f"{node.name}/{step}", bound, known)
        carried = [*made[:split]]
        for row, value in zip(scanned, made[split:], strict=True):
            row.append(value)
    out_axes = _list_integers(node, "scan_output_axes", results)
    out_turned = _list_integers(node, "scan_output_directions", results)
    stacked = [
        _stack(builder, row[::-1] if turn else row, axis)
        for row, axis, turn in zip(scanned, out_axes, out_turned, strict=True)
    ]
    return [*carried, *stacked]


def _measure_scan(
    node: ir.Node, sources: Sequence[ir.Value], axes: Sequence[int], known: Inference
) -> int:
    for source, axis in zip(sources, axes, strict=True):
        dims = known.shape(source)
        if dims is not None and isinstance(length := dims[axis], int) and length:
            return length
    lengths = {
        atom
        for source, axis in zip(sources, axes, strict=True)
        for dim in (known.shape(source) or [])[axis:][:1]
        if isinstance(dim, Dim)
        for atom in dim.atoms
    }
    assert isinstance(node.graph, ir.Graph)
    options = list_options(lengths, node.graph)
    depends = f"; it depends on {name_sizes(options)}" if options else ""
    raise Unresolved(f"the length of its sequence is not a fixed number{depends}")


def _list_integers(node: ir.Node, name: str, count: int) -> Sequence[int]:
    attribute = node.attributes.get(name)
    return attribute.as_ints() if attribute is not None else [0] * count


def _take_apart(
    builder: NodeBuilder, source: ir.Value, length: int, axis: int, known: Inference
) -> list[ir.Value]:
    """Build the slices of a tensor along ``axis``, with this axis removed.

    This uses Split, whose gradient is a single Concat.  With a Gather for each slice, the gradient
    of each slice would be as large as the complete tensor.
    """
    pieces: Sequence[ir.Value] = [source]
    if length > 1:
        sizes = builder.integers([1] * length)
        pieces = builder.ops("Split", [source, sizes], length, {"axis": axis})
    slices = [builder.op("Squeeze", piece, builder.integers([axis])) for piece in pieces]
    for node in builder.nodes:
        known.visit(node)
    return slices


def _stack(builder: NodeBuilder, row: Sequence[ir.Value], axis: int) -> ir.Value | None:
    if not row:
        return None
    raised = [builder.op("Unsqueeze", value, builder.integers([axis])) for value in row]
    return builder.op("Concat", *raised, axis=axis) if len(raised) > 1 else raised[0]


def _write_body(
    builder: NodeBuilder,
    body: ir.Graph,
    prefix: str,
    bound: Sequence[ir.Value | None],
    known: Inference,
) -> list[ir.Value]:
    """Build one iteration of ``body``, which reads the values in ``bound`` as its inputs.

    ``None`` in ``bound`` represents a loop's condition, which is true while the loop runs.
    """
    given = [_write_truth(builder) if value is None else value for value in bound]
    nodes, outputs = copy_body(body, prefix, given)
    for node in nodes:
        known.visit(node)
    builder.nodes.extend(nodes)
    return outputs


def _write_truth(builder: NodeBuilder) -> ir.Value:
    return builder.tensor(ir.tensor(True, dtype=ir.DataType.BOOL))


def _hoist_constants(body: ir.Graph, node: ir.Node) -> None:
    """Move a body's initializers into the graph that contains the node."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    taken = _list_names(graph)
    for name, value in list(body.initializers.items()):
        body.initializers.pop(name)
        if name in taken and value.const_value is not None:
            # a new tensor: renaming the old one would also rename it in the user's model
            content, value.const_value = value.const_value.numpy(), None
            value.name = f"{node.name}/{name}"
            value.const_value = ir.tensor(content, name=value.name)
        graph.register_initializer(value)


def _list_names(graph: ir.Graph | ir.Function | None) -> set[str]:
    assert isinstance(graph, ir.Graph)
    names = {value.name for value in graph.inputs if value.name} | set(graph.initializers)
    for node in graph:
        names |= {node.name or "", *(value.name or "" for value in node.outputs)}
    return names
