"""Faults: whose an error is that interrupts the work on a model, the model's or ours.

The work trusts what an operator's definition promises of its inputs and attributes: ranks that fit,
a divisor that is not 0, a mode that exists.  A model may break that where no checker looks, and
the breach then shows as one of Python's errors of values (:data:`FAULTS`): it is told of the node.
Any other error is a mistake of this package, and says so, with the pass and the node; its
traceback is logged, and it gives no advice on the model.
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
"""As what a model shows whose values or ranks are not what an operator takes."""
_UNREADABLE = (*FAULTS, AssertionError, AttributeError, RuntimeError, TypeError)
"""As what bytes show that are not a model, when onnx-ir reads them."""

_NO_NUMBER = re.compile(r"only .* arrays can be converted to .*")
_MOST_CHARACTERS = 160


@contextmanager
def attribute_errors_to(
    node: ir.Node, work: str, lost: str = "is read, but nothing makes it", advice: str = ""
) -> Iterator[None]:
    """Name ``node`` where the work on it fails; ``work`` completes "while it was ...".

    ``lost`` and ``advice`` say what it means that nothing was written for an output of it.

    Raises:
        UnsupportedModel: the node's inputs or attributes are not what its operator takes.
        InternalModelError: the work itself is wrong.
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
    """Name a pass over the whole model, and the node it was at, where it fails.

    ``work`` completes "while it was ...".

    Raises:
        UnsupportedModel: the model is too large to be written down.
        InternalModelError: the pass itself is wrong, since the gate has let the model in.
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
    """Refuse bytes that cannot be read; ``refuse`` makes the error from the reason.

    onnx-ir and protobuf raise any sort of error over such bytes.  One that says that our own code
    is wrong, and is raised in it, passes unchanged to the pass around this.
    """
    try:
        yield
    except _UNREADABLE as error:
        if not isinstance(error, FAULTS) and _is_raised_here(error):
            raise
        raise refuse(explain(error)) from error


def _shows_values(cause: BaseException) -> bool:
    """Check whether an error is of values; numpy's for an array in place of a number is, too."""
    if isinstance(cause, TypeError):
        return _NO_NUMBER.fullmatch(str(cause)) is not None
    return isinstance(cause, FAULTS)


def _is_raised_here(error: BaseException) -> bool:
    """Check whether it is this package's code, and not one that it calls, which raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(find_cause(error).__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("splitonnx.")


def _find_node(error: BaseException) -> ir.Node | None:
    """Find the node that a pass was at when it failed: the innermost function's ``node``."""
    found = None
    for frame, _ in traceback.walk_tb(find_cause(error).__traceback__):
        local = frame.f_locals.get("node")
        found = local if isinstance(local, ir.Node) else found
    return found


def _describe(node: ir.Node) -> str:
    return f"node '{node.name}' ({node.op_type})"


def _report(subject: str, work: str, error: Exception) -> InternalModelError:
    """Log where our work failed, and make the error that asks for a report."""
    log_mistake(f"{subject}, while it was {work}", error)
    cause = find_cause(error)
    return InternalModelError(subject, work, f"{type(cause).__name__}: {explain(error)}")


def find_cause(error: BaseException) -> BaseException:
    """Find the first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error: BaseException) -> str:
    """Return the sentence of the first cause: onnx-ir repeats whole messages on the way up."""
    text = " ".join(str(find_cause(error)).split())
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable[:_MOST_CHARACTERS] or "a type or shape that is not known"
