"""Stop gradients at tensors that the user names, as ``detach`` does in PyTorch.

Exporters leave out a ``detach``, because it has no effect in inference.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
import onnx_ir as ir

from splitonnx.errors import UsageError
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.cutting.passes.stored_options import (
    NONE_STORED,
    Ignored,
    StoredOptions,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import find_movers, map_values


def stop_gradients(
    graph: ir.Graph,
    weights: Collection[str],
    names: Sequence[str],
    given: Collection[str] = (),
    stored: StoredOptions = NONE_STORED,
) -> tuple[StoredOptions, Ignored]:
    """Stop every gradient at the named tensors, in place.

    Each of ``names`` is the name of a tensor or node, or a glob pattern for tensor names.  Nodes
    that read such a tensor read a detached copy of it instead.  ``weights`` names the graph inputs
    that are not data.  ``given`` names the tensors and nodes of the user's model.  ``stored`` are
    the options from the model's file; stops in it that have no effect are ignored.

    Returns:
        ``stored`` with only the stops that were made and that are not also in ``names``, and those
        of its stops that mean something else than they do.  A stop where no gradient passes anyway
        is not among them.

    Raises:
        UnknownTensor: a name matches nothing.
        UsageError: a tensor is itself a parameter, no node reads it, or no gradient passes through
            it to a parameter anyway.
    """
    values, chosen = map_values(graph), resolve_names(graph, names, given)
    for value in chosen:
        if reason := _explain_refusal(value, weights):
            raise UsageError(f"--stop-gradient '{value.name}' {reason}")
        _detach(graph, value)
    found = [name for name in stored.stop_gradients if name in values]
    idle = [name for name in found if name in weights or not values[name].uses()]
    made = [n for n in found if values[n] not in chosen and _try_stop(graph, values[n], weights)]
    ignored = Ignored(
        missing=tuple(name for name in stored.stop_gradients if name not in values),
        stops=tuple(name for name in idle if values[name] not in chosen),
    )
    return msgspec.structs.replace(stored, stop_gradients=tuple(made)), ignored


def _try_stop(graph: ir.Graph, value: ir.Value, weights: Collection[str]) -> bool:
    """Stop every gradient at a tensor, and return whether this has an effect."""
    if _explain_refusal(value, weights):
        return False
    _detach(graph, value)
    return True


def _explain_refusal(value: ir.Value, weights: Collection[str]) -> str:
    """Return why gradients cannot be stopped at a tensor, or an empty string if they can."""
    if value.name in weights:
        return "is a parameter; --freeze keeps it from being trained"
    if not value.uses():
        return "has no effect: no node reads it, and the loss of it is what is trained"
    if not {source.name for source in find_movers([value])} & set(weights):
        return "has no effect: no gradient would pass through it to a parameter"
    return ""


def _detach(graph: ir.Graph, value: ir.Value) -> None:
    readers = list(value.uses())
    builder = NodeBuilder(f"{value.name}/stop")
    copy = builder.detach(value)
    (node,) = builder.nodes
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, node)
    for use in readers:
        use.node.replace_input_with(use.idx, copy)
