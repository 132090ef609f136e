"""Faults in a model: what goes wrong in the work on it is told in one sentence.

The work trusts what an operator's definition promises of its inputs and attributes: their number,
ranks that fit, a divisor that is not 0.  A model may break that where no checker looks, and the
breach then shows as one of Python's own errors.  The error names the node where it is known
(:func:`attribute_errors_to`), else the pass that failed (:func:`attribute_errors_to_pass`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from google.protobuf.message import EncodeError

from splitonnx.errors import InternalModelError, UnsupportedModel
from splitonnx.partitioner.graphs.builders import MissingOutput

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EncodeError,
    LookupError,
    MemoryError,
    RuntimeError,  # onnx-ir's are some
    TypeError,
    ValueError,
)
"""As what a model that is not well-formed shows."""

_MOST_CHARACTERS = 160


@contextmanager
def attribute_errors_to(
    node: ir.Node, lost: str = "is read, but nothing makes it", advice: str = ""
) -> Iterator[None]:
    """Blame ``node`` where the work on it breaks off.

    ``lost`` and ``advice`` say what it means that nothing was written for an output of it.

    Raises:
        UnsupportedModel: it names the node and what was wrong.
    """
    subject = f"node '{node.name}' ({node.op_type})"
    try:
        yield
    except MissingOutput as error:
        raise UnsupportedModel(subject, f"its output '{error}' {lost}", advice) from error
    except FAULTS as error:
        raise UnsupportedModel(
            subject,
            f"its inputs or attributes are not what the operator takes ({explain(error)})",
            "check how the model was exported",
        ) from error


@contextmanager
def attribute_errors_to_pass(work: str) -> Iterator[None]:
    """Blame the model as a whole where a stage of the work on it breaks off.

    ``work`` completes "it cannot be ...".

    Raises:
        InternalModelError: it names the work and what was wrong.
    """
    try:
        yield
    except FAULTS as error:
        raise InternalModelError(
            "the model",
            f"it cannot be {work} ({explain(error)})",
            "check how it was exported",
        ) from error


def explain(error: BaseException) -> str:
    """Give the sentence of the first cause: onnx-ir repeats whole messages on the way up."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable[:_MOST_CHARACTERS] or "a type or shape that is not known"
