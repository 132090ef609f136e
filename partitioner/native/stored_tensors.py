"""Take large tensors out of models and batches, so that a process gets equal ones only once.

This module knows how tensors are written; :mod:`requests` sends their contents.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import np_dtype_to_tensor_dtype, tensor_dtype_to_np_dtype

from splitonnx.partitioner.native.requests import keep

Stored: TypeAlias = Sequence[Any]
"""The element type of a tensor, as ONNX numbers it, its sizes, and its bytes in their order.

The caller has the bytes as a :class:`Kept`.
"""
_LARGE = 1 << 16
"""Tensors with fewer bytes than this are sent as they are."""
_PLAIN = frozenset(
    {
        TensorProto.BOOL, TensorProto.DOUBLE, TensorProto.FLOAT, TensorProto.FLOAT16,
        TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.INT8,
        TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64, TensorProto.UINT8,
    }
)  # fmt: skip
"""The element types that numpy has, too, with the same bytes."""


def store_arrays(arrays: Iterable[Any]) -> dict[int, Stored]:
    """Store large arrays, and map the ``id`` of each to it; other values are left out."""
    stored: dict[int, Stored] = {}
    for array in arrays:
        if id(array) in stored or not isinstance(array, np.ndarray) or array.nbytes < _LARGE:
            continue
        if array.dtype.kind in "biuf" and sys.byteorder == "little":
            kind = np_dtype_to_tensor_dtype(array.dtype)
            stored[id(array)] = kind, array.shape, keep(array.tobytes())
    return stored


@dataclass(frozen=True, kw_only=True)
class Separated:
    """A serialized model without its large initializers, and these, by name."""

    content: bytes
    weights: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Return how many bytes the whole model takes, but for a few for each initializer."""
        return len(self.content) + sum(len(kept.content) for _, _, kept in self.weights.values())

    def join(self) -> bytes:
        """Return the whole model, serialized."""
        given = {
            name: (kind, dims, kept.content) for name, (kind, dims, kept) in self.weights.items()
        }
        content: bytes = fill_weights(self.content, given).SerializeToString()
        return content


def separate_weights(model: onnx.ModelProto) -> Separated:
    """Serialize a model without its large initializers, which are kept beside it."""
    light = onnx.ModelProto()
    _copy_fields(model, light, "graph")
    _copy_fields(model.graph, light.graph, "initializer")
    weights: dict[str, Stored] = {}
    for tensor in model.graph.initializer:
        raw = tensor.raw_data if tensor.data_type in _PLAIN else b""  # a copy
        if len(raw) >= _LARGE:
            weights[tensor.name] = tensor.data_type, list(tensor.dims), keep(raw)
        else:
            light.graph.initializer.append(tensor)
    return Separated(content=light.SerializeToString(), weights=weights)


def fill_weights(content: bytes, weights: Mapping[str, Stored]) -> onnx.ModelProto:
    """Return the model that :func:`separate_weights` has separated."""
    model: onnx.ModelProto = onnx.ModelProto.FromString(content)
    for name, (kind, dims, raw) in weights.items():
        model.graph.initializer.add(name=name, data_type=kind, dims=dims, raw_data=raw)
    return model


def declare_weights(content: bytes, weights: Mapping[str, Stored]) -> bytes:
    """Declare in a serialized model that its weights are elsewhere: in memory.

    A session must be given all of them before it loads the model; it then reads no file, and is
    spared a copy of the weights in the model.
    """
    model = onnx.ModelProto.FromString(content)
    for name, (kind, dims, _) in weights.items():
        tensor = model.graph.initializer.add(name=name, data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="memory")
    declared: bytes = model.SerializeToString()
    return declared


def decode_stored(tensor: Stored) -> np.ndarray:
    """Return a stored tensor as an array, which cannot be written to."""
    kind, dims, raw = tensor
    return np.frombuffer(raw, tensor_dtype_to_np_dtype(kind)).reshape(dims)


def _copy_fields(source: Any, target: Any, left_out: str) -> None:
    """Copy the fields of a message to another one, except for the field named ``left_out``."""
    for entry, value in source.ListFields():
        if entry.name == left_out:
            continue
        if hasattr(value, "extend"):
            getattr(target, entry.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, entry.name).CopyFrom(value)
        else:
            setattr(target, entry.name, value)
