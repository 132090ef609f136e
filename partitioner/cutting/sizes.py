"""Make each party compute sizes from the shapes of its own tensors.

For ``x.view(x.size(0), -1)``, exporters write a Shape node that reads some tensor with this size.
Often this tensor is far before the cut, so only the other party has it.  The size itself is not
sent.  Instead, the party that needs the size reads it from the shape of one of its own tensors:
dimensions with the same symbol have the same size.  Each party also computes values that depend on
sizes alone.

This module does not depend on losses or gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_inner, list_inputs, reads_size
from splitonnx.partitioner.inference.dimensions import Amount, Dim, Undecided, list_terms, solve
from splitonnx.partitioner.inference.inferences import Inference

Places = Mapping[tuple[ir.Value, int], Amount]
"""The dimensions that a party can read from shapes: a mapping from (tensor, axis) to the size."""

_MOST_SIZES = 64
"""Limit of sizes per node; a node that computes more sizes is not derived from other shapes."""


def find_sizes(
    graph: ir.Graph, data: Collection[ir.Value], known: Inference
) -> dict[ir.Node, frozenset[ir.Value]]:
    """Find the nodes that compute sizes, and map each of them to the data whose shapes it reads.

    A node computes sizes if all elements of its output are known sums and products of dimensions.
    Nodes that use sizes for something else, such as a mask or a Range, are not included.
    """
    sizes: dict[ir.Node, frozenset[ir.Value]] = {}
    origins: dict[ir.Value, frozenset[ir.Value]] = {}
    for node in graph:  # in topological order
        reads = list(list_inputs(node))
        if reads_size(node):
            found = frozenset(value for value in reads if value in data)
        elif any(value in data for value in node.outputs):
            continue
        else:
            found = frozenset[ir.Value]().union(*(origins.get(v, ()) for v in reads))
        if not found:
            continue
        origins.update((value, found) for value in node.outputs)
        known.visit(node)
        content = known.content(node.outputs[0])
        few = content is not None and content.size <= _MOST_SIZES
        if len(node.outputs) == 1 and (few or reads_size(node)):
            sizes[node] = found
    return sizes


def find_underived(size: ir.Node, held: Sequence[ir.Value], known: Inference) -> str | None:
    """Return the name of a dimension that the node ``size`` uses but ``held`` does not provide.

    Return ``"its rank"`` if the sizes that the node computes are not known, and ``None`` if all
    its dimensions can be read from the shapes of the tensors in ``held``.
    """
    content = known.content(size.outputs[0])
    if content is None:
        return "its rank"
    places = _list_places(held, known)
    try:
        for amount in content.reshape(-1):
            if isinstance(amount, Dim) and amount not in places.values():
                solve(amount, places)
    except Undecided as missing:
        return str(missing)
    return None


class SizeWatch:
    """A record of the nodes that must wait, because a party lacks tensors whose shapes they read.

    Only nodes that compute sizes are recorded.  ``away`` maps each waiting node to the number of
    nodes that the party still lacks and that compute the tensors it waits for.
    """

    def __init__(self, sizes: Mapping[ir.Node, frozenset[ir.Value]]) -> None:
        self._sizes = sizes
        self._waiting: defaultdict[ir.Node | None, list[ir.Node]] = defaultdict(list)
        self.away: dict[ir.Node, int] = {}

    def enter(
        self, new: Sequence[ir.Node], nodes: Collection[ir.Node], held: Collection[ir.Value]
    ) -> tuple[list[ir.Node], list[ir.Node]]:
        """Record that the party got the nodes in ``new``.

        ``nodes`` holds all nodes of the party, including the new ones.  ``held`` holds the tensors
        that the party has without computing them.  Return two lists of nodes that compute sizes:
        the new ones that must wait for nodes that the party lacks, and those that are ready now,
        whether they are new or had to wait before.
        """
        away, near = [], []
        for node in new:
            if node not in self._sizes:
                continue
            makers = {v.producer() for v in self._sizes[node] if v not in held}
            missing = [maker for maker in makers if maker not in nodes]
            if missing:
                self.away[node] = len(missing)
                away.append(node)
                for maker in missing:
                    self._waiting[maker].append(node)
            else:
                near.append(node)
        for maker in new:
            for node in self._waiting.pop(maker, ()):
                self.away[node] -= 1
                if not self.away[node]:
                    del self.away[node]
                    near.append(node)
        return away, near


def derive_sizes(
    graph: ir.Graph,
    remote_shapes: Mapping[ir.Node, Sequence[ir.Value]],
    nodes: Collection[ir.Node],
    others: Collection[ir.Node],
    party: str,
    known: Inference,
    duplicated: Collection[ir.Node] = frozenset(),
) -> set[ir.Node]:
    """Rewrite the graph, in place, so that ``party`` computes all sizes itself.

    ``nodes`` holds the party's nodes so far, and ``others`` holds those of the other party.  Each
    node in ``remote_shapes`` reads the shape of a tensor that the party does not have.  It is
    replaced by nodes that read the same sizes from the tensors to which it is mapped.  The party
    also gets its own copies of the nodes in ``duplicated``, and of the size computations that both
    parties share.

    Afterwards, the graph's nodes may be out of topological order.  Return the party's nodes after
    the change.
    """
    own, sized = set(nodes), set[ir.Value]()
    replaced: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node in own]:
        name = f"{node.name}/{party}"
        if node in remote_shapes:
            builder = NodeBuilder(name)
            replaced[node.outputs[0]] = _write_size(builder, node, remote_shapes[node], known)
            graph.insert_after(node, builder.nodes)
            own = (own - {node}) | set(builder.nodes)
        elif node in duplicated or (
            node in others and (reads_size(node) or any(v in sized for v in list_inputs(node)))
        ):
            copy = _copy(node, name, party)
            graph.insert_after(node, copy)
            own = (own - {node}) | {copy}
            replaced.update(zip(node.outputs, copy.outputs, strict=True))
        else:
            continue
        sized.update(node.outputs)
    inner = {part: node for node in own for part in list_inner(node)}
    for old, new in replaced.items():
        for use in list(old.uses()):
            if inner.get(use.node, use.node) in own:
                use.node.replace_input_with(use.idx, new)
    return own


def _copy(node: ir.Node, name: str, party: str) -> ir.Node:
    copy = ir.Node(
        node.domain,
        node.op_type,
        list(node.inputs),
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        version=node.version,
        name=name,
        metadata_props=dict(node.metadata_props),
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = f"{old.name}/{party}" if old.name else old.name
        new.type, new.shape = old.type, old.shape
    return copy


def _list_places(held: Sequence[ir.Value], known: Inference) -> Places:
    return {
        (value, axis): dim
        for value in held
        for axis, dim in enumerate(known.shape(value) or ())
        if isinstance(dim, Dim)
    }


def _write_size(
    builder: NodeBuilder, size: ir.Node, held: Sequence[ir.Value], known: Inference
) -> ir.Value:
    """Build the sizes that a node computes, reading them from the shapes of tensors in ``held``.

    The result has the type and the shape of the node's output.
    """
    content, output = known.content(size.outputs[0]), size.outputs[0]
    assert content is not None
    places = _list_places(held, known)
    elements = [a if isinstance(a, Dim) else int(a) for a in content.reshape(-1)]
    parts = [_write_amount(builder, amount, places) for amount in elements]
    result = parts[0] if len(parts) == 1 else _join(builder, parts)
    if content.ndim != 1:
        result = builder.op("Reshape", result, builder.integers(content.shape))
    if output.dtype not in (None, ir.DataType.INT64):
        result = builder.op("Cast", result, to=output.dtype)
    for node in builder.nodes:
        known.visit(node)
        for value in node.outputs:
            known.note(value)
    return result


def _join(builder: NodeBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    return builder.op("Concat", *parts, axis=0) if parts else builder.integers([])


def _write_amount(builder: NodeBuilder, amount: Amount, places: Places) -> ir.Value:
    """Build a vector of one element that contains a sum of products of sizes."""
    for (value, axis), dim in places.items():
        if dim == amount:
            return _write_atom(builder, (value, axis), 1, 0)
    ways = solve(amount, places)
    total: ir.Value | None = None
    for atoms, factor in list_terms(amount):
        product: ir.Value | None = None
        factors = [_write_atom(builder, *ways[atom]) for atom in atoms]
        if factor != 1 or not atoms:
            factors.append(builder.integers([factor]))
        for value in factors:
            product = value if product is None else builder.op("Mul", product, value)
        assert product is not None
        total = product if total is None else builder.op("Add", total, product)
    return builder.integers([0]) if total is None else total


def _write_atom(
    builder: NodeBuilder, place: tuple[ir.Value, int], factor: int, offset: int
) -> ir.Value:
    value, axis = place
    size = builder.op("Shape", value, start=axis, end=axis + 1)
    if offset:
        size = builder.op("Sub", size, builder.integers([offset]))
    return size if factor == 1 else builder.op("Div", size, builder.integers([factor]))
