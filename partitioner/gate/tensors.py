"""Check that tensors have as many bytes as declared, and that external data may be read.

External data must be in the model's folder: ONNX Runtime 1.19.2 itself would read any file or
memory address that a model names.  Each external file is opened only once, and is both checked and
memory-mapped through the open file.  So the data that is read later is the data that was checked.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from splitonnx.errors import ForbiddenExternalData, NotAModel
from splitonnx.graph_limits import MODEL
from splitonnx.partitioner.gate.names import refuse_long


@dataclass(kw_only=True)
class DataFiles:
    """The files with a model's external data, each memory-mapped once.

    ``folder`` is the model's folder; if it is ``None``, the model may not read any file.
    """

    label: str
    folder: Path | None
    _mapped: dict[str, mmap.mmap] = field(default_factory=dict)

    def check(self, tensor: TensorProto) -> None:
        """Check a tensor's type, size and location without reading its data.

        Raises:
            NotAModel: the tensor's data type or shape is invalid, its number of bytes does not
                match them, or its file cannot be read.
            UnsupportedModel: the tensor contains a string that is too long.
            ForbiddenExternalData: the tensor's data is outside the model's folder.
        """
        subject = f"tensor '{tensor.name}'"
        dims = list(tensor.dims)
        if len(dims) > MODEL.rank or any(dim < 0 for dim in dims):
            raise NotAModel(self.label, f"{subject} has the shape {dims[: MODEL.rank]}")
        external = tensor.data_location == TensorProto.EXTERNAL
        if tensor.data_type == TensorProto.STRING:
            if external or len(tensor.string_data) != math.prod(dims):
                raise NotAModel(self.label, f"{subject} does not hold {math.prod(dims)} strings")
            for text in tensor.string_data:
                refuse_long(text, subject)
            return
        try:
            bits = ir.DataType(tensor.data_type).bitwidth
        except (ValueError, TypeError) as error:
            raise NotAModel(self.label, f"{subject} has no known data type") from error
        size = -(-math.prod(dims) * bits // 8)  # bytes, rounded up
        if external:
            self._locate(tensor, size)
        elif tensor.HasField("raw_data"):
            if len(tensor.raw_data) != size:
                self._refuse_size(subject, size, f"{len(tensor.raw_data)}")
        elif _count_values(tensor) != _expect_values(tensor, math.prod(dims), bits):
            self._refuse_size(subject, size, f"{_count_values(tensor)} elements")

    def read(self, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """Return an external tensor with memory-mapped data.

        The tensor must have passed :meth:`check`.
        """
        mapping = self._mapped[str(tensor.location)]
        shape = tensor.shape.numpy()
        start = tensor.offset or 0
        if tensor.dtype.bitwidth < 8:
            packed = TensorProto(name=tensor.name, data_type=tensor.dtype.value, dims=shape)
            packed.raw_data = mapping[start : start + tensor.nbytes]
            return ir.serde.deserialize_tensor(packed)
        dtype = tensor.dtype.numpy().newbyteorder("<")
        array = np.frombuffer(mapping, dtype, math.prod(shape), start).reshape(shape)
        return ir.Tensor(array, tensor.dtype, shape=tensor.shape, name=tensor.name)

    def _refuse_size(self, subject: str, size: int, held: str) -> None:
        raise NotAModel(self.label, f"{subject} declares {size} bytes, but holds {held}")

    def _locate(self, tensor: TensorProto, size: int) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        mapping = self._map(tensor.name, location)
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", str(size)))
        except ValueError as error:
            reason = f"tensor '{tensor.name}' has no valid place in its file"
            raise NotAModel(self.label, reason) from error
        if length != size:
            raise NotAModel(
                self.label,
                f"tensor '{tensor.name}' declares {size} bytes, but the length of its place in "
                f"'{location}' is {length}",
            )
        if offset < 0 or offset + length > len(mapping):
            raise NotAModel(
                self.label,
                f"tensor '{tensor.name}' declares {size} bytes, but '{location}' holds "
                f"{max(0, len(mapping) - max(0, offset))} at its place",
            )

    def _map(self, tensor: str, location: str) -> mmap.mmap:
        if location not in self._mapped:
            self._mapped[location] = self._open(tensor, location)
        return self._mapped[location]

    def _open(self, tensor: str, location: str) -> mmap.mmap:
        if (
            self.folder is None
            or not location
            or not location.isprintable()
            or location.startswith(("*", "/", "\\"))
            or Path(location).is_absolute()
        ):
            raise ForbiddenExternalData(tensor, location.encode("unicode_escape").decode())
        try:
            path = (self.folder / location).resolve()
            if not path.is_relative_to(self.folder):
                raise ForbiddenExternalData(tensor, location)
            # O_NONBLOCK: opening a pipe without a writer would block
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, RuntimeError) as error:  # RuntimeError: a cycle of links
            reason = f"the file '{location}' of tensor '{tensor}' is missing or cannot be read"
            raise NotAModel(self.label, reason) from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or not found.st_size:
                reason = f"'{location}', named by tensor '{tensor}', is not a file with content"
                raise NotAModel(self.label, reason)
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            reason = f"the file '{location}' of tensor '{tensor}' cannot be mapped"
            raise NotAModel(self.label, reason) from error
        finally:
            os.close(descriptor)


def _count_values(tensor: TensorProto) -> int:
    fields: Sequence[Sequence[object]] = (
        tensor.float_data,
        tensor.int32_data,
        tensor.int64_data,
        tensor.double_data,
        tensor.uint64_data,
    )
    return sum(len(values) for values in fields)


def _expect_values(tensor: TensorProto, elements: int, bits: int) -> int:
    """Return how many values a tensor stores in its typed field, given its number of elements."""
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return 2 * elements
    return -(-elements * bits // 8) if bits < 8 else elements
