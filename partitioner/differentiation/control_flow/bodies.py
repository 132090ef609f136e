"""Copy nodes of a differentiated step into the body of a Scan, Loop or If."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from splitonnx.partitioner.graphs.assertions import LENGTHS
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_bodies


class BodyWriter:
    """Writes the body of a Scan, Loop or If; all names in the body begin with ``prefix``."""

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
        """Read a value around the body wherever the nodes read ``value``."""
        self._copies[value] = around

    def count(self) -> ir.Value:
        """Add the first two inputs and the first output of a Loop's body, which never stops it.

        Return the first input, the number of the iteration.
        """
        number = ir.Value(name="", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        going = ir.Value(name="", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        self.read(number)
        self.read(going)
        self.show(going)
        return number

    def pick(self, value: ir.Value, sequence: ir.Value, last: ir.Value, number: ir.Value) -> None:
        """Read a row of ``sequence`` wherever the nodes read ``value``.

        The sequence lies around the body.  The first iteration reads the row at ``last``, and each
        further one the row before.  ``number`` is the number of the iteration.
        """
        position = self._builder.op("Sub", last, self._find(number))
        row = self._builder.op("Gather", sequence, position, axis=0)
        row.type, row.shape = value.type, value.shape
        self._copies[value] = row

    def add(self, total: ir.Value, term: ir.Value) -> None:
        """Add an output to the body, which has the sum of ``total`` and ``term``."""
        self._output(self._builder.op("Add", self._find(total), self._find(term)), total)

    def copy(self, nodes: Iterable[ir.Node]) -> None:
        """Copy nodes, which must be in topological order, to the end of the body.

        A node that fails over the lengths of sequences keeps the end of its name, which says so.
        """
        for node in nodes:
            inputs = [None if value is None else self._find(value) for value in node.inputs]
            name = f"{self._prefix}/{len(self._builder.nodes)}"
            made = [
                ir.Value(
                    name=f"{name}_{i}" if value.name else "", type=value.type, shape=value.shape
                )
                for i, value in enumerate(node.outputs)
            ]
            attributes = [self._copy_attribute(own, name) for own in node.attributes.values()]
            told = f"/{LENGTHS}" if (node.name or "").endswith(f"/{LENGTHS}") else ""
            self._builder.nodes.append(
                ir.Node(
                    node.domain, node.op_type, inputs, attributes, outputs=made, name=name + told
                )
            )
            self._copies.update(zip(node.outputs, made, strict=True))

    def _copy_attribute(self, attribute: ir.Attr, name: str) -> ir.Attr:
        """Return an attribute of a copied node; if it is a body, it is copied as well."""
        if attribute.type != ir.AttributeType.GRAPH:
            return attribute
        body = attribute.as_graph().clone(allow_outer_scope_values=True)
        self._rename(body, f"{name}/{attribute.name}")
        self._replace_outer(body, set())
        return ir.AttrGraph(attribute.name, body)

    def _rename(self, body: ir.Graph, prefix: str) -> None:
        """Let all names in a body begin with ``prefix``."""
        for index, value in enumerate(body.inputs):
            value.name = f"{prefix}/in/{index}"
        for index, node in enumerate(body):
            node.name = f"{prefix}/{index}"
            for number, value in enumerate(node.outputs):
                value.name = f"{prefix}/{index}_{number}" if value.name else ""
            for inner in list_bodies(node):
                self._rename(inner, f"{prefix}/{index}")

    def _replace_outer(self, body: ir.Graph, known: Collection[ir.Value]) -> None:
        """Have the nodes of a body read the copies of the values that lie around it.

        ``known`` are the values of the bodies around it that were copied with it.
        """
        own = {*known, *body.inputs, *body.initializers.values()}
        own.update(value for node in body for value in node.outputs)
        for node in body:
            for index, value in enumerate(node.inputs):
                if value is not None and value not in own:
                    node.replace_input_with(index, self._find(value))
            for inner in list_bodies(node):
                self._replace_outer(inner, own)

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

    def show_zeros_like(self, around: ir.Value) -> None:
        """Add an output to the body, which is zero and has the shape of a value around it."""
        self._copies[around] = around
        self.show_zeros(around)

    def _output(self, own: ir.Value, value: ir.Value) -> None:
        own.type, own.shape = value.type, value.shape
        self._outputs.append(own)

    def finish(self) -> ir.Graph:
        """Return the body, which is a Scan's, a Loop's or a branch of an If."""
        return ir.Graph(self._inputs, self._outputs, nodes=self._builder.nodes, name=self._prefix)

    def _find(self, value: ir.Value) -> ir.Value:
        if value not in self._copies and value.is_initializer():
            tensor = value.const_value
            assert tensor is not None
            self._copies[value] = self._builder.tensor(tensor)
        return self._copies[value]
