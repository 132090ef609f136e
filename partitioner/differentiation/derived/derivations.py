"""Extend a graph by gradients with onnxruntime-training, which is called through :mod:`natives`.

The graph is prepared so that the gradient builder treats it correctly: parameters that a node reads
twice are separated, and detached values and opaque nodes are taken out.  Afterwards, all of this is
undone.  :mod:`gradients` differentiates a whole model with it, and :mod:`control_flow` the bodies
of its nodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from splitonnx.element_types import ELEMENT_TYPES
from splitonnx.errors import NotDifferentiable, SplitonnxError, UnsupportedModel, WrongRuntime
from splitonnx.extras import has_training_wheel, miss
from splitonnx.partitioner.differentiation.derived.broadcasts import (
    remove_copies,
    supply_broadcasts,
)
from splitonnx.partitioner.differentiation.derived.opaques import (
    Opaques,
    put_back_opaques,
    take_out_opaques,
)
from splitonnx.partitioner.differentiation.derived.shared_scales import separate_scales
from splitonnx.partitioner.differentiation.derived.supplied_gradients import (
    GRADIENT,
    NONE,
    SuppliedGradients,
    put_back_gradients,
)
from splitonnx.partitioner.graphs.builders import DETACHED, insert_copy
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.readings import read_model
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.graphs.traversals import map_values, trace_gradients
from splitonnx.partitioner.inference.folds import note_shapes
from splitonnx.partitioner.inference.node_types import list_types
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.workers import Refused, call
from splitonnx.partitioner.rewrites.selections import separate_splits

ADVICE = "freeze the parameters before it with --freeze, or export the model without it"

_OWN = "__own"
"""Name of the attribute that keeps an Identity from being merged with another."""

_TYPES = {kind.runtime: ir.DataType(kind.code) for kind in ELEMENT_TYPES}

_SUBJECT = "the model to differentiate"

_SOURCE = re.compile(r"was false\. |\[ONNXRuntimeError\] : \d+ : \w+ : ")
"""Pattern after which ONNX Runtime's error messages state the reason."""


def add_gradients(
    model: ir.Model,
    parameters: Sequence[str],
    ends: Sequence[str],
    supplied: SuppliedGradients = NONE,
    *,
    loss: str = "",
) -> ir.Model:
    """Return ``model``, which is changed, extended by gradients with respect to ``parameters``.

    ``loss`` names a scalar to differentiate.  Each further name in ``ends`` is a value whose
    gradient is given: the graph must have an input with the name ``<end>_grad``.  The gradient of
    each parameter, which is any value of the graph, is an output with the name
    ``<parameter>_grad``.  ``supplied`` are the gradients of the opaque nodes that gradients pass
    through; all other opaque nodes are treated as data.

    Raises:
        NotDifferentiable: an operator has no gradient.
        UnsupportedModel: the builder refuses the model for another reason.
        MissingExtra, WrongRuntime: onnxruntime-training is not installed.
    """
    repeated = supply_broadcasts(
        model.graph, {*parameters, *supplied.results}, {*ends, *supplied.arguments, loss}
    )
    supplied = supplied.join(repeated)
    _part_twins(model.graph, parameters)
    _name_permutations(model.graph)
    _mark_identities(model.graph)
    detached = _take_out_detached(model.graph)
    opaques = take_out_opaques(model.graph)
    _part_twins(model.graph, supplied.results)
    wanted = sorted({*parameters, *supplied.results})
    targets = sorted({*ends, *supplied.arguments})
    with attribute_errors_to_pass("written down for the gradient builder"):
        content = _serialize(model)
    try:
        content = call(natives.optimize, _SUBJECT, content, wanted)
        content = _correct_optimized(content, [*targets, loss])
        content = call(natives.build_gradients, _SUBJECT, content, wanted, loss, targets)
        with attribute_errors_to_pass("read from the gradient builder"):
            derived = _read_derived(content, opaques, supplied)
            _put_back_detached(derived.graph, detached)
            _unmark_identities(derived.graph)
            remove_copies(derived.graph, set(repeated.results))
        _annotate(derived)
    except Refused as error:
        raise _translate(error) from error
    return derived


def _serialize(model: ir.Model) -> bytes:
    try:
        content: bytes = write_model(model).SerializeToString()
    except (EncodeError, MemoryError) as error:
        raise UnsupportedModel(
            "the model's constants",
            "they take more than 2 GiB or than there is memory",
            "store large tensors as weights",
        ) from error
    return content


def _read_derived(content: bytes, opaques: Opaques, supplied: SuppliedGradients) -> ir.Model:
    proto = onnx.load_from_string(content)
    put_back_opaques(proto.graph, opaques)
    put_back_gradients(proto.graph, supplied)
    derived = read_model(proto)
    if opaques.nodes:
        derived.graph.sort()
    return derived


def _part_twins(graph: ir.Graph, parameters: Sequence[str]) -> None:
    """Insert an Identity if a node reads the same parameter twice, as in ``w * w``.

    Otherwise the gradient builder of version 1.19.2 would give two gradients the same name.
    """
    trained = set(parameters)
    for value in [value for value in graph.inputs if value.name in trained]:
        readers: set[ir.Node] = set()
        for use in list(value.uses()):
            if use.node.graph is graph and use.node in readers:
                name = f"{value.name}/twin/{use.node.name}/{use.idx}"
                insert_copy(graph, use.node, use.idx, name)
            readers.add(use.node)


def _name_permutations(graph: ir.Graph) -> None:
    """Set the attribute ``perm`` of each Transpose that relies on the default.

    Without it, onnxruntime-training 1.19.2 fails on some of these nodes ("unordered_map::at").
    """
    for node in graph:
        shape = node.inputs[0].shape if node.op_type == "Transpose" and node.inputs[0] else None
        if shape is not None and not node.domain and "perm" not in node.attributes:
            order = list(reversed(range(len(shape))))
            node.attributes["perm"] = ir.AttrInt64s("perm", order)


def _mark_identities(graph: ir.Graph) -> None:
    """Add a different attribute to each Identity, so that the builder's optimizer merges none.

    A port is an Identity.  If a port were merged with an Identity of the model that reads the same
    value, one party's nodes would read the tensor that is sent to the other party, and would pass
    gradients to it.  Attributes with names that begin with two underscores are otherwise ignored.
    """
    for node in graph:
        if node.op_type == "Identity" and not node.domain:
            node.attributes[_OWN] = ir.AttrString(_OWN, node.outputs[0].name or "")


def _unmark_identities(graph: ir.Graph) -> None:
    for node in graph:
        node.attributes.pop(_OWN, None)


def _take_out_detached(graph: ir.Graph) -> dict[str, str]:
    """Replace each detached value by a graph input, so that the builder treats it as data.

    Return a mapping from the name of each input to the name of the replaced value, which becomes a
    graph output.
    """
    detached: dict[str, str] = {}
    for node in [node for node in graph if DETACHED in node.metadata_props]:
        (source,), (value,) = node.inputs, node.outputs
        assert source is not None
        stand_in = ir.Value(name=value.name, type=value.type, shape=value.shape)
        value.name = f"{value.name}.source"
        value.replace_all_uses_with(stand_in, replace_graph_outputs=True)
        graph.inputs.append(stand_in)
        graph.outputs.append(value)
        detached[stand_in.name or ""] = value.name
    return detached


def _put_back_detached(graph: ir.Graph, detached: Mapping[str, str]) -> None:
    """Replace each graph input that stands for a detached value by the value itself."""
    values = map_values(graph)
    for name, source in detached.items():
        stand_in, value = values[name], values[source]
        graph.outputs.remove(value)
        stand_in.replace_all_uses_with(value, replace_graph_outputs=True)
        if stand_in in graph.inputs:
            graph.inputs.remove(stand_in)
    if detached:
        graph.sort()


def _correct_optimized(content: bytes, ends: Sequence[str]) -> bytes:
    """Rewrite the nodes whose gradient would be wrong or would be refused.

    Call this after the optimizer, which replaces adjacent slices by Splits and lets normalizations
    share constants.
    """
    if b"Split" not in content and b"Norm" not in content:
        return content
    model = read_model(onnx.load_from_string(content))
    found = [value for value in model.graph.outputs if value.name in ends]
    changed = separate_scales(model.graph)
    if not separate_splits(model.graph, trace_gradients(found)) and not changed:
        return content
    corrected: bytes = write_model(model).SerializeToString()
    return corrected


def _annotate(model: ir.Model) -> None:
    """Set missing types as ONNX Runtime infers them, and give gradients their values' shapes."""
    values = map_values(model.graph)
    types = list_types(model)
    for name, kind in types.items():
        if values[name].type is not None:
            continue
        if kind not in _TYPES:
            raise UnsupportedModel(f"'{name}'", f"it is a {kind}, which has no gradient")
        values[name].type = ir.TensorType(_TYPES[kind])
    for name, value in values.items():
        if value.shape is None:
            base = values.get(re.sub(rf"{GRADIENT}(_\d+)?$", "", name))
            value.shape = None if base is None else base.shape
    for node in model.graph:
        for value in node.outputs[1:]:
            if value.shape is None:
                value.shape = _find_shape(node)
    note_shapes(model.graph)  # ONNX Runtime's optimizer adds nodes without shapes


def _find_shape(node: ir.Node) -> ir.Shape | None:
    """Return the shape of an extra output that a node stores for its gradient.

    Shape inference does not cover these outputs.
    """
    if node.op_type == "BatchNormInternal" and node.inputs[1] is not None:
        return node.inputs[1].shape  # the batch's statistics, per channel like the scale
    if node.op_type == "MaxPool":
        return node.outputs[0].shape  # the index of each maximum
    if node.op_type == "ConcatTraining":
        return ir.Shape([len(node.inputs)])  # the length of each input
    return None


def _translate(error: Refused) -> SplitonnxError:
    if error.kind in ("ImportError", "ModuleNotFoundError"):
        return miss("onnxruntime-training", "cpu", "differentiating a model")
    if error.kind == natives.StockRuntime.__name__ and not has_training_wheel():
        return miss("onnxruntime-training", "cpu", "differentiating a model")
    if error.kind == natives.StockRuntime.__name__:
        return WrongRuntime(
            "stock onnxruntime",
            "onnxruntime-training; run: pip install 'splitonnx[cpu]' in an environment without "
            "stock onnxruntime",
        )
    text = " ".join(str(error).split())
    unknown = re.search(r"gradient builder has not been registered: (\S+) for node (.*)", text)
    if unknown:
        return NotDifferentiable(unknown.group(2), unknown.group(1), ADVICE)
    missing = re.search(r"implementation for (\w+)\(\d+\) node with name '([^']*)'", text)
    if missing:
        return UnsupportedModel(
            f"node '{missing.group(2)}' ({missing.group(1)})",
            "ONNX Runtime has no kernel for it with these element types",
            "export the model in float32",
        )
    reason = _SOURCE.split(text)[-1]
    return UnsupportedModel("the gradient builder of onnxruntime-training", f"refused: {reason}")
