"""The root of the tree of errors, and how their sentences quote names and foreign text."""

from __future__ import annotations

from collections.abc import Iterable


def quote(names: Iterable[str]) -> str:
    """Join names for a sentence: ``'a', 'b'``."""
    return ", ".join(f"'{name}'" for name in names)


def flatten(text: str, most: int = 300) -> str:
    """Convert text from elsewhere to one printable line of at most ``most`` characters."""
    line = "".join(char if char.isprintable() else "?" for char in text[:most])
    return f"{line}..." if len(text) > most else line


class SplitonnxError(Exception):
    """Root of the tree; catching it catches every error raised on purpose."""
