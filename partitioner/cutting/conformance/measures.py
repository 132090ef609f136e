"""Measure the differences between computed and expected results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from splitonnx.partitioner.cutting.conformance.samples import Arrays
from splitonnx.partitioner.gate.walks import list_nodes

TOLERATED = 1e-3
"""The relative difference above which a cut fails; a smaller one only causes a remark."""
_COARSE_TYPES = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
_COARSE_OPERATORS = frozenset(
    {"ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear"}
)
_CHOOSING = frozenset(
    {
        "ArgMax",
        "ArgMin",
        "Ceil",
        "Equal",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Hardmax",
        "Less",
        "LessOrEqual",
        "Mod",
        "NonMaxSuppression",
        "NonZero",
        "Round",
        "Shrink",
        "Sign",
        "ThresholdedRelu",
        "TopK",
        "Unique",
    }
)
"""Operators whose result can change by much where an input changes in its last place."""
_WHOLE = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest difference between the elements of a tensor and their expected values.

    ``gap`` is this difference, and ``size`` is ``gap`` divided by the largest absolute value that
    is expected.
    Both are infinite if the shapes differ, or if only one of two compared values is finite.
    ``batch`` is the index of the batch.
    """

    tensor: str
    batch: int
    size: float
    gap: float = 0.0


def find_largest(differences: Sequence[Difference]) -> Difference:
    """Return the difference with the largest size, or one of size 0 if there are none."""
    none = Difference(tensor="", batch=0, size=0.0)
    return max([none, *differences], key=lambda each: each.size)


def list_differences(expected: Sequence[Arrays], found: Sequence[Arrays]) -> list[Difference]:
    """List the differences in each batch, one for each tensor that is in both results."""
    return [
        Difference(
            tensor=name,
            batch=number,
            size=measure(have[name], array),
            gap=_find_gap(have[name], array),
        )
        for number, (want, have) in enumerate(zip(expected, found, strict=True))
        for name, array in want.items()
        if name in have
    ]


def measure(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference, divided by the largest absolute expected value.

    NaN counts as equal to NaN.  The result is infinite if the shapes differ, if any strings differ,
    or if only one of two compared values is finite.
    """
    if found.shape != expected.shape:
        return np.inf
    if expected.dtype.kind in "OSU":
        return 0.0 if np.array_equal(found, expected) else np.inf
    second = _widen(expected)
    largest = np.abs(second[np.isfinite(second)]).max(initial=0)
    return _find_gap(found, expected) / float(max(largest, 1e-30))


def is_finite(array: np.ndarray) -> bool:
    """Return whether an array holds no infinite numbers and no NaN."""
    return array.dtype.kind in "OSU" or bool(np.isfinite(_widen(array)).all())


def has_finite(arrays: Sequence[np.ndarray]) -> bool:
    """Return whether some element of several arrays is finite, or they have no elements."""
    filled = [array for array in arrays if array.size and array.dtype.kind not in "OSU"]
    return not filled or any(bool(np.isfinite(_widen(array)).any()) for array in filled)


def is_coarse(model: onnx.ModelProto) -> bool:
    """Return whether a model computes with 16-bit floats or quantized numbers, which round more."""
    tensors = [tensor.data_type for tensor in model.graph.initializer]
    inputs = [value.type.tensor_type.elem_type for value in model.graph.input]
    casts = [
        attribute.i
        for node in list_nodes(model.graph.node)
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    ]
    if _COARSE_TYPES.intersection([*tensors, *inputs, *casts]):
        return True
    return any(node.op_type in _COARSE_OPERATORS for node in list_nodes(model.graph.node))


def find_choices(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Map each output of a model that depends on a choice by rounding to the first such node.

    Such a node returns places, truth values or whole numbers, which jump where a float passes the
    next one: ArgMax, the second output of MaxPool, comparisons, Round.
    """
    known: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        within = list(list_nodes([node]))
        inherited = [known[name] for each in within for name in each.input if name in known]
        chosen = next(iter([*inherited, *filter(_is_choosing, within)]), None)
        if chosen is not None:
            known.update((name, chosen) for name in node.output if name)
    names = [value.name for value in model.graph.output]
    return {name: known[name] for name in names if name in known}


def _is_choosing(node: onnx.NodeProto) -> bool:
    if node.domain:
        return False
    given = {a.name: a for a in node.attribute}
    if node.op_type == "Cast":
        return given["to"].i in _WHOLE
    if node.op_type in ("GridSample", "Resize"):
        usual = b"nearest" if node.op_type == "Resize" else b"linear"
        return (given["mode"].s if "mode" in given else usual) == b"nearest"
    if node.op_type == "MaxPool":
        return len(node.output) > 1 and bool(node.output[1])
    return node.op_type in _CHOOSING


def _find_gap(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference between two elements; NaN equals NaN."""
    if found.shape != expected.shape or expected.dtype.kind in "OSU":
        return 0.0 if np.array_equal(found, expected) else np.inf
    first, second = _widen(found), _widen(expected)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):  # of infinities
        gap = float(np.abs(np.where(same, 0, first - second)).max(initial=0))
    return gap if np.isfinite(gap) else np.inf


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
