"""Convert models to an opset and IR version that onnxruntime-training supports.

Each node is converted in place, and therefore names, weights and subgraph bodies are preserved.
:mod:`upgrades` converts older nodes.  Newer nodes are converted by :mod:`downgrades` or replaced
with onnx's own definition of their operator as a function.  This module handles versions and
schemas; it deals neither with training nor with cutting the model into parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from splitonnx.operators import HIGHEST_IR_VERSION, HIGHEST_OPSET
from splitonnx.partitioner.gate.names import check_function
from splitonnx.partitioner.graphs.attributes import check_attributes
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import list_nodes
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.workers import call
from splitonnx.partitioner.normalization.downgrades import DOWNGRADES
from splitonnx.partitioner.normalization.upgrades import UPGRADES, Adapter, refuse

LOWEST_OPSET = 18
"""The lowest opset of a converted model; Dropout's mask needs BitwiseXor, new in opset 18."""
IR_VERSION = HIGHEST_IR_VERSION

_RENEWED = frozenset({"DFT", "GridSample", "GroupNormalization"})
"""Operators whose meaning changed between opsets 18 and 21; models with them get opset 21."""
_BODIES = "splitonnx.bodies"
_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_MOST_ROUNDS = 4
"""The most rounds; a function body may contain operators that have a function body themselves."""


def inline_functions(model: ir.Model) -> None:
    """Inline the model's functions, in place.

    The opset of a function may differ from the opset of the model.  The inlined nodes keep the
    opset of their function until :func:`adapt_opset` converts all nodes to a common opset.
    """
    _join_domains(model.opset_imports)
    own = model.opset_imports.get("", 1)
    for node in list_nodes(model.graph):
        node.version = own
        node.domain = _spell(node.domain)
    for function in model.functions.values():
        _join_domains(function.opset_imports)
        version = function.opset_imports.get("", own)
        function.opset_imports[""] = own
        for node in function.all_nodes():
            node.version = version
            node.domain = _spell(node.domain)
    _inline(model)
    check_attributes(model.graph, own)


def _inline(model: ir.Model) -> None:
    if model.functions:
        with attribute_errors_to_pass("written without functions"):
            InlinePass()(model)


def adapt_opset(model: ir.Model, wanted: int | None = None) -> None:
    """Convert a model to an opset between 18 and 21 and to IR version 10, in place.

    The model must not contain functions.  ``wanted`` is the opset, if another model has one that
    this model must have, too.

    Raises:
        UnsupportedModel: an operator cannot be converted; the error names the operator.
    """
    model.ir_version = IR_VERSION
    own = model.opset_imports.get("", 1)
    nodes = list_nodes(model.graph)
    for node in nodes:
        node.version = node.version or own
    target = _choose_target(nodes, own) if wanted is None else wanted
    if any(node.version != target for node in nodes):
        infer_shapes(model, check_type=False)
        for _ in range(_MOST_ROUNDS):
            if not _expand_newer(model, target):
                break
        for node in list_nodes(model.graph):
            with attribute_errors_to(node, "brought to a newer opset"):
                _adapt(node, target)
        check_attributes(model.graph, target)
    model.opset_imports[""] = target
    for node in list_nodes(model.graph):
        node.version = None


def _join_domains(imports: dict[str, int]) -> None:
    """Replace the domain ``ai.onnx`` with its other name, the empty string."""
    version = imports.pop("ai.onnx", None)
    if version is not None:
        imports.setdefault("", version)


def _spell(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _choose_target(nodes: Iterable[ir.Node], version: int) -> int:
    if any(node.op_type in _RENEWED and not node.domain for node in nodes):
        return HIGHEST_OPSET
    return min(max(version, LOWEST_OPSET), HIGHEST_OPSET)


def _find_schema(kind: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(kind, version, "")
    except onnx.defs.SchemaError:
        return None


def _adapt(node: ir.Node, target: int) -> None:
    if node.domain or node.graph is None or node.version is None:
        return
    if node.version > target:
        _lower(node, target)
        return
    node.attributes.pop("consumed_inputs", None)  # a hint about reusing memory, removed in opset 6
    for version in range(node.version + 1, target + 1):
        adapter = UPGRADES.get((node.op_type, version))
        if adapter is not None and _apply(adapter, node, f"opset{version}"):
            return
        node.version = version
    schema = _find_schema(node.op_type, target)
    if schema is None or schema.deprecated or not _fits(node, schema):
        raise refuse(node, f"it cannot be brought to opset {target}")


def _apply(adapter: Adapter, node: ir.Node, label: str) -> bool:
    """Apply an adapter to a node; return whether it has been replaced by other nodes."""
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/{label}")
    made = adapter(builder, node)
    if made is not None:
        builder.replace(node, made)
        return True
    assert node.graph is not None
    node.graph.insert_before(node, builder.nodes)
    return False


def _lower(node: ir.Node, target: int) -> None:
    """Convert a node of a newer opset to a node with the same meaning in an older opset."""
    assert node.version is not None
    newer, older = _find_schema(node.op_type, node.version), _find_schema(node.op_type, target)
    if newer is not None and older is not None and newer.since_version == older.since_version:
        return
    adapter = DOWNGRADES.get(node.op_type)
    if adapter is not None and _apply(adapter, node, f"opset{target}"):
        return
    if older is None or not _fits(node, older):
        raise refuse(node, f"it cannot be brought to opset {target}")
    _widen(node, older)


def _fits(node: ir.Node, schema: onnx.defs.OpSchema) -> bool:
    return set(node.attributes) <= set(schema.attributes) and len(node.inputs) <= schema.max_input


def _widen(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    """Cast 16-bit inputs that the older operator does not support to float32, and results back."""
    narrow = [
        index
        for index, value in enumerate(node.inputs)
        if value is not None and value.dtype is not None and not _takes(schema, index, value.dtype)
    ]
    if not narrow:
        return
    dtypes = {value.dtype for index in narrow if (value := node.inputs[index]) is not None}
    outputs = [value for value in node.outputs if value.dtype in dtypes]
    if not dtypes <= _NARROW or len(dtypes) > 1 or node.op_type in ("If", "Loop", "Scan"):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise refuse(node, f"opset {schema.since_version}, its newest known here, takes no {names}")
    (dtype,) = dtypes
    assert dtype is not None
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/wide")
    inputs = list(node.inputs)
    for index in narrow:
        inputs[index] = builder.cast(_required(inputs[index]), ir.DataType.FLOAT)
    made = builder.ops(node.op_type, inputs, len(node.outputs), dict(node.attributes))
    builder.replace(
        node,
        [
            builder.op("Cast", new, to=dtype.value) if old in outputs else new
            for old, new in zip(node.outputs, list(made), strict=True)
        ],
    )


def _required(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _takes(schema: onnx.defs.OpSchema, index: int, dtype: ir.DataType) -> bool:
    formal = schema.inputs[min(index, len(schema.inputs) - 1)]
    return f"tensor({dtype.name.lower().replace('_', '')})" in _list_types(formal)


def _list_types(formal: onnx.defs.OpSchema.FormalParameter) -> Collection[str]:
    return {name.lower() for name in formal.types}


def _expand_newer(model: ir.Model, target: int) -> bool:
    """Replace operators that ``target`` does not have by their function bodies."""
    count = 0
    for node in model.graph.all_nodes():
        if node.domain or node.version is None or node.op_type in DOWNGRADES:
            continue
        if node.version <= target or _find_schema(node.op_type, target) is not None:
            continue
        with attribute_errors_to(node, "written by its function body"):
            function = _define(node, model.opset_imports.get("", 1), f"body_{count}")
            model.functions[function.identifier()] = function
            _fill_defaults(node)
            node.domain, node.op_type, node.overload = _BODIES, function.name, ""
        count += 1
    if count:
        _inline(model)
        model.opset_imports.pop(_BODIES, None)
    return bool(count)


def _define(node: ir.Node, opset: int, name: str) -> ir.Function:
    """Make a function from onnx's definition of a node's operator."""
    _lighten(node)
    body, version = _read_body(node)
    _match_outputs(body, len(node.outputs))
    check_function(body, f"what node '{node.name}' ({node.op_type}) means")
    function = ir.serde.deserialize_function(body)
    _name_body(function, node, version)
    function.domain, function.name, function.overload = _BODIES, name, ""
    function.opset_imports.clear()
    function.opset_imports[""] = opset
    return function


def _lighten(node: ir.Node) -> None:
    """Compute Attention's float64 softmax in float32: no runtime has its gradient in float64.

    The result is rounded to the type of the inputs anyway.
    """
    wanted, source = (
        node.attributes.get("softmax_precision"),
        node.inputs[0] if node.inputs else None,
    )
    double = ir.DataType.DOUBLE
    if wanted is not None and wanted.as_int() == double and source and source.dtype != double:
        node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT)


def _name_body(function: ir.Function, node: ir.Node, version: int) -> None:
    """Name the nodes and values of a body after the node that it replaces."""
    prefix = node.outputs[0].name or node.name
    for inner in function.all_nodes():
        inner.version = version
        inner.name = f"{node.name}/{inner.outputs[0].name}"
        for value in inner.outputs:
            value.name = f"{prefix}/{value.name}"
    for value in node.outputs:
        value.name = value.name or None


def _match_outputs(body: onnx.FunctionProto, count: int) -> None:
    """Limit the body to ``count`` outputs, and add an Identity for each output without a value."""
    del body.output[count:]
    made = {name for node in body.node for name in node.output}
    for name in body.output:
        if name not in made:
            body.node.append(onnx.helper.make_node("Identity", [body.output[0]], [name]))


def _fill_defaults(node: ir.Node) -> None:
    """Set the default of each attribute that is missing, because the body may refer to it."""
    assert node.version is not None
    schema = onnx.defs.get_schema(node.op_type, node.version, "")
    for name, attribute in schema.attributes.items():
        if name not in node.attributes and attribute.default_value.name:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)


def _read_body(node: ir.Node) -> tuple[onnx.FunctionProto, int]:
    """Return the operator's definition in other operators, and the opset of these operators."""
    schema: Any = _find_schema(node.op_type, node.version or 1)  # onnx's stubs lack its bodies
    if schema is not None and schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= (node.version or v)]
        body = onnx.FunctionProto()
        body.ParseFromString(schema.get_function_with_opset_version(versions[-1]))
        return body, versions[-1]
    if schema is None or not schema.has_context_dependent_function:
        raise refuse(node, "no operator up to opset 21 has its meaning", "export without it")
    types = _serialize_types(node)
    versions = [
        v for v in schema.context_dependent_function_opset_versions if v <= (node.version or v)
    ]
    proto = ir.to_proto(node).SerializeToString()
    subject = f"node '{node.name}' ({node.op_type})"
    content = call(natives.define, subject, proto, types, node.version or 1, versions[-1])
    body = onnx.FunctionProto()
    body.ParseFromString(content)
    if not body.node or len(body.input) < len(
        node.inputs
    ):  # for example, an unknown activation function
        raise refuse(node, "onnx gives no definition of it for these inputs", "export without it")
    return body, versions[-1]


def _serialize_types(node: ir.Node) -> Sequence[bytes]:
    types = []
    for value in node.inputs:
        if value is None:
            types.append(b"")
        elif value.type is None:
            raise refuse(node, f"the type of its input '{value.name}' is not known")
        else:
            types.append(ir.to_proto(value).type.SerializeToString())
    return types
