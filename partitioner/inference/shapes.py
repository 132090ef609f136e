"""Infer types and shapes with onnx's own inference, and refuse shapes that crash ONNX Runtime.

This covers every value whose type onnx's schemas define.  :mod:`inferences` infers more shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from splitonnx.errors import NotAModel
from splitonnx.operators import EINSUM
from splitonnx.partitioner.graphs.builders import known_dims, known_rank, take_input
from splitonnx.partitioner.graphs.faults import (
    attribute_errors_to_bytes,
    attribute_errors_to_pass,
)
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.inference.dimensions import name_unknown, parse_dim
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.inference.shape_rules import Dims, spread_operands
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
_SKIPPED = "splitonnx.skipped"
"""The domain of nodes that onnx's inference skips."""
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
        inferred = infer_message(content, check_type=check_type)
    except Refused:
        return  # a contradictory graph stays unchanged
    graphs = list(model.graphs())
    reading = attribute_errors_to_bytes(refuse_types)
    with attribute_errors_to_pass("given the types that onnx infers"), reading:
        proto = onnx.ModelProto.FromString(inferred)
        if b"Sequence" in inferred:
            _forget_elements(proto.graph)
        if len(graphs) == 1:
            _note_entries(model.graph, proto.graph)
            return
        found = ir.serde.deserialize_model(proto)
    for graph, typed in zip(graphs, found.graphs(), strict=False):
        _note_types(graph, typed)


def infer_message(content: bytes, *, check_type: bool) -> bytes:
    """Return a model with the types and shapes that onnx infers, except for Einsum.

    onnx takes the size of the first operand of an Einsum where operands are broadcast.  The result
    of such a node therefore gets its shape from :mod:`shape_rules`, and onnx infers the rest anew.

    Raises:
        Refused: onnx cannot infer the shapes.
        NativeCrash: onnx's inference crashes on the model.
    """
    made: bytes = call(natives.infer_shapes, "the model", content, check_type)
    if EINSUM.encode() not in content:
        return made
    given = onnx.ModelProto.FromString(content)
    declared = _list_types(given.graph)
    corrected: Mapping[str, Dims] = {}
    for _ in range(1 + content.count(EINSUM.encode())):  # each round completes one more node
        typed = onnx.ModelProto.FromString(made)
        found = {**corrected, **_correct_einsums(typed.graph, declared)}
        if found == corrected:
            break
        corrected = found
        model = onnx.ModelProto.FromString(content)
        model.opset_import.append(onnx.helper.make_opsetid(_SKIPPED, 1))
        _write_dims(model.graph, corrected, _list_types(typed.graph))
        made = call(natives.infer_shapes, "the model", model.SerializeToString(), check_type)
    return made


def _forget_elements(graph: onnx.GraphProto) -> None:
    """Forget sizes that have a name only as a size of a sequence's elements, in place.

    Elements may differ in this size, but onnx gives its name to whatever is taken out of the
    sequence, as if it were the same for all.
    """
    infos = [
        info
        for each in _list_graphs(graph)
        for info in (*each.value_info, *each.input, *each.output)
    ]
    elements = [info.type.sequence_type.elem_type for info in infos]
    dims = [dim for kind in elements for dim in kind.tensor_type.shape.dim]
    named = {dim.dim_param for info in graph.input for dim in info.type.tensor_type.shape.dim}
    forgotten = {dim.dim_param for dim in dims} - named - {""}
    for dim in (*dims, *(dim for info in infos for dim in info.type.tensor_type.shape.dim)):
        if dim.dim_param in forgotten:
            dim.Clear()


def _list_graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """List a graph and the bodies of its nodes, also the nested ones."""
    bodies = [
        body
        for node in graph.node
        for attribute in node.attribute
        for body in (attribute.g, *attribute.graphs)
        if body.node
    ]
    return [graph, *(inner for body in bodies for inner in _list_graphs(body))]


def _list_types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    return {
        info.name: info.type
        for each in _list_graphs(graph)
        for info in (*each.value_info, *each.input, *each.output)
    } | {
        tensor.name: onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        for each in _list_graphs(graph)
        for tensor in each.initializer
    }


def _list_dims(kind: onnx.TypeProto | None) -> list[int | str | None] | None:
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in kind.tensor_type.shape.dim
    ]


def _correct_einsums(
    graph: onnx.GraphProto, declared: Mapping[str, onnx.TypeProto]
) -> dict[str, Dims]:
    """Return the right shapes of the results of Einsum whose inferred ones are not right."""
    types = _list_types(graph)
    corrected: dict[str, Dims] = {}
    for node in (node for each in _list_graphs(graph) for node in each.node):
        if node.op_type != EINSUM or node.domain not in ("", "ai.onnx", _SKIPPED):
            continue
        shapes: list[Dims | None] = []
        for name in node.input:
            dims = _list_dims(types.get(name))
            named = enumerate(dims or ())
            shape = [
                d if isinstance(d, int) else parse_dim(d) if d else name_unknown(name, axis)
                for axis, d in named
            ]
            shapes.append(None if dims is None else shape)
        equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
        result = node.output[0]
        noted = _list_dims(declared.get(result)) or []
        right = spread_operands(equation, shapes, noted, result)
        own = _list_dims(types.get(result))
        if right is not None and own != [d if isinstance(d, int) else str(d) for d in right]:
            corrected[result] = right
    return corrected


def _write_dims(
    graph: onnx.GraphProto, corrected: Mapping[str, Dims], types: Mapping[str, onnx.TypeProto]
) -> None:
    """Declare the results in ``corrected``, and have onnx's inference skip their nodes."""
    for each in _list_graphs(graph):
        outputs = {info.name: info for info in (*each.value_info, *each.output)}
        for node in each.node:
            if node.op_type != EINSUM or node.output[0] not in corrected:
                continue
            name, first = node.output[0], types[node.input[0]]
            node.domain = _SKIPPED
            dims = [d if isinstance(d, int) else str(d) for d in corrected[name]]
            kind = onnx.helper.make_tensor_type_proto(first.tensor_type.elem_type, dims)
            info = outputs[name] if name in outputs else each.value_info.add(name=name)
            info.type.CopyFrom(kind)


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
    read: dict[bytes, tuple[ir.Shape | None, ir.TypeProtocol | None]] = {}
    made = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        entry = entries.get(value.name or "")
        if entry is None:
            continue
        content = entry.SerializeToString()
        if content not in read:
            kind = ir.serde.deserialize_type_proto_for_type(entry)
            shape = ir.serde.deserialize_type_proto_for_shape(entry)
            read[content] = (shape, kind)
        _note_type(value, *read[content])


def _note_types(graph: ir.Graph, typed: ir.Graph) -> None:
    known = ir.convenience.create_value_mapping(typed)
    for name, value in ir.convenience.create_value_mapping(graph).items():
        found = known.get(name)
        if found is not None:
            _note_type(value, found.shape, found.type)


def _note_type(value: ir.Value, shape: ir.Shape | None, kind: ir.TypeProtocol | None) -> None:
    if shape is not None and value.shape != shape:
        value.shape = shape
    if kind is None or value.type == kind:
        return
    if isinstance(kind, ir.TensorType):
        value.dtype = kind.dtype
    else:
        value.type = copy.deepcopy(kind)  # of a sequence: setting dtype would make it a tensor


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
