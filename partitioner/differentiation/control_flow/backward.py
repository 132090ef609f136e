"""Write the Scan or Loop that computes the gradients of another one, and the nodes around it.

A Loop's gradient is a Loop, because ONNX Runtime runs no Scan of no steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.differentiation.control_flow.bodies import BodyWriter
from splitonnx.partitioner.differentiation.control_flow.gradient_nodes import GradientNodes
from splitonnx.partitioner.differentiation.control_flow.steps import DerivedStep, Product, Step
from splitonnx.partitioner.differentiation.derived.supplied_gradients import GRADIENT
from splitonnx.partitioner.graphs.bodies import build_scan, reverse_rows, runs_backwards
from splitonnx.partitioner.graphs.traversals import list_inputs, map_values


@dataclass(frozen=True, kw_only=True)
class DerivedLoop:
    """A Scan or Loop and its step with gradients.

    ``inputs`` maps the name of each input of the step to the value around the node that it is a
    part of, and ``outputs`` does the same for the outputs.  ``starts`` names the inputs whose
    gradients the nodes around it need, and ``ends`` the outputs whose gradients they provide.
    """

    node: ir.Node
    step: Step
    derived: DerivedStep
    inputs: Mapping[str, ir.Value]
    outputs: Mapping[str, ir.Value]
    starts: Sequence[str]
    ends: Sequence[str]


def write_backward(
    loop: DerivedLoop, stacked: Mapping[ir.Value, ir.Value], nodes: GradientNodes
) -> dict[ir.Value, ir.Value]:
    """Add the backward Scan or Loop and the nodes around it to ``nodes``.

    They read the stacked values of the forward node and the gradients of its outputs.  Return the
    gradients of the values that the forward node reads.
    """
    return _Backward(loop, stacked, nodes).write()


class _Backward:
    def __init__(
        self, loop: DerivedLoop, stacked: Mapping[ir.Value, ir.Value], nodes: GradientNodes
    ) -> None:
        self._loop, self._stacked, self._nodes = loop, stacked, nodes
        self._values = map_values(loop.derived.graph)
        self._builder = nodes.builder
        self._writer = BodyWriter(f"{loop.node.name}/backward")
        self._counts = loop.node.op_type == "Loop"

    def write(self) -> dict[ir.Value, ir.Value]:
        loop = self._loop
        found = self._write_node() if loop.derived.gradients else {}  # some read only shapes
        for name in loop.starts:
            if name in found:
                self._nodes.add(loop.inputs[name], found[name])
        for product in loop.derived.products:
            weights = loop.inputs[_name(product.weights)]
            self._nodes.add(weights, self._multiply(product, found[_name(product.result)]))
        return self._nodes.total(loop.inputs[name] for name in loop.starts)

    def _write_node(self) -> dict[str, ir.Value]:
        """Write the backward node, and return the gradients that it computes by name.

        It carries the gradients of the states, and the sums of the gradients of what is held.
        """
        loop, derived, writer = self._loop, self._loop.derived, self._writer
        states = self._find_states()
        sums = {
            _name(own): ir.Value(name=None, type=own.type, shape=own.shape)
            for own in loop.step.held
            if _name(own) in derived.gradients
        }
        number = writer.count() if self._counts else None
        for gradient in states.values():
            writer.read(self._values[gradient])
        for total in sums.values():
            writer.read(total)
        first = [self._write_first(name, gradient) for name, gradient in states.items()]
        first += [self._nodes.zeros(loop.inputs[name]) for name in sums]
        rows = self._list_rows()
        if number is None:
            for value in rows:
                writer.read(value)
        else:
            last = self._builder.op("Sub", self._count_steps(), self._builder.integer(1))
            for value, sequence in rows.items():
                writer.pick(value, sequence, last, number)
        for own, value in loop.step.held.items():
            writer.hold(self._values[_name(own)], self._nodes.refer(value))
        writer.copy(derived.backward)
        for name, gradient in states.items():
            if name in derived.gradients:
                writer.show(derived.gradients[name])
            else:  # no later step reads this state
                writer.show_zeros(self._values[gradient])
        for name, total in sums.items():
            writer.add(total, derived.gradients[name])
        carried = {*states, *sums}
        sources = {n: _skip_copies(v) for n, v in derived.gradients.items() if n not in carried}
        shown = list(dict.fromkeys(sources.values()))
        for value in shown:
            writer.show(value)
        outputs = self._build(first, list(rows.values()))
        made: dict[str | ir.Value, ir.Value]
        made = dict(zip([*states, *sums, *shown], outputs, strict=True))
        return {name: made[sources.get(name, name)] for name in derived.gradients}

    def _build(self, first: Sequence[ir.Value], rows: Sequence[ir.Value]) -> Sequence[ir.Value]:
        body = self._writer.finish()
        if self._counts:
            inputs = [self._count_steps(), None, *first]
            attributes = {"body": ir.AttrGraph("body", body)}
            made = self._builder.ops("Loop", inputs, len(body.outputs) - 1, attributes)
            own, length = body.outputs[1:], None
        else:
            backwards = not runs_backwards(self._loop.node)
            made = build_scan(self._builder, body, first, rows, backwards=backwards)
            own, length = body.outputs[:], rows[0].shape[0] if rows[0].shape else None
        for index, (inner, value) in enumerate(zip(own, made, strict=True)):
            value.type = inner.type
            if inner.shape is not None:
                front = [] if index < len(first) else [length]
                value.shape = ir.Shape([*front, *inner.shape])
        return made

    def _count_steps(self) -> ir.Value:
        """Return the number of iterations that the forward Loop ran."""
        number = self._values[_name(self._loop.step.counted[0])]
        return self._builder.op("Size", self._nodes.refer(self._stacked[number]))

    def _find_states(self) -> dict[str, str]:
        """Map the states that have a gradient to the names of the gradients that the step gets."""
        step = self._loop.step
        pairs = zip(step.states, step.nexts, strict=True)
        names = {_name(state): f"{after.name}{GRADIENT}" for state, after in pairs}
        return {state: gradient for state, gradient in names.items() if gradient in self._values}

    def _write_first(self, state: str, gradient: str) -> ir.Value:
        """Return the gradient of the last state, which is zero if no node reads that state."""
        after = gradient.removesuffix(GRADIENT)
        if after in self._loop.ends:
            return self._nodes.refer(self._loop.outputs[after], GRADIENT)
        return self._nodes.zeros(self._loop.inputs[state])

    def _list_rows(self) -> dict[ir.Value, ir.Value]:
        """Map each value of which the step reads a row to the sequence of these rows.

        A Scan needs at least one, which says how many steps there are.
        """
        loop, rows = self._loop, dict[ir.Value, ir.Value]()
        read = {value for node in loop.derived.backward for value in list_inputs(node)}
        read |= set(loop.derived.gradients.values())
        for value, sequence in self._stacked.items():
            if value in read:
                rows[value] = self._nodes.refer(sequence)
        for value in loop.step.shown:
            gradient = self._values.get(f"{value.name}{GRADIENT}")
            if gradient is not None:
                rows[gradient] = self._nodes.refer(loop.outputs[_name(value)], GRADIENT)
        if not rows and not self._counts:
            value, sequence = next(iter(self._stacked.items()))
            rows[value] = self._nodes.refer(sequence)
        return rows

    def _multiply(self, product: Product, gradients: ir.Value) -> ir.Value:
        """Return the gradient of the weights of a product, which is summed over all steps."""
        factor = self._nodes.refer(self._stacked[self._values[_name(product.factor)]])
        rows = self._builder.op("Flatten", factor, axis=-1)
        if self._counts:  # a Loop stacks what it computes from the last step to the first
            gradients = reverse_rows(self._builder, gradients)
        gradients = self._builder.op("Flatten", gradients, axis=-1)
        left, right = (gradients, rows) if product.transposed else (rows, gradients)
        if not self._counts:
            return self._builder.op("Gemm", left, right, transA=1)
        # without iterations, a Gemm fails, and a MatMul may leave its result unset
        turned = self._builder.op("Transpose", left, perm=[1, 0])
        summed = self._builder.op("MatMul", turned, right)
        ran = self._builder.op("Greater", self._count_steps(), self._builder.integer(0))
        return self._builder.op("Where", ran, summed, self._builder.number(0.0, factor.dtype))


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
