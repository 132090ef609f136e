"""The gate: read a model and check it before any other code uses it.

A model's external data can make ONNX Runtime 1.19.2 read any file or memory address.  So our own
code checks each model first.  Domains and operators must be known, external data must be in the
model's folder, sizes must match the number of bytes, and names must be unique and defined before
they are used.  Weights are memory-mapped, not copied.  This module only checks that a model is
valid; whether the model can be trained is checked later.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import google.protobuf.message
import onnx
import onnx_ir as ir

from splitonnx.errors import NotAModel, UnsupportedModel
from splitonnx.files import read_regular
from splitonnx.graph_limits import MODEL
from splitonnx.partitioner.gate.adjustments import NONE, Adjustments, adjust
from splitonnx.partitioner.gate.forms import check_declared_types, check_form
from splitonnx.partitioner.gate.fused_operators import claim_fused
from splitonnx.partitioner.gate.marks import forget_marks
from splitonnx.partitioner.gate.ml_operators import unwrap_maps
from splitonnx.partitioner.gate.names import check_names, check_texts, check_types
from splitonnx.partitioner.gate.operators import check_operators, check_opsets
from splitonnx.partitioner.gate.quantized_operators import TOOLS
from splitonnx.partitioner.gate.tensors import DataFiles
from splitonnx.partitioner.gate.walks import list_tensors, sort_nodes
from splitonnx.partitioner.graphs.faults import (
    FAULTS,
    attribute_errors_to_bytes,
    attribute_errors_to_pass,
    explain,
    is_ours,
)
from splitonnx.partitioner.graphs.readings import read_model

MAX_PROTO_BYTES = 2**31 - 1
"""Size limit of a Protocol Buffers message (2 GiB); larger models need external data."""

ModelSource = str | Path | bytes | onnx.ModelProto


def open_model(
    source: ModelSource, adjustments: Adjustments = NONE, *, is_marked: bool = False
) -> ir.Model:
    """Read a model, change its inputs as ``adjustments`` describes, check it, and return it.

    ``source`` is a path, the bytes of a model, or a loaded model, and is not changed.  External
    data is memory-mapped from files in the model's folder.  Models that are given as bytes or as an
    object must not have external data.  ``is_marked`` is for a bundle's own model, whose nodes keep
    the marks that the passes made (:mod:`marks`).

    Raises:
        NotAModel: the source cannot be read or is not a valid ONNX model.
        UnsupportedModel: the model uses an unknown domain, operator or opset.
        ForbiddenExternalData: a tensor's data is outside the model's folder.
        UsageError: an adjustment does not fit the model's inputs.
    """
    proto, label, folder = _read_adjusted(source, adjustments)
    files = DataFiles(label=label, folder=folder)
    with attribute_errors_to_pass("checked by the gate"):
        try:
            version = check_opsets(proto.opset_import, label)
            check_texts(proto, label)
            proto = claim_fused(unwrap_maps(proto), version)
            others = TOOLS if adjustments.dequantize else ()
            check_operators(proto, version, label, others)
            check_types(proto, label)
            for tensor in list_tensors(proto):
                files.check(tensor)
            check_names(proto, label)
            check_form(proto, label)
            check_declared_types(proto, label)
            model = _deserialize(proto, label)
        except UnicodeDecodeError as error:
            raise NotAModel(label, "it holds text that is not UTF-8") from error
        except FAULTS as error:
            if is_ours(error):
                raise
            raise NotAModel(label, explain(error)) from error
        _map_external(model, files)
        if isinstance(source, onnx.ModelProto):
            _keep_names(model)
        _forget_unknown_dims(model.graph)
        if not is_marked:
            forget_marks(model)
    return model


def read_original(source: ModelSource, adjustments: Adjustments = NONE) -> onnx.ModelProto:
    """Read a model that :func:`open_model` has accepted, and load its external data.

    The inputs are changed as ``adjustments`` describes; the rest of the model stays as it is in
    ``source``.  Do not change the returned model, because it can be ``source`` itself.

    Raises:
        NotAModel: the model can no longer be read.
    """
    proto, label, folder = _read_adjusted(source, adjustments)
    if folder is not None:
        try:
            onnx.load_external_data_for_model(proto, str(folder))
        except FAULTS as error:
            raise NotAModel(label, explain(error)) from error
    return proto


def read_inputs(source: ModelSource) -> Sequence[onnx.ValueInfoProto]:
    """Read and return the inputs that a model declares.

    Do not change the returned messages, because they can be part of ``source`` itself.
    """
    inputs: Sequence[onnx.ValueInfoProto] = _read(source)[0].graph.input
    return inputs


def _deserialize(proto: onnx.ModelProto, label: str) -> ir.Model:
    with attribute_errors_to_bytes(partial(NotAModel, label)):
        return read_model(proto)


def _read_adjusted(
    source: ModelSource, adjustments: Adjustments
) -> tuple[onnx.ModelProto, str, Path | None]:
    """Read a model, sort its nodes and adjust its inputs, without changing ``source``."""
    proto, label, folder = _read(source)
    try:
        proto = sort_nodes(proto)
    except UnicodeDecodeError as error:
        raise NotAModel(label, "it holds text that is not UTF-8") from error
    if not adjustments:
        return proto, label, folder
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    adjust(changed, adjustments)
    return changed, label, folder


def _read(source: ModelSource) -> tuple[onnx.ModelProto, str, Path | None]:
    if isinstance(source, onnx.ModelProto):
        _refuse_empty(source, "the model")
        return source, "the model", None
    if isinstance(source, bytes):
        return _parse(source, "the model"), "the model", None
    path = Path(source)
    label = str(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise NotAModel(label, "it is not a file")  # a pipe or a device may be endless
        if found.st_size > MAX_PROTO_BYTES:
            raise NotAModel(label, "it is larger than 2 GiB; save its weights as external data")
        content = read_regular(path, MAX_PROTO_BYTES)
        folder = path.resolve().parent
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise NotAModel(label, f"it cannot be read ({reason})") from error
    return _parse(content, label), label, folder


def _parse(content: bytes, label: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except google.protobuf.message.DecodeError as error:
        raise NotAModel(label, "its bytes are not in ONNX format, or cut short") from error
    _refuse_empty(proto, label)
    return proto


def _refuse_empty(proto: onnx.ModelProto, label: str) -> None:
    if not proto.HasField("graph") or not proto.graph.node:
        raise NotAModel(label, "it holds no graph")
    if (count := len(proto.graph.node)) > MODEL.nodes:
        raise UnsupportedModel(label, f"it has {count} nodes; at most {MODEL.nodes} are taken")


class _GivenTensor(ir.serde.TensorProtoTensor):
    """A tensor of a loaded model, which is copied before it gets another name."""

    @property
    def name(self) -> str:
        return super().name

    @name.setter
    def name(self, value: str | None) -> None:
        if (value or "") != self._proto.name:
            given, self._proto = self._proto, onnx.TensorProto()
            self._proto.CopyFrom(given)
            self._proto.name = value or ""


def _keep_names(model: ir.Model) -> None:
    """Leave the names of a loaded model's tensors alone.

    onnx_ir reads tensors where they are.  It names them after the values that hold them, so a pass
    that renames a value, or reads a Constant, would change the user's model.
    """

    def hold(tensor: object) -> ir.TensorProtocol | None:
        return _GivenTensor(tensor.raw) if isinstance(tensor, ir.serde.TensorProtoTensor) else None

    _replace_tensors(model, hold)


def _map_external(model: ir.Model, files: DataFiles) -> None:
    """Replace every external tensor by a tensor that reads the memory-mapped file."""

    def read(tensor: object) -> ir.TensorProtocol | None:
        return files.read(tensor) if isinstance(tensor, ir.ExternalTensor) else None

    _replace_tensors(model, read)


def _replace_tensors(
    model: ir.Model, replace: Callable[[object], ir.TensorProtocol | None]
) -> None:
    """Replace the stored tensors for which ``replace`` returns another one."""
    graphs: list[ir.Graph] = [*model.graphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.subgraphs()]
    for graph in graphs:
        for value in graph.initializers.values():
            if (tensor := replace(value.const_value)) is not None:
                value.const_value = tensor
        for node in graph:
            for name, attribute in list(node.attributes.data.items()):
                if (tensor := replace(attribute.value)) is not None:
                    node.attributes[name] = ir.AttrTensor(name, tensor)


def _forget_unknown_dims(graph: ir.Graph) -> None:
    """Replace dimensions that stand for an unknown size by unknown ones.

    For a dynamic size, some exporters write -1 or ``?``; two of those need not be equal.
    """
    for value in (*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)):
        if value.shape is not None and any(map(_is_unknown, value.shape)):
            dims = [None if _is_unknown(dim) else dim for dim in value.shape]
            value.shape = ir.Shape(dims)


def _is_unknown(dim: int | ir.SymbolicDim) -> bool:
    return dim < 0 if isinstance(dim, int) else dim.value == "?"
