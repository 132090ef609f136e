"""Copy nodes of a differentiated step into the body of a Scan."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


class BodyWriter:
    """Writes the body of a Scan; all names in the body begin with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self._builder = NodeBuilder(prefix)
        self._prefix = prefix
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._copies: dict[ir.Value, ir.Value] = {}

    def read(self, value: ir.Value) -> None:
        """Add an input to the body, which stands for ``value``."""
        own = ir.Value(
            name=f"{self._prefix}/in/{len(self._inputs)}", type=value.type, shape=value.shape
        )
        self._inputs.append(own)
        self._copies[value] = own

    def hold(self, value: ir.Value, around: ir.Value) -> None:
        """Read a value around the Scan wherever the nodes read ``value``."""
        self._copies[value] = around

    def copy(self, nodes: Iterable[ir.Node]) -> None:
        """Copy nodes, which must be in topological order, to the end of the body."""
        for node in nodes:
            inputs = [None if value is None else self._find(value) for value in node.inputs]
            name = f"{self._prefix}/{len(self._builder.nodes)}"
            made = [
                ir.Value(
                    name=f"{name}_{i}" if value.name else "", type=value.type, shape=value.shape
                )
                for i, value in enumerate(node.outputs)
            ]
            attributes = list(node.attributes.values())
            self._builder.nodes.append(
                ir.Node(node.domain, node.op_type, inputs, attributes, outputs=made, name=name)
            )
            self._copies.update(zip(node.outputs, made, strict=True))

    def show(self, value: ir.Value) -> None:
        """Add an output to the body, which has the value of ``value``."""
        found = self._find(value)
        self._output(self._builder.op("Identity", found), value)

    def show_zeros(self, value: ir.Value) -> None:
        """Add an output to the body, which is zero and has the shape of ``value``."""
        zero = self._builder.number(0.0, value.dtype)
        shape = self._builder.op("Shape", self._find(value))
        shape.type = ir.TensorType(ir.DataType.INT64)
        self._output(self._builder.op("Expand", zero, shape), value)

    def _output(self, own: ir.Value, value: ir.Value) -> None:
        own.type, own.shape = value.type, value.shape
        self._outputs.append(own)

    def finish(self) -> ir.Graph:
        """Return the body."""
        return ir.Graph(self._inputs, self._outputs, nodes=self._builder.nodes, name=self._prefix)

    def _find(self, value: ir.Value) -> ir.Value:
        if value not in self._copies and value.is_initializer():
            tensor = value.const_value
            assert tensor is not None
            self._copies[value] = self._builder.tensor(tensor)
        return self._copies[value]
