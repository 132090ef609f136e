"""Postpone or skip slow imports that may not be needed, so that processes start faster."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

UNUSED = ("sympy", "onnx_ir._symbolic_shapes")
"""Modules that are imported only if they are used, because their import is slow.

The onnx_ir package imports them for arithmetic on symbolic dimensions, which splitonnx does not
use.  Importing SymPy takes as long as everything else that ``splitonnx.cut`` imports.
"""


class _Postponed(ModuleType):
    """Stand in for a module that is imported when one of its attributes is first used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # from code that inspects all modules
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def postpone(*names: str) -> None:
    """Postpone the import of each named module until one of its attributes is used.

    Modules of packages that are not installed are ignored.  This affects the whole process, so call
    it only in a process that runs the command line.
    """
    for name in names:
        package = name.partition(".")[0]
        if name not in sys.modules and (package in sys.modules or find_spec(package)):
            sys.modules[name] = _Postponed(name)


@contextmanager
def postponing(*names: str) -> Iterator[None]:
    """Postpone imports like :func:`postpone`, but only those made inside a ``with`` block.

    Whoever imports such a module after the block gets the module itself, so this can also be used
    in a process that runs other code.
    """
    postpone(*names)
    try:
        yield
    finally:
        for name in names:
            if type(sys.modules.get(name)) is _Postponed:
                del sys.modules[name]


@contextmanager
def leaving_out(name: str) -> Iterator[None]:
    """Make the import of a submodule fail inside a ``with`` block that imports its package.

    ``name`` is the full name of the submodule.  The package must catch the ``ImportError``.  After
    the block, the submodule can be imported as usual.  If the package has been imported before,
    this function does nothing.
    """
    package = name.rpartition(".")[0]
    if package in sys.modules or name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.modules.get(name, package) is None:
            del sys.modules[name]
