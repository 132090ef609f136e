"""Check a model's opsets, operators and functions.

Opsets and operators must be known.  Functions must not be recursive, and inlining them must not
yield too many nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import onnx
import onnx_ir as ir
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, OperatorSetIdProto

from splitonnx.errors import NotAModel, UnsupportedModel
from splitonnx.graph_limits import MODEL
from splitonnx.operators import AXES, EINSUM, EQUATION, KINDS, STANDARD_DOMAINS, WINDOWS
from splitonnx.partitioner.gate.fused_operators import DOMAIN as FUSED_DOMAIN
from splitonnx.partitioner.gate.fused_operators import is_fused, refuse_domain
from splitonnx.partitioner.gate.ml_operators import DOMAIN, ESTIMATORS
from splitonnx.partitioner.gate.names import refuse_long
from splitonnx.partitioner.gate.walks import label_node, list_bodies, list_nodes

Key = tuple[str, str, str]

_GRAPHS = frozenset({AttributeProto.GRAPH, AttributeProto.GRAPHS})
_DTYPES = frozenset(dtype.value for dtype in ir.DataType)


def check_opsets(
    imports: Iterable[OperatorSetIdProto], label: str, default: int | None = None
) -> int:
    """Return the opset version of ONNX's own operators, or ``default`` if the model has none.

    Raises:
        NotAModel: there is neither an opset version nor a default, or a domain has two versions.
        UnsupportedModel: the installed onnx does not know the opset version.
    """
    newest = onnx.defs.onnx_opset_version()
    found: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain in STANDARD_DOMAINS else entry.domain
        if found.setdefault(domain, entry.version) != entry.version:
            raise NotAModel(label, f"it imports two opsets of the domain '{entry.domain}'")
    version = found.get("", default)
    if version is None:
        raise NotAModel(label, "it imports no opset of ONNX's own operators")
    if not 1 <= version <= newest:
        raise UnsupportedModel(label, f"opset {version} is not known; the newest is {newest}")
    return version


def check_operators(
    model: ModelProto, version: int, label: str, others: Collection[str] = ()
) -> None:
    """Check that every operator is known, and that the model's functions can be inlined.

    ``others`` names operators of ONNX Runtime's domain that are accepted, too.

    Raises:
        NotAModel: a function is declared twice or called with too many arguments, an attribute is
            not valid, or a node has more or fewer outputs than its subgraph body computes.
        UnsupportedModel: an operator or a function's opset is not known; a function calls itself;
            function calls and subgraph bodies are nested too deeply; or there are too many nodes.
    """
    functions: dict[Key, FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in functions:
            raise NotAModel(label, f"it declares the function '{function.name}' twice")
        functions[key] = function
        _check_function(function, label)
    sizes: dict[Key, tuple[int, int]] = {}
    for key, function in functions.items():
        _measure_function(key, functions, sizes, ())
        own = check_opsets(function.opset_import, f"function '{key[1]}'", version)
        _check_nodes(function.node, functions, own, label, others)
    count, _ = _measure(model.graph.node, functions, sizes, ())
    _check_nodes(model.graph.node, functions, version, label, others)
    for node in list_nodes(model.graph.node):
        _refuse_references(node, label)
    if count > MODEL.nodes:
        raise UnsupportedModel(label, f"it has {count} nodes; at most {MODEL.nodes} are taken")


def _check_function(function: FunctionProto, label: str) -> None:
    if len(set(function.input)) < len(function.input) or "" in function.input:
        raise NotAModel(label, f"the inputs of its function '{function.name}' have no own names")


def _check_nodes(
    nodes: Iterable[NodeProto],
    functions: Mapping[Key, FunctionProto],
    version: int,
    label: str,
    others: Collection[str],
) -> None:
    for node in list_nodes(nodes):
        if (count := len(node.input)) > MODEL.inputs:
            reason = f"it has {count} inputs; at most {MODEL.inputs} are taken"
            raise UnsupportedModel(label_node(node), reason, "join some of them in nodes before it")
        called = functions.get(_find_key(node))
        if called is None:
            is_other = node.domain == FUSED_DOMAIN and node.op_type in others
            schema = None if is_other else _find_schema(node, version)
            _check_attributes(node, schema, label)
            _check_results(node, label)
            if any(a.type in _GRAPHS and a.ref_attr_name for a in node.attribute):
                raise UnsupportedModel(label_node(node), "it takes a graph from a function's call")
        elif len(node.input) > len(called.input) or len(node.output) > len(called.output):
            raise NotAModel(label, f"{label_node(node)} gives or asks more than its function has")
        elif any(a.type in _GRAPHS for a in node.attribute):
            raise UnsupportedModel(label_node(node), "it hands a graph to a function")


def _refuse_references(node: NodeProto, label: str) -> None:
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            reason = f"attribute '{attribute.name}' of {label_node(node)} refers to one that no"
            raise NotAModel(label, f"{reason} function has")


def _find_key(node: NodeProto) -> Key:
    return (node.domain, node.op_type, node.overload)


def _find_schema(node: NodeProto, version: int) -> onnx.defs.OpSchema | None:
    """Return the schema of a node's operator.

    Return ``None`` for operators of ``ai.onnx.ml`` and for fused operators of ONNX Runtime.

    Raises:
        UnsupportedModel: the operator is not known or is deprecated.
    """
    if node.domain == DOMAIN and node.op_type in ESTIMATORS:
        return None
    if is_fused(node):
        return None
    if node.domain not in STANDARD_DOMAINS:
        raise refuse_domain(node)
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError as error:
        raise UnsupportedModel(label_node(node), f"opset {version} has no such operator") from error
    if schema.deprecated:
        raise UnsupportedModel(
            label_node(node), f"opset {version} no longer has it", "export with a newer opset"
        )
    return schema


def _check_attributes(node: NodeProto, schema: onnx.defs.OpSchema | None, label: str) -> None:
    if node.op_type == "Constant" and len(node.attribute) != 1:
        raise NotAModel(label, f"{label_node(node)} does not hold exactly one value")
    for attribute in node.attribute:
        if schema is not None and attribute.name not in schema.attributes:
            raise NotAModel(label, f"{label_node(node)} takes no attribute '{attribute.name}'")
        if not _is_text([attribute.s, *attribute.strings]):
            raise NotAModel(
                label, f"attribute '{attribute.name}' of {label_node(node)} is not text"
            )
        for text in (attribute.s, *attribute.strings):
            refuse_long(text, label_node(node))
        if node.op_type == EINSUM and not EQUATION.fullmatch(attribute.s):
            # onnx's inference may process such an equation forever
            raise NotAModel(label, f"{label_node(node)} has no equation of letters")
        if attribute.name in KINDS and attribute.i not in _DTYPES:
            raise NotAModel(label, f"{label_node(node)} names an unknown data type")
        if attribute.name in WINDOWS and any(extent < 1 for extent in attribute.ints):
            # onnxruntime-training 1.19.2 divides by a stride of 0, which crashes the process
            raise NotAModel(label, f"{label_node(node)} has {attribute.name} below 1")
        axes = (*attribute.ints, attribute.i) if attribute.name in AXES else ()
        if any(abs(axis) > MODEL.rank for axis in axes):
            # the kernel and the inference of LayerNormalization read beyond their dimensions
            raise NotAModel(label, f"{label_node(node)} names an axis that no tensor has")
        if attribute.name == "batch_dims" and attribute.i < 0:
            # onnx's inference of GatherND reads beyond its dimensions there, and may crash
            raise NotAModel(label, f"{label_node(node)} has {attribute.i} batch dimensions")


def _check_results(node: NodeProto, label: str) -> None:
    """Check that a node has one output for each result of its bodies, also for trailing ones.

    onnx's checker lets some others pass, but neither its inference nor ONNX Runtime takes them.
    """
    for body in list_bodies(node):
        count = len(body.output) - (node.op_type == "Loop")  # its first result is the condition
        if len(node.output) != count:
            raise NotAModel(
                label,
                f"{label_node(node)} has {len(node.output)} outputs, but its body '{body.name}' "
                f"computes {count}; export it with an output for each, also where nothing reads it",
            )


def _is_text(contents: Iterable[bytes]) -> bool:
    try:
        return all(content.decode() is not None for content in contents)
    except UnicodeDecodeError:
        return False


def _measure_function(
    key: Key,
    functions: Mapping[Key, FunctionProto],
    sizes: dict[Key, tuple[int, int]],
    path: tuple[Key, ...],
) -> tuple[int, int]:
    if key in path:
        raise UnsupportedModel(f"function '{key[1]}'", "it calls itself, so it has no end")
    if key not in sizes:
        sizes[key] = _measure(functions[key].node, functions, sizes, (*path, key))
    return sizes[key]


def _measure(
    nodes: Iterable[NodeProto],
    functions: Mapping[Key, FunctionProto],
    sizes: dict[Key, tuple[int, int]],
    path: tuple[Key, ...],
) -> tuple[int, int]:
    """Compute how many nodes there are after inlining functions, and how deep they are nested."""
    if len(path) > MODEL.depth:
        raise UnsupportedModel(f"function '{path[0][1]}'", f"calls nest over {MODEL.depth} deep")
    count, depth = 0, 0
    for node in nodes:
        count += 1
        inner = [_measure(body.node, functions, sizes, path) for body in list_bodies(node)]
        if (key := _find_key(node)) in functions:
            inner.append(_measure_function(key, functions, sizes, path))
        if inner:
            count += sum(size for size, _ in inner)
            depth = max(depth, 1 + max(deep for _, deep in inner))
        if depth > MODEL.depth:
            raise UnsupportedModel(label_node(node), f"it nests over {MODEL.depth} deep")
    return count, depth
