"""Define which cuts of a model are legal, and partition a graph at them.

In a *partition*, the nodes between the cut tensors ``at`` and ``tail_at`` (or the model's outputs)
belong to the server, and all other nodes to the client.  Therefore, a skip connection from nodes
before ``at`` to nodes after ``tail_at``, or a weight that both of them use, is never sent.  A
partition is legal if the parties exchange only the cut tensors, and if no trained parameter is used
by both parties.  Raw inputs, like all other tensors, are sent only if they are cut tensors.

This module uses graphs and names only; it does not depend on losses, gradients or runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import onnx_ir as ir

from splitonnx.errors import NotACut, SharedParameter, UsageError, count_some
from splitonnx.partitioner.cutting.sizes import find_sizes, find_underived
from splitonnx.partitioner.graphs.traversals import (
    find_data,
    find_dependents,
    find_moving,
    list_inputs,
    reads_size,
    walk_back,
)
from splitonnx.partitioner.inference.inferences import Inference


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A legal partition of a graph into the server's part and the client's part.

    ``server`` holds the server's nodes; all other nodes belong to the client.  Nodes that do not
    depend on data, or depend only on its shape, may be needed by both parties: ``client`` holds all
    nodes that the client needs.  ``remote_shapes`` holds, per party, the nodes that read the shape
    of a tensor that the party lacks.  It maps each of them to other tensors from which the party
    can read the same sizes.  The nodes in ``duplicated`` depend only on raw inputs that are sent
    anyway, so each party computes them itself.
    """

    at: tuple[ir.Value, ...]
    tail_at: tuple[ir.Value, ...]
    server: frozenset[ir.Node]
    client: frozenset[ir.Node] = frozenset()
    remote_shapes: Mapping[str, Mapping[ir.Node, Sequence[ir.Value]]] = field(default_factory=dict)
    duplicated: frozenset[ir.Node] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Side:
    """One party's side of a cut: its nodes, and in ``sources`` the values from which they start.

    ``remote_shapes`` is the party's entry in :attr:`Partition.remote_shapes`.  If the party needs a
    size that it cannot derive, ``underived`` explains why; otherwise it is empty.
    """

    nodes: set[ir.Node]
    sources: set[ir.Value]
    remote_shapes: Mapping[ir.Node, Sequence[ir.Value]]
    underived: str = ""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The server's and the client's side of a cut whose validity has not been checked yet."""

    at: tuple[ir.Value, ...]
    tail_at: tuple[ir.Value, ...]
    server: Side
    client: Side


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Facts about a graph that do not depend on where it is cut.

    ``raw`` holds the inputs that are data, in the graph's order.  ``data`` holds the values that
    depend on these inputs, and ``private`` the values computed from them without a trained
    parameter.  ``sizes`` maps each node that computes sizes of data to the tensors whose shapes it
    reads.  ``readers`` holds the nodes in ``sizes`` that read a shape directly.  ``passing`` holds
    the outputs that the client computes itself unless they depend on the cut.  ``known`` holds the
    dimensions that were inferred.
    """

    raw: Mapping[ir.Value, None]
    data: set[ir.Value]
    private: set[ir.Value]
    sizes: Mapping[ir.Node, frozenset[ir.Value]]
    readers: frozenset[ir.Node]
    passing: frozenset[ir.Value]
    known: Inference


def survey(
    graph: ir.Graph,
    *,
    state: Collection[str],
    trainable: Collection[str] = frozenset(),
    known: Inference | None = None,
    is_training: bool = False,
) -> Surroundings:
    """Collect the facts about a graph that :func:`divide` needs for any cut.

    ``known`` may hold inferred dimensions that the graph itself does not declare.  In a graph for
    training, the loss reads all outputs, so none of them is ``passing``.
    """
    known = known or Inference(graph.opset_imports[""])
    raw = {value: None for value in graph.inputs if value.name not in state}
    data = find_data(graph, raw)
    sizes = find_sizes(graph, data, known)
    private = find_opened(graph, raw, data, trainable)
    passing = {value for value in graph.outputs if value in private and not is_training}
    return Surroundings(
        raw=raw,
        data=data,
        private=private,
        sizes=sizes,
        readers=frozenset(node for node in sizes if reads_size(node)),
        passing=frozenset(passing if passing != set(graph.outputs) else ()),
        known=known,
    )


def divide(
    graph: ir.Graph,
    at: Sequence[ir.Value],
    tail_at: Sequence[ir.Value] = (),
    *,
    state: Collection[str],
    trainable: Collection[str] = frozenset(),
    around: Surroundings | None = None,
) -> Partition:
    """Divide ``graph`` between the client and the server at the given tensors.

    The client sends ``at`` to the server; in a U-shaped cut, the server sends ``tail_at`` back.  If
    ``at`` is empty, everything belongs to the client.  ``state`` names the graph inputs that are
    weights rather than data, and ``trainable`` the trained weights.  ``around`` is the result of
    :func:`survey`, if it has already been computed.

    Raises:
        NotACut: tensors other than ``at`` and ``tail_at`` would have to be sent, a party does not
            use a tensor that it receives, or the server would have nothing to compute.
        SharedParameter: both parties would use the same trained parameter.
        UsageError: ``tail_at`` is given without ``at``.
    """
    if not at:
        if tail_at:
            raise UsageError("a U-shaped cut needs both ends: name the first cut with --at")
        return Partition(at=(), tail_at=(), server=frozenset())
    around = around or survey(graph, state=state, trainable=trainable)
    sides = trace_sides(graph, at, tail_at, around)
    check_use(sides, around.data)
    duplicated = find_duplicated(graph, sides, around, trainable)
    server, client = sides.server, sides.client
    _refuse_shared_parameters(server.nodes, client.nodes, graph, trainable)
    return Partition(
        at=sides.at,
        tail_at=sides.tail_at,
        server=frozenset(server.nodes),
        client=frozenset(client.nodes),
        remote_shapes={"client": client.remote_shapes, "server": server.remote_shapes},
        duplicated=duplicated,
    )


def trace_sides(
    graph: ir.Graph, at: Sequence[ir.Value], tail_at: Sequence[ir.Value], around: Surroundings
) -> Sides:
    """Find the nodes and values that each party needs for its own outputs.

    The result may not be a legal cut yet: both parties may need the same node, and a party may need
    values that are not sent to it.

    Raises:
        NotACut: a cut tensor depends on none of the model's inputs.
    """
    raw, sizes, known = list(around.raw), around.sizes, around.known
    for value in (*at, *tail_at):
        if value not in around.data:
            reason = f"'{value.name}' does not depend on the model's inputs"
            raise NotACut(_list_names(at, tail_at), reason=reason)
    ends = tail_at or list_server_outputs(graph, at, around)
    own = graph.outputs if tail_at else list_kept_outputs(graph, at, around)
    head, _ = walk_back(at, ends=sizes)  # nodes before the cut cannot read its shape
    server = _walk_side(ends, at, lambda _: at, sizes, known)
    client = _walk_side(
        (*at, *own),
        tail_at,
        lambda node: raw if node in head else (*tail_at, *at, *raw),
        sizes,
        known,
    )
    return Sides(at=tuple(at), tail_at=tuple(tail_at), server=server, client=client)


def check_use(sides: Sides, data: Set[ir.Value]) -> None:
    """Check that the server has nodes to run, and that each party uses the tensors it receives.

    Raises:
        NotACut: the server has nothing to compute, or a party does not use a tensor it receives.
    """
    names = _list_names(sides.at, sides.tail_at)
    if not any(node.inputs and set(node.outputs) & data for node in sides.server.nodes):
        raise NotACut(names, reason="nothing would be left for the server")
    received = (("server", sides.server, sides.at), ("client", sides.client, sides.tail_at))
    for party, side, values in received:
        for value in values:
            if value not in side.sources:
                raise NotACut(names, reason=f"the {party}'s part does not use '{value.name}'")


def find_duplicated(
    graph: ir.Graph, sides: Sides, around: Surroundings, trainable: Collection[str]
) -> frozenset[ir.Node]:
    """Find the nodes that both parties compute from data, and check that this is allowed.

    These nodes may depend only on raw inputs that are sent anyway, and on no trained parameters.
    They must not compute tail tensors.

    Raises:
        NotACut: other tensors would have to be sent too; the error's ``missing`` names them.
    """
    at, server, client, data = sides.at, sides.server, sides.client, around.data
    both = {node for node in server.nodes & client.nodes if set(node.outputs) & data}
    opened = find_opened(graph, set(at) & around.private, data, trainable) - set(sides.tail_at)
    shared = {node for node in both if not set(node.outputs) <= opened}
    leaks = [value for value in around.raw if value in server.sources and value not in at]
    if not shared and not leaks:
        return frozenset(both)
    names = _list_names(at, sides.tail_at)
    if reason := server.underived or client.underived:
        raise NotACut(names, reason=reason)
    missing = _find_missing(graph, sides, (data - opened) | set(at)) or _list_names(leaks, [])
    if not missing:
        made = [node.outputs[0].name or "" for node in graph if node in shared]
        raise NotACut(names, reason=f"both parties would have to compute {count_some(made)}")
    _, sources = walk_back([v for v in around.private if v.name in missing], ends=around.sizes)
    bare = [value.name or "" for value in around.raw if value in sources]
    raise NotACut(names, missing=missing, raw=bare)


def _list_names(at: Sequence[ir.Value], tail_at: Sequence[ir.Value]) -> list[str]:
    return [value.name or "" for value in (*at, *tail_at)]


def find_lost(
    tensors: Sequence[ir.Value], trainable: Collection[str]
) -> tuple[ir.Value, list[str]] | None:
    """Find an integer tensor in ``tensors`` that would block the gradients of trained parameters.

    Return the tensor and the names of the parameters that would get no gradient, or ``None`` if no
    tensor blocks a gradient.  A parameter that gets a gradient through another tensor in
    ``tensors`` is not affected.
    """
    floats = [v for v in tensors if v.dtype is not None and v.dtype.is_floating_point()]
    served = {value.name for value in walk_back(floats)[1]}
    for value in tensors:
        before = {v.name or "" for v in walk_back([value])[1]} & set(trainable)
        if value not in floats and before - served:
            return value, sorted(before - served)
    return None


def find_opened(
    graph: ir.Graph,
    named: Collection[ir.Value],
    data: Collection[ir.Value],
    trainable: Collection[str],
) -> set[ir.Value]:
    """Find the values that can be computed without trained parameters from tensors in ``named``.

    Values that also depend on other tensors in ``data`` are left out.  The tensors in ``named`` are
    included.  ``trainable`` names the trained parameters.
    """
    trained = set(trainable)
    moving = find_moving(graph, [value for value in graph.inputs if value.name in trained])
    opened = set(named)
    for node in graph:
        reads = [value for value in list_inputs(node) if value in data]
        if reads and all(v in opened for v in reads) and not moving & set(list_inputs(node)):
            opened.update(node.outputs)
    return opened


def _walk_side(
    ends: Iterable[ir.Value],
    stop: Collection[ir.Value],
    hold: Callable[[ir.Node], Sequence[ir.Value]],
    sizes: Mapping[ir.Node, frozenset[ir.Value]],
    known: Inference,
) -> Side:
    """Find one party's side by walking back from its outputs, past shapes it can read elsewhere."""
    targets, reason = list(ends), ""
    readers = {node for node in sizes if reads_size(node)}
    while True:
        nodes, sources = walk_back(targets, set(stop), sizes)
        near, remote_shapes, more = (
            set[ir.Node](),
            dict[ir.Node, Sequence[ir.Value]](),
            list[ir.Value](),
        )
        for node in [node for node in sizes if node in nodes]:
            held = hold(node)
            away = [
                value
                for value in sizes[node]
                if value not in held and value not in targets and value.producer() not in nodes
            ]
            if not away:
                near |= walk_back(node.outputs, ends=readers)[0]
                continue
            remote_shapes[node] = held
            missing = find_underived(node, held, known)
            if missing is not None:
                more += away
                reason = (
                    f"beyond it a size of '{away[0].name}' is needed ({missing}) that no tensor of "
                    "the cut has; cut elsewhere, or fix that size with --dim NAME=SIZE"
                )
        if not more:
            return Side(
                nodes=nodes | near, sources=sources, remote_shapes=remote_shapes, underived=reason
            )
        targets += more  # perhaps the party can compute the tensor itself


def list_server_outputs(
    graph: ir.Graph, at: Sequence[ir.Value], around: Surroundings
) -> list[ir.Value]:
    """List the model outputs that the server computes if the cut has no ``tail_at``.

    Outputs that the client's head already computes are not listed, nor those that the client
    computes from raw inputs beside it.
    """
    head, _ = walk_back(at, ends=around.sizes)
    kept = list_kept_outputs(graph, at, around)
    return [v for v in graph.outputs if v.producer() not in head and v not in kept]


def list_kept_outputs(
    graph: ir.Graph, at: Collection[ir.Value], around: Surroundings
) -> list[ir.Value]:
    """List the outputs that the client computes from raw inputs, not from the tensors in ``at``.

    A model may pass an attention mask on to its user, for example.  The server has no use for it.
    """
    reached = find_dependents(graph, at) if around.passing else set[ir.Value]()
    return [v for v in graph.outputs if v in around.passing and v not in reached]


def _find_missing(graph: ir.Graph, sides: Sides, data: Collection[ir.Value]) -> list[str]:
    """List the names of other tensors that would have to be sent to make the cut legal."""
    at, tail_at = sides.at, sides.tail_at
    server, client = sides.server.nodes, sides.client.nodes
    beyond = find_dependents(graph, at)
    if tail_at:
        tail, _ = walk_back(graph.outputs, stop=set(tail_at))
        overlap = {v for n in tail & server for v in n.outputs}
        leaving = [
            v.name or ""
            for n in graph
            if n in client and n not in server
            for v in list_inputs(n)
            if v in overlap and v in beyond and v not in at
        ]
        leaving += [v.name or "" for v in graph.outputs if v in overlap & beyond and v not in at]
        if leaving:
            return sorted(set(leaving))
    head, _ = walk_back(at)
    inside = {n for n in server if n not in head and set(n.outputs) & beyond}
    made = {v for n in inside for v in n.outputs} | set(at)
    return sorted(
        {v.name or "" for n in inside for v in list_inputs(n) if v in data and v not in made}
    )


def _refuse_shared_parameters(
    server: Collection[ir.Node],
    client: Collection[ir.Node],
    graph: ir.Graph,
    trainable: Collection[str],
) -> None:
    def read(nodes: Collection[ir.Node]) -> set[str]:
        return {v.name or "" for n in nodes for v in list_inputs(n)} & set(trainable)

    shared = read(server) & read(client)
    if shared:
        order = [value.name or "" for value in graph.inputs]
        raise SharedParameter(sorted(shared, key=order.index))
