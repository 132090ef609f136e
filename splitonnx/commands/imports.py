"""Postpone imports that take long and are rarely used, so that commands start faster.

``onnx_ir`` imports SymPy for arithmetic on symbolic dimensions, which splitonnx does not use.
Importing SymPy takes longer than importing everything else that ``splitonnx cut`` needs from
``onnx_ir`` and ``onnx``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

RARELY_USED = ("sympy", "onnx_ir._symbolic_shapes")
"""The second module uses the first while it is imported."""


class _Postponed(ModuleType):
    """Stand in for a module that is imported when one of its attributes is first used."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def postpone(*names: str) -> None:
    """Postpone the import of modules until they are used.

    This changes imports in the whole process.  Use it only in a process that runs a command.
    """
    for name in names:
        sys.modules.setdefault(name, _Postponed(name))
