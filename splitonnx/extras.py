"""Import optional packages, and name the extra to install if a package is missing.

This module knows which package belongs to which extra; it does not use the packages.
"""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from types import ModuleType

from splitonnx.errors import MissingExtra

_EXTRAS = {
    "onnx": "cpu",
    "onnx_ir": "cpu",
    "onnxruntime": "portable",
    "tensorboardX": "tensorboard",
}
"""The smallest extra that installs each package."""


def load(module: str, purpose: str) -> ModuleType:
    """Import and return ``module``.

    ``purpose`` describes the feature that needs the module; it is used in the error message.

    Raises:
        MissingExtra: a package that the module needs is missing, and an extra would install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise miss(package, _EXTRAS[package], purpose) from error


def miss(package: str, extra: str, purpose: str) -> MissingExtra:
    """Return the error to raise for a missing package that ``extra`` would install.

    ``purpose`` describes the feature that needs the package.
    """
    is_available = extra != "cpu" or has_training_wheel()
    return MissingExtra(package, extra, purpose, is_available=is_available)


def has_training_wheel() -> bool:
    """Return whether onnxruntime-training 1.19.2 has a wheel for this machine and Python."""
    is_common = sys.platform == "darwin" or platform.machine().lower() in ("x86_64", "amd64")
    return is_common and sys.version_info < (3, 13)
