"""Decide whether an error in processing a model is caused by the model or by this package.

Code that handles a node assumes that the node's inputs and attributes are valid for its operator:
ranks match, a divisor is not 0, a mode exists.  Checkers do not cover all of these assumptions.  If
a model violates an assumption, Python raises an exception such as :class:`ValueError` (see
:data:`FAULTS`), which is reported as an error in the model, with the node's name.  Any other
exception is reported as a bug in this package, with the pass and the node, and its traceback is
logged.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx_ir as ir
from google.protobuf.message import EncodeError

from splitonnx.errors import InternalModelError, SplitonnxError, UnsupportedModel
from splitonnx.faults import log_mistake
from splitonnx.partitioner.graphs.builders import MissingOutput

FAULTS = (ArithmeticError, EncodeError, LookupError, MemoryError, ValueError)
"""Exceptions that Python code raises if a model's values or ranks are not valid."""
_UNREADABLE = (*FAULTS, AssertionError, AttributeError, RuntimeError, TypeError)
"""Exceptions that onnx-ir raises when it reads bytes that are not a valid model."""

_NO_NUMBER = re.compile(r"only .* arrays can be converted to .*")
_MOST_CHARACTERS = 160


@contextmanager
def attribute_errors_to(
    node: ir.Node, work: str, lost: str = "is read, but nothing makes it", advice: str = ""
) -> Iterator[None]:
    """Convert exceptions in a ``with`` block that handles ``node`` into errors about this node.

    ``work`` describes the block in error messages: it completes the phrase "while it was ...".
    ``lost`` and ``advice`` are used in the message if an output of the node was not replaced.

    Raises:
        UnsupportedModel: the node's inputs or attributes are not valid for its operator.
        InternalModelError: the code in the block has a bug.
    """
    subject = _describe(node)
    try:
        yield
    except SplitonnxError:
        raise
    except MissingOutput as error:
        raise UnsupportedModel(subject, f"its output '{error}' {lost}", advice) from error
    except Exception as error:
        if _shows_values(find_cause(error)):
            raise UnsupportedModel(
                subject,
                f"its inputs or attributes are not what the operator takes ({explain(error)})",
                "check how the model was exported",
            ) from error
        raise _report(subject, work, error) from error


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
        subject = "the model" if node is None else f"the model at {_describe(node)}"
        raise _report(subject, work, error) from error


@contextmanager
def attribute_errors_to_bytes(refuse: Callable[[str], SplitonnxError]) -> Iterator[None]:
    """Convert exceptions from reading a model's bytes into errors about the bytes.

    onnx-ir and protobuf raise many kinds of exceptions on invalid bytes.  ``refuse`` creates the
    error to raise, given the reason.  Exceptions that come from this package's own code and look
    like a bug are not converted.
    """
    try:
        yield
    except _UNREADABLE as error:
        if not isinstance(error, FAULTS) and _is_raised_here(error):
            raise
        raise refuse(explain(error)) from error


def _shows_values(cause: BaseException) -> bool:
    """Return whether an exception was caused by invalid values in the model.

    This includes numpy's TypeError for an array that should be a single number.
    """
    if isinstance(cause, TypeError):
        return _NO_NUMBER.fullmatch(str(cause)) is not None
    return isinstance(cause, FAULTS)


def _is_raised_here(error: BaseException) -> bool:
    """Return whether an exception was raised by this package itself and not by a library."""
    frames = [frame for frame, _ in traceback.walk_tb(find_cause(error).__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("splitonnx.")


def _find_node(error: BaseException) -> ir.Node | None:
    """Find the node that a pass was handling when it failed.

    This is the value of the innermost local variable named ``node`` in the traceback.
    """
    found = None
    for frame, _ in traceback.walk_tb(find_cause(error).__traceback__):
        local = frame.f_locals.get("node")
        found = local if isinstance(local, ir.Node) else found
    return found


def _describe(node: ir.Node) -> str:
    return f"node '{node.name}' ({node.op_type})"


def _report(subject: str, work: str, error: Exception) -> InternalModelError:
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
