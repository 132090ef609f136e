"""Find the values of a step that have the same shape in every step of a Scan or Loop.

Only these can be stacked over the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from splitonnx.expressions import find_unbound


class FixedShapes:
    """Tells whether a value's shape follows from what is the same in every step.

    ``given`` are the inputs of the step.  Their sizes do not change, and so every size that is
    computed from these sizes alone does not change either.
    """

    def __init__(self, graph: ir.Graph, given: Iterable[ir.Value]) -> None:
        texts = [dim for value in given for dim in _list_dims(value) if isinstance(dim, str)]
        self._sizes = {atom: 1 for text in texts for atom in find_unbound(text, {})}
        values = (value for node in graph for value in node.outputs)
        self._known = {value.name for value in values if _is_fixed(value, self._sizes)}

    def __contains__(self, value: ir.Value) -> bool:
        """Return whether ``value`` has the same shape in every step.

        It may belong to a later graph that was derived from the step and that knows fewer shapes.
        """
        return value.name in self._known or _is_fixed(value, self._sizes)


def _is_fixed(value: ir.Value, sizes: Mapping[str, int]) -> bool:
    if value.shape is None:
        return False
    return all(
        isinstance(dim, int) or (dim is not None and not find_unbound(dim, sizes))
        for dim in _list_dims(value)
    )


def _list_dims(value: ir.Value) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
