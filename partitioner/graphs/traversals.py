"""Traverse a graph, to find the values that a node reads or that another value depends on.

The subgraph bodies of ``If``, ``Loop`` and ``Scan`` nodes may read values of the surrounding graph.
These values count as read by the node that contains the body, so no dependency is missed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from splitonnx.layers import LAYERS, LayerNode
from splitonnx.partitioner.graphs.builders import DETACHED


def list_inputs(node: ir.Node) -> list[ir.Value]:
    """List all values that ``node`` reads, including outside values read by its subgraph bodies."""
    values = [value for value in node.inputs if value is not None]
    for body in list_bodies(node):
        values.extend(_list_captures(body))
    return values


def _list_captures(body: ir.Graph) -> Iterator[ir.Value]:
    inner = set(body.inputs) | set(body.initializers.values())
    for node in body:
        for value in list_inputs(node):
            if value not in inner:
                yield value
        inner.update(node.outputs)
    for value in body.outputs:
        if value not in inner:
            yield value


def walk_back(
    targets: Iterable[ir.Value],
    stop: Collection[ir.Value] = frozenset(),
    ends: Collection[ir.Node] = frozenset(),
) -> tuple[set[ir.Node], set[ir.Value]]:
    """Walk backwards from ``targets``, and return the nodes and the source values that are reached.

    The walk ends at source values: values in ``stop``, graph inputs and initializers.  It also ends
    at nodes in ``ends``: these nodes are returned, but the walk does not continue to their inputs.
    """
    nodes: set[ir.Node] = set()
    sources: set[ir.Value] = set()
    pending = list(targets)
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or value in stop:
            sources.add(value)
        elif node not in nodes:
            nodes.add(node)
            if node not in ends:
                pending.extend(list_inputs(node))
    return nodes, sources


class ResumedWalk:
    """A backward walk that can be continued from further targets, without repeating known nodes.

    ``nodes`` holds the known nodes, at which :meth:`explore` stops.  The caller must add the new
    nodes that :meth:`explore` returns.  Nodes in ``ends`` are returned, but the walk does not
    continue to their inputs.
    """

    def __init__(self, ends: Collection[ir.Node] = frozenset()) -> None:
        self.nodes: set[ir.Node] = set()
        self._ends = ends

    def explore(
        self, targets: Iterable[ir.Value], stops: Mapping[ir.Value, int], most: int = -1
    ) -> tuple[list[ir.Node], list[ir.Value], set[ir.Node]]:
        """Walk back from ``targets`` until a known node or a source value is reached.

        Return the new nodes, the source values, and the known nodes that were reached.  Source
        values are graph inputs, initializers, and each value in ``stops`` with a number of at most
        ``most``.  The walk also stops at the nodes in ``ends``.
        """
        new, reached, met = dict[ir.Node, None](), list[ir.Value](), set[ir.Node]()
        pending = list(targets)
        while pending:
            value = pending.pop()
            node = value.producer()
            if node is None or stops.get(value, most + 1) <= most:
                reached.append(value)
            elif node in self.nodes:
                met.add(node)
            elif node not in new:
                new[node] = None
                if node not in self._ends:
                    pending.extend(list_inputs(node))
        return list(new), reached, met


def find_dependents(graph: ir.Graph, roots: Collection[ir.Value]) -> set[ir.Value]:
    """Return ``roots`` and all values that depend on any of them."""
    dependents = set(roots)
    for node in graph:  # in topological order
        if any(value in dependents for value in list_inputs(node)):
            dependents.update(node.outputs)
    return dependents


def find_last_read(targets: Iterable[ir.Value], row: Sequence[ir.Value]) -> dict[ir.Value, int]:
    """Map each target to the position of the last value in ``row`` that it is or depends on.

    The position is -1 if the target depends on none of them.
    """
    places = {value: place for place, value in enumerate(row)}
    found = {}
    for target in targets:
        nodes, sources = walk_back([target])
        before = {target, *sources, *(value for node in nodes for value in node.outputs)}
        found[target] = max((places[value] for value in before if value in places), default=-1)
    return found


RANDOM = frozenset(
    ["Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike"]
)  # fmt: skip


def find_data(graph: ir.Graph, roots: Collection[ir.Value]) -> set[ir.Value]:
    """Return the values that depend on data: ``roots`` and all values computed from their elements.

    Values that depend only on the shape of data (position ids, masks by position, the target of a
    Reshape) are not included, because either party can compute them.  Random values are included,
    because the other party would draw different ones.
    """
    data = set(roots)
    for node in graph:  # in topological order
        drawn = node.op_type in RANDOM and not node.domain
        if drawn or (not reads_size(node) and any(v in data for v in list_inputs(node))):
            data.update(node.outputs)
    return data


def reads_size(node: ir.Node) -> bool:
    """Return whether a node reads only the shape of its input, not its elements."""
    return node.op_type in ("Shape", "Size") and not node.domain


def find_moving(graph: ir.Graph, roots: Collection[ir.Value]) -> set[ir.Value]:
    """Return ``roots`` and all values from which a gradient could flow back to any of them.

    No gradient flows through detached Identity nodes or through values that are not floats.
    """
    moving = set(roots)
    for node in graph:
        if DETACHED not in node.metadata_props and any(v in moving for v in list_inputs(node)):
            moving.update(value for value in node.outputs if is_float(value))
    return moving


def find_movers(targets: Iterable[ir.Value]) -> set[ir.Value]:
    """Return the graph inputs and initializers to which a gradient of ``targets`` could flow."""
    return {value for value in trace_gradients(targets) if value.producer() is None}


def trace_gradients(
    targets: Iterable[ir.Value],
    *,
    ends: Collection[ir.Value] = (),
    within: Collection[ir.Node] | None = None,
) -> set[ir.Value]:
    """Return ``targets`` and all values to which a gradient of ``targets`` could flow back.

    Gradients are not traced beyond the values in ``ends``, and only through the nodes in
    ``within`` if it is given.
    """
    seen: set[ir.Value] = set()
    pending = list(targets)
    while pending:
        value = pending.pop()
        if value in seen or not is_float(value):
            continue
        seen.add(value)
        node = value.producer()
        if node is None or value in ends or (within is not None and node not in within):
            continue
        if DETACHED not in node.metadata_props:
            pending.extend(list_inputs(node))
    return seen


def is_float(value: ir.Value) -> bool:
    """Return whether a value may have a gradient, that is, if its type is a float or unknown."""
    return value.dtype is None or value.dtype.is_floating_point()


def map_values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return a graph's inputs, initializers and node outputs by name.

    Values inside subgraph bodies (of If, Loop and Scan nodes) are not included.
    """
    values = {value.name: value for value in graph.inputs if value.name}
    values.update(graph.initializers)
    for node in graph:
        for value in node.outputs:
            if value.name:
                values[value.name] = value
    return values


def prune(graph: ir.Graph) -> None:
    """Remove the nodes on which no output of the graph depends."""
    needed, _ = walk_back(graph.outputs)
    dead = [node for node in graph if node not in needed]
    for node in dead:
        disconnect(list_inner(node))
    graph.remove(dead, safe=True)


def describe_layer(node: ir.Node) -> LayerNode:
    """Describe a node as :mod:`splitonnx.layers` reads it."""
    held = node.attributes.values() if node.op_type in (*LAYERS, "Transpose") else ()
    integers: dict[str, list[int]] = {}
    for attribute in held:
        if attribute.type == ir.AttributeType.INT:
            integers[attribute.name] = [attribute.as_int()]
        elif attribute.type == ir.AttributeType.INTS:
            integers[attribute.name] = list(attribute.as_ints())
    return LayerNode(
        operator=node.op_type,
        arguments=tuple(value.name or "" if value is not None else "" for value in node.inputs),
        results=tuple(value.name or "" for value in node.outputs),
        integers=integers,
        equation=node.attributes.get_string("equation", "") or "",
    )


def list_bodies(node: ir.Node) -> list[ir.Graph]:
    """List the subgraph bodies of a control-flow node."""
    bodies: list[ir.Graph] = []
    for attribute in node.attributes.data.values():  # the attributes' own view is slow
        if attribute.type == ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies.extend(attribute.as_graphs())
    return bodies


def list_nodes(graph: ir.Graph) -> list[ir.Node]:
    """List a graph's nodes, each followed by the nodes in its subgraph bodies."""
    nodes = []
    for node in graph:
        nodes.append(node)
        nodes.extend(list_inner(node))
    return nodes


def list_inner(node: ir.Node) -> list[ir.Node]:
    """List the nodes in a node's subgraph bodies, including nested bodies."""
    return [inner for body in list_bodies(node) for inner in list_nodes(body)]


def disconnect(nodes: Iterable[ir.Node]) -> None:
    """Disconnect removed nodes from their inputs, so that the inputs no longer count as used."""
    for node in nodes:
        node.resize_inputs(0)


def order_lazily(graph: ir.Graph) -> None:
    """Order a graph's nodes such that ONNX Runtime keeps few of their results at a time.

    ONNX Runtime searches depth-first for what to run next: from the node listed last whose results
    no other node reads, to the maker listed last of what a node reads.  In the order made here it
    ends short ways first, as the gradient of a layer's weights before those of the layers before
    it, so that what was read for it is no longer needed.  And it makes what has a long way behind
    it first, so that a mask that is read beside it is made just before it is used, instead of all
    masks at once.
    """
    depths: dict[ir.Node, int] = {}
    needed: set[ir.Node] = set()
    for node in graph:  # in topological order, so every maker's depth is known
        found = [value.producer() for value in list_inputs(node)]
        makers = [maker for maker in found if maker is not None and maker in depths]
        depths[node] = 1 + max((depths[maker] for maker in makers), default=0)
        needed.update(makers)
    inner = sorted((node for node in depths if node in needed), key=lambda node: depths[node])
    ends = sorted((node for node in depths if node not in needed), key=lambda node: -depths[node])
    graph.extend([*inner, *ends])
