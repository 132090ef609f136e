"""Find what PyTorch's exporters left out of a model, and suggest an export call that keeps it.

By default, both exporters write a model for inference.  Omissions leave traces: names that the
exporter made up, nodes in inference mode, fixed sizes.  The dropout of a recurrent layer may leave
no trace, so the remark about it is conditional.  This module does not change the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from splitonnx.errors import quote
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import list_nodes, walk_back

CHECKED = "splitonnx.torch"
"""The key of the metadata with which :mod:`splitonnx.torch` marks a model that it compared."""
CALL = "splitonnx.torch.export(model, example, 'model.onnx')"
"""The call that avoids every omission."""

_TRAINING = (
    "torch.onnx.export(model, (example,), 'model.onnx', dynamo=False, do_constant_folding=False, "
    "training=torch.onnx.TrainingMode.TRAINING, {names})"
)
_DYNAMO = (
    "torch.onnx.export(model.train(), (example,), dynamo=True, optimize=False, "
    "dynamic_shapes=({0: torch.export.Dim('N', min=2, max=4096)},)).save('model.onnx')"
)
_FEW = 3
_FIRST_STATISTIC = 3
"""The first of BatchNormalization's inputs that is a running statistic."""
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_LAYOUTS = frozenset({"Reshape", "Squeeze", "Transpose"})
_BETWEEN = _LAYOUTS | {"Dropout"}
_COMPUTED = re.compile(
    r"onnx::[A-Za-z]+_\d+|(val|t|permute|transpose|reshape|unsqueeze|view)(_\d+)?"
)
"""Names that the exporters make up for weights that they computed from parameters."""
_CALCULATED = re.compile(
    r"(_?weight_norm(_interface)?|abs|add|addmm|bmm|cat|concat|div|einsum|exp|linalg_vector_norm|"
    r"log|log1p|matmul|mm|mul|neg|pow|reciprocal|relu|rsqrt|rsub|sigmoid|softmax|softplus|sqrt|"
    r"stack|sub|sum|tanh)(_\d+)?"
    r"|/(.*/)?(?!Constant_|Expand_|Identity_|Reshape_|S(lic|queez)e_|Transpose_|Unsqueeze_)"
    r"[A-Z][A-Za-z]*_(\d+_)?output_0"
)
"""Names that the exporters give to results of calculations.

An initializer has such a name if the calculation was folded.  The dynamo exporter names a result
after PyTorch's function, the legacy exporter after the module and the operator.
"""
_FOLDED = re.compile(r"onnx::Conv(Transpose)?_\d+")
_REWRITES = "pkg.onnxscript.rewriter.rule_name"
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node, written by the dynamo exporter: the modules that it belongs to."""


class OmissionKind(StrEnum):
    """What an exporter left out, or changed."""

    FIXED_BATCH = "fixed batch"
    FOLDED_BATCHNORM = "no batchnorm"
    FROZEN_BATCHNORM = "frozen batchnorm"
    COMPUTED_WEIGHTS = "computed weights"
    JOINED_PARAMETERS = "joined parameters"
    LOST_DROPOUT = "lost dropout"


@dataclass(frozen=True, kw_only=True)
class Omission:
    """Something that an exporter left out, or changed.

    ``sentence`` describes the omission in a clause, and ``names`` lists the tensors or nodes that
    it affects.
    """

    kind: OmissionKind
    sentence: str
    names: tuple[str, ...]


def is_from_torch(model: ir.Model) -> bool:
    """Return whether a model was exported by PyTorch, but not through :mod:`splitonnx.torch`."""
    return (model.producer_name or "").lower() == "pytorch" and CHECKED not in model.metadata_props


@attribute_errors_to_pass("searched for what PyTorch's exporter left out")
def list_omissions(model: ir.Model) -> list[Omission]:
    """List what PyTorch's exporter left out; the list is empty for models of other exporters.

    Pass the model as it was read from the file, before it is prepared.
    """
    if not is_from_torch(model):
        return []
    return [omission for look in _LOOKS for omission in look(model.graph)]


def describe_call(model: ir.Model, kinds: set[OmissionKind]) -> str:
    """Return the call of ``torch.onnx.export`` that avoids the omissions in ``kinds``.

    The legacy exporter refuses dropout in recurrent layers in training mode.  The dynamo exporter
    keeps it, but leaves BatchNormalization in inference mode.
    """
    nodes = list(model.graph)
    if OmissionKind.LOST_DROPOUT in kinds or any(_follows(node, _BETWEEN) for node in nodes):
        has_statistics = any(node.op_type == "BatchNormalization" for node in model.graph)
        return f"{_DYNAMO}{' and --batchnorm train' if has_statistics else ''}"
    raw = [_make_name(value, at) for at, value in enumerate(_list_raw(model.graph))]
    axes = ", ".join(f"'{name}': {{0: 'N'}}" for name in raw)
    return _TRAINING.format(names=f"input_names={raw}, dynamic_axes={{{axes}}}")


def advise(model: ir.Model, omissions: list[Omission]) -> str:
    """Return a sentence that lists what the exporter left out, and the calls that keep it."""
    clauses = "; ".join(omission.sentence for omission in omissions)
    call = describe_call(model, {omission.kind for omission in omissions})
    return f"{clauses}; export it again with {CALL}, or with {call}"


def _make_name(value: ir.Value, at: int) -> str:
    """Return the name of an input, or ``input_N`` if the name is not a Python identifier."""
    name = value.name or ""
    return name if name.isidentifier() else f"input_{at}"


def _list_raw(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.inputs if value.name not in graph.initializers]


def _find_fixed_batch(graph: ir.Graph) -> Iterator[Omission]:
    raw = _list_raw(graph)
    firsts = {_read_batch(value) for value in (*raw, *graph.outputs[:1])}
    batch = firsts.pop() if len(firsts) == 1 else None
    sizes = [dim for value in raw for dim in (value.shape or ())]
    is_open = any(not isinstance(dim, int) for dim in sizes)  # then the batch is another axis
    if batch is not None and (batch == 1 or not is_open):
        names = tuple(value.name or "" for value in raw)
        yield Omission(
            kind=OmissionKind.FIXED_BATCH,
            sentence=f"the batch is fixed at {batch} by {_name(names)}",
            names=names,
        )


def _read_batch(value: ir.Value) -> int | None:
    first = value.shape[0] if value.shape is not None and len(value.shape) else None
    return first if isinstance(first, int) else None


def _find_folded(graph: ir.Graph) -> Iterator[Omission]:
    """Find convolutions that a BatchNormalization was folded into."""
    folded = []
    for node in list_nodes(graph):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        by_name = weight is not None and _FOLDED.fullmatch(weight.name or "")
        if by_name or "BatchNorm" in node.metadata_props.get(_REWRITES, ""):
            folded.append(node.name or "")
    if folded:
        yield Omission(
            kind=OmissionKind.FOLDED_BATCHNORM,
            sentence=f"BatchNormalization was folded into {_name(folded)}, so it normalises and "
            "trains nothing",
            names=tuple(folded),
        )


def _find_frozen(graph: ir.Graph) -> Iterator[Omission]:
    frozen = tuple(
        node.name or ""
        for node in graph
        if node.op_type == "BatchNormalization"
        and not node.domain
        and not node.attributes.get_int("training_mode", 0)
        and not computes_statistics(node)
    )
    if frozen:
        yield Omission(
            kind=OmissionKind.FROZEN_BATCHNORM,
            sentence=f"{len(frozen)} BatchNormalization nodes are in inference mode "
            f"({_name(frozen)}), which --batchnorm train corrects as well",
            names=frozen,
        )


def computes_statistics(node: ir.Node) -> bool:
    """Return whether the statistics of a BatchNormalization are computed from the batch.

    The dynamo exporter writes this for a layer without running statistics
    (``track_running_stats=False``).  The node is then in inference mode, but reads the mean and the
    variance that other nodes compute from the batch.
    """
    _, sources = walk_back([value for value in node.inputs[3:5] if value is not None])
    return any(value.is_graph_input() and not value.is_initializer() for value in sources)


def _find_computed(graph: ir.Graph) -> Iterator[Omission]:
    matrices = [
        name
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and len(value.const_value.shape) > 1
    ]
    computed = tuple(name for name in matrices if _COMPUTED.fullmatch(name))
    if computed:
        yield Omission(
            kind=OmissionKind.COMPUTED_WEIGHTS,
            sentence=f"{_name(computed)} {'was' if len(computed) == 1 else 'were'} computed from "
            "the network's parameters, to which trained values cannot be given back",
            names=computed,
        )
    results = tuple(
        name
        for name in matrices
        if _CALCULATED.fullmatch(name) and _varies(graph.initializers[name].const_value)
    )
    if results:
        one = len(results) == 1
        yield Omission(
            kind=OmissionKind.COMPUTED_WEIGHTS,
            sentence=f"{_name(results)} {'was' if one else 'were'} computed by the exporter, as of "
            "a normalised weight, and would be trained freely in place of the parameters behind "
            f"{'it' if one else 'them'}, without the computation",
            names=results,
        )


def _varies(tensor: ir.TensorProtocol | None) -> bool:
    """Return whether numbers may come from parameters: they are finite, and not all are equal."""
    if tensor is None or tensor.size < 1:
        return False
    array = tensor.numpy().astype(np.float64)
    return bool(np.isfinite(array).all() and array.min() < array.max())


def _find_joined(graph: ir.Graph) -> Iterator[Omission]:
    """Find parameters that an exporter stores once because their numbers were equal.

    The legacy exporter leaves an Identity with the name of the other parameter.  The dynamo
    exporter leaves one parameter, which nodes of other modules use as well, or one node as its
    scale and its bias.  Running statistics are left out: preparation gives each its own tensor.
    """
    joined: dict[str, list[str]] = {}
    for node in graph:
        first = node.inputs[0] if node.op_type == "Identity" else None
        other = node.outputs[0].name or "/"  # names of activations begin with a slash
        is_parameter = not other.startswith("/") and not _is_only_statistic(node.outputs[0])
        if first is not None and first.is_initializer() and is_parameter:
            joined.setdefault(first.name or "", []).append(other)
    for name, value in graph.initializers.items():
        tensor, users = value.const_value, _list_learning(value)
        is_bias = tensor is not None and len(tensor.shape) == 1 and tensor.size > 1
        owner = name.rpartition(".")[0]
        if owner and is_bias and len(users) > 1:
            others = [n for n in users if not _is_within(n, owner) or users.count(n) > 1]
            if others:
                more = dict.fromkeys(node.name or "" for node in others)
                joined.setdefault(name, []).extend(more)
    if joined:
        names = tuple(dict.fromkeys([*joined, *(n for own in joined.values() for n in own)]))
        pairs = [f"'{name}' as {_name(others)}" for name, others in joined.items()]
        yield Omission(
            kind=OmissionKind.JOINED_PARAMETERS,
            sentence="parameters of equal numbers were stored once and would be trained as one: "
            f"{', '.join(pairs[:_FEW])}{' and more' if len(pairs) > _FEW else ''}",
            names=names,
        )


def _list_learning(value: ir.Value) -> list[ir.Node]:
    """List the nodes that use a tensor other than as a running mean or variance."""
    return [
        use.node
        for use in value.uses()
        if use.node.op_type != "BatchNormalization" or use.node.domain or use.idx < _FIRST_STATISTIC
    ]


def _is_only_statistic(value: ir.Value) -> bool:
    return bool(value.uses()) and not _list_learning(value)


def find_module(node: ir.Node) -> str | None:
    """Return the name of the module to which a node belongs, if the dynamo exporter noted it."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
    module = re.sub(r"@\d+$", "", scopes[-2]) if len(scopes) > 1 else ""
    return module if module and module.isprintable() else None


def _is_within(node: ir.Node, module: str) -> bool:
    """Return whether a node belongs to a module, or its metadata name no module."""
    scopes = node.metadata_props.get(_SCOPES)
    return scopes is None or f"'{module}'" in scopes


def _find_lost_dropout(graph: ir.Graph) -> Iterator[Omission]:
    """Find consecutive recurrent layers in a model that has no dropout and is in inference mode."""
    nodes = list(graph)
    if any(node.op_type in ("Bernoulli", "Dropout") for node in nodes):
        return
    if any(node.attributes.get_int("training_mode", 0) for node in nodes):
        return
    if any(_follows(node, _LAYOUTS) for node in nodes):
        names = tuple(node.name or "" for node in nodes if node.op_type in _RECURRENT)
        yield Omission(
            kind=OmissionKind.LOST_DROPOUT,
            sentence=f"{_name(names)} have no Dropout between them: if the network had one, as in "
            "nn.LSTM(dropout=...), it is gone, and the legacy exporter cannot keep it",
            names=names,
        )


def _follows(node: ir.Node, between: frozenset[str]) -> bool:
    """Return whether only operators in ``between`` separate a recurrent layer from another."""
    value = node.inputs[0] if node.op_type in _RECURRENT and not node.domain else None
    while value is not None and (before := value.producer()) is not None:
        if before.op_type == node.op_type:
            return True
        value = before.inputs[0] if before.op_type in between else None
    return False


def _name(names: tuple[str, ...] | list[str]) -> str:
    if len(names) <= _FEW + 1:
        return quote(names)
    return f"{quote(names[:_FEW])} and {len(names) - _FEW} more"


_LOOKS: tuple[Callable[[ir.Graph], Iterator[Omission]], ...] = (
    _find_fixed_batch,
    _find_folded,
    _find_frozen,
    _find_computed,
    _find_joined,
    _find_lost_dropout,
)
