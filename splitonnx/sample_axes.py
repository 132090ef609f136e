"""Find the axis of an output that counts the samples, by the names of declared dimensions.

The first dimension of the data counts the samples.  Its name, such as ``N``, says which axis of an
output grows with them: ``h_n`` of shape ``[1, N, 4]`` has its samples on axis 1.  Where the data
fix their number of rows there is no name, and an axis of the same size stands for it.
``runtime/js/src/sample_axes.ts`` is the twin.  This module does not see any array.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from splitonnx.expressions import describe_size, parse_terms
from splitonnx.tensors import TensorSpec

_WORD = re.compile(r"[^\s*+()/]+")
_NUMBER = re.compile(r"-?[0-9]+")


def find_sample_axis(
    output: TensorSpec, data: Sequence[TensorSpec], *, has_own_batches: bool = False
) -> int | None:
    """Return the axis of an output along which its batches are joined.

    ``data`` declares the arrays that are predicted from.  ``has_own_batches`` means that they come
    in batches as the user made them, so that a first dimension may count something else.

    An output that is a single number per batch is joined along axis 0, and so is one whose first
    dimension the declarations leave unknown.  Return ``None`` if no axis counts the samples, if
    more than one does, or if its size is not a multiple of their number, such as ``N + -1``.
    """
    shape = output.shape
    if all(dim == 1 for dim in shape):
        return 0
    names = {word for spec in data for dim in spec.shape[:1] for word in _list_names(dim)}
    named = [axis for axis, dim in enumerate(shape) if names & _list_names(dim)]
    if named:
        return named[0] if len(named) == 1 and _is_multiple(shape[named[0]], names) else None
    fixed = {spec.shape[0] for spec in data if spec.shape and isinstance(spec.shape[0], int)}
    if shape[0] in fixed:
        return 0
    known = {word for spec in data for dim in spec.shape for word in _list_names(dim)}
    if not isinstance(shape[0], int) and (has_own_batches or not _list_names(shape[0]) & known):
        return 0
    equal = [axis for axis, dim in enumerate(shape) if dim in fixed]
    return equal[0] if len(equal) == 1 else None


def _list_names(dim: int | str | None) -> set[str]:
    """Return the names in a dimension; a number has none, and neither has an unknown one."""
    text = describe_size(dim) if isinstance(dim, str) else "?"
    words = [] if text == "?" else _WORD.findall(text)
    return {word for word in words if not _NUMBER.fullmatch(word)}


def _is_multiple(dim: int | str | None, names: set[str]) -> bool:
    """Return whether a dimension is a sum of products that each have exactly one of the names."""
    products = parse_terms(describe_size(str(dim)))
    return all(sum(atom in names for atom in atoms) == 1 for atoms, _ in products)
