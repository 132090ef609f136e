"""Train models with 16-bit or 64-bit floats in float32, and merge them in their original type.

onnxruntime has hardly any gradient kernels for 16-bit floats, and a 16-bit update is lost if it is
small compared with the weight.  Therefore, both forms of a model, for training and for prediction,
are converted to float32.  This includes their weights, which become the master weights.  The
skeleton, from which the trained model is merged later, keeps its types, and the weights are rounded
to these types when they are restored.

A float64 model is converted only if its weights are float64; if they are float32, its float64
operations are kept.  This module deals with types; the only operators that it knows are those with
an attribute that specifies a type.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import list_bodies

_NARROW = frozenset({ir.DataType.BFLOAT16, ir.DataType.FLOAT16})
_TYPE_ATTRIBUTES = (
    "dtype", "output_dtype", "precision", "softmax_precision", "stash_type", "to",
)  # fmt: skip
_ACCEPTED = frozenset({ir.DataType.DOUBLE, ir.DataType.FLOAT16})
"""Data types that the runtime can pass to the graph, which then casts them."""


def replace_null_casts(graph: ir.Graph) -> None:
    """Make an Identity of each Cast to the type that its input has, in bodies as well.

    Functions of opsets that are written out have such nodes.  A session of ONNX Runtime 1.19 that
    does not optimize refuses those of float16: it removes casts around operators that it computes
    in float32, and leaves the type of such a Cast.
    """
    for node in list(graph):
        for body in list_bodies(node):
            replace_null_casts(body)
        source = node.inputs[0] if node.op_type == "Cast" and not node.domain else None
        if source is None or source.dtype is None:
            continue
        if node.attributes.get_int("to", 0) == source.dtype.value:
            node.op_type = "Identity"
            node.attributes.clear()


@attribute_errors_to_pass("brought to float32")
def widen(
    forms: Sequence[ir.Model], weights: Mapping[str, ir.TensorProtocol]
) -> Mapping[str, ir.TensorProtocol]:
    """Convert the training and prediction forms of a model to float32, and return their weights.

    The forms are changed in place, and names stay unchanged.  The returned weights are float32; if
    nothing needs to be converted, ``weights`` itself is returned.

    Data inputs of type float16 and float64 keep their type; the graph casts them.  Data inputs of
    type bfloat16 become float32, because numpy has no bfloat16.

    Raises:
        UnsupportedModel: a data input has a type that no runtime supports (float8, 4 bits).
    """
    dtypes = {tensor.dtype for tensor in weights.values()}
    replaced = _NARROW | (dtypes & {ir.DataType.DOUBLE})
    changed = False
    for form in forms:
        _refuse_inputs(form.graph)
        for value in list(form.graph.inputs):
            if value.name not in weights and value.dtype in replaced & _ACCEPTED:
                _cast_input(form.graph, value)
        kept = {v for v in form.graph.inputs if v.name not in weights and v.dtype in _ACCEPTED}
        changed |= _retype_graph(form.graph, replaced, kept)
    if not changed:
        return weights
    return {
        name: ir.tensor(_convert(tensor), name=name) if tensor.dtype in replaced else tensor
        for name, tensor in weights.items()
    }


def _refuse_inputs(graph: ir.Graph) -> None:
    for value in graph.inputs:
        dtype = value.dtype
        if dtype in (None, ir.DataType.STRING, ir.DataType.UNDEFINED):
            continue
        if dtype.bitwidth < 8 or dtype.name.startswith("FLOAT8"):
            raise UnsupportedModel(
                f"input '{value.name}'",
                f"it is of type {dtype}, which cannot be fed",
                "export the model with inputs of float32, float16 or whole bytes",
            )


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    builder = NodeBuilder(f"{value.name}/wide")
    used = value.uses()
    cast = builder.op("Cast", value, to=ir.DataType.FLOAT.value)
    cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    for use in used:
        use.node.replace_input_with(use.idx, cast)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = cast
    first = next(iter(graph), None)
    if first is None:  # the outputs are inputs and constants
        graph.extend(builder.nodes)
    else:
        graph.insert_before(first, builder.nodes)


def _retype_graph(
    graph: ir.Graph, replaced: Collection[ir.DataType], kept: Collection[ir.Value]
) -> bool:
    """Change the types in a graph and its bodies; return whether any type was changed."""
    values = [value for value in graph.inputs if value not in kept]
    values += graph.initializers.values()
    changed = False
    for node in graph:
        values += node.outputs
        changed |= _retype_attributes(node, replaced)
        for body in list_bodies(node):
            changed |= _retype_graph(body, replaced, ())
    for value in values:
        if value.const_value is not None and value.const_value.dtype in replaced:
            value.const_value = ir.tensor(_convert(value.const_value), name=value.name)
        if value.type is not None and value.dtype in replaced:
            value.type = _retype(value.type, replaced)
            changed = True
    return changed


def _retype_attributes(node: ir.Node, replaced: Collection[ir.DataType]) -> bool:
    if not node.attributes:
        return False
    changed = False
    numbers = {dtype.value for dtype in replaced}
    for name, attribute in list(node.attributes.items()):
        if attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in replaced:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(_convert(tensor)))
                changed = True
        elif (
            name in _TYPE_ATTRIBUTES
            and attribute.type is ir.AttributeType.INT
            and attribute.as_int() in numbers
        ):
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
            changed = True
    return changed


def _retype(kind: ir.TypeProtocol, replaced: Collection[ir.DataType]) -> ir.TypeProtocol:
    if kind.dtype not in replaced:
        return kind
    if isinstance(kind, ir.SequenceType):
        return ir.SequenceType(_retype(kind.elem_type, replaced))
    if isinstance(kind, ir.OptionalType):
        return ir.OptionalType(_retype(kind.elem_type, replaced))
    return ir.TensorType(ir.DataType.FLOAT)


def _convert(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return a tensor in float32; finite numbers beyond the range become the largest number."""
    array = tensor.numpy()
    if tensor.dtype is ir.DataType.DOUBLE:
        most = np.finfo(np.float32).max
        array = np.where(np.isfinite(array), np.clip(array, -most, most), array)
    return array.astype(np.float32)
