"""Change the inputs of a model: fix sizes, rename sizes, and bind inputs to constant values.

The changes are made before the model is checked, so all later steps see the model that the user
intended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from splitonnx.errors import UsageError, quote
from splitonnx.partitioner.gate.walks import label_node, list_nodes

_PASSING = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that pass the number of a Loop's iterations on."""
Number = bool | float | int
Binding = Number | Sequence[Number] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Adjustments:
    """The changes that a user makes to a model before it is prepared.

    ``dims`` maps a size, given as a symbol or as ``input:axis``, to a number or a new symbol.
    ``bindings`` maps the name of an input to its constant value: one number for all elements, or
    one for each element.  Both are made before the model is checked.  If ``dequantize`` is true,
    the gate accepts the operators of quantization tools, and a preparation pass replaces them.
    """

    dims: Mapping[str, int | str] = field(default_factory=dict)
    bindings: Mapping[str, Binding] = field(default_factory=dict)
    dequantize: bool = False

    @property
    def chosen_sizes(self) -> frozenset[int]:
        """The sizes above 1 that the user gave axes of the inputs."""
        return frozenset(size for size in self.dims.values() if isinstance(size, int) and size > 1)

    def __bool__(self) -> bool:
        return bool(self.dims or self.bindings or self.dequantize)


NONE = Adjustments()


def adjust(model: onnx.ModelProto, adjustments: Adjustments) -> None:
    """Change the sizes of a model's inputs, and then replace bound inputs with constants, in place.

    Raises:
        UsageError: a name is unknown, a size is neither a positive number nor a symbol, or a value
            does not fit its input.
    """
    for name, size in adjustments.dims.items():
        _set_size(model.graph, name, size)
    for name, value in adjustments.bindings.items():
        _bind(model.graph, name, value)


def _set_size(graph: onnx.GraphProto, name: str, size: int | str) -> None:
    if isinstance(size, int) and size < 1:
        raise UsageError(f"--dim {name}={size}: a size is at least 1")
    if isinstance(size, str) and not size.isidentifier():
        raise UsageError(f"--dim {name}={size}: '{size}' is neither a size nor a symbol")
    found = [dim for value in graph.input for dim in _list_dims(value) if dim.dim_param == name]
    if found and name:
        others = [d for v in (*graph.output, *graph.value_info) for d in _list_dims(v)]
        for dim in (*found, *(dim for dim in others if dim.dim_param == name)):
            _write(dim, size)
        return
    _write(_find_axis(graph, name), size)
    # what was inferred from the old size
    del graph.value_info[:]
    for value in graph.output:
        for dim in _list_dims(value):
            dim.Clear()


def _find_axis(graph: onnx.GraphProto, name: str) -> onnx.TensorShapeProto.Dimension:
    """Return the dimension given by ``name`` in the form ``input:axis``."""
    tensor, _, axis = name.rpartition(":")
    for value in graph.input:
        if value.name == tensor and axis.isdecimal() and int(axis) < len(_list_dims(value)):
            return _list_dims(value)[int(axis)]
    symbols = {dim.dim_param for value in graph.input for dim in _list_dims(value)} - {""}
    known = f"the symbols {quote(sorted(symbols))}" if symbols else "no symbols"
    raise UsageError(
        f"--dim {name}: the model's inputs have no such size; they have {known}, and other sizes "
        "are named like 'input:0'"
    )


def _write(dim: onnx.TensorShapeProto.Dimension, size: int | str) -> None:
    if isinstance(size, int):
        dim.dim_value = size
    else:
        dim.dim_param = size


def _bind(graph: onnx.GraphProto, name: str, value: Binding) -> None:
    """Replace an input by a Constant node that holds its value."""
    found = next((known for known in graph.input if known.name == name), None)
    if found is None or not found.type.HasField("tensor_type"):
        raise UsageError(
            f"--bind {name}: the model has no such input; it has "
            f"{quote([known.name for known in graph.input])}"
        )
    array = _read(found, value)
    _refuse_idle_loops(graph, name, array)
    graph.input.remove(found)
    for stored in [stored for stored in graph.initializer if stored.name == name]:
        graph.initializer.remove(stored)
    tensor = onnx.numpy_helper.from_array(array, name)
    graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=tensor))


def _refuse_idle_loops(graph: onnx.GraphProto, name: str, array: np.ndarray) -> None:
    """Refuse a value with which a Loop makes no iteration, so that its weights have no part.

    Raises:
        UsageError: a Loop reads the input as its number of iterations, or as its condition.
    """
    if array.size != 1 or array.reshape(()) > 0:
        return
    names = {name}
    for node in list_nodes(graph.node):
        if node.op_type in _PASSING and node.input and node.input[0] in names:
            names.update(node.output)
        if node.op_type == "Loop" and names.intersection(node.input[:2]):
            advice = "true" if array.dtype.kind == "b" else "1 or more"
            raise UsageError(
                f"--bind {name}={array.reshape(())}: {label_node(node)} would make no iteration, "
                f"and its weights would have no part in the model; bind {advice}"
            )


def _read(source: onnx.ValueInfoProto, value: Binding) -> np.ndarray:
    """Convert a value to an array with the type and shape of an input."""
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in _list_dims(source)]
    names = [d.dim_param or "?" for d in _list_dims(source) if not d.HasField("dim_value")]
    shape = [size for size in sizes if size is not None]
    if len(shape) < len(sizes):
        raise UsageError(
            f"--bind {source.name}: the size {quote(names)} of this input is not fixed; fix it "
            "with --dim"
        )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(source.type.tensor_type.elem_type))
    given = np.asarray(value)
    if given.dtype.kind not in "biuf":
        raise UsageError(f"--bind {source.name}: {value!r} is not a number; give it without quotes")
    with np.errstate(invalid="ignore", over="ignore"):
        array = given.astype(dtype)
    kept, wide = array.astype(np.float64), given.astype(np.float64)
    if dtype.kind in "biu" and not np.array_equal(kept, wide):
        raise UsageError(f"--bind {source.name}: {value} is not {dtype}, the type of this input")
    if np.isnan(kept).any() or (np.isinf(kept) & np.isfinite(wide)).any():
        raise UsageError(
            f"--bind {source.name}: {value} is not a number that {dtype}, the type of this input, "
            "can hold; give another (inf and -inf are allowed)"
        )
    if given.size == 1:
        return np.full(shape, array.reshape(()), dtype)
    if given.size != (count := int(np.prod(shape))):
        raise UsageError(
            f"--bind {source.name}: {given.size} numbers came for an input of shape {shape}; give "
            f"one, or {count}"
        )
    return array.reshape(shape)


def _list_dims(value: onnx.ValueInfoProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    dims: Sequence[onnx.TensorShapeProto.Dimension] = value.type.tensor_type.shape.dim
    return dims
