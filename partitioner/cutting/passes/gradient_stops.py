"""Stop gradients at tensors that the user names, as ``detach`` does in PyTorch.

Exporters drop a ``detach``, because it does nothing in inference.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from splitonnx.errors import UsageError
from splitonnx.partitioner.cutting.cuts import resolve_names
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import find_movers


def stop_gradients(graph: ir.Graph, weights: Collection[str], names: Sequence[str]) -> None:
    """Stop every gradient at the named tensors, in place.

    Each name is the name of a tensor or node, or a glob pattern for tensor names.  The nodes that
    read the tensor get a detached copy of it.

    Raises:
        UnknownTensor: a name matches nothing.
        UsageError: no gradient would reach a parameter through the tensor anyway, or the tensor is
            itself a parameter.
    """
    for value in resolve_names(graph, names):
        name = value.name or ""
        if name in weights:
            raise UsageError(
                f"--stop-gradient '{name}' is a parameter; --freeze keeps it from being trained"
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
