"""The base class of all errors, and helpers to quote names and foreign text in messages."""

from __future__ import annotations

from collections.abc import Iterable


def quote(names: Iterable[str]) -> str:
    """Join names for an error message: ``'a', 'b'``."""
    return ", ".join(f"'{name}'" for name in names)


def flatten(text: str, most: int = 300) -> str:
    """Convert foreign text to one printable line of at most ``most`` characters."""
    line = "".join(char if char.isprintable() else "?" for char in text[:most])
    return f"{line}..." if len(text) > most else line


class SplitonnxError(Exception):
    """Base class of all errors that splitonnx raises on purpose."""
