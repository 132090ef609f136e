"""Refuse a Resize to constant sizes on an axis whose size is not fixed, such as the batch."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import take_input
from splitonnx.partitioner.graphs.traversals import walk_back
from splitonnx.partitioner.inference.inferences import Inference

_KEPT = 2
"""The number of leading axes, batch and channels, of which a Resize has to keep the sizes."""


def refuse_resized_batches(graph: ir.Graph) -> None:
    """Refuse each Resize that changes the number of samples or channels, if that is not fixed.

    An exporter that traces a batch of two samples writes the 2 into the sizes of a Resize.  With
    another batch, the node would compute new samples from those of the batch, which nobody means
    and which has no gradient here.

    Raises:
        UnsupportedModel: the graph has such a node.
    """
    asked = [node for node in graph if _has_sizes(node)]
    if not asked:
        return
    needed, _ = walk_back([value for node in asked for value in node.inputs if value is not None])
    known = Inference(graph.opset_imports[""])
    for node in graph:
        if node in needed:
            known.visit(node)
    dims = [dim for value in graph.inputs for dim in value.shape or ()]
    symbols = {str(dim) for dim in dims if not isinstance(dim, int)}
    for node in asked:
        _check(node, known, symbols)


def _has_sizes(node: ir.Node) -> bool:
    return node.op_type == "Resize" and not node.domain and len(node.inputs) > 3


def _check(node: ir.Node, known: Inference, symbols: Collection[str]) -> None:
    data, given = node.inputs[0], node.inputs[3]
    before = known.shape(data) if data is not None else None
    sizes = known.content(given)
    if before is None or sizes is None:
        return
    rank = len(before)
    axes = [axis % rank for axis in node.attributes.get_ints("axes", range(rank))]
    for axis, size in zip(axes, sizes.tolist(), strict=True):
        dim = before[axis]
        if axis < _KEPT and isinstance(size, int) and str(dim) in symbols and dim != size:
            what = "batch" if axis == 0 else f"size along axis {axis}"
            raise UnsupportedModel(
                f"node '{node.name}' ({node.op_type})",
                f"its sizes have a {what} of {size}, but its input '{take_input(node).name}' has "
                f"one of any size ('{dim}')",
                f"train with --dim {dim}={size}, or export it with sizes for the last axes alone",
            )
