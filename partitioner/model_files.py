"""Write a model as one ONNX file, or as two if its weights are too large for one.

This module does not know what the model is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitonnx.atomic import replace_file, replacing, write_file
from splitonnx.errors import UnwritableFile, UsageError
from splitonnx.outputs import check_output
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass

MAX_INSIDE = 2**31 - 2**26
"""Limit of bytes of weights in one ONNX file; Protocol Buffers messages are limited to 2 GiB."""


@dataclass(frozen=True, kw_only=True)
class _Content:
    """A model's bytes, and the weights in its external data file in the file's order."""

    content: bytes
    beside: Sequence[np.ndarray] = ()

    @property
    def size(self) -> int:
        return len(self.content) + sum(array.nbytes for array in self.beside)


def serialize_model(model: ir.Model, subject: str, advice: str) -> bytes:
    """Return a model as bytes that contain its weights.

    Raises:
        UsageError: the weights are too large for one file; the message names the model as
            ``subject`` says, and what can write it as ``advice`` says.
    """
    size = sum(tensor.nbytes for tensor in _list_tensors(model))
    if size > MAX_INSIDE:
        raise UsageError(
            f"{subject}'s weights take {size / 1e9:.2f} GB, more than one ONNX file holds; "
            f"write it with {advice}, which put them into a file beside it"
        )
    return _serialize(model).content


def write_model(model: ir.Model, target: Path, *, overwrite: bool) -> int:
    """Write a model to ``target``, and return the number of bytes written.

    If the weights are too large for one ONNX file, they are written as external data to a second
    file, whose name is ``target`` with ``.data`` appended.  The weights are streamed, so they do
    not have to fit into memory.  Each file is moved into place only when it is complete, and the
    model file is moved last.  The model itself then refers to this second file.

    Raises:
        UnwritableFile: a file cannot be written, or exists and ``overwrite`` is false.
    """
    beside = target.with_name(f"{target.name}.data")
    large = sum(tensor.nbytes for tensor in _list_tensors(model)) > MAX_INSIDE
    written = _serialize(model, beside.name if large else None)
    if large:
        check_output(beside, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as fresh:
            write_file(fresh, [written.content])
            if large:
                replace_file(beside, written.beside)
    except OSError as error:
        raise UnwritableFile(str(target), error.strerror or str(error)) from error
    return written.size


def _list_tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    values = model.graph.initializers.values()
    return [value.const_value for value in values if value.const_value is not None]


@attribute_errors_to_pass("written down")
def _serialize(model: ir.Model, beside: str | None = None) -> _Content:
    """Serialize a model.

    If ``beside`` is given, the weights are to be stored in an external file with this name.
    """
    arrays: list[np.ndarray] = []
    if beside is not None:
        offset = 0
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not isinstance(tensor.raw, np.ndarray):
                continue
            value.const_value = ir.ExternalTensor(
                beside,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
            arrays.append(tensor.raw)
            offset += tensor.nbytes
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return _Content(content=content, beside=arrays)
