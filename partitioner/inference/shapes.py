"""Infer types and shapes with onnx's own inference, and refuse shapes that crash ONNX Runtime.

This covers every value whose type onnx's schemas define.  :mod:`inferences` infers more shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from splitonnx.errors import NotAModel
from splitonnx.partitioner.graphs.builders import known_dims, known_rank, take_input
from splitonnx.partitioner.graphs.faults import (
    attribute_errors_to_bytes,
    attribute_errors_to_pass,
)
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.workers import Refused, call

_KERNELS = {"Conv": 1, "ConvInteger": 1, "ConvTranspose": 1, "DeformConv": 1, "QLinearConv": 3}
"""Map each convolution operator to the index of the input that is its kernel."""
MOST_ALONG = 1 << 32
"""Limit of a single dimension.

onnxruntime-training 1.19.2 has loops that count up to the length of an image's dimensions.
"""
_MOST_BYTES = 1 << 10
"""Initializers with more bytes are passed to onnx without contents, which do not affect types."""
_MOST_DIMENSIONS = 32
_WINDOWED = frozenset({*_KERNELS, "AveragePool", "LpPool", "MaxPool", "MaxUnpool"})


def infer_shapes(model: ir.Model, *, check_type: bool = True) -> None:
    """Set all types and shapes that onnx can infer for a model's values, in place.

    onnx's data propagation stores each element of a vector separately, so a vector of a billion
    elements would use up all memory.  Data propagation is therefore disabled; :mod:`folds` folds
    constants instead.

    Raises:
        NotAModel: onnx infers a type that does not exist.
        NativeCrash: onnx's inference crashes on the model.
    """
    with attribute_errors_to_pass("written down"), lighten(model.graph):
        content = write_model(model).SerializeToString()
    try:
        inferred = call(natives.infer_shapes, "the model", content, check_type)
    except Refused:
        return  # a contradictory graph stays unchanged
    graphs = list(model.graphs())
    reading = attribute_errors_to_bytes(refuse_types)
    with attribute_errors_to_pass("given the types that onnx infers"), reading:
        proto = onnx.ModelProto.FromString(inferred)
        if len(graphs) == 1:
            _note_entries(model.graph, proto.graph)
            return
        found = ir.serde.deserialize_model(proto)
    for graph, typed in zip(graphs, found.graphs(), strict=False):
        _note_types(graph, typed)


def refuse_types(reason: str) -> NotAModel:
    """Return the error for a model whose inferred types cannot be read, because of ``reason``."""
    return NotAModel("the model", f"its types cannot be inferred ({reason})")


@contextmanager
def lighten(graph: ir.Graph) -> Iterator[None]:
    """Turn a graph's initializers into inputs during a ``with`` block.

    Small initializers keep their contents, large ones do not.
    """
    stored = list(graph.initializers.values())
    tensors = [value.const_value for value in stored]
    inputs = list(graph.inputs)
    for value, tensor in zip(stored, tensors, strict=True):
        if tensor is not None:
            value.shape = value.shape if value.shape is not None else ir.Shape(tensor.shape.numpy())
            value.type = value.type or ir.TensorType(tensor.dtype)
        if not value.is_graph_input():
            graph.inputs.append(value)
        if tensor is None or tensor.nbytes > _MOST_BYTES:
            value.const_value = None
            del graph.initializers[value.name or ""]
    try:
        yield
    finally:
        for value, tensor in zip(stored, tensors, strict=True):
            value.const_value = tensor
            graph.initializers[value.name or ""] = value
        graph.inputs[:] = inputs


def _note_entries(graph: ir.Graph, typed: onnx.GraphProto) -> None:
    """Set the types and shapes of a graph without bodies, as declared in its message ``typed``."""
    entries = {info.name: info.type for info in (*typed.value_info, *typed.input, *typed.output)}
    read: dict[bytes, tuple[ir.Shape | None, ir.DataType | None]] = {}
    made = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        entry = entries.get(value.name or "")
        if entry is None:
            continue
        content = entry.SerializeToString()
        if content not in read:
            kind = ir.serde.deserialize_type_proto_for_type(entry)
            shape = ir.serde.deserialize_type_proto_for_shape(entry)
            read[content] = (shape, None if kind is None else kind.dtype)
        _note_type(value, *read[content])


def _note_types(graph: ir.Graph, typed: ir.Graph) -> None:
    known = ir.convenience.create_value_mapping(typed)
    for name, value in ir.convenience.create_value_mapping(graph).items():
        found = known.get(name)
        if found is not None:
            _note_type(value, found.shape, found.dtype)


def _note_type(value: ir.Value, shape: ir.Shape | None, dtype: ir.DataType | None) -> None:
    if shape is not None and value.shape != shape:
        value.shape = shape
    if dtype is not None and value.dtype != dtype:
        value.dtype = dtype


def check_ranks(graph: ir.Graph) -> None:
    """Check the dimensions of images, kernels and outputs, and the axes of normalizations.

    A node's image and kernel must have the same number of dimensions, outputs must not have too
    many or too large dimensions, and the axis of a LayerNormalization must exist.  onnx's checker
    does not check these conditions.  If they are violated, onnxruntime-training 1.19.2 reads
    outside its vectors and crashes the process.

    Raises:
        NotAModel: a node's dimensions or axis are invalid.
    """
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None and len(value.shape) > _MOST_DIMENSIONS:
                reason = f"its output '{value.name}' would have {len(value.shape)} dimensions"
                raise NotAModel(f"node '{node.name}' ({node.op_type})", reason)
            if max((d for d in known_dims(value) or () if d is not None), default=0) > MOST_ALONG:
                reason = f"its output '{value.name}' would have a dimension beyond all memory"
                raise NotAModel(f"node '{node.name}' ({node.op_type})", reason)
        if node.domain not in ("", "ai.onnx"):
            continue
        with attribute_errors_to(node, "held against its shapes"):
            if node.op_type in _WINDOWED:
                _check_window(node)
            elif node.op_type == "LayerNormalization":
                _check_axis(node)


def _check_axis(node: ir.Node) -> None:
    rank, axis = known_rank(take_input(node)), node.attributes.get_int("axis", -1)
    if rank is not None and not -rank <= axis < rank:
        raise NotAModel(
            f"node '{node.name}' ({node.op_type})", f"its input of rank {rank} has no axis {axis}"
        )


def _check_window(node: ir.Node) -> None:
    image, place = node.inputs[0], _KERNELS.get(node.op_type)
    kernel = node.inputs[place] if place is not None else None
    ranks = [len(v.shape) for v in (image, kernel) if v is not None and v.shape is not None]
    for name, share in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 2)):
        values = node.attributes.get_ints(name, [])
        if values:
            ranks.append(len(values) // share + 2)
    if len(set(ranks)) > 1 or any(rank < 3 for rank in ranks):
        raise NotAModel(
            f"node '{node.name}' ({node.op_type})",
            f"its images, kernel and attributes are of {sorted(set(ranks))} dimensions",
        )
    dims = known_dims(kernel) if kernel is not None else None
    if dims is not None and 0 in dims:
        raise NotAModel(f"node '{node.name}' ({node.op_type})", "its kernel is empty")
