"""Supply the gradient of a broadcast that is only decided when the model runs.

If an axis of an operand has another symbolic size than the result, the operand may be repeated
along the axis: its size there is then 1.  onnxruntime-training 1.19.2 assumes that it is not.  The
gradient that it builds has the size of the result, so it is wrong, and kernels write beyond the
memory that was planned for it.  For such an operand, the node reads a hidden copy, whose gradient
is summed over all axes of size 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
import onnx_ir as ir

from splitonnx.partitioner.differentiation.derived.supplied_gradients import (
    GRADIENT,
    SuppliedGradients,
    add_argument,
    write_nodes,
)
from splitonnx.partitioner.graphs.builders import HIDDEN, NodeBuilder, insert_copy, take_input
from splitonnx.partitioner.graphs.traversals import find_moving, trace_gradients

_OPERANDS = {
    "Add": (0, 1),
    "Div": (0, 1),
    "Expand": (0,),
    "Gemm": (2,),
    "MatMul": (0, 1),
    "Max": None,
    "Min": None,
    "Mul": (0, 1),
    "Pow": (0, 1),
    "Sub": (0, 1),
    "Sum": None,
    "Where": (1, 2),
}
"""The inputs of each operator that are broadcast to the shape of the output; ``None`` means all."""


def supply_broadcasts(
    graph: ir.Graph, parameters: Collection[str], ends: Collection[str]
) -> SuppliedGradients:
    """Insert a hidden copy where a gradient passes an operand that may be repeated.

    ``parameters`` names the values whose gradients are wanted, and ``ends`` those that gradients
    start from.  ``graph`` is changed.  Each copy has the sizes that its operand is repeated to, and
    :func:`remove_copies` removes it after the gradients were built.
    """
    named = [value for node in graph for value in node.outputs] + list(graph.inputs)
    moving = find_moving(graph, [value for value in named if value.name in parameters])
    reached = trace_gradients(value for value in named if value.name in ends)
    nodes: list[onnx.NodeProto] = []
    results: list[str] = []
    arguments: list[str] = []
    for node, index, shape in [*_list_uncertain(graph, moving, reached)]:
        source = take_input(node, index)
        name = f"{source.name}/repeated/{node.outputs[0].name}/{index}"
        copy = insert_copy(graph, node, index, name)
        copy.shape = shape
        hidden = copy.producer()
        assert hidden is not None
        hidden.metadata_props[HIDDEN] = "1"
        builder = NodeBuilder(f"{copy.name}/sum")
        total = _sum(builder, copy, len(shape) - len(source.shape or ()))
        total.name = f"{copy.name}/argument{GRADIENT}"
        arguments.append(add_argument(graph, source, total))
        results.append(copy.name or "")
        nodes += write_nodes(builder.nodes)
    return SuppliedGradients(nodes=nodes, results=results, arguments=arguments)


def remove_copies(graph: ir.Graph, names: Collection[str]) -> None:
    """Replace each copy in ``names`` by what it copies."""
    for node in [node for node in graph if node.outputs and node.outputs[0].name in names]:
        (source,), (copy,) = node.inputs, node.outputs
        assert source is not None
        copy.replace_all_uses_with(source)
        graph.remove(node, safe=True)


def _sum(builder: NodeBuilder, copy: ir.Value, more: int) -> ir.Value:
    """Sum the gradient of a repeated operand; the result of its node has ``more`` axes."""
    repeated = ir.Value(name=f"{copy.name}{GRADIENT}", type=copy.type)
    is_one = builder.op("Equal", builder.op("Shape", copy), builder.integers([1]))
    own = builder.integers(range(more, len(copy.shape or ())))
    axes = builder.op("Compress", own, is_one, axis=0)
    if not more:
        return builder.op("ReduceSum", repeated, axes, keepdims=1, noop_with_empty_axes=1)
    first = builder.integers(range(more))
    axes = builder.op("Concat", first, axes, axis=0)
    return builder.op("Squeeze", builder.op("ReduceSum", repeated, axes, keepdims=1), first)


def _list_uncertain(
    graph: ir.Graph, moving: Collection[ir.Value], reached: Collection[ir.Value]
) -> Iterator[tuple[ir.Node, int, ir.Shape]]:
    """Yield each operand that may be repeated, with the shape of its copy."""
    for node in graph:
        if node.domain or node.op_type not in _OPERANDS or node.outputs[0] not in reached:
            continue
        operands = _OPERANDS[node.op_type]
        for index in range(len(node.inputs)) if operands is None else operands:
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None or value not in moving:
                continue
            shape = _repeat(value.shape, node.outputs[0].shape, node.op_type == "MatMul")
            if shape is not None:
                yield node, index, shape


def _repeat(own: ir.Shape | None, result: ir.Shape | None, is_product: bool) -> ir.Shape | None:
    """Return the shape that an operand is repeated to, or ``None`` if it surely is not repeated.

    The last two axes of a matrix product are not repeated.
    """
    if own is None or result is None:
        return None
    count = len(own) - (min(2, len(own)) if is_product else 0)
    shift = len(result) - len(own)
    pairs = zip(own[:count], result[shift:], strict=False)
    if all(isinstance(here, int) or (here.value and here == there) for here, there in pairs):
        return None
    return ir.Shape([*result[: shift + count], *own[count:]])
