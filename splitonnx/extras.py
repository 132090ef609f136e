"""The extras: importing what the base install does not bring, and saying which extra would.

It knows which package comes with which extra, and nothing of what they are used for.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from splitonnx.errors import MissingExtra

_EXTRAS = {"onnx": "cpu", "onnx_ir": "cpu", "onnxruntime": "portable"}
"""The smallest extra that brings each package."""


def load(module: str, purpose: str) -> ModuleType:
    """Import ``module``; ``purpose`` is what wants it.

    Raises:
        MissingExtra: it needs a package that only an extra installs.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise MissingExtra(package, _EXTRAS[package], purpose) from error
