"""The ONNX Runtime that is installed: which build it is, what it raises, and how it returns values.

No other module of the runtime imports onnxruntime.  This one opens no sessions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from splitonnx.errors import MissingExtra
from splitonnx.imports import leaving_out

SILENT = 4
"""ONNX Runtime's log severity "fatal": errors are raised anyway, and its lines bypass our log."""


@dataclass(frozen=True, kw_only=True)
class InstalledRuntime:
    """The version of the installed ONNX Runtime, and whether it is the training build.

    ``training`` is true for onnxruntime-training, which can compute gradients.
    """

    version: str
    training: bool

    def __str__(self) -> str:
        return f"onnxruntime{'-training' if self.training else ''} {self.version}"


def installed_runtime() -> InstalledRuntime:
    """Return the version of the installed ONNX Runtime and whether it is the training build.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
    """
    # The training build and the stock build share a folder: only what is inside tells them apart.
    training = hasattr(get_bindings(), "GradientGraphBuilder")
    return InstalledRuntime(version=import_onnxruntime().__version__, training=training)


@cache
def import_onnxruntime() -> Any:
    """Return the module onnxruntime, which tells nobody that it is used.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
    """
    # From 1.29 on it reports models and errors to its maker, keeps an identifier of the device, and
    # does both while it is imported, unless the environment says this before.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        # The training build imports onnx and more there, which takes as long as all the rest.
        with leaving_out("onnxruntime.training"):
            import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "portable", "running a bundle") from error
    onnxruntime.disable_telemetry_events()  # a program that imported it before us
    onnxruntime.set_default_logger_severity(SILENT)  # device discovery warns on its own
    return onnxruntime


def get_bindings() -> Any:
    """Return onnxruntime's module in C++."""
    return import_onnxruntime().capi.onnxruntime_pybind11_state


@cache
def list_exceptions() -> tuple[type[Exception], ...]:
    """List the exceptions that sessions raise when they are opened and run."""
    # They have no base class in common, and each version adds some.  ValueError: a feed is missing.
    own = (kind for kind in vars(get_bindings()).values() if isinstance(kind, type))
    return (RuntimeError, ValueError, *(kind for kind in own if issubclass(kind, Exception)))


def detach(value: Any) -> Any:
    """Detach an output from its run's others, which it would keep alive, but not from its array."""
    alone = get_bindings().OrtValueVector()
    alone.push_back(value._ortvalue)
    return type(value)(alone[0], value._numpy_obj)
