"""Separate running statistics from other weights that an exporter stored in the same tensor.

PyTorch's exporters store tensors with equal numbers only once.  In a new network, the scale of a
BatchNormalization and its running variance are both ones, so the exporter stores one tensor for
both.  But training changes the scale by its gradient, and the variance by its own update.  So they
must be two tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import list_some
from splitonnx.partitioner.gate.exporters import find_module
from splitonnx.partitioner.graphs.traversals import find_data, list_bodies, list_nodes, map_values
from splitonnx.partitioner.normalization.parameters import LOOKERS, is_weight_input, list_uses

_SUFFIXES = {3: "running_mean", 4: "running_var"}
"""Maps the inputs of BatchNormalization for running statistics to PyTorch's names for them."""
_OWNERS = ((1, ".weight"), (2, ".bias"))
_FEW = 3
_READERS = frozenset({"Div", "Sub"})
"""Operators that normalize by a statistic; a bias or a scale is added or multiplied."""


@dataclass(frozen=True, kw_only=True)
class Separation:
    """A running statistic that was moved from the tensor ``source`` to the new tensor ``name``.

    ``nodes`` names the BatchNormalizations that read the new tensor, all as their input ``index``.
    If ``is_trained`` is true, ``source`` remains a parameter; if not, it remains a statistic.
    """

    name: str
    source: str
    index: int
    nodes: tuple[str, ...]
    is_trained: bool

    @property
    def role(self) -> str:
        """Return ``"running mean"`` or ``"running variance"``."""
        return "running mean" if self.index == 3 else "running variance"


@dataclass(frozen=True, kw_only=True)
class _Statistic:
    """One running statistic of a module: the nodes of the module's calls, and their input."""

    index: int
    nodes: tuple[ir.Node, ...]
    scope: str | None

    @property
    def direct(self) -> ir.Value:
        """Return the value that the nodes read, perhaps the result of an Identity."""
        value = self.nodes[0].inputs[self.index]
        assert value is not None
        return value


def describe_separations(separations: Sequence[Separation]) -> str:
    """Return a sentence about the separated statistics, or an empty string if there are none."""
    if not separations:
        return ""
    told = [
        f"'{one.source}', {'also' if one.is_trained else 'another statistic and'} the "
        f"{one.role} of {list_some(one.nodes)}, as '{one.name}'"
        for one in separations[:_FEW]
    ]
    more = len(separations) - _FEW
    told += [f"{more} more"] if more > 0 else []
    return (
        "tensors of equal numbers were stored once, as exporters do; running statistics among them "
        f"are kept apart, each in a tensor of its own: {'; '.join(told)}"
    )


def separate_statistics(graph: ir.Graph) -> list[Separation]:
    """Move running statistics to new tensors, in place, and return a description of each move.

    A statistic is moved if its tensor is also applied to data as a parameter.  If a tensor holds
    several statistics (a mean and a variance, or statistics of several modules), all but one are
    moved.  A module that is called several times keeps one statistic.  The exporter may note to
    which module a node belongs.  Without this note, nodes with the same four tensors count as one
    module, and the same statistic of two modules is separated only if all its numbers are equal:
    tensors with different numbers are not stored together by chance.  An Identity node before a
    statistic is removed.
    """
    holders = [graph, *(body for node in list_nodes(graph) for body in list_bodies(node))]
    data = find_data(graph, list(graph.inputs))
    taken = {name for holder in holders for name in map_values(holder)}
    found: list[Separation] = []
    for holder in holders:
        for value, tensor in list(_list_stored(holder)):
            statistics = _list_statistics(value)
            if not statistics:
                continue
            is_trained = any(_is_applied(node, index, data) for node, index in list_uses(value))
            chosen = _choose(value, tensor, statistics, is_trained)
            for statistic in statistics:
                if statistic not in chosen:
                    _connect(statistic, value)
            for statistic in chosen:
                name = _name(statistic, value, taken)
                taken.add(name)
                _give(holder, statistic, name, tensor)
                found.append(
                    Separation(
                        name=name,
                        source=value.name or "",
                        index=statistic.index,
                        nodes=tuple(node.name or "" for node in statistic.nodes),
                        is_trained=is_trained,
                    )
                )
    return found


def _list_stored(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value
    for node in graph:
        if node.op_type == "Constant" and not node.domain and "sparse_value" not in node.attributes:
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is not None:
                yield node.outputs[0], tensor


def _list_statistics(value: ir.Value) -> list[_Statistic]:
    """Group the uses of a tensor as a running statistic by module and kind."""
    grouped: dict[Hashable, list[ir.Node]] = {}
    for node, index in _list_direct_uses(value):
        if node.op_type == "BatchNormalization" and not node.domain and index in _SUFFIXES:
            grouped.setdefault((index, _identify(node)), []).append(node)
    return [
        _Statistic(index=key[0], nodes=tuple(nodes), scope=find_module(nodes[0]))
        for key, nodes in grouped.items()
        if isinstance(key, tuple)
    ]


def _list_direct_uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the uses of a value, also behind an Identity, with which exporters rename it."""
    for use in value.uses():
        if use.node.op_type == "Identity" and not use.node.domain:
            yield from _list_direct_uses(use.node.outputs[0])
        else:
            yield use.node, use.idx


def _identify(node: ir.Node) -> Hashable:
    """Return what tells the nodes of one module from those of another."""
    return find_module(node) or tuple(node.inputs[1:5])


def _is_applied(node: ir.Node, index: int, data: Collection[ir.Value]) -> bool:
    """Return whether a node applies its input to data as a parameter.

    Arithmetic on stored tensors alone is left out, since it may read a true statistic, as where
    training that is aware of quantization folds a normalization into a weight.
    """
    if node.op_type == "BatchNormalization" and not node.domain and index in _SUFFIXES:
        return False
    if is_weight_input(node, index):
        return True
    is_idle = node.op_type in _READERS or node.op_type in LOOKERS
    return not is_idle and any(output in data for output in node.outputs)


def _choose(
    value: ir.Value, tensor: ir.TensorProtocol, statistics: Sequence[_Statistic], is_trained: bool
) -> list[_Statistic]:
    """Choose the statistics of a tensor that get a tensor of their own."""
    if is_trained or len(statistics) == 1:
        return [*statistics] if is_trained else []
    keeper = next(
        (one for one in statistics if f"{one.scope}.{_SUFFIXES[one.index]}" == value.name),
        statistics[0],
    )
    array = tensor.numpy()
    is_uniform = bool((array == array.reshape(-1)[:1]).all())
    return [
        one
        for one in statistics
        if one is not keeper
        and (is_uniform or one.index != keeper.index or (one.scope and keeper.scope))
    ]


def _name(statistic: _Statistic, source: ir.Value, taken: Collection[str]) -> str:
    """Return a free name for a statistic: that of the network if it is known, else of the node."""
    direct, suffix = statistic.direct, _SUFFIXES[statistic.index]
    is_renamed = direct is not source and not direct.is_graph_output()
    if is_renamed and _is_only_used_by(direct, statistic.nodes):
        return direct.name or ""  # an Identity's, which goes
    owner = statistic.scope or _find_owner(statistic.nodes) or statistic.nodes[0].name
    name, count = f"{owner}.{suffix}", 1
    while name in taken:
        count += 1
        name = f"{owner}.{suffix}.{count}"
    return name


def _find_owner(nodes: Sequence[ir.Node]) -> str | None:
    """Return the module that the names of a scale or a bias tell, if only ``nodes`` use it."""
    for index, suffix in _OWNERS:
        value = nodes[0].inputs[index]
        name = value.name or "" if value is not None else ""
        if value is not None and name.endswith(suffix) and _is_only_used_by(value, nodes):
            return name.removesuffix(suffix) or None
    return None


def _is_only_used_by(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    return all(use.node in nodes for use in value.uses())


def _give(graph: ir.Graph, statistic: _Statistic, name: str, tensor: ir.TensorProtocol) -> None:
    """Let the nodes of a statistic read a new initializer."""
    own = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    _connect(statistic, own)
    graph.register_initializer(own)


def _connect(statistic: _Statistic, value: ir.Value) -> None:
    """Let the nodes of a statistic read a value; drop an Identity that is unused then."""
    before = [node.inputs[statistic.index] for node in statistic.nodes]
    for node in statistic.nodes:
        node.replace_input_with(statistic.index, value)
    for old in dict.fromkeys(before):
        _drop_unused(old)


def _drop_unused(value: ir.Value | None) -> None:
    """Remove the Identity that makes a value, and those before it, where nothing uses them."""
    while value is not None and not value.uses() and not value.is_graph_output():
        node = value.producer()
        if node is None or node.op_type != "Identity" or node.graph is None:
            return
        value = node.inputs[0]
        node.graph.remove(node, safe=True)
