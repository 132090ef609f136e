"""The base class of all errors, and helpers that format names and untrusted text for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SENT = re.compile(r"(.+)@(?:(server|client)|(?:server|client)_grad)(?:#\w+)?", re.DOTALL)
"""The name of a tensor that one party sends to the other: a tensor of the model, or a gradient.

What is sent for an encoded tensor has its name, and a name of its own after a ``#``.
"""


def quote(names: Iterable[str]) -> str:
    """Quote names for an error message and join them with commas, as in ``'a', 'b'``."""
    return ", ".join(f"'{name}'" for name in names)


def list_some(names: Iterable[str], most: int = 8) -> str:
    """Quote at most ``most`` names for an error message, as in ``'a', 'b', ...``.

    Return ``none`` if there are no names.
    """
    held = list(names)
    return (quote(held[:most]) or "none") + (", ..." if len(held) > most else "")


def count_some(names: Sequence[str], most: int = 4) -> str:
    """Quote names for a sentence; if there are over ``most``, quote some and count the rest."""
    if len(names) <= most:
        return quote(names)
    return f"{quote(names[: most - 1])} and {len(names) - most + 1} more"


def flatten(text: str, most: int = 300) -> str:
    """Convert untrusted text to one printable line.

    If the text has more than ``most`` characters, ``...`` replaces the rest.
    """
    line = "".join(char if char.isprintable() else "?" for char in text[:most])
    return f"{line}..." if len(text) > most else line


def name_tensor(name: str) -> str:
    """Return a tensor's name for a message: in quotes, as the model has it.

    What one party sends to the other has a name of splitonnx's own, such as ``h@server``.
    """
    sent = _SENT.fullmatch(name)
    if sent is None:
        return f"'{flatten(name)}'"
    known = f"'{flatten(sent[1])}'"
    return f"{known} (sent to the {sent[2]})" if sent[2] else f"the gradient of {known}"


class SplitonnxError(Exception):
    """Base class of all errors that splitonnx raises on purpose."""
