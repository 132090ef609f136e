"""Make explicit what operators leave to be guessed of their operands: no axes, scalars, broadcasts.

If a reduction has no axes but ``noop_with_empty_axes`` is set, it still applies its function to
each element: ReduceL1 computes absolute values and ReduceLogSum computes logarithms (see
ReduceSum-13 and related operators at onnx.ai/onnx/operators).  However, onnxruntime 1.19.2 only
copies the input, or fails if the ``axes`` input is missing.  Such a reduction is therefore replaced
by the operator that computes its function, for example Abs for ReduceL1.

Inputs that list axes must be vectors, but some exporters write a single axis as a scalar.  ONNX
Runtime accepts such a scalar for some operators but not for others, possibly including operators of
the gradient graph.  The scalars are therefore replaced by vectors.

The scale and the bias of a LayerNormalization may be broadcast to its input
(LayerNormalization-17 at onnx.ai/onnx/operators).  onnxruntime 1.19.2 takes only as many numbers as
are normalized together, and reads these in order, whatever their shape.  A scale or a bias that is
broadcast is therefore applied after the normalization.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import (
    NodeBuilder,
    known_array,
    known_dims,
    take_inputs,
)
from splitonnx.partitioner.graphs.traversals import list_bodies

_REMAINDERS = {
    "ReduceL1": "Abs",
    "ReduceL2": "Abs",
    "ReduceLogSum": "Log",
    "ReduceLogSumExp": "Identity",
    "ReduceMax": "Identity",
    "ReduceMean": "Identity",
    "ReduceMin": "Identity",
    "ReduceProd": "Identity",
    "ReduceSum": "Identity",
    "ReduceSumSquare": "Mul",
}
"""Maps a reduction to the operator that it applies to a single element."""


_AXES = {
    "Pad": (3,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    **dict.fromkeys(_REMAINDERS, (1,)),
}
"""Maps operators to their inputs that are vectors of axes, or of one number per axis."""


def make_axes_vectors(graph: ir.Graph) -> bool:
    """Convert scalars to vectors with one element, where an operator takes one number per axis.

    Such inputs are, for example, the axes of a Squeeze and the starts of a Slice.  Nodes in
    subgraph bodies are changed as well.  Return whether any input was converted.
    """
    found = False
    for node in list(graph):
        for body in list_bodies(node):
            found |= make_axes_vectors(body)
        for index in _AXES.get(node.op_type, ()) if not node.domain else ():
            axes = node.inputs[index] if index < len(node.inputs) else None
            if axes is not None and _is_scalar(axes):
                builder = NodeBuilder(f"{node.outputs[0].name}/axes{index}")
                vector = builder.op("Reshape", axes, builder.integers([1]))
                graph.insert_before(node, builder.nodes)
                node.replace_input_with(index, vector)
                found = True
    return found


def _is_scalar(value: ir.Value) -> bool:
    tensor = value.const_value
    shape = value.shape if tensor is None else tensor.shape
    return shape is not None and len(shape) == 0


def make_reductions_explicit(graph: ir.Graph) -> None:
    """Replace each reduction over no axes with an elementwise operator, such as Abs for ReduceL1.

    A reduction is replaced if it has no axes and ``noop_with_empty_axes`` is set.  Other reductions
    are left unchanged.  Nodes in subgraph bodies are changed as well.
    """
    for node in list(graph):
        for body in list_bodies(node):
            make_reductions_explicit(body)
        kind = None if node.domain else _REMAINDERS.get(node.op_type)
        x = node.inputs[0] if kind else None
        if kind is None or x is None or not _reduces_nothing(node):
            continue
        builder = NodeBuilder(f"{node.outputs[0].name}/explicit")
        builder.replace(node, [builder.op(kind, x, *([x] if kind == "Mul" else []))])


def _reduces_nothing(node: ir.Node) -> bool:
    if not node.attributes.get_int("noop_with_empty_axes", 0):
        return False
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    array = known_array(axes)
    return axes is None or (array is not None and array.size == 0)


def separate_broadcast_scales(graph: ir.Graph) -> None:
    """Apply the scale and the bias of a LayerNormalization after it where they are broadcast.

    Nodes in subgraph bodies are changed as well.  A node is left unchanged if its sizes are not
    known, but not if a size is 1 that may have to be broadcast.
    """
    for node in list(graph):
        for body in list_bodies(node):
            separate_broadcast_scales(body)
        if node.op_type == "LayerNormalization" and not node.domain:
            _separate_scale(node)


def _separate_scale(node: ir.Node) -> None:
    x, scale = take_inputs(node, 2)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    dims = known_dims(x)
    if dims is None:
        return
    axis = node.attributes.get_int("axis", -1) % len(dims)
    is_full = _is_full(scale, dims[axis:])
    if is_full and (bias is None or _is_full(bias, dims[axis:])):
        return
    builder = NodeBuilder(f"{node.outputs[0].name}/scaled")
    inner = scale
    if not is_full:
        inner = builder.op("Expand", builder.number(1.0, scale.dtype), builder.shape(x, axis))
    attributes = dict(node.attributes)
    made, *rest = builder.ops("LayerNormalization", [x, inner], len(node.outputs), attributes)
    made = made if is_full else builder.op("Mul", made, scale)
    made = made if bias is None else builder.op("Add", made, bias)
    builder.replace(node, [made, *rest])


def _is_full(operand: ir.Value, sizes: Sequence[int | None]) -> bool:
    """Return whether an operand has one number for each that is normalized; unknown sizes fit."""
    dims = known_dims(operand)
    if dims is None:
        return True
    while len(dims) > len(sizes) and dims[0] == 1:
        dims = dims[1:]
    if len(dims) != len(sizes):
        return False
    pairs = zip(dims, sizes, strict=True)
    return all(own == size or (own != 1 and None in (own, size)) for own, size in pairs)
