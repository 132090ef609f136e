"""The gate: every model passes it before anything else sees it.

ONNX Runtime 1.19.2 reads any file, and memory, that a model's external data names; so what comes
in is checked by our own code first: known domains and operators only, external data only from
the model's own folder, sizes that agree with the bytes, names that are unique and defined before
they are used.  Weights are mapped, not copied.  This module knows what is well-formed; whether a
model can be trained is decided later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import google.protobuf.message
import onnx
import onnx_ir as ir
from onnx import TensorProto

from splitonnx.errors import ForbiddenExternalData, NotAModel, UnsupportedModel

MAX_PROTO_BYTES = 2**31 - 1
"""Protocol Buffers end at 2 GiB; what is larger has its weights outside."""
MAX_NODES = 1_000_000
MAX_RANK = 32

KNOWN_DOMAINS = frozenset({"", "ai.onnx"})

ModelSource = str | Path | bytes | onnx.ModelProto


def open_model(source: ModelSource) -> ir.Model:
    """Read a model, check it, and return it ready to be worked on.

    External data is mapped from files inside the model's folder; a model given as bytes or as a
    loaded one may have none.  ``source`` itself is not changed.

    Raises:
        NotAModel: the bytes are no ONNX model, or not a well-formed one.
        UnsupportedModel: it uses a domain, operator or opset that is not known here.
        ForbiddenExternalData: a tensor's data lie outside the model's folder.
    """
    proto, label, folder = _read(source)
    _check_opsets(proto, label)
    _check_functions(proto, label)
    for tensor in _list_tensors(proto):
        _check_tensor(tensor, label, folder)
    _check_names(proto.graph, set(), label)
    _check_form(proto, label)
    model = ir.from_proto(proto)
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    return model


def _read(source: ModelSource) -> tuple[onnx.ModelProto, str, Path | None]:
    if isinstance(source, onnx.ModelProto):
        return source, "the model", None
    if isinstance(source, bytes):
        return _parse(source, "the model"), "the model", None
    path = Path(source)
    try:
        if path.is_file() and path.stat().st_size > MAX_PROTO_BYTES:
            raise NotAModel(str(path), "it is larger than 2 GiB; save its weights as external data")
        content = path.read_bytes()
    except OSError as error:
        raise NotAModel(str(path), f"it cannot be read ({error.strerror})") from error
    return _parse(content, str(path)), str(path), path.resolve().parent


def _parse(content: bytes, label: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except google.protobuf.message.DecodeError as error:
        raise NotAModel(label, "its bytes are not in ONNX format, or cut short") from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise NotAModel(label, "it holds no graph")
    return proto


def _check_opsets(proto: onnx.ModelProto, label: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in KNOWN_DOMAINS and not 1 <= entry.version <= newest:
            raise UnsupportedModel(
                label, f"opset {entry.version} is not known; the newest is {newest}"
            )
    if not any(entry.domain in KNOWN_DOMAINS for entry in proto.opset_import):
        raise NotAModel(label, "it imports no opset of ONNX's own operators")


def _check_functions(proto: onnx.ModelProto, label: str) -> None:
    """Refuse functions that call themselves, directly or through others."""
    calls = {
        (f.domain, f.name): {(node.domain, node.op_type) for node in _list_nodes(f.node)}
        for f in proto.functions
    }
    done: set[tuple[str, str]] = set()

    def visit(key: tuple[str, str], path: tuple[tuple[str, str], ...]) -> None:
        if key in path:
            raise UnsupportedModel(f"function '{key[1]}'", "it calls itself, so it has no end")
        if key not in done and key in calls:
            for called in calls[key]:
                visit(called, (*path, key))
            done.add(key)

    for key in calls:
        visit(key, ())
    known = set(calls)
    nodes = [*_list_nodes(proto.graph.node), *(n for f in proto.functions for n in f.node)]
    if len(nodes) > MAX_NODES:
        raise UnsupportedModel(label, f"it has {len(nodes)} nodes; at most {MAX_NODES} are taken")
    version = next(e.version for e in proto.opset_import if e.domain in KNOWN_DOMAINS)
    for node in nodes:
        if (node.domain, node.op_type) not in known:
            _check_operator(node, version)


def _check_operator(node: onnx.NodeProto, version: int) -> None:
    name = node.name or (node.output[0] if node.output else "")
    if node.domain not in KNOWN_DOMAINS:
        raise UnsupportedModel(
            f"node '{name}' ({node.op_type})",
            f"its domain '{node.domain}' is not one of ONNX's own",
            "export the model with standard operators",
        )
    try:
        onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError as error:
        raise UnsupportedModel(
            f"node '{name}' ({node.op_type})", f"opset {version} has no such operator"
        ) from error


def _list_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _list_nodes(body.node)


def _list_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    def of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for body in (attribute.g, *attribute.graphs):
                    yield from of_graph(body)

    def of_graph(graph: onnx.GraphProto) -> Iterator[TensorProto]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            raise UnsupportedModel(
                f"sparse tensor '{sparse.values.name}'", "sparse weights are not taken"
            )
        yield from of_nodes(graph.node)

    yield from of_graph(proto.graph)
    for function in proto.functions:
        yield from of_nodes(function.node)


def _check_tensor(tensor: TensorProto, label: str, folder: Path | None) -> None:
    """Check a tensor's place and size by arithmetic, before anything is read or allocated."""
    subject = f"tensor '{tensor.name}'"
    if tensor.data_type == TensorProto.STRING:
        return
    try:
        dtype = ir.DataType(tensor.data_type)
        bits = dtype.bitwidth
    except (ValueError, TypeError) as error:
        raise NotAModel(label, f"{subject} has no known data type") from error
    if len(tensor.dims) > MAX_RANK or any(dim < 0 for dim in tensor.dims):
        raise NotAModel(label, f"{subject} has the shape {list(tensor.dims)}")
    size = -(-math.prod(tensor.dims) * bits // 8)  # bytes, rounded up
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, label, folder, size)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != size:
        raise NotAModel(label, f"{subject} declares {size} bytes, but holds {len(tensor.raw_data)}")
    elif not tensor.HasField("raw_data") and _count_typed(tensor) * max(bits, 8) < 8 * size:
        raise NotAModel(
            label, f"{subject} declares {size} bytes, but holds {_count_typed(tensor)} elements"
        )


def _count_typed(tensor: TensorProto) -> int:
    fields: Sequence[Sequence[object]] = (
        tensor.float_data,
        tensor.int32_data,
        tensor.int64_data,
        tensor.double_data,
        tensor.uint64_data,
    )
    return sum(len(field) for field in fields)


def _check_external(tensor: TensorProto, label: str, folder: Path | None, size: int) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    inside = None if folder is None else (folder / location).resolve()
    if (
        folder is None
        or inside is None
        or not location
        or location.startswith(("*", "/", "\\"))
        or Path(location).is_absolute()
        or not inside.is_relative_to(folder)
    ):
        raise ForbiddenExternalData(tensor.name, location)
    if not inside.is_file():
        raise NotAModel(label, f"the file '{location}' of tensor '{tensor.name}' is missing")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(size)))
    except ValueError as error:
        raise NotAModel(label, f"tensor '{tensor.name}' has no valid place in its file") from error
    if length != size or offset < 0 or offset + length > inside.stat().st_size:
        raise NotAModel(
            label,
            f"tensor '{tensor.name}' declares {size} bytes, but '{location}' holds "
            f"{max(0, inside.stat().st_size - offset)} at its place",
        )


def _check_names(graph: onnx.GraphProto, outer: set[str], label: str) -> None:
    """Check that every name is given once and used after it was given."""
    own = [value.name for value in graph.input]
    weights = [tensor.name for tensor in graph.initializer]
    _refuse_twice(own, label)
    _refuse_twice(weights, label)
    known = {*own, *weights}
    for node in graph.node:
        for name in node.input:
            if name and name not in known and name not in outer:
                raise NotAModel(
                    label,
                    f"node '{node.name or node.op_type}' reads '{name}', which nothing before it "
                    "makes (a missing initializer, a cycle, or nodes out of order)",
                )
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _check_names(body, known | outer, label)
        for name in node.output:
            if name and (name in known or name in outer):
                raise NotAModel(label, f"two values bear the name '{name}'")
            known.add(name)
    for value in graph.output:
        if value.name not in known and value.name not in outer:
            raise NotAModel(label, f"nothing makes its output '{value.name}'")


def _refuse_twice(names: Sequence[str], label: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise NotAModel(label, f"two values bear the name '{name}'")
        seen.add(name)


def _check_form(proto: onnx.ModelProto, label: str) -> None:
    """Let onnx's checker and type inference look at the model without its weights' data."""
    light = _strip(proto)
    try:
        onnx.checker.check_model(light)
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=False)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split()).split(" ==> ")[0]
        raise NotAModel(label, reason) from error


def _strip(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with its large weights as inputs, so that checking copies no weight."""
    light = onnx.ModelProto()
    light.ir_version = max(proto.ir_version, 4)
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    named = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) <= 1024 and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        elif tensor.name not in named:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return light
