"""Refuse a Resize to constant sizes on an axis whose size is not fixed, such as the batch."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.expressions import UNKNOWN, describe_size, solve_for
from splitonnx.partitioner.graphs.builders import take_input
from splitonnx.partitioner.graphs.traversals import (
    list_bodies,
    list_inner,
    list_inputs,
    list_nodes,
    walk_back,
)
from splitonnx.partitioner.inference.dimensions import Dim
from splitonnx.partitioner.inference.inferences import Inference

_KEPT = 2
"""The number of leading axes, batch and channels, of which a Resize has to keep the sizes."""


def refuse_resized_batches(graph: ir.Graph) -> None:
    """Refuse each Resize that changes the number of samples or channels, if that is not fixed.

    An exporter that traces a batch of two samples writes the 2 into the sizes of a Resize.  With
    another batch, the node would compute new samples from those of the batch, which nobody means
    and which has no gradient here.

    Raises:
        UnsupportedModel: the graph, or a body in it, has such a node.
    """
    asked = [node for node in list_nodes(graph) if _has_sizes(node)]
    if not asked:
        return
    holders = {inner: node for node in graph for inner in list_inner(node)}
    outer = list(dict.fromkeys(holders[node] for node in asked if node in holders))
    read = [value for node in (*asked, *outer) for value in list_inputs(node)]
    needed, _ = walk_back(read)
    known = Inference(graph.opset_imports[""])
    for node in graph:
        if node in needed:
            known.visit(node)
        if node in outer:
            _visit_bodies(node, known)
    places = _name_places(graph)
    for node in asked:
        _check(node, known, places)


def _visit_bodies(node: ir.Node, known: Inference) -> None:
    """Infer the shapes in the bodies of a node."""
    for body in list_bodies(node):
        for inner in body:
            _visit_bodies(inner, known)
            known.visit(inner)


def _name_places(graph: ir.Graph) -> dict[str, str]:
    """Map each size that the graph's inputs leave open to what ``--dim`` calls it."""
    return {
        str(dim.value or f"{UNKNOWN}{value.name}:{axis}"): dim.value or f"{value.name}:{axis}"
        for value in graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if not isinstance(dim, int)
    }


def _has_sizes(node: ir.Node) -> bool:
    return node.op_type == "Resize" and not node.domain and len(node.inputs) > 3


def _check(node: ir.Node, known: Inference, places: Mapping[str, str]) -> None:
    data, given = node.inputs[0], node.inputs[3]
    before = known.shape(data) if data is not None else None
    sizes = known.content(given)
    if before is None or sizes is None:
        return
    rank = len(before)
    axes = [axis % rank for axis in node.attributes.get_ints("axes", range(rank))]
    for axis, size in zip(axes, sizes.tolist(), strict=True):
        dim = before[axis]
        is_open = isinstance(dim, Dim) and dim.atoms <= places.keys()
        if axis < _KEPT and isinstance(size, int) and isinstance(dim, Dim) and is_open:
            what = "batch" if axis == 0 else f"size along axis {axis}"
            told = f" ('{describe_size(str(dim))}')".replace(" ('?')", "")
            raise UnsupportedModel(
                f"node '{node.name}' ({node.op_type})",
                f"its sizes have a {what} of {size}, but its input '{take_input(node).name}' has "
                f"one of any size{told}",
                f"{_advise_size(dim, size, places)}export it with sizes for the last axes alone",
            )


def _advise_size(dim: Dim, size: int, places: Mapping[str, str]) -> str:
    """Return the option that makes a dimension this size, if there is one."""
    atom, *others = dim.atoms
    needed = None if others else solve_for(atom, str(dim), size, {})
    return "" if needed is None or needed < 1 else f"train with --dim {places[atom]}={needed}, or "
