"""The element types of tensors, with their names in each format and library.

Files and messages use the names of the safetensors format, ONNX uses numbers, ONNX Runtime uses
names of its own (``tensor(float)``), and numpy uses dtypes.  All tables that translate between them
are built from ``ELEMENT_TYPES``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ElementType(NamedTuple):
    """An element type of tensors.

    ``name`` is its name in the safetensors format, ``code`` is its number in ONNX, ``runtime`` is
    its name in ONNX Runtime, and ``dtype`` is its numpy dtype.
    """

    name: str
    code: int
    runtime: str
    dtype: np.dtype[np.generic]


ELEMENT_TYPES = (
    ElementType("BOOL", 9, "tensor(bool)", np.dtype("?")),
    ElementType("U8", 2, "tensor(uint8)", np.dtype("u1")),
    ElementType("I8", 3, "tensor(int8)", np.dtype("i1")),
    ElementType("U16", 4, "tensor(uint16)", np.dtype("<u2")),
    ElementType("I16", 5, "tensor(int16)", np.dtype("<i2")),
    ElementType("F16", 10, "tensor(float16)", np.dtype("<f2")),
    ElementType("U32", 12, "tensor(uint32)", np.dtype("<u4")),
    ElementType("I32", 6, "tensor(int32)", np.dtype("<i4")),
    ElementType("F32", 1, "tensor(float)", np.dtype("<f4")),
    ElementType("U64", 13, "tensor(uint64)", np.dtype("<u8")),
    ElementType("I64", 7, "tensor(int64)", np.dtype("<i8")),
    ElementType("F64", 11, "tensor(double)", np.dtype("<f8")),
)
"""All element types that may be sent or stored; they are little-endian."""
