"""Check a model's names, strings and declared types.

Names must be printable, unique, and defined before they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import onnx_ir as ir
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
)

from splitonnx.errors import NotAModel, UnsupportedModel
from splitonnx.graph_limits import MODEL
from splitonnx.partitioner.gate.walks import (
    label_node,
    list_all_nodes,
    list_bodies,
    list_graphs,
    list_tensors,
)
from splitonnx.partitioner.inference.shapes import MOST_ALONG

_Described = NodeProto | GraphProto | ValueInfoProto | TensorProto | FunctionProto | ModelProto

_OWN_NOTES = "splitonnx."
"""The beginning of the keys of entries in the metadata that this package reads."""
_DTYPES = frozenset(dtype.value for dtype in ir.DataType)


def check_texts(model: ModelProto, label: str) -> None:
    """Check that every name is printable and short, and that other strings are valid UTF-8.

    Raises:
        NotAModel: a name contains a line break or another control character, or is too long; a
            string is not UTF-8.
        UnsupportedModel: a string is too long.
    """
    check = partial(_check_text, label=label)
    free = partial(_check_free_text, label=label)
    for node in list_all_nodes(model):
        check((node.op_type, node.domain, node.name, node.overload, *node.input, *node.output))
        free(node)
        for attribute in node.attribute:
            check((attribute.name, attribute.ref_attr_name))
            if not isinstance(attribute.doc_string, str):
                raise NotAModel(label, "it holds text that is not UTF-8")
    for graph in list_graphs(model):
        free(graph)
        for value in (*graph.input, *graph.output, *graph.value_info):
            check((value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim)))
            free(value)
    for tensor in list_tensors(model):
        check((tensor.name, *(text for e in tensor.external_data for text in (e.key, e.value))))
        free(tensor)
    for function in model.functions:
        check((function.name, function.domain, function.overload, *function.input))
        check((*function.output, *function.attribute))
        check([attribute.name for attribute in function.attribute_proto])
        free(function)
    check([entry.domain for entry in model.opset_import])
    check((model.producer_name, model.producer_version, model.domain))
    own = [e.key for e in model.metadata_props if e.key.startswith(_OWN_NOTES)]
    if twice := next((key for key in own if own.count(key) > 1), ""):
        raise NotAModel(label, f"its metadata have the entry {twice[:80]!a} twice")
    free(model)


def _check_text(names: Iterable[str], label: str) -> None:
    for name in names:
        if not isinstance(name, str):  # protobuf returns invalid UTF-8 as bytes
            raise NotAModel(label, f"the name {name[:80]!r} in it is not UTF-8")
        if len(name) > MODEL.name_characters:
            raise NotAModel(label, f"a name of {len(name)} characters, '{name[:40]}...', is in it")
        if not name.isprintable():
            raise NotAModel(label, f"the name {name[:80]!a} in it holds control characters")


def _check_free_text(message: _Described, label: str) -> None:
    """Check descriptions and metadata, which may contain any text, including line breaks."""
    notes = [text for entry in message.metadata_props for text in (entry.key, entry.value)]
    if not all(isinstance(text, str) for text in (message.doc_string, *notes)):
        raise NotAModel(label, "it holds text that is not UTF-8")
    for text in (message.doc_string, *notes):
        refuse_long(text, label)


def refuse_long(text: str | bytes, label: str) -> None:
    """Raise an error if a string is too long for a graph in a bundle.

    Raises:
        UnsupportedModel: the string takes more than ``MODEL.text_bytes`` bytes.
    """
    if len(text) * 4 <= MODEL.text_bytes:  # a character takes at most 4 bytes
        return
    size = len(text.encode() if isinstance(text, str) else text)
    if size > MODEL.text_bytes:
        raise UnsupportedModel(
            label,
            f"it holds a text of {size} bytes; at most {MODEL.text_bytes} are taken",
            "export the model without notes for debugging",
        )


def check_types(model: ModelProto, label: str) -> None:
    """Check the declared types of all values.

    Raises:
        NotAModel: an element type does not exist, a value has far too many dimensions, or a
            dimension is far too large.
        UnsupportedModel: a model input or output is not a tensor, or a value has a type that is
            not supported, such as a map.
    """
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.WhichOneof("value")
        if kind not in (None, "tensor_type"):
            raise UnsupportedModel(
                f"'{value.name}'", f"its type is {kind}; inputs and outputs must be tensors"
            )
    for graph in list_graphs(model):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_type(value.type, value, label)


def _check_type(declared: TypeProto, value: ValueInfoProto, label: str) -> None:
    kind = declared.WhichOneof("value")
    if kind == "tensor_type":
        tensor = declared.tensor_type
        if tensor.elem_type not in _DTYPES:
            raise NotAModel(label, f"'{value.name}' has no known data type")
        if len(tensor.shape.dim) > MODEL.rank:
            raise NotAModel(label, f"'{value.name}' has {len(tensor.shape.dim)} dimensions")
        if any(dim.dim_value > MOST_ALONG for dim in tensor.shape.dim):
            raise NotAModel(label, f"'{value.name}' has a dimension beyond all memory")
    elif kind == "sequence_type":
        _check_type(declared.sequence_type.elem_type, value, label)
    elif kind == "optional_type":
        _check_type(declared.optional_type.elem_type, value, label)
    elif kind is not None:
        raise UnsupportedModel(f"'{value.name}'", f"its type, {kind}, is not taken")


def check_names(model: ModelProto, label: str) -> None:
    """Check that every name is defined exactly once, and before it is used.

    Raises:
        NotAModel: two values have the same name, or a name is used but not defined.
    """
    _check_graph(model.graph, (), label)
    for function in model.functions:
        check_function(function, label)


def _check_graph(graph: GraphProto, scopes: tuple[set[str], ...], label: str) -> None:
    """Check the names in a graph or body.

    ``scopes`` holds the names that the surrounding graphs have defined so far.
    """
    inputs = [value.name for value in graph.input]
    weights = [tensor.name for tensor in graph.initializer]
    for names in (inputs, weights, [value.name for value in graph.output]):
        _refuse_twice(names, label)
        if "" in names:
            raise NotAModel(label, "an input, output or initializer has no name")
    known = {*inputs, *weights}
    _check_nodes(graph.node, known, scopes, label)
    for value in graph.output:
        if not _is_known(value.name, known, scopes):
            raise NotAModel(label, f"nothing makes its output '{value.name}'")


def check_function(function: FunctionProto, label: str) -> None:
    """Check that every name in a function is defined exactly once, and before it is used.

    Raises:
        NotAModel: two values have the same name, or a name is used but not defined.
    """
    known = set(function.input)
    _check_nodes(function.node, known, (), label)
    for name in function.output:
        if name not in known:
            raise NotAModel(label, f"nothing makes '{name}' of its function '{function.name}'")


def _check_nodes(
    nodes: Sequence[NodeProto], known: set[str], scopes: tuple[set[str], ...], label: str
) -> None:
    for node in nodes:
        for name in node.input:
            if name and not _is_known(name, known, scopes):
                raise NotAModel(
                    label,
                    f"node '{node.name or node.op_type}' reads '{name}', which nothing before it "
                    "makes (an initializer is missing, or a cycle of nodes ends in it)",
                )
        if len({attribute.name for attribute in node.attribute}) < len(node.attribute):
            raise NotAModel(label, f"{label_node(node)} has an attribute twice")
        for body in list_bodies(node):
            _check_graph(body, (*scopes, known), label)
        for name in node.output:
            if name and _is_known(name, known, scopes):
                raise NotAModel(label, f"two values bear the name '{name}'")
            if name:
                known.add(name)


def _is_known(name: str, known: set[str], scopes: tuple[set[str], ...]) -> bool:
    return name in known or any(name in scope for scope in scopes)


def _refuse_twice(names: Sequence[str], label: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise NotAModel(label, f"two values bear the name '{name}'")
        seen.add(name)
