"""Collect the nodes that compute the gradients of what an If, Loop or Scan reads."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir

from splitonnx.partitioner.differentiation.derived.supplied_gradients import GRADIENT, write_nodes
from splitonnx.partitioner.graphs.builders import NodeBuilder


class GradientNodes:
    """The nodes beside a backward step; they do not belong to the graph yet.

    Values of the graph are therefore represented by other values of the same name, which
    :meth:`refer` returns.
    """

    def __init__(self, name: str) -> None:
        self.builder = NodeBuilder(f"{name}/gradient")
        self._name = name
        self._known: dict[str, ir.Value] = {}
        self._parts: dict[ir.Value, list[ir.Value]] = {}

    def refer(self, value: ir.Value, suffix: str = "") -> ir.Value:
        """Return a value that represents a value of the graph, or its gradient."""
        name = f"{value.name}{suffix}"
        if name not in self._known:
            self._known[name] = ir.Value(name=name, type=value.type, shape=value.shape)
        return self._known[name]

    def zeros(self, value: ir.Value) -> ir.Value:
        """Return zeros in the shape of a value of the graph."""
        source = self.refer(value)
        zero = self.builder.number(0.0, source.dtype)
        return self.builder.op("Expand", zero, self.builder.op("Shape", source))

    def add(self, value: ir.Value, gradient: ir.Value) -> None:
        """Add a part of the gradient of a value of the graph."""
        self._parts.setdefault(value, []).append(gradient)

    def total(self, values: Iterable[ir.Value]) -> dict[ir.Value, ir.Value]:
        """Return the gradient of each value: the sum of its parts, or zeros if it has none."""
        totals = {}
        for index, value in enumerate(dict.fromkeys(values)):
            given = self._parts.get(value) or [self.zeros(value)]
            total = self.builder.op("Sum" if len(given) > 1 else "Identity", *given)
            total.name = f"{self._name}/argument/{index}{GRADIENT}"
            totals[value] = total
        return totals

    def declare(self) -> list[onnx.ValueInfoProto]:
        """Return the known types and shapes of what the nodes compute, as protobuf messages."""
        made = [value for node in self.builder.nodes for value in node.outputs]
        return [
            ir.serde.serialize_value(value)
            for value in made
            if value.type is not None and value.shape is not None
        ]

    def serialize(self) -> list[onnx.NodeProto]:
        """Return the nodes as protobuf messages."""
        return write_nodes(self.builder.nodes)
