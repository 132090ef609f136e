"""Find sums in which terms cancel, a sign that the export lost a ``detach``.

In PyTorch, a straight-through estimator is written ``z + (q - z).detach()``.  ONNX has no detach,
so the exported model contains ``z + (q - z)``.  The gradient of this sum with respect to ``z`` is 0
instead of 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.graphs.builders import DETACHED, known_array
from splitonnx.partitioner.graphs.traversals import find_moving, walk_back
from splitonnx.partitioner.reports.remarks import Kind, Remark, make_option

_MOST_TERMS = 8
"""The largest number of terms to which a sum is expanded."""
_SIGNS: Mapping[str, tuple[int, ...]] = {
    "Add": (1, 1),
    "Sub": (1, -1),
    "Neg": (-1,),
    "Identity": (1,),
}

Terms = dict[ir.Value, int]


def remark_on_detaches(prepared: PreparedModel) -> Iterator[Remark]:
    """Yield a remark for each sum in which a term that depends on trained parameters cancels."""
    graph = prepared.skeleton.graph
    trained = set(prepared.trainable)
    moving = find_moving(graph, [value for value in graph.inputs if value.name in trained])
    sums: dict[ir.Value, Terms] = {}
    for node in graph:
        parts = _list_parts(node)
        if not parts:
            continue
        terms: Terms = {}
        for value, sign in parts:
            for term, factor in sums.get(value, {value: 1}).items():
                terms[term] = terms.get(term, 0) + sign * factor
        lost = [term for term, factor in terms.items() if factor == 0]
        rest = {term: factor for term, factor in terms.items() if factor}
        if rest and len(terms) <= _MOST_TERMS:
            sums[node.outputs[0]] = rest
        for term in lost if rest else ():
            if term in moving:
                yield _remark(node, term, sums)


def _list_parts(node: ir.Node) -> list[tuple[ir.Value, int]]:
    """List the terms that a node adds, each with its sign; nothing if the node is not a sum.

    A product with the constant 1 or -1, and a quotient by it, are sums of one term.  A tensor at
    which gradients are stopped is not a sum.
    """
    values = [value for value in node.inputs if value is not None]
    if node.domain or DETACHED in node.metadata_props:
        return []
    if node.op_type == "Sum":
        return [(value, 1) for value in values]
    if node.op_type in ("Div", "Mul") and len(values) == 2:
        pairs = [(values[0], values[1]), (values[1], values[0])]
        signed = [(own, _read_sign(other)) for own, other in pairs]
        return [part for part in signed[: 1 if node.op_type == "Div" else 2] if part[1]][:1]
    signs = _SIGNS.get(node.op_type, ())
    return list(zip(values, signs, strict=True)) if len(values) == len(signs) else []


def _read_sign(value: ir.Value) -> int:
    """Return 1 or -1 if a constant consists of this number alone, and 0 otherwise."""
    array = known_array(value)
    if array is None or not array.size:
        return 0
    return next((sign for sign in (1, -1) if np.all(array == sign)), 0)


def _remark(node: ir.Node, term: ir.Value, sums: Mapping[ir.Value, Terms]) -> Remark:
    result, detached = node.outputs[0].name or "", _find_detached(node, term, sums)
    name = term.name or ""
    remedy = (
        f"stop the gradient at '{detached}' if the model detached it"
        if detached
        else "no tensor holds the part that was detached; write the model so that one does"
    )
    return Remark(
        kind=Kind.LOST_DETACH,
        sentence=f"'{name}' cancels out of the sum '{result}', so no gradient reaches it from "
        f"there, which looks like a detach that the export lost: {remedy}",
        names=(result, name),
        options=(make_option("--stop-gradient", detached),) if detached else (),
    )


def _find_detached(node: ir.Node, term: ir.Value, sums: Mapping[ir.Value, Terms]) -> str | None:
    """Return the name of the smallest partial sum of ``node`` that subtracts ``term``.

    Of these, ``term`` alone with a minus is chosen last, because ``q - z`` may be written as
    ``q + (-z)``.  Return ``None`` if there is no such sum, or if the terms that are kept depend on
    it.
    """
    kept: list[ir.Value] = []
    found = None
    sign = 1
    while True:
        parts = [(v, s) for v, s in _list_parts(node) if term in sums.get(v, {v: 1})]
        held = [(v, sign * s * sums.get(v, {v: 1})[term]) for v, s in parts]
        lost = [(v, s) for v, s in parts if sign * s * sums.get(v, {v: 1})[term] < 0]
        kept += [value for value, factor in held if factor > 0]
        if len(lost) != 1 or lost[0][0] is term:
            break
        value, own = lost[0]
        following = value.producer()
        if following is None or not _list_parts(following):
            break
        found = value if found is None or len(sums.get(value, {})) > 1 else found
        node, sign = following, sign * own
    if found is None or found.producer() in walk_back(kept)[0]:
        return None
    return found.name
