"""Limit the size of constants that are created while a model is rewritten.

Without a limit, a model of a hundred bytes could request huge constants, such as the interpolation
weights of an image of a terabyte or a diagonal of a million rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import known_dims
from splitonnx.partitioner.graphs.faults import describe_node

MOST_CONSTANTS = 2**26
"""Limit of elements in all constants that are created while a model is rewritten.

Intermediate constants count too.  A model that needs more is assumed to be malicious.
"""
_SPENT: ContextVar[list[float]] = ContextVar("elements spent on the model at hand")


@contextmanager
def count_constants() -> Iterator[None]:
    """Begin a new total of constants for a ``with`` block; :func:`limit` adds to it."""
    token = _SPENT.set([0.0])
    try:
        yield
    finally:
        _SPENT.reset(token)


def limit(node: ir.Node, count: float) -> None:
    """Check that a node may create constants with ``count`` elements, and add them to the total.

    Call this before creating the constants.

    Raises:
        UnsupportedModel: the model's constants would have more than 2**26 elements in total.
    """
    spent = _SPENT.get([0.0])
    if spent[0] + count > MOST_CONSTANTS:
        before = f", behind {spent[0]:.0f} that were asked for before" if spent[0] else ""
        raise UnsupportedModel(
            describe_node(node),
            f"its attributes ask for tables of {count:.0f} elements{before}; at most "
            f"{MOST_CONSTANTS} are written for a model",
            "check its sizes",
        )
    spent[0] += max(0, count)


def refuse_tables(graph: ir.Graph) -> None:
    """Check that no node computes a huge value from constants.

    Native code would compute such a value in advance, and store it.

    Raises:
        UnsupportedModel: a value would have more than 2**26 elements.
    """
    constant = set(graph.initializers.values())
    for node in graph:
        if not all(value is None or value in constant for value in node.inputs) or node.domain:
            continue
        constant.update(node.outputs)
        for dims in (known_dims(value) for value in node.outputs if node.op_type != "Constant"):
            with count_constants():
                limit(node, math.prod(dim or 0 for dim in dims or (0,)))
