"""Decide whether an error during the work on a model is caused by the model or by this package.

The code relies on what an operator's definition guarantees of its inputs and attributes: ranks that
match, a divisor that is not 0, a mode that exists.  A model may violate this in places that no
checker covers.  The violation then raises one of Python's errors of values (:data:`FAULTS`), which
is reported as an error in the model, with the node's name.  Any other error is a bug in this
package.  It is reported as such, with the pass and the node, its traceback is logged, and no advice
on the model is given.
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
"""Exceptions raised for a model whose values or ranks are not valid for an operator."""
_UNREADABLE = (*FAULTS, AssertionError, AttributeError, RuntimeError, TypeError)
"""Exceptions that onnx-ir raises when it reads bytes that are not a model."""

_NO_NUMBER = re.compile(r"only .* arrays can be converted to .*")
_MOST_CHARACTERS = 160


@contextmanager
def attribute_errors_to(
    node: ir.Node, work: str, lost: str = "is read, but nothing makes it", advice: str = ""
) -> Iterator[None]:
    """Report errors in the block as errors of ``node``; ``work`` completes "while it was ...".

    ``lost`` and ``advice`` go into the error message if no replacement was built for an output.

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
    """Report errors in a pass over the whole model with the pass and the node it was working on.

    ``work`` completes "while it was ...".

    Raises:
        UnsupportedModel: the model is too large to be serialized.
        InternalModelError: the pass has a bug, because the gate accepted the model.
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
    """Report errors while reading bytes; ``refuse`` makes the error to raise from the reason.

    onnx-ir and protobuf raise many kinds of exceptions on invalid bytes.  An exception that is
    typical of a bug and is raised in our own code passes unchanged to the surrounding pass.
    """
    try:
        yield
    except _UNREADABLE as error:
        if not isinstance(error, FAULTS) and _is_raised_here(error):
            raise
        raise refuse(explain(error)) from error


def _shows_values(cause: BaseException) -> bool:
    """Return whether values cause an error; numpy's error for an array as a number counts too."""
    if isinstance(cause, TypeError):
        return _NO_NUMBER.fullmatch(str(cause)) is not None
    return isinstance(cause, FAULTS)


def _is_raised_here(error: BaseException) -> bool:
    """Return whether an error was raised by this package's own code, not by a library it calls."""
    frames = [frame for frame, _ in traceback.walk_tb(find_cause(error).__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("splitonnx.")


def _find_node(error: BaseException) -> ir.Node | None:
    """Find the node that a pass was working on when it failed: the innermost variable ``node``."""
    found = None
    for frame, _ in traceback.walk_tb(find_cause(error).__traceback__):
        local = frame.f_locals.get("node")
        found = local if isinstance(local, ir.Node) else found
    return found


def _describe(node: ir.Node) -> str:
    return f"node '{node.name}' ({node.op_type})"


def _report(subject: str, work: str, error: Exception) -> InternalModelError:
    """Log an internal failure, and return the error that asks the user for a report."""
    log_mistake(f"{subject}, while it was {work}", error)
    cause = find_cause(error)
    return InternalModelError(subject, work, f"{type(cause).__name__}: {explain(error)}")


def find_cause(error: BaseException) -> BaseException:
    """Return the first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error: BaseException) -> str:
    """Return the message of an error's first cause; onnx-ir repeats it in each outer error."""
    text = " ".join(str(find_cause(error)).split())
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable[:_MOST_CHARACTERS] or "a type or shape that is not known"
