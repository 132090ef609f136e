"""Export PyTorch networks for training, and load trained weights back into them::

    import splitonnx.torch

    splitonnx.torch.export(model, example, "model.onnx")
    ...
    splitonnx.torch.load("bundle", model)

Users install PyTorch themselves: it is not a dependency, and importing this package does not import
it.  No other package imports ``torch``.  This package uses the partitioner, and does not depend on
clients or servers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitonnx.torch.exports import Export, export
    from splitonnx.torch.loads import Loaded, load

__all__ = ["Export", "Loaded", "export", "load"]

_HOMES = {"Export": "exports", "export": "exports", "Loaded": "loads", "load": "loads"}
"""The module that each name comes from."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'splitonnx.torch' has no attribute '{name}'")
    from splitonnx import extras

    home = f"splitonnx.torch.{_HOMES[name]}"
    value: object = getattr(extras.load(home, f"splitonnx.torch.{name}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
