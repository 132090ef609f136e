"""Tables: constants of a size that a model's numbers say, bounded before they are made.

A model of a hundred bytes may ask for the interpolation weights of a picture of a terabyte, or
for a diagonal of a million rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import known_dims

MOST_CONSTANTS = 2**26
"""Elements of the constants that a model's rewrites make, those on the way among them.

A model that asks for more is no honest one.
"""
_SPENT: ContextVar[list[float]] = ContextVar("elements spent on the model at hand")


@contextmanager
def count_constants() -> Iterator[None]:
    """Count what :func:`limit` is asked for as one model's."""
    token = _SPENT.set([0.0])
    try:
        yield
    finally:
        _SPENT.reset(token)


def limit(node: ir.Node, count: float) -> None:
    """Refuse a node for which constants of ``count`` elements would have to be made.

    It is asked before any is.

    Raises:
        UnsupportedModel: with those of the nodes before it there would be more than 2**26.
    """
    spent = _SPENT.get([0.0])
    if spent[0] + count > MOST_CONSTANTS:
        before = f", behind {spent[0]:.0f} that were asked for before" if spent[0] else ""
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            f"its attributes ask for tables of {count:.0f} elements{before}; at most "
            f"{MOST_CONSTANTS} are written for a model",
            "check its sizes",
        )
    spent[0] += max(0, count)


def refuse_tables(graph: ir.Graph) -> None:
    """Refuse a node that makes too large a constant of constants, which native code would fold.

    Raises:
        UnsupportedModel: it would have more than 2**26 elements.
    """
    constant = set(graph.initializers.values())
    for node in graph:
        if not all(value is None or value in constant for value in node.inputs) or node.domain:
            continue
        constant.update(node.outputs)
        for dims in (known_dims(value) for value in node.outputs if node.op_type != "Constant"):
            with count_constants():
                limit(node, math.prod(dim or 0 for dim in dims or (0,)))
