"""Decide whether the model or this package caused an error while a model was processed.

The gate refuses models that are not valid.  An exception in a later pass is therefore reported as a
bug in this package, with the pass and the node, and its traceback is logged.  In the gate itself,
an exception is the model's fault if a library raised it, and a bug if this package's own code did.
:mod:`splitonnx.partitioner.inference.node_faults` does the same for code that handles one node.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from splitonnx.errors import InternalModelError, SplitonnxError, UnsupportedModel
from splitonnx.faults import log_mistake

FAULTS = (ArithmeticError, EncodeError, LookupError, MemoryError, ValueError)
"""Exceptions that Python code raises if a model's values or ranks are not valid."""
_UNREADABLE = (*FAULTS, AssertionError, AttributeError, RuntimeError, TypeError)
"""Exceptions that onnx-ir raises when it reads bytes that are not a valid model."""

_MOST_CHARACTERS = 160
_GRADIENT = re.compile(r"(.+)_Grad/\w+", re.DOTALL)
"""The names that onnxruntime-training gives to the nodes of a node's gradient."""


@contextmanager
def attribute_errors_to_pass(work: str) -> Iterator[None]:
    """Convert exceptions in a pass over a model into errors that name the pass and the node.

    ``work`` describes the pass in error messages: it completes the phrase "while it was ...".

    Raises:
        UnsupportedModel: the model is too large to be serialized.
        InternalModelError: the pass failed although the gate accepted the model; this is a bug.
    """
    try:
        yield
    except SplitonnxError:
        raise
    except (EncodeError, MemoryError) as error:
        reason = f"it is too large ({explain(error)})"
        raise UnsupportedModel("the model", reason, "save its weights beside it") from error
    except Exception as error:
        node = _find_node(error)
        subject = "the model" if node is None else f"the model at {describe_node(node)}"
        raise report_mistake(subject, work, error) from error


@contextmanager
def attribute_errors_to_bytes(refuse: Callable[[str], SplitonnxError]) -> Iterator[None]:
    """Convert exceptions from reading a model's bytes into errors about the bytes.

    onnx-ir and protobuf raise many kinds of exceptions on invalid bytes.  ``refuse`` creates the
    error to raise, given the reason.  Exceptions that this package's own code raises
    (:func:`is_ours`) are not converted.
    """
    try:
        yield
    except _UNREADABLE as error:
        if is_ours(error):
            raise
        raise refuse(explain(error)) from error


def is_ours(error: BaseException) -> bool:
    """Return whether an exception was caused by this package's own code and not by a library.

    An exception that numpy raises counts as this package's own if the package called numpy, because
    it then passed wrong arguments.  Three kinds of exceptions never count as this package's own:
    exceptions from protobuf, exceptions about text that is not UTF-8, and a lack of memory.
    """
    cause = find_cause(error)
    if isinstance(cause, DecodeError | EncodeError | MemoryError | UnicodeError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    callers = [name for name in modules if name.partition(".")[0] != "numpy"]
    return bool(callers) and callers[-1].startswith("splitonnx.")


def _find_node(error: BaseException) -> ir.Node | None:
    """Find the node that a pass was handling when it failed.

    This is the value of the innermost local variable named ``node`` in the traceback.
    """
    found = None
    for frame, _ in traceback.walk_tb(find_cause(error).__traceback__):
        local = frame.f_locals.get("node")
        found = local if isinstance(local, ir.Node) else found
    return found


def describe_node(node: ir.Node) -> str:
    """Return a text for error messages with a node's name and operator.

    A node of a gradient is named by the node whose gradient it computes.
    """
    whole = _GRADIENT.fullmatch(node.name or "")
    subject = f"node '{node.name}'" if whole is None else f"the gradient of node '{whole[1]}'"
    return f"{subject} ({node.op_type})"


def report_mistake(subject: str, work: str, error: Exception) -> InternalModelError:
    """Log a bug in this package, and return an error that asks the user to report it."""
    log_mistake(f"{subject}, while it was {work}", error)
    cause = find_cause(error)
    return InternalModelError(subject, work, f"{type(cause).__name__}: {explain(error)}")


def find_cause(error: BaseException) -> BaseException:
    """Return the exception that originally caused an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error: BaseException) -> str:
    """Return the message of the exception that originally caused an error, shortened if needed.

    onnx-ir wraps exceptions several times and repeats the message each time.
    """
    text = " ".join(str(find_cause(error)).split())
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable[:_MOST_CHARACTERS] or "a type or shape that is not known"
