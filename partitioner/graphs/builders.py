"""Build nodes with automatic names, and create each constant only once.

Modules that write formulas as nodes, such as losses, updates and lowerings, use this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel

DETACHED = "splitonnx.detached"
"""Metadata key of an Identity node through which no gradient may pass."""

HIDDEN = "splitonnx.hidden"
"""Metadata key of a node that is hidden from the gradient builder, which gets its gradient."""

Attribute = int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | ir.Attr


class MissingOutput(Exception):
    """Raised if the replacement of a node has no value for an output that is used."""


class UnknownType(UnsupportedModel):
    """Raised if what is written for a node needs a type that is not known."""


class NodeBuilder:
    """A builder for a sequence of nodes; every node and value is named ``<prefix>/<number>``.

    ``nodes`` holds the nodes built so far, in order.
    """

    def __init__(self, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Append a node with one output, and return the output."""
        return self.ops(kind, list(inputs), 1, attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        attributes: Mapping[str, Attribute],
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs, and return the outputs."""
        name = f"{self._prefix}/{len(self.nodes)}"
        held = ir.convenience.convert_attributes(attributes) if attributes else ()
        made = [ir.Value(name=f"{name}_{i}" if i else name) for i in range(outputs)]
        self.nodes.append(ir.Node("", kind, inputs, held, outputs=made, name=f"{name}_{kind}"))
        return made

    def number(self, value: float, dtype: ir.DataType | None) -> ir.Value:
        """Return a scalar constant of the type ``dtype``.

        Raises:
            UnknownType: ``dtype`` is ``None``, because the type of an input is not known.
        """
        known = self._require(dtype)
        return self._constant((value, known), _make_tensor(value, known))

    def integers(self, values: Sequence[int]) -> ir.Value:
        """Return an int64 vector as a constant."""
        key = (*values, "I64")
        return self._constant(key, _make_tensor(list(values), ir.DataType.INT64))

    def integer(self, value: int) -> ir.Value:
        """Return an int64 scalar as a constant."""
        return self._constant((value,), _make_tensor(value, ir.DataType.INT64))

    def tensor(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Return a tensor as a constant."""
        return self._constant((id(tensor), "tensor"), tensor)

    def array(self, array: np.ndarray, dtype: ir.DataType | None) -> ir.Value:
        """Return an array as a constant, converted to ``dtype``."""
        known = self._require(dtype)
        return self.tensor(ir.tensor(array.astype(known.numpy()), dtype=known))

    def cast(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """Return ``value`` cast to ``dtype``, or ``value`` itself if it already has this type."""
        known = self._require(dtype)
        if value.dtype == known:
            return value
        result = self.op("Cast", value, to=known.value)
        result.type = ir.TensorType(known)
        return result

    def shape(self, value: ir.Value, start: int = 0, end: int | None = None) -> ir.Value:
        """Return the dimensions ``start:end`` of a value as an int64 vector.

        The vector is a constant if these dimensions are known; otherwise, a Shape node computes it.
        """
        dims = known_dims(value)
        piece = None if dims is None else dims[start:end]
        if piece is not None and all(dim is not None for dim in piece):
            return self.integers([dim for dim in piece if dim is not None])
        if end is None:
            return self.op("Shape", value, start=start)
        return self.op("Shape", value, start=start, end=end)

    def detach(self, value: ir.Value) -> ir.Value:
        """Return a copy of ``value`` that no gradient passes through."""
        result = self.op("Identity", value)
        result.type, result.shape = value.type, value.shape
        node = result.producer()
        assert node is not None
        node.metadata_props[DETACHED] = "1"
        return result

    def replace(self, node: ir.Node, made: Sequence[ir.Value | None]) -> None:
        """Replace ``node`` in its graph with the nodes built so far.

        ``made`` holds one value for each output of ``node``, or ``None`` for an output that is not
        used.  The new values take over the names, types and shapes of the outputs.

        Raises:
            MissingOutput: ``made`` has no value for an output that is used.
        """
        graph = node.graph
        assert graph is not None
        old, new = [], []
        own = {value for written in self.nodes for value in written.outputs}
        for index, value in enumerate(node.outputs):
            if not value.name or not (value.uses() or value.is_graph_output()):
                continue
            replacement = made[index] if index < len(made) else None
            if replacement is None:
                raise MissingOutput(value.name)
            if replacement not in own or replacement in new:
                replacement = self.op("Identity", replacement)
                own.add(replacement)
            old.append(value)
            new.append(replacement)
        ir.convenience.replace_nodes_and_values(graph, node, [node], self.nodes, old, new)
        release_bodies(node)

    def _require(self, dtype: ir.DataType | None) -> ir.DataType:
        if dtype is None:
            raise UnknownType(
                f"what is written for '{self._prefix}'",
                "the element type of its input is not known",
                "export the model with types and shapes",
            )
        return dtype

    def _constant(self, key: tuple[object, ...], tensor: ir.TensorProtocol) -> ir.Value:
        if key not in self._constants:
            name = f"{self._prefix}/{len(self.nodes)}"
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
            held = [ir.AttrTensor("value", tensor)]
            node = ir.Node("", "Constant", [], held, outputs=[value], name=f"{name}_Constant")
            self.nodes.append(node)
            self._constants[key] = value
        return self._constants[key]


def _make_tensor(value: float | list[int], dtype: ir.DataType) -> ir.TensorProtocol:
    """Create a tensor like ``ir.tensor``, but faster, for common argument types."""
    if type(value) not in (bool, float, int, list):
        return ir.tensor(value, dtype=dtype)
    array = np.array(value, dtype.numpy())
    return ir.Tensor(array, dtype=dtype, shape=ir.Shape(array.shape))


def insert_copy(graph: ir.Graph, node: ir.Node, index: int, name: str) -> ir.Value:
    """Have a node read a copy of one of its inputs; return the copy.

    ``index`` is the input's position.  ``name`` is the name of the copy and of the Identity that
    makes it, which is inserted before the node.
    """
    source = take_input(node, index)
    copy = ir.Value(name=name, type=source.type, shape=source.shape)
    graph.insert_before(node, ir.Node("", "Identity", [source], outputs=[copy], name=name))
    node.replace_input_with(index, copy)
    return copy


def store_constant(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return a stored tensor as an initializer of the graph, if a Constant node in it holds it."""
    maker, tensor = value.producer(), ir.convenience.get_const_tensor(value)
    if maker is None or tensor is None:
        return value
    name, value.name = value.name, None
    held = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    stored = ir.Value(name=name, const_value=held, type=ir.TensorType(tensor.dtype))
    ir.convenience.replace_all_uses_with(value, stored, replace_graph_outputs=True)
    graph.remove(maker, safe=True)
    graph.register_initializer(stored)
    return stored


def known_dims(value: ir.Value) -> list[int | None] | None:
    """List a value's dimensions, with ``None`` for each unknown dimension.

    Return ``None`` if the number of dimensions is unknown.
    """
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def known_rank(value: ir.Value) -> int | None:
    """Return a value's number of dimensions, or ``None`` if it is not known."""
    return None if value.shape is None else len(value.shape)


def require_rank(node: ir.Node, value: ir.Value) -> int:
    """Return the number of dimensions of a value that ``node`` reads or computes.

    Raises:
        UnsupportedModel: the number is not known.
    """
    rank = known_rank(value)
    if rank is None:
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            f"the rank of '{value.name}' is not known",
            "export the model with shapes",
        )
    return rank


def take_input(node: ir.Node, index: int = 0) -> ir.Value:
    """Return a node's input at ``index``, which must be one that the operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def take_inputs(node: ir.Node, count: int) -> list[ir.Value]:
    """Return a node's first ``count`` inputs, which must be ones that the operator requires."""
    return [take_input(node, index) for index in range(count)]


def known_array(value: ir.Value | None) -> np.ndarray | None:
    """Return a constant's contents, or ``None`` if the value is not a constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def release_bodies(node: ir.Node) -> None:
    """Disconnect the subgraph bodies of a removed node from the values that they read."""
    for attribute in node.attributes.values():
        bodies: Sequence[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = attribute.as_graphs()
        for inner in (inner for body in bodies for inner in body):
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
            release_bodies(inner)
