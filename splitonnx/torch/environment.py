"""Import PyTorch on first use, and refuse a version that is too old."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from splitonnx.errors import TorchNeeded

OLDEST = (2, 5)
"""The oldest version whose ``torch.onnx.export`` has both exporters, chosen by ``dynamo``."""
NEEDED = f">={OLDEST[0]}.{OLDEST[1]}"


def import_torch(purpose: str) -> Any:
    """Import and return ``torch``.

    ``purpose`` is the name of the function that needs PyTorch; it is used in the error message.

    Raises:
        TorchNeeded: PyTorch is missing or too old.
    """
    try:
        import torch
    except ImportError as error:
        raise TorchNeeded(purpose, "torch", NEEDED) from error
    version = str(torch.__version__)
    if read_version(version) < OLDEST:
        raise TorchNeeded(purpose, "torch", NEEDED, version)
    return torch


def read_version(version: str) -> tuple[int, ...]:
    """Return the major and minor number of a version such as ``2.13.0+cpu``."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def has_onnxscript() -> bool:
    """Return whether ``onnxscript`` is installed, which the dynamo exporter needs."""
    return find_spec("onnxscript") is not None
