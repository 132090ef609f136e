"""Files of adapters alone, in the layout of PEFT's ``adapter_model.safetensors``.

The adapter of weight ``<module>.weight`` has two tensors, ``lora_A`` of shape (r, in) and
``lora_B`` of shape (out, r)::

    base_model.model.<module>.lora_A.weight
    base_model.model.<module>.lora_B.weight

These are the transposes of A and B in the model (:mod:`adapters`).  PEFT keeps ``lora_alpha`` in a
second file; here it is in the file's metadata.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitonnx.atomic import replace_file
from splitonnx.codecs import decode_tensors, encode_tensors
from splitonnx.errors import FormatError, UnsupportedModel, UnusableFile, UnwritableFile
from splitonnx.files import map_regular
from splitonnx.manifests import MAX_MANIFEST
from splitonnx.partitioner.adapters import Note
from splitonnx.tensors import DTYPES, name_dtype

_ALPHA = "lora_alpha"
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<letter>[AB])(?:\.default)?\.weight"
)
_FORM = "<module>.lora_A.weight and <module>.lora_B.weight"


@dataclass(frozen=True, kw_only=True)
class SavedAdapters:
    """The adapters in a file: A (in, r) and B (r, out) by module, and ``alpha`` if it is known."""

    alpha: float | None
    matrices: Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_note_file(model: ir.Model, note: Note, path: Path) -> int:
    """Write the adapters of a model to a file, and return the number of bytes written.

    Raises:
        UnsupportedModel: a matrix is not stored in the model, or two would have the same name.
        UnwritableFile: the file cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    for adapter in note.adapters:
        module = adapter.weight.removesuffix(".weight")
        for letter, name in (("A", adapter.first), ("B", adapter.second)):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            if key in tensors:
                raise UnsupportedModel(
                    f"the adapter of '{adapter.weight}'",
                    f"another weight's adapter has its name in the file, '{key}'",
                    "rename one of the two weights in the model",
                )
            tensors[key] = _read(model.graph, name).T
    chunks = encode_tensors(tensors, {"format": "pt", _ALPHA: repr(note.alpha)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, chunks)
    except OSError as error:
        raise UnwritableFile(str(path), error.strerror or str(error)) from error
    return sum(memoryview(chunk).nbytes for chunk in chunks)


def read_adapters(path: Path) -> SavedAdapters:
    """Read a file of adapters.

    Raises:
        UnusableFile: the file cannot be read.
        FormatError: it is not a safetensors file, or holds other tensors than adapters of matrices.
    """
    try:
        content = map_regular(path)
    except OSError as error:
        raise UnusableFile(str(path), f"it cannot be read: {error.strerror}") from error
    try:
        tensors, metadata = decode_tensors(content, max_header=MAX_MANIFEST)
    except FormatError as error:
        raise FormatError(str(path), str(error)) from error
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or not name.isprintable():
            raise FormatError(str(path), f"it holds {name[:80]!a}; adapters are named {_FORM}")
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.inexact):
            raise FormatError(str(path), f"'{name}' is not a matrix of floats")
        pair = pairs.setdefault(found["module"], {})
        if found["letter"] in pair:
            raise FormatError(str(path), f"it holds '{name}' under two names")
        pair[found["letter"]] = array.T
    if not pairs:
        raise FormatError(str(path), "it holds no adapters")
    return SavedAdapters(
        alpha=_read_alpha(path, metadata),
        matrices={module: _pair(path, module, pair) for module, pair in pairs.items()},
    )


def _pair(path: Path, module: str, pair: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if len(pair) != 2:
        raise FormatError(str(path), f"of '{module}' it holds lora_{''.join(pair)} alone")
    first, second = pair["A"], pair["B"]
    if first.shape[1] != second.shape[0] or not len(second):
        raise FormatError(
            str(path),
            f"of '{module}', lora_A has rank {first.shape[1]} and lora_B {second.shape[0]}",
        )
    return first, second


def _read_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    text = metadata.get(_ALPHA)
    if text is None:
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise FormatError(str(path), f"its {_ALPHA} is {text[:80]!a}, not a number above 0")
    return alpha


def _read(graph: ir.Graph, name: str) -> np.ndarray:
    value = graph.initializers.get(name)
    tensor = None if value is None else value.const_value
    if tensor is None:
        raise UnsupportedModel(f"the adapter matrix '{name}'", "it is not stored in the model")
    array: np.ndarray = tensor.numpy()
    # the codec has no bfloat16, which float32 holds exactly
    return array if name_dtype(array.dtype) in DTYPES else array.astype(np.float32)
