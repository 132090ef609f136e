"""Infer a single node's output types with onnx, or compute its outputs from known inputs.

onnx is given only the node and the known types and contents of its inputs, not the rest of the
graph.  :class:`WeightValues` computes what a graph makes of its weights in this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
import onnx
import onnx_ir as ir

from splitonnx.errors import NativeCrash
from splitonnx.partitioner.graphs.faults import is_ours
from splitonnx.partitioner.graphs.transcripts import write_node
from splitonnx.partitioner.graphs.traversals import list_inner, map_values
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.workers import Refused, call

_Pairs = tuple[tuple[str, bytes], ...]

_MOST_REMEMBERED = 1 << 12
"""Limit of bytes in a request; the results of larger requests are not cached."""


_MOST_ELEMENTS = 1 << 22
"""The most elements of a value, and of what it is computed from, that :class:`WeightValues` reads.
"""
_COMPLETE = 21
"""An opset of which the evaluator has operators that it lacks in earlier ones, alike in both."""
_MOST_NODES = 64
"""The most nodes that :class:`WeightValues` evaluates for one value."""
_Declared = tuple[int, tuple[int | str, ...] | None]
"""A tensor's element type, and its dimensions or ``None`` if their number is not known."""


class Schemas:
    """Type inference for the outputs of single nodes, for one opset.

    Results are cached for nodes without attributes and without constant inputs.
    """

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._known: dict[Hashable, Sequence[onnx.TypeProto | None]] = {}

    def infer(
        self, node: ir.Node, types: Mapping[str, _Declared], data: Mapping[str, onnx.TensorProto]
    ) -> Sequence[onnx.TypeProto | None]:
        """Return the types of a node's outputs, with ``None`` for each type that onnx cannot infer.

        ``types`` holds the types of the node's inputs, and ``data`` the contents of constant
        inputs.  Both use the keys ``i0`` for the first input, ``i1`` for the second, and so on.

        Raises:
            NativeCrash: onnx's inference crashes on the node.
        """
        plain = not node.attributes and not data
        key = (node.op_type, len(node.inputs), len(node.outputs), *types.items())
        if plain and key in self._known:
            return self._known[key]
        protos = {
            name: onnx.helper.make_tensor_type_proto(kind, shape)
            for name, (kind, shape) in types.items()
        }
        made = _infer_types(node, protos, data, self._opset)
        if plain:
            self._known[key] = made
        return made


def _infer_types(
    node: ir.Node,
    types: Mapping[str, onnx.TypeProto],
    data: Mapping[str, onnx.TensorProto],
    opset: int,
) -> Sequence[onnx.TypeProto | None]:
    proto = _write_node(node).SerializeToString()
    kinds = tuple((name, kind.SerializeToString()) for name, kind in types.items())
    tensors = tuple((name, tensor.SerializeToString()) for name, tensor in data.items())
    size = len(proto) + sum(len(content) for _, content in (*kinds, *tensors))
    infer = _infer if size <= _MOST_REMEMBERED else _infer.__wrapped__
    try:
        made = infer(proto, kinds, tensors, opset)
    except NativeCrash as error:
        raise replace(error, subject=f"node '{node.name}' ({node.op_type})") from error
    names = [f"o{index}" for index in range(len(node.outputs))]
    return [onnx.TypeProto.FromString(made[name]) if name in made else None for name in names]


@lru_cache(maxsize=1 << 12)
def _infer(node: bytes, kinds: _Pairs, tensors: _Pairs, opset: int) -> Mapping[str, bytes]:
    """Infer the output types of a node, and cache them, because deep networks repeat nodes."""
    try:
        return call(natives.infer_node, "a node", node, dict(kinds), dict(tensors), opset)
    except Refused:
        return {}


def evaluate(
    node: ir.Node, contents: Sequence[np.ndarray | None], opset: int
) -> Sequence[np.ndarray | None]:
    """Compute a node's outputs from its inputs' contents, with onnx's reference evaluator.

    Return ``None`` for every output if the reference evaluator fails.
    """
    proto = _write_node(node)
    feeds = {f"i{index}": c for index, c in enumerate(contents) if c is not None}
    try:
        with np.errstate(all="ignore"):
            made = _run_constant(proto) or _run_reference(proto, feeds, opset)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_ours(error):
            raise
        return [None] * len(node.outputs)  # the runtime will report the error
    return [np.asarray(array) for array in made]


class WeightValues:
    """Read the values that a graph computes from its weights and constants alone.

    ``read`` returns the array of a weight, or ``None`` if there is no weight of this name.  Values
    that take many nodes or elements, bodies, or nodes without known shapes are not computed.
    """

    def __init__(self, graph: ir.Graph, read: Callable[[str], np.ndarray | None]) -> None:
        self._graph = graph
        self._read = read

    @cached_property
    def _values(self) -> Mapping[str, ir.Value]:
        return map_values(self._graph)

    def read(self, name: str) -> np.ndarray | None:
        """Return the array of a weight, or of a value computed from weights and constants alone."""
        array = self._read(name)
        value = self._values.get(name) if array is None else None
        if value is None:
            return array
        nodes = self._list_nodes(value)
        known: dict[ir.Value, np.ndarray | None] = {}
        for node in nodes or ():
            contents = [None if v is None else self._find(v, known) for v in node.inputs]
            given = [c for v, c in zip(node.inputs, contents, strict=True) if v is not None]
            if any(c is None or c.size > _MOST_ELEMENTS for c in given) or not _is_small(node):
                return None
            made = evaluate(node, contents, self._graph.opset_imports[""])
            if any(array is None for array in made):
                made = evaluate(node, contents, _COMPLETE)
            known |= dict(zip(node.outputs, made, strict=False))
        return known.get(value)

    def _find(
        self, value: ir.Value, known: Mapping[ir.Value, np.ndarray | None]
    ) -> np.ndarray | None:
        if value in known:
            return known[value]
        if value.producer() is None and value.const_value is not None:
            return value.const_value.numpy()
        return self._read(value.name or "")

    def _list_nodes(self, end: ir.Value) -> list[ir.Node] | None:
        """List the nodes that compute a value, in order, or return ``None`` if they are many."""
        found: dict[ir.Node, None] = {}
        pending = [end]
        while pending:
            node = pending.pop().producer()
            if node is None or node in found:
                continue
            if len(found) == _MOST_NODES or node.domain or list_inner(node):
                return None
            found[node] = None
            pending += [value for value in node.inputs if value is not None]
        order = {node: index for index, node in enumerate(self._graph) if node in found}
        return sorted(found, key=order.__getitem__)


def _is_small(node: ir.Node) -> bool:
    """Return whether all outputs of a node have known shapes of not too many elements."""
    for value in node.outputs:
        dims = [] if value.shape is None else list(value.shape)
        sizes = [dim for dim in dims if isinstance(dim, int)]
        if value.shape is None or len(sizes) < len(dims) or math.prod(sizes) > _MOST_ELEMENTS:
            return False
    return True


def _run_constant(proto: onnx.NodeProto) -> list[np.ndarray]:
    """Return the tensor of a ``Constant`` as the evaluator would, or nothing for other nodes."""
    held = proto.attribute
    is_tensor = (proto.op_type, proto.domain, [a.name for a in held]) == ("Constant", "", ["value"])
    return [onnx.numpy_helper.to_array(held[0].t)] if is_tensor else []


def _run_reference(
    proto: onnx.NodeProto, feeds: Mapping[str, np.ndarray], opset: int
) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator  # slow to import, and few models need it

    graph = onnx.helper.make_graph(
        [proto],
        "fold",
        [onnx.ValueInfoProto(name=name) for name in feeds],
        [onnx.ValueInfoProto(name=name) for name in proto.output],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    made = ReferenceEvaluator(model).run(None, dict(feeds))
    assert isinstance(made, list)
    return made


def _write_node(node: ir.Node) -> onnx.NodeProto:
    """Convert a node to a protobuf message with generic names: inputs ``i0``, outputs ``o0``, etc.

    So nodes that differ only in the names of their values become the same message.
    """
    return write_node(
        node,
        [f"i{index}" if value is not None else "" for index, value in enumerate(node.inputs)],
        [f"o{index}" for index in range(len(node.outputs))],
    )
