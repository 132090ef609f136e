"""What is declared of a tensor: name, element type, shape; and checking arrays against it.

Element types carry the names of the safetensors format (``F32``, ``I64``, ...).  A dimension
is a number, a symbol that must have one value throughout a task (``"N"``), or ``None`` where
nothing is known beforehand.  This module knows numpy and nothing of ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from splitonnx.errors import ArrayMismatch, BatchTooLarge, ValueOutOfRange

DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
"""Element types that may travel or be stored, by their safetensors name; little-endian."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def name_dtype(dtype: np.dtype[np.generic]) -> str:
    """Give the safetensors name of a numpy dtype, or numpy's own name where there is none."""
    return _NAMES.get(dtype, str(dtype))


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as it is declared.

    ``bounds`` is a half-open range that an integer tensor's values must lie in.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    bounds: tuple[int, int] | None = None

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.dtype}[{dims}]"


def describe(array: np.ndarray) -> str:
    """Describe an array in the words of :class:`TensorSpec`: ``F32[32, 1, 8, 8]``."""
    return f"{name_dtype(array.dtype)}[{', '.join(map(str, array.shape))}]"


def check_array(array: np.ndarray, spec: TensorSpec, symbols: dict[str, int]) -> None:
    """Raise unless ``array`` has the dtype, shape and value range that ``spec`` declares.

    ``symbols`` binds the symbolic dimensions seen so far in this task and is extended; a symbol
    that takes a second value is a mismatch.

    Raises:
        ArrayMismatch: dtype or shape differ.
        ValueOutOfRange: an integer lies outside ``spec.bounds``.
    """
    if array.dtype != DTYPES.get(spec.dtype) or not _shape_fits(array.shape, spec, symbols):
        bound = ", ".join(f"{k} = {v}" for k, v in symbols.items() if k in spec.shape)
        expected = f"{spec} where {bound}" if bound else str(spec)
        raise ArrayMismatch(spec.name, expected, describe(array))
    if spec.bounds is not None and array.size:
        lower, upper = spec.bounds
        smallest, largest = int(array.min()), int(array.max())
        if smallest < lower or largest >= upper:
            worst = smallest if smallest < lower else largest
            raise ValueOutOfRange(spec.name, worst, lower, upper)


def check_rows(array: np.ndarray, spec: TensorSpec, limit: int) -> None:
    """Raise where ``array`` has more rows than ``limit`` and ``spec`` does not fix their number.

    Raises:
        BatchTooLarge: it names the rows and the limit.
    """
    is_free = bool(spec.shape) and not isinstance(spec.shape[0], int)
    if is_free and array.ndim and array.shape[0] > limit:
        raise BatchTooLarge(spec.name, array.shape[0], limit)


def _shape_fits(shape: tuple[int, ...], spec: TensorSpec, symbols: dict[str, int]) -> bool:
    if len(shape) != len(spec.shape):
        return False
    bound = dict(symbols)
    for size, dim in zip(shape, spec.shape, strict=True):
        if isinstance(dim, str):
            if bound.setdefault(dim, size) != size:
                return False
        elif dim is not None and dim != size:
            return False
    symbols.update(bound)
    return True
