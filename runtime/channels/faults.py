"""A server's answers: which kind was due, errors as it raised them, and why it did not save."""

from __future__ import annotations

from typing import TypeVar

from splitonnx.errors import (
    BatchTooLarge,
    NotFinite,
    NotPermitted,
    RemoteFault,
    RemoteProtocolError,
    ServerBusy,
    SharingNotPermitted,
    SplitonnxError,
    StaleConnection,
    TaskTooLarge,
    flatten,
)
from splitonnx.messages import Fault, Message, Save, Saved, Unsaved

_Answer = TypeVar("_Answer", bound=Message)


def expect(expected: type[_Answer], message: Message) -> _Answer:
    """Return a server's message, which must be of the kind that is due.

    Raises:
        RemoteProtocolError: it is of another kind.
    """
    if not isinstance(message, expected):
        due = expected.__name__
        raise RemoteProtocolError(f"it sent {type(message).__name__} where {due} was due")
    return message


def translate_fault(fault: Fault, generation: int) -> SplitonnxError:
    """Return the error that a fault of the server reports; its texts become single, short lines.

    ``generation`` is the number of the connection that the fault came on.
    """
    reason, subject = flatten(fault.reason), flatten(fault.subject)
    if fault.code == StaleConnection.__name__:
        return StaleConnection(generation, fault.newest)
    if fault.code == ServerBusy.__name__:
        return ServerBusy(reason)
    if fault.code == NotFinite.__name__:
        return NotFinite(subject, f"{reason}, at the server")
    if fault.code == BatchTooLarge.__name__:
        return BatchTooLarge(subject, fault.needed, fault.limit)
    if fault.code == NotPermitted.__name__:
        return NotPermitted(subject, reason)
    if fault.code == SharingNotPermitted.__name__:
        return SharingNotPermitted(subject)
    if fault.code == TaskTooLarge.__name__:
        return TaskTooLarge(fault.needed, fault.limit)
    return RemoteFault(fault.code, reason)


def read_saved(asked: Save, answer: Message) -> str:
    """Return why a server did not save its state as it was asked to, or ``""`` if it did.

    Raises:
        RemoteProtocolError: its answer belongs to something else.
    """
    if not isinstance(answer, Saved | Unsaved):
        raise RemoteProtocolError(f"it sent {type(answer).__name__} where Saved was due")
    if answer.step != asked.step:
        raise RemoteProtocolError(f"it saved step {answer.step}, not {asked.step}")
    if answer.session != asked.session:
        raise RemoteProtocolError("it saved another session")
    if isinstance(answer, Unsaved):
        return flatten(answer.reason) or "no reason given"
    return "its version cannot keep the best state" if asked.keep and not answer.keep else ""
