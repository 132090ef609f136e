"""Faults in a model: what goes wrong at a node is told of that node, in one sentence.

A rule for an operator trusts what the operator's definition promises of its inputs and
attributes: their number, ranks that fit, a divisor that is not 0.  A model may break that where
no checker looks, and the breach then shows as one of Python's own errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel


@contextmanager
def blame(node: ir.Node) -> Iterator[None]:
    """Blame ``node`` where the work on it breaks off.

    Raises:
        UnsupportedModel: it names the node and what was wrong.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError,
            MemoryError, RuntimeError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:120] or "a type or shape that is not known"
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            f"its inputs or attributes are not what the operator takes ({reason})",
            "check how the model was exported",
        ) from error
