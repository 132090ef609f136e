"""Write the Scan that computes the gradients of another Scan, and the nodes around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from splitonnx.partitioner.differentiation.derived.supplied_gradients import GRADIENT, write_nodes
from splitonnx.partitioner.differentiation.scans.bodies import BodyWriter
from splitonnx.partitioner.differentiation.scans.steps import DerivedStep, Product, Step
from splitonnx.partitioner.graphs.bodies import build_scan, runs_backwards
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_inputs, map_values


@dataclass(frozen=True, kw_only=True)
class DerivedScan:
    """A Scan and its step with gradients.

    ``inputs`` maps the name of each input of the step to the value around the Scan that it is a
    part of, and ``outputs`` does the same for the outputs.  ``starts`` names the inputs whose
    gradients the nodes around the Scan need, and ``ends`` the outputs whose gradients they provide.
    """

    node: ir.Node
    step: Step
    derived: DerivedStep
    inputs: Mapping[str, ir.Value]
    outputs: Mapping[str, ir.Value]
    starts: Sequence[str]
    ends: Sequence[str]


class BackwardScan:
    """The backward Scan of a Scan, and the nodes around it.

    ``nodes`` are all of these nodes; they read the stacked values of the forward Scan and the
    gradients of its outputs.  ``gradients`` maps the values that the forward Scan reads to their
    gradients.
    """

    def __init__(self, scan: DerivedScan, stacked: Mapping[ir.Value, ir.Value]) -> None:
        self.gradients: dict[ir.Value, ir.Value] = {}
        self._scan, self._stacked = scan, stacked
        self._values = map_values(scan.derived.graph)
        self._builder = NodeBuilder(f"{scan.node.name}/gradient")
        self._known: dict[str, ir.Value] = {}
        states = {
            _name(state): f"{after.name}{GRADIENT}"
            for state, after in zip(scan.step.states, scan.step.nexts, strict=True)
            if f"{after.name}{GRADIENT}" in self._values
        }
        found = self._write_scan(states)
        parts: dict[ir.Value, list[ir.Value]] = {}
        for name, value in scan.inputs.items():
            if name in scan.starts and name in found:
                gradient = found[name]
                if value in scan.step.held.values():
                    axis = self._builder.integers([0])
                    gradient = self._builder.op("ReduceSum", gradient, axis, keepdims=0)
                parts.setdefault(value, []).append(gradient)
        for product in scan.derived.products:
            weights = scan.inputs[_name(product.weights)]
            parts.setdefault(weights, []).append(self._multiply(product, found))
        for index, (value, given) in enumerate(parts.items()):
            total = self._builder.op("Sum" if len(given) > 1 else "Identity", *given)
            total.name = f"{scan.node.name}/argument/{index}{GRADIENT}"
            self.gradients[value] = total

    def serialize(self) -> list[onnx.NodeProto]:
        """Return the nodes as protobuf messages."""
        return write_nodes(self._builder.nodes)

    def _refer(self, value: ir.Value, suffix: str = "") -> ir.Value:
        """Return a value that stands for a value around the Scan, or for its gradient."""
        name = f"{value.name}{suffix}"
        if name not in self._known:
            self._known[name] = ir.Value(name=name, type=value.type, shape=value.shape)
        return self._known[name]

    def _write_scan(self, states: Mapping[str, str]) -> dict[str, ir.Value]:
        """Write the backward Scan, and return the gradients that it computes.

        ``states`` maps the states that have a gradient to the names of the gradients that the step
        gets.
        """
        scan, derived = self._scan, self._scan.derived
        writer = BodyWriter(f"{scan.node.name}/backward")
        for gradient in states.values():
            writer.read(self._values[gradient])
        first = [self._write_first(name, gradient) for name, gradient in states.items()]
        rows = self._read_rows(writer)
        for value in scan.step.held:
            writer.hold(self._values[_name(value)], self._refer(scan.inputs[_name(value)]))
        writer.copy(derived.backward)
        for name, gradient in states.items():
            if name in derived.gradients:
                writer.show(derived.gradients[name])
            else:  # no later step reads this state
                writer.show_zeros(self._values[gradient])
        sources = {n: _skip_copies(v) for n, v in derived.gradients.items() if n not in states}
        shown = list(dict.fromkeys(sources.values()))
        for value in shown:
            writer.show(value)
        outputs = build_scan(
            self._builder, writer.finish(), first, rows, backwards=not runs_backwards(scan.node)
        )
        made = dict(zip([*states, *shown], outputs, strict=True))
        return {name: made[name if name in states else sources[name]] for name in derived.gradients}

    def _write_first(self, state: str, gradient: str) -> ir.Value:
        """Return the gradient of the last state, which is zero if no node reads that state."""
        after = gradient.removesuffix(GRADIENT)
        if after in self._scan.ends:
            return self._refer(self._scan.outputs[after], GRADIENT)
        start = self._refer(self._scan.inputs[state])
        zero = self._builder.number(0.0, start.dtype)
        return self._builder.op("Expand", zero, self._builder.op("Shape", start))

    def _read_rows(self, writer: BodyWriter) -> list[ir.Value]:
        """Have the step read rows of sequences, and return these sequences."""
        scan, rows = self._scan, []
        read = {value for node in scan.derived.backward for value in list_inputs(node)}
        for value, sequence in self._stacked.items():
            if value in read:
                writer.read(value)
                rows.append(self._refer(sequence))
        for value in scan.step.shown:
            if value.name in scan.ends:
                writer.read(self._values[f"{value.name}{GRADIENT}"])
                rows.append(self._refer(scan.outputs[_name(value)], GRADIENT))
        return rows

    def _multiply(self, product: Product, found: Mapping[str, ir.Value]) -> ir.Value:
        """Return the gradient of the weights of a Gemm, which is summed over all steps."""
        factor = self._stacked[self._values[_name(product.factor)]]
        rows = self._builder.op("Flatten", self._refer(factor), axis=2)  # (T * N, size)
        gradients = self._builder.op("Flatten", found[_name(product.result)], axis=2)
        pair = (gradients, rows) if product.transposed else (rows, gradients)
        return self._builder.op("Gemm", *pair, transA=1)


def _skip_copies(value: ir.Value) -> ir.Value:
    """Return the value that ``value`` is a copy of, so that only one of them is stacked."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and not node.domain:
        source = node.inputs[0]
        assert source is not None
        value, node = source, source.producer()
    return value


def _name(value: ir.Value) -> str:
    return value.name or ""
