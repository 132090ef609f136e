"""Differentiate one step of a Scan, and divide the result into a forward and a backward step.

The body of a Scan becomes a model of its own, which is differentiated like any other.  What depends
on gradients is the backward step; the rest is the forward step.  The backward step computes nothing
again: the forward step also shows the values that the backward step reads.

The weights of a Gemm are the same in every step.  Their gradient is one product of the stacked
values of all steps, which is faster than a sum of one product per step.  Therefore the backward
step computes only the gradient of the output of such a Gemm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from splitonnx.partitioner.differentiation.derived.derivations import add_gradients
from splitonnx.partitioner.differentiation.derived.supplied_gradients import GRADIENT
from splitonnx.partitioner.graphs.bodies import copy_body
from splitonnx.partitioner.graphs.traversals import (
    find_dependents,
    find_moving,
    is_float,
    list_inner,
    list_inputs,
    map_values,
    trace_gradients,
)
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.rewrites import rewrite


@dataclass(frozen=True, kw_only=True)
class Step:
    """The body of a Scan as a model of its own.

    ``states`` and ``rows`` are the graph's inputs for the states and for the step's row of each
    sequence.  ``held`` maps each further input to the value around the Scan that it stands for.
    ``nexts`` and ``shown`` are the graph's outputs: the next states, and the row of each sequence
    that the Scan computes.
    """

    model: ir.Model
    states: Sequence[ir.Value]
    rows: Sequence[ir.Value]
    held: Mapping[ir.Value, ir.Value]
    nexts: Sequence[ir.Value]
    shown: Sequence[ir.Value]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A Gemm of a step, whose weights are held: their gradient is computed for all steps at once.

    ``weights`` is the input that holds the weights, ``factor`` is what they are multiplied with,
    and ``result`` is the output.  ``transposed`` is the attribute ``transB``.
    """

    weights: ir.Value
    factor: ir.Value
    result: ir.Value
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class DerivedStep:
    """A step with its gradients.

    ``backward`` lists the nodes of the backward step, and ``stash`` the values of the forward step
    that they or the gradients of ``products`` read.  ``gradients`` maps the name of an input of the
    step, or of the result of a product, to its gradient.
    """

    graph: ir.Graph
    backward: Sequence[ir.Node]
    stash: Sequence[ir.Value]
    gradients: Mapping[str, ir.Value] = field(default_factory=dict)
    products: Sequence[Product] = ()


def open_step(node: ir.Node, prefix: str, opsets: Mapping[str, int], ir_version: int) -> Step:
    """Return the body of a Scan as a model of its own; all of its names begin with ``prefix``."""
    body = node.attributes["body"].as_graph()
    count = len(body.inputs) - node.attributes.get_int("num_scan_inputs", 0)
    inputs = [
        ir.Value(name=f"{prefix}/{i}", type=value.type, shape=value.shape)
        for i, value in enumerate(body.inputs)
    ]
    nodes, results = copy_body(body, f"{prefix}/body", inputs)
    outputs = [_copy(nodes, value, f"{prefix}/result/{i}") for i, value in enumerate(results)]
    held = _replace_held(nodes, prefix)
    for value, given in zip(outputs, body.outputs, strict=True):
        value.type, value.shape = given.type, given.shape
    graph = ir.Graph(
        [*inputs, *held], outputs, nodes=nodes, opset_imports=dict(opsets), name=prefix
    )
    model = ir.Model(graph, ir_version=ir_version)
    infer_shapes(model)
    return Step(
        model=model,
        states=inputs[:count],
        rows=inputs[count:],
        held=held,
        nexts=outputs[:count],
        shown=outputs[count:],
    )


def _replace_held(nodes: Sequence[ir.Node], prefix: str) -> dict[ir.Value, ir.Value]:
    """Replace each value that the nodes read from around the Scan by an input of the step."""
    made = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in list_inputs(node))
    known: dict[ir.Value, ir.Value] = {}
    for value in read:
        if value not in made and not (value.name or "").startswith(f"{prefix}/"):
            name = f"{prefix}/held/{len(known)}"
            known[value] = ir.Value(name=name, type=value.type, shape=value.shape)
    for reader in [inner for node in nodes for inner in (node, *list_inner(node))]:
        for index, argument in enumerate(reader.inputs):
            if argument in known:
                reader.replace_input_with(index, known[argument])
    return {own: value for value, own in known.items()}


def _copy(nodes: list[ir.Node], value: ir.Value, name: str) -> ir.Value:
    node = ir.node("Identity", [value], name=name)
    node.outputs[0].name = name
    nodes.append(node)
    return node.outputs[0]


def differentiate_step(
    step: Step, moving: Collection[ir.Value], reached: Collection[ir.Value]
) -> DerivedStep:
    """Differentiate a step.

    ``moving`` holds the inputs of the step that depend on trained parameters at its start, and
    ``reached`` the outputs whose gradients are given from around the Scan.  The model of ``step``
    is changed and must not be used afterwards.
    """
    graph = step.model.graph
    moved = _find_moving(step, moving)
    ends, wanted = _find_ends(step, moved, reached)
    rewrite(step.model, [value.name or "" for value in moved])
    products = _find_products(graph, [value for value in step.held if value in wanted])
    weights = {product.weights for product in products}
    for product in products:
        _part(graph, product.result)
    named = [value for value in (*step.states, *step.rows, *step.held) if value in wanted - weights]
    named += [product.result for product in products]
    for value in ends:
        gradient = ir.Value(name=f"{value.name}{GRADIENT}", type=value.type, shape=value.shape)
        graph.inputs.append(gradient)
    graph.outputs.extend(v for p in products for v in (p.result, p.factor) if v.producer())
    names = [value.name or "" for value in named]
    derived = add_gradients(step.model, names, [value.name or "" for value in ends]).graph
    return _divide(step, derived, names, [value.name or "" for value in ends], products)


def _find_moving(step: Step, moving: Collection[ir.Value]) -> set[ir.Value]:
    """Return the inputs that depend on trained parameters in any step."""
    roots = set(moving)
    while True:
        found = find_moving(step.model.graph, roots)
        more = {
            state
            for state, after in zip(step.states, step.nexts, strict=True)
            if after in found and state not in roots
        }
        if not more:
            return roots
        roots |= more


def _find_ends(
    step: Step, moving: Collection[ir.Value], reached: Collection[ir.Value]
) -> tuple[list[ir.Value], set[ir.Value]]:
    """Return the outputs that have a gradient in any step, and the inputs that get one."""
    found = find_moving(step.model.graph, moving)
    ends = {value for value in reached if value in found}
    while True:
        wanted = trace_gradients(ends) & set(moving)
        more = {
            after
            for state, after in zip(step.states, step.nexts, strict=True)
            if state in wanted and after not in ends
        }
        if not more:
            return [value for value in (*step.nexts, *step.shown) if value in ends], wanted
        ends |= more


def _find_products(graph: ir.Graph, held: Sequence[ir.Value]) -> list[Product]:
    """List the Gemms whose weights are in ``held`` and are read by nothing but such Gemms."""
    products = []
    for value in held:
        found = [_read_product(use.node, use.idx) for use in value.uses()]
        products += [p for p in found if p is not None] if all(found) else []
    return products


def _read_product(node: ir.Node, index: int) -> Product | None:
    alpha = node.attributes.get_float("alpha", 1.0)
    plain = alpha == 1 and not node.attributes.get_int("transA", 0)
    weights, factor = node.inputs[index], node.inputs[0]
    if node.op_type != "Gemm" or node.domain or index != 1 or not plain:
        return None
    assert weights is not None
    assert factor is not None
    return Product(
        weights=weights,
        factor=factor,
        result=node.outputs[0],
        transposed=bool(node.attributes.get_int("transB", 0)),
    )


def _part(graph: ir.Graph, value: ir.Value) -> None:
    """Have all nodes read a copy of ``value``, which then has one reader.

    The gradient builder gives two gradients the same name where a node reads a parameter twice.
    """
    copy = ir.node("Identity", [value], name=f"{value.name}/read")
    copy.outputs[0].name = f"{value.name}/read"
    copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
    producer = value.producer()
    assert producer is not None
    value.replace_all_uses_with(copy.outputs[0], replace_graph_outputs=False)
    copy.replace_input_with(0, value)
    graph.insert_after(producer, copy)


def _divide(
    step: Step,
    graph: ir.Graph,
    named: Sequence[str],
    ends: Sequence[str],
    products: Sequence[Product],
) -> DerivedStep:
    values = map_values(graph)
    given = {values[f"{name}{GRADIENT}"] for name in ends}
    gradients = {name: values[f"{name}{GRADIENT}"] for name in named}
    starts = [values[value.name or ""] for value in (*step.states, *step.rows)]
    later, varying = find_dependents(graph, given), find_dependents(graph, starts)
    backward: set[ir.Node] = set()
    stash = {values[product.factor.name or ""] for product in products}
    pending = list(gradients.values())
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in given or node in backward:
            continue
        if value in varying and value not in later and (is_float(value) or node is None):
            stash.add(value)
        elif node is not None:
            backward.add(node)
            pending.extend(list_inputs(node))
    return DerivedStep(
        graph=graph,
        backward=[node for node in graph if node in backward],
        stash=[value for value in values.values() if value in stash],
        gradients=gradients,
        products=products,
    )
