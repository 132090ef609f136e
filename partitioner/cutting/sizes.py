"""Find and replace sizes that a party reads from the shape of a tensor that it does not hold.

Exporters write ``x.view(x.size(0), -1)`` as a Shape of any tensor that has the size, often one
far before the cut.  Instead of sending integers, the reading party takes each size from the shape
of a tensor that it does hold: two dimensions with the same symbols are the same size.  Each party
computes for itself the values that depend on sizes alone.

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
"""The dimensions that a party can read: maps (tensor, axis) to the size of that dimension."""

_MOST_SIZES = 64
"""A node with more sizes than this is computed as usual, not derived from other shapes."""


def find_sizes(
    graph: ir.Graph, data: Collection[ir.Value], known: Inference
) -> dict[ir.Node, frozenset[ir.Value]]:
    """Map each node that computes sizes of data to the tensors whose shapes it reads.

    A node computes sizes if all of its elements are known sums and products of dimensions.  Values
    that are computed from sizes in another way (a mask, a Range) are not listed.
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
    """Return a dimension that a node needs and no tensor in ``held`` has, or ``None``."""
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
    """Tracks which size nodes can read their sizes from tensors that a party holds or computes."""

    def __init__(self, sizes: Mapping[ir.Node, frozenset[ir.Value]]) -> None:
        self._sizes = sizes
        self._waiting: defaultdict[ir.Node | None, list[ir.Node]] = defaultdict(list)
        self.away: dict[ir.Node, int] = {}

    def enter(
        self, new: Sequence[ir.Node], nodes: Collection[ir.Node], held: Collection[ir.Value]
    ) -> tuple[list[ir.Node], list[ir.Node]]:
        """Add nodes; return the size nodes that must wait, and those that are now computable.

        A size node waits until ``nodes`` contains the producers of all tensors whose shapes it
        reads; the tensors in ``held`` have no producer to wait for.
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
    """Make ``party`` compute its sizes itself, in place; return the nodes that it then has.

    ``nodes`` are the party's nodes, ``others`` those of the other party.  ``remote_shapes`` maps
    each node that reads the size of a tensor which the party does not hold to the tensors that
    provide the size instead.  Nodes that both parties have and that read sizes are duplicated, like
    the nodes in ``duplicated``.  Afterwards the graph's nodes may be out of topological order.
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
    """Build a node's sizes, in the shape and type of its output."""
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
    """Build a sum of products of sizes, as a vector of one element."""
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
