"""Differentiate a body, and divide the result into a forward and a backward step.

The body of a Scan or Loop, or a branch of an If, becomes a model of its own, which is
differentiated like any other.  What depends on gradients is the backward step; the rest is the
forward step.  The forward step of a Scan or Loop also shows the values that the backward step
reads.  The backward step computes again only what cannot be stacked, because its shape may differ
from step to step.  The backward step of a branch computes again whatever it reads, so that the If
itself stays as it is.

The weights of a product, a Gemm or MatMul, are the same in every step.  Their gradient is one
product of the stacked values of all steps, which is faster than a sum of one product per step.
Therefore the backward step computes only the gradient of the output of such a product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from splitonnx.expressions import UNKNOWN
from splitonnx.partitioner.differentiation.control_flow.fixed_shapes import FixedShapes
from splitonnx.partitioner.differentiation.control_flow.obstacles import (
    list_undifferentiable,
    note_carried_shapes,
)
from splitonnx.partitioner.differentiation.derived.derivations import add_gradients
from splitonnx.partitioner.differentiation.derived.kept_outputs import name_kept_outputs
from splitonnx.partitioner.differentiation.derived.supplied_gradients import (
    GRADIENT,
    SuppliedGradients,
)
from splitonnx.partitioner.graphs.bodies import copy_body
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, known_rank
from splitonnx.partitioner.graphs.traversals import (
    find_dependents,
    find_moving,
    is_float,
    list_bodies,
    list_inner,
    list_inputs,
    map_values,
    trace_gradients,
)
from splitonnx.partitioner.inference.folds import note_body_shapes
from splitonnx.partitioner.inference.inferences import Inference
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.normalization.batchnorms import freeze_batchnorms, list_batchnorms
from splitonnx.partitioner.normalization.dropouts import list_dropouts, remove_dropouts
from splitonnx.partitioner.rewrites import rewrite

Supply = Callable[[ir.Model, Collection[str], Collection[str]], SuppliedGradients]
"""Writes the gradients of the Scan, Loop and If nodes of a model (:func:`supply_gradients`)."""

_COPIED = 1024
"""The most elements of a constant around a body that is copied into the step."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The body of a Scan or Loop, or a branch of an If, as a model of its own.

    ``states`` and ``rows`` are the graph's inputs for the states and for the step's row of each
    sequence.  ``counted`` are the first two inputs of a Loop's body: the number of the iteration,
    and the condition.  ``held`` maps each further input to the value around the node that it stands
    for.  ``nexts`` and ``shown`` are the graph's outputs: the next states, and the row of each
    sequence that the node computes.  ``again`` is the condition that a Loop's body computes.
    """

    model: ir.Model
    states: Sequence[ir.Value] = ()
    rows: Sequence[ir.Value] = ()
    counted: Sequence[ir.Value] = ()
    held: Mapping[ir.Value, ir.Value]
    nexts: Sequence[ir.Value] = ()
    shown: Sequence[ir.Value]
    again: Sequence[ir.Value] = ()

    @property
    def given(self) -> list[ir.Value]:
        """The inputs that the body itself has, in the order in which a body is written."""
        return [*self.counted, *self.states, *self.rows]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of a step with held weights, whose gradient is computed for all steps at once.

    ``weights`` is the input that holds the weights, ``factor`` is what they are multiplied with,
    and ``result`` is the output.  ``transposed`` is the attribute ``transB`` of a Gemm.
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
    """Return the body of a Scan or Loop as a model; all of its names begin with ``prefix``."""
    (body,) = list_bodies(node)
    opened = _open(body, prefix, opsets, ir_version)
    inputs, outputs = opened.rows, opened.shown
    counted = 2 if node.op_type == "Loop" else 0
    end = len(body.inputs) - node.attributes.get_int("num_scan_inputs", 0)
    first = 1 if counted else 0
    last = first + end - counted
    return replace(
        opened,
        counted=inputs[:counted],
        states=inputs[counted:end],
        rows=inputs[end:],
        again=outputs[:first],
        nexts=outputs[first:last],
        shown=outputs[last:],
    )


def open_branch(body: ir.Graph, prefix: str, opsets: Mapping[str, int], ir_version: int) -> Step:
    """Return a branch of an If as a model; all of its names begin with ``prefix``."""
    return _open(body, prefix, opsets, ir_version)


def _open(body: ir.Graph, prefix: str, opsets: Mapping[str, int], ir_version: int) -> Step:
    """Return a body as a model, with all inputs of the body as rows."""
    inputs = [
        ir.Value(name=f"{prefix}/{i}", type=value.type, shape=value.shape)
        for i, value in enumerate(body.inputs)
    ]
    nodes, results = copy_body(body, f"{prefix}/body", inputs)
    outputs = [_copy(nodes, value, f"{prefix}/result/{i}") for i, value in enumerate(results)]
    held = _replace_held(nodes, prefix)
    note_carried_shapes(nodes)
    for value, given in zip(outputs, body.outputs, strict=True):
        value.type, value.shape = given.type, given.shape
    graph = ir.Graph(
        [*inputs, *held], outputs, nodes=nodes, opset_imports=dict(opsets), name=prefix
    )
    model = ir.Model(graph, ir_version=ir_version)
    infer_shapes(model)
    if list_dropouts(graph) or list_batchnorms(graph):
        remove_dropouts(graph)
        freeze_batchnorms(graph)
        infer_shapes(model)
    note_body_shapes(graph, Inference(opsets[""]))
    return Step(model=model, rows=inputs, held=held, shown=outputs)


def _replace_held(nodes: list[ir.Node], prefix: str) -> dict[ir.Value, ir.Value]:
    """Replace each value that the nodes read from around the body by an input of the step.

    Small constants are copied into the step, since some operators need to know them.
    """
    made = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in list_inputs(node))
    constants = NodeBuilder(f"{prefix}/constant")
    known: dict[ir.Value, ir.Value] = {}
    held: dict[ir.Value, ir.Value] = {}
    for value in read:
        if value in made or (_name(value)).startswith(f"{prefix}/"):
            continue
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None and tensor.size <= _COPIED:
            known[value] = constants.tensor(tensor)
            continue
        name = f"{prefix}/held/{len(held)}"
        known[value] = ir.Value(name=name, type=value.type, shape=value.shape)
        held[known[value]] = value
    for reader in [inner for node in nodes for inner in (node, *list_inner(node))]:
        for index, argument in enumerate(reader.inputs):
            if argument in known:
                reader.replace_input_with(index, known[argument])
    nodes[:0] = constants.nodes
    return held


def _copy(nodes: list[ir.Node], value: ir.Value, name: str) -> ir.Value:
    node = ir.node("Identity", [value], name=name)
    node.outputs[0].name = name
    nodes.append(node)
    return node.outputs[0]


def differentiate_step(
    step: Step, moving: Collection[ir.Value], reached: Collection[ir.Value], supply: Supply
) -> DerivedStep:
    """Differentiate a step.

    ``moving`` holds the inputs of the step that depend on trained parameters at its start, and
    ``reached`` the outputs whose gradients are given from around the node.  ``supply`` writes the
    gradients of the control flow inside.  The model of ``step`` is changed and must not be used
    afterwards.

    Raises:
        NotDifferentiable: a node of the step has no gradient.
    """
    graph = step.model.graph
    moved = _find_moving(step, moving)
    ends, wanted = _find_ends(step, moved, reached)
    rewrite(step.model, [_name(value) for value in moved])
    if name_kept_outputs(graph):
        infer_shapes(step.model)
    fixed = FixedShapes(graph, [*step.given, *step.held])
    weights = [value for value in step.held if value in wanted and step.given]
    products = _find_products(graph, weights, fixed)
    for product in products:
        _part(graph, product.result)
    wanted -= {product.weights for product in products}
    named = [value for value in (*step.states, *step.rows, *step.held) if value in wanted]
    named += [product.result for product in products]
    for value in ends:
        gradient = ir.Value(name=f"{value.name}{GRADIENT}", type=value.type, shape=value.shape)
        graph.inputs.append(gradient)
    graph.outputs.extend(v for p in products for v in (p.result, p.factor) if v.producer())
    names, targets = [_name(value) for value in named], [_name(value) for value in ends]
    for fault in list_undifferentiable(graph, names, targets):
        raise fault
    supplied = supply(step.model, names, targets)
    derived = add_gradients(step.model, names, targets, supplied).graph
    _forget_unknown(derived)
    return _divide(step, derived, names, targets, products, fixed)


def _forget_unknown(graph: ir.Graph) -> None:
    """Remove the names of unknown sizes from all shapes of a step's graph.

    ONNX Runtime numbers them anew in each graph.  In a body, it would take them for sizes of the
    graph around it that have the same names.
    """
    values = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *values):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape(
                [None if isinstance(dim, str) and UNKNOWN in dim else dim for dim in dims]
            )


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


def _find_products(graph: ir.Graph, held: Sequence[ir.Value], fixed: FixedShapes) -> list[Product]:
    """List the Gemms whose weights are in ``held`` and are read by nothing but such Gemms."""
    products = []
    for value in held:
        found = [_read_product(graph, use.node, use.idx, fixed) for use in value.uses()]
        products += [p for p in found if p is not None] if all(found) else []
    return products


def _read_product(graph: ir.Graph, node: ir.Node, index: int, fixed: FixedShapes) -> Product | None:
    alpha = node.attributes.get_float("alpha", 1.0)
    plain = alpha == 1 and not node.attributes.get_int("transA", 0)
    if node.op_type not in ("Gemm", "MatMul") or node.domain or index != 1 or not plain:
        return None
    weights, factor = node.inputs[index], node.inputs[0]
    assert weights is not None
    assert factor is not None
    inside = node.graph is not graph  # in the body of another node
    if inside or known_rank(weights) != 2 or not _has_size(factor, node.outputs[0]):
        return None
    if factor not in fixed and factor.producer() is not None:  # it cannot be stacked
        return None
    return Product(
        weights=weights,
        factor=factor,
        result=node.outputs[0],
        transposed=bool(node.attributes.get_int("transB", 0)),
    )


def _has_size(*values: ir.Value) -> bool:
    """Return whether the size of the last axis of each value is known.

    Without it, the size is lost where a Loop runs no iteration, since nothing is stacked then.
    """
    dims = [known_dims(value) for value in values]
    return all(known and known[-1] is not None for known in dims)


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
    fixed: FixedShapes,
) -> DerivedStep:
    values = map_values(graph)
    given = {values[f"{name}{GRADIENT}"] for name in ends}
    gradients = {name: values[f"{name}{GRADIENT}"] for name in named}
    starts = [values[_name(value)] for value in step.given]
    later, varying = find_dependents(graph, given), find_dependents(graph, starts)
    backward: set[ir.Node] = set()
    stash = {values[_name(product.factor)] for product in products}
    pending = list(gradients.values())
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in given or node in backward:
            continue
        if value in varying and value not in later and _is_kept(value, fixed):
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


def _is_kept(value: ir.Value, fixed: FixedShapes) -> bool:
    """Return whether the backward step is given a value instead of computing it again.

    A value whose shape may differ from step to step is computed again.  So are integers and
    booleans, from floats that are kept, unless a loop makes them.
    """
    node = value.producer()
    if node is None:
        return True
    return value in fixed and (is_float(value) or bool(list_bodies(node)))


def _name(value: ir.Value) -> str:
    return value.name or ""
