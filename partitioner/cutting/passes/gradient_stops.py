"""Stop gradients at tensors that the user names, as ``detach`` does in PyTorch.

Exporters leave out a ``detach``, because it has no effect in inference.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from splitonnx.errors import UsageError
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import find_movers


def stop_gradients(
    graph: ir.Graph, weights: Collection[str], names: Sequence[str], given: Collection[str] = ()
) -> None:
    """Stop every gradient at the named tensors, in place.

    Each of ``names`` is the name of a tensor or node, or a glob pattern for tensor names.  Nodes
    that read such a tensor read a detached copy of it instead.  ``weights`` names the graph inputs
    that are not data.  ``given`` names the tensors and nodes of the user's model.

    Raises:
        UnknownTensor: a name matches nothing.
        UsageError: a tensor is itself a parameter, no node reads it, or no gradient passes through
            it to a parameter anyway.
    """
    for value in resolve_names(graph, names, given):
        name = value.name or ""
        if name in weights:
            raise UsageError(
                f"--stop-gradient '{name}' is a parameter; --freeze keeps it from being trained"
            )
        if not value.uses():
            raise UsageError(
                f"--stop-gradient '{name}' has no effect: no node reads it, and the loss of it is "
                "what is trained"
            )
        if not {source.name for source in find_movers([value])} & set(weights):
            raise UsageError(
                f"--stop-gradient '{name}' has no effect: no gradient would pass through it to a "
                "parameter"
            )
        _detach(graph, value)


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
