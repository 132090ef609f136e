"""Encode and decode tensors in the safetensors format, for messages and for weight files.

A message or file consists of the length of its header (8 bytes, little-endian), a JSON header
padded with spaces to a multiple of 64 bytes, and the raw tensors.  The header maps each name to its
``dtype``, ``shape`` and ``data_offsets``; ``__metadata__`` maps strings to strings.  (Format:
github.com/huggingface/safetensors.)

The decoder does not trust its input.  It checks every size before it reads any data, and it never
executes code from the input.  It rejects gaps between tensors, overlaps, and trailing bytes.

This module handles only bytes and tensors; :mod:`splitonnx.messages` defines the messages.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

import numpy as np

from splitonnx.errors import FormatError
from splitonnx.graph_limits import STAGE
from splitonnx.tensors import DTYPES, name_dtype

ALIGNMENT = 64
"""The alignment of the raw data in bytes, so that views of the tensors are aligned."""
MAX_RANK = STAGE.rank
MAX_SIZE = 2**63 - 1
"""The largest dimension or offset.  A larger number is invalid, and may be too long to print."""

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"

Chunk = bytes | memoryview


def encode_tensors(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> list[Chunk]:
    """Encode tensors and metadata as one safetensors message; contiguous tensors are not copied.

    The message is returned as a list of chunks.  Tensors with larger element types come first, so
    that every tensor is aligned to the size of its elements.

    Raises:
        FormatError: a tensor has an element type that cannot be encoded.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    chunks: list[Chunk] = []
    end = 0
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        dtype = name_dtype(array.dtype)
        if dtype not in DTYPES:
            raise FormatError(f"tensor '{name}'", f"its element type {dtype} cannot travel")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
        if array.nbytes:
            chunks.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % ALIGNMENT)
    return [_LENGTH.pack(len(text)) + text, *chunks]


def decode_tensors(
    content: Chunk | bytearray, *, max_header: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Decode the tensors and the metadata of a message.

    The tensors are read-only views of ``content``.

    Args:
        content: the complete message.
        max_header: the largest allowed size of the header, in bytes.

    Raises:
        FormatError: ``content`` is not exactly one complete, well-formed message.
    """
    view = memoryview(content).toreadonly().cast("B")
    header, start = _read_header(view, max_header)
    metadata = _check_metadata(header.pop(_METADATA, {}))
    data = view[start:]
    tensors: dict[str, np.ndarray] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _read_offsets(*item)):
        dtype, shape, stop = _check_entry(name, entry, end)
        if stop > len(data):
            raise _malformed(f"tensor '{name}' ends at byte {stop} of {len(data)}")
        tensors[name] = _view(data[end:stop], dtype, shape)
        if dtype == np.bool_ and tensors[name].view(np.uint8).max(initial=0) > 1:
            raise _malformed(f"tensor '{name}' holds truth values that are neither 0 nor 1")
        end = stop
    if end != len(data):
        raise _malformed(f"{len(data) - end} bytes follow the last tensor")
    return {name: tensors[name] for name in header}, metadata


def decode_metadata(content: Chunk | bytearray, *, max_header: int) -> dict[str, str]:
    """Decode the metadata of a message, of which the bytes of tensors may be missing.

    Raises:
        FormatError: ``content`` does not begin with a complete, well-formed header.
    """
    header, _ = _read_header(memoryview(content).toreadonly().cast("B"), max_header)
    return _check_metadata(header.pop(_METADATA, {}))


def measure_encoded(content: Chunk | bytearray, *, max_header: int) -> int | None:
    """Return the size in bytes that a message must have by its header, from its first bytes.

    The result is ``None`` if ``content`` does not contain the whole header, or if the header is
    malformed.
    """
    try:
        header, start = _read_header(memoryview(content).toreadonly().cast("B"), max_header)
        header.pop(_METADATA, None)
        ends = [_read_offsets(name, entry)[1] for name, entry in header.items()]
    except FormatError:
        return None
    return start + max(ends, default=0)


def _malformed(reason: str) -> FormatError:
    return FormatError("not a well-formed tensor message", reason)


def _read_header(view: memoryview, max_header: int) -> tuple[dict[str, object], int]:
    if len(view) < _LENGTH.size:
        raise _malformed(f"{len(view)} bytes are not a header")
    (length,) = _LENGTH.unpack(view[: _LENGTH.size])
    if length > max_header:
        raise _malformed(f"its header of {length} bytes is over the limit of {max_header}")
    if length > len(view) - _LENGTH.size:
        raise _malformed(f"its header of {length} bytes is cut short")
    start = _LENGTH.size + length
    text = bytes(view[_LENGTH.size : start])
    if not text.startswith(b"{"):
        raise _malformed("its header is not a JSON object")
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
        )
        if b"\\u" in text:
            json.dumps(header, ensure_ascii=False).encode()  # raises on half a surrogate
    except (ValueError, RecursionError) as error:
        raise _malformed(f"its header is not JSON ({error})") from error
    assert isinstance(header, dict)  # it starts with a brace
    return header, start


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs in it twice")
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed("its metadata do not map strings to strings")
    return metadata


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _read_offsets(name: str, entry: object) -> tuple[int, int]:
    """Return a tensor's offsets as a key for sorting.

    An empty tensor sorts before another tensor that starts at the same byte.
    """
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _malformed(f"tensor '{name}' has no valid offsets")
    return offsets[0], offsets[1]


def _check_entry(
    name: str, entry: object, start: int
) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    assert isinstance(entry, dict)  # checked by _read_offsets
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(f"tensor '{name}' has the fields {sorted(entry)}")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _malformed(f"tensor '{name}' has the unknown element type {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise _malformed(f"tensor '{name}' has no valid shape")
    begin, end = entry["data_offsets"]
    if begin != start:
        raise _malformed(f"tensor '{name}' starts at byte {begin} instead of {start}")
    if math.prod(max(dim, 1) for dim in shape) * DTYPES[dtype].itemsize > MAX_SIZE:
        raise _malformed(f"tensor '{name}' has a shape that no memory holds")  # an empty one too
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != size:
        raise _malformed(f"tensor '{name}' takes {end - begin} bytes instead of {size}")
    return DTYPES[dtype], tuple(shape), end


def _view(data: memoryview, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    raw = np.frombuffer(data, np.uint8)
    if raw.ctypes.data % dtype.itemsize:  # files from other writers may be unaligned
        raw = raw.copy()
        raw.flags.writeable = False
    return raw.view(dtype).reshape(shape)
