"""Declarations of tensors (name, element type, shape), and checks of arrays against them.

Element types have the names of the safetensors format (``F32``, ``I64``, ...).  A dimension is a
number, a string or ``None``.  A string is a name, such as ``"N"``, which stands for the same size
throughout a task, or an expression, such as ``"4*N + 1"`` (see :mod:`splitonnx.expressions`).
``None`` allows any size of at least 1.  Names and expressions also stand for sizes of at least 1,
because native kernels depend on this.  Only the outputs of the model may have dimensions of size 0:
no kernel reads these outputs, and their shapes may depend on the input data.  This module depends
on numpy and not on ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

import msgspec
import numpy as np

from splitonnx.element_types import ELEMENT_TYPES
from splitonnx.errors import ArrayMismatch, BatchTooLarge, ValueOutOfRange
from splitonnx.expressions import (
    LESS_1,
    UNKNOWN,
    describe_size,
    evaluate,
    find_unbound,
    is_name,
    is_quotient,
    parse_terms,
    solve_for,
)

DTYPES: Mapping[str, np.dtype[np.generic]] = {kind.name: kind.dtype for kind in ELEMENT_TYPES}
"""Element types that may be sent or stored, by their safetensors name."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def name_dtype(dtype: np.dtype[np.generic]) -> str:
    """Return the safetensors name of a numpy dtype, or its numpy name if it cannot be sent."""
    return _NAMES.get(dtype, str(dtype))


Bounds: TypeAlias = Annotated[tuple[int, ...], msgspec.Meta(min_length=2, max_length=3)]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of a tensor: its name, element type and shape.

    If ``bounds`` is set, the values of class labels and of samples' weights must be at least
    ``bounds[0]`` and less than ``bounds[1]``.  A third number is one value that is allowed as well,
    such as the value of labels that do not count.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    bounds: Bounds | None = None

    def __str__(self) -> str:
        return f"{self.dtype}{describe_dims(self.shape)}"


def describe_dims(dims: Sequence[int | str | None]) -> str:
    """Return dimensions as a reader knows them, such as ``[N, 8, ?]``."""
    return f"[{', '.join('?' if dim is None else describe_size(str(dim)) for dim in dims)}]"


def describe(array: np.ndarray) -> str:
    """Return the dtype and shape of an array as text, such as ``F32[32, 1, 8, 8]``."""
    return f"{name_dtype(array.dtype)}[{', '.join(map(str, array.shape))}]"


LARGEST = 2**31 - 1
"""The largest size of a symbolic dimension."""


def check_array(
    array: np.ndarray, spec: TensorSpec, sizes: dict[str, int], *, is_output: bool = False
) -> None:
    """Check that ``array`` has the dtype, shape and value range that ``spec`` declares.

    ``sizes`` maps the names and expressions in shapes to their sizes, if these are known in this
    task.  Sizes that ``array`` determines are added to ``sizes``.  If a name or expression
    already has a different size, the array does not match.  ``is_output`` means that ``array`` is
    an output of the model; a symbolic dimension whose size is not known yet may then be 0.

    Raises:
        ArrayMismatch: the dtype or shape differs.
        ValueOutOfRange: a value is outside ``spec.bounds``; NaN is not.
    """
    if array.dtype != DTYPES.get(spec.dtype) or not _bind_shape(
        array.shape, spec, sizes, is_output=is_output
    ):
        raise ArrayMismatch(spec.name, _describe_expected(array, spec, sizes), describe(array))
    if spec.bounds is not None:
        _check_bounds(array, spec.name, spec.bounds)


def _check_bounds(array: np.ndarray, name: str, bounds: Bounds) -> None:
    lower, upper, *others = bounds
    found = array[array != others[0]] if others else array
    if not found.size:
        return
    smallest, largest = found.min().item(), found.max().item()
    if smallest < lower or largest >= upper:
        worst = smallest if smallest < lower else largest
        raise ValueOutOfRange(name, worst, lower, upper, *others)


def check_rows(array: np.ndarray, spec: TensorSpec, limit: int) -> None:
    """Check that ``array`` has at most ``limit`` rows, unless ``spec`` fixes the number of rows.

    Raises:
        BatchTooLarge: the array has more than ``limit`` rows.
    """
    is_free = bool(spec.shape) and not isinstance(spec.shape[0], int)
    if is_free and array.ndim and array.shape[0] > limit:
        raise BatchTooLarge(spec.name, array.shape[0], limit)


def _describe_expected(array: np.ndarray, spec: TensorSpec, sizes: Mapping[str, int]) -> str:
    names = dict.fromkeys(atom for dim in spec.shape if isinstance(dim, str)
                          for a, _ in parse_terms(dim) for atom in (dim, *a))  # fmt: skip
    bound = [f"{name.removesuffix(LESS_1)} = {size + name.endswith(LESS_1)}"
             for name, size in sizes.items() if name in names and UNKNOWN not in name]  # fmt: skip
    open_names = [name for name in names if name not in sizes and is_name(name)]
    bound += [f"{n.removesuffix(LESS_1)} >= 2" for n in open_names if n.endswith(LESS_1)]
    is_empty = 0 in array.shape
    dims = spec.shape if is_empty else [_find_size(dim, sizes) for dim in spec.shape]
    expected = f"{spec.dtype}{describe_dims(dims)}"
    if not bound and is_empty and 0 not in spec.shape:
        return f"{expected} without an empty dimension"
    return f"{expected} where {', '.join(bound)}" if bound else expected


def _find_size(dim: int | str | None, sizes: Mapping[str, int]) -> int | str | None:
    """Return the size of a dimension that no name describes, if it is known."""
    if not isinstance(dim, str) or UNKNOWN not in dim:
        return dim
    return sizes.get(dim, evaluate(dim, sizes))


def _bind_shape(
    shape: tuple[int, ...], spec: TensorSpec, sizes: dict[str, int], *, is_output: bool
) -> bool:
    """Compare a shape with its declaration, and bind the dimensions that have no size yet."""
    if len(shape) != len(spec.shape):
        return False
    unbound = []
    for dim, size in zip(spec.shape, shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                return False
        elif not (0 if is_output and dim is not None else 1) <= size <= LARGEST:
            return False
        elif dim is not None and sizes.get(dim) != size:
            if dim in sizes:
                return False
            unbound.append((dim, size))
    return not unbound or _bind_all(unbound, sizes, is_output=is_output)


def _bind_all(dims: list[tuple[str, int]], sizes: dict[str, int], *, is_output: bool) -> bool:
    """Bind symbolic dimensions to their sizes, all or none."""
    bound = dict(sizes)
    dims.sort(key=lambda pair: not is_name(pair[0]))  # names first: expressions need them
    if not all(_bind(dim, size, bound, is_output=is_output) for dim, size in dims):
        return False
    if len(bound) > len(sizes) and not _is_consistent(bound):
        return False
    sizes.update(bound)
    return True


def _bind(dim: str, size: int, sizes: dict[str, int], *, is_output: bool) -> bool:
    if dim in sizes:
        return sizes[dim] == size
    unbound = find_unbound(dim, sizes)
    if not unbound:
        return evaluate(dim, sizes) == size
    if len(unbound) == 1:
        (atom,) = unbound
        solution = solve_for(atom, dim, size, sizes)
        if solution is not None:
            sizes[atom] = solution
            may_be_empty = is_quotient(atom) or is_output
            return (0 if may_be_empty else 1) <= solution <= LARGEST
        if all(atoms.count(atom) <= 1 for atoms, _ in parse_terms(dim)):
            return False  # no whole number solves it
    sizes[dim] = size
    return True


def _is_consistent(sizes: Mapping[str, int]) -> bool:
    """Return whether the size of each bound expression agrees with the sizes of its atoms."""
    for text, size in sizes.items():
        if is_name(text):
            continue
        others = {name: known for name, known in sizes.items() if name != text}
        if evaluate(text, others) not in (None, size):
            return False
    return True
