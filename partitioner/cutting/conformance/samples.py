"""Draw random inputs for a model from the shapes and types that it declares.

A symbolic size of an input's first axis counts as the batch size, on other axes too if it has a
name, and any other as a length.
A model does not declare which integers, masks and lengths it accepts, so several draws are made,
and the first that the model accepts is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import product

import numpy as np
import onnx

from splitonnx.partitioner.cutting.conformance.quantized_ranges import find_upper_ends
from splitonnx.partitioner.gate.walks import list_bodies, list_nodes

Arrays = dict[str, np.ndarray]

_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_RENAMING = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose results are the numbers of their first input."""
_COUNTS = {
    **dict.fromkeys(_RECURRENT, (4,)),
    **dict.fromkeys(("Expand", "Gather", "GatherElements", "GatherND", "OneHot"), (1,)),
    **dict.fromkeys(("Reshape", "ReverseSequence", "Tile", "TopK"), (1,)),
    **dict.fromkeys(("Compress", "ScatterElements", "ScatterND"), (1,)),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
}
"""The inputs of operators that are lengths, sizes or indices."""
_SUMS = frozenset({"CumSum", "Einsum", "Gemm", "MatMul", "ReduceL1", "ReduceSum"})
_SIZES = frozenset({"Shape", "Size"})
"""Operators whose results do not depend on the numbers of their input."""

_BATCHES = (((2, 1.0), (3, 1.0), (5, 3.0)), ((1, 1.0), (1, 3.0)))
"""Batch sizes to try, each with a factor for the standard deviation of floats.

Different sizes are tried first, and then only 1 for models that accept no other.  The last
batch has larger numbers, and reveals nodes that change only large numbers or those of one sign.
"""
_LENGTHS = (8, 32, 4, 64, 224, 1)
"""Values tried for symbolic sizes that are not the batch."""
_INTEGERS = (8, 6, 4, 3, 2, 1)
"""Upper limits of random integers, tried in this order.

Integers may be indices into small tables.
"""


def iter_draws(model: onnx.ModelProto, seed: int, scale: float = 1.0) -> Iterator[list[Arrays]]:
    """Yield lists of random batches for a model, to be tried in this order.

    Floats are drawn from a normal distribution with the standard deviation ``scale``, or a multiple
    of it in the last batch.  Where lengths or indices are computed from floats, booleans or sums,
    these inputs are also drawn as masks.  If the model is quantized, the last batch is drawn near
    the upper end of the integers' range, where integer kernels may be wrong.  Nothing is yielded if
    an input is not a tensor of real numbers or booleans with a declared rank.
    """
    inputs = list_inputs(model)
    if not all(_is_numeric(value) for value in inputs):
        return
    has_batch = any(_is_symbolic(value, 0) for value in inputs)
    rows = _list_batches(inputs)
    has_length = any(
        _is_symbolic(value, axis) and _dims(value)[axis].dim_param not in rows
        for value in inputs
        for axis in range(1, len(_dims(value)))
    )
    lengths = _LENGTHS if has_length else _LENGTHS[:1]
    limits = _INTEGERS if has_integers(model) else _INTEGERS[:1]
    ends, counted = find_upper_ends(model), _find_lengths(model)
    batches = _BATCHES if has_batch else _BATCHES[-1:]
    masks = find_masks(model)
    choices: tuple[set[str], ...] = (set(), masks) if masks else (set(),)
    for sizes, length, limit, masked in product(batches, lengths, limits, choices):
        random = np.random.default_rng(seed)
        drawn = [
            {v.name: _draw(random, v, rows, size, length, limit, spread) for v in inputs}
            for size, spread in [(size, scale * factor) for size, factor in sizes]
        ]
        for batch in drawn:
            batch.update({name: batch[name] + batch[name].dtype.type(1) for name in counted})
            batch.update({name: _draw_mask(random, batch[name]) for name in sorted(masked)})
        for name, end in ends.items():
            drawn[-1][name] = _draw_near(random, drawn[-1][name], end)
        yield drawn


def find_open_batch(model: onnx.ModelProto) -> str:
    """Return the symbol of a model's batch size: the only symbol on the first axes of its inputs.

    Return an empty string if there is no such symbol, or more than one.
    """
    names = _list_batches(list_inputs(model))
    return names.pop() if len(names) == 1 else ""


def repeat_sample(model: onnx.ModelProto, batch: Arrays, symbol: str) -> Arrays | None:
    """Return a batch with its only sample twice, or ``None`` if it holds more than one sample.

    ``symbol`` is the symbol of the batch size, which may be on any axis.
    """
    repeated = dict(batch)
    for value in list_inputs(model):
        for axis, dim in enumerate(_dims(value)):
            if dim.dim_param == symbol:
                if repeated[value.name].shape[axis] != 1:
                    return None
                repeated[value.name] = np.repeat(repeated[value.name], 2, axis)
    return repeated


def list_inputs(model: onnx.ModelProto) -> Sequence[onnx.ValueInfoProto]:
    """List the inputs that a caller must supply because they have no initializer."""
    given = {tensor.name for tensor in model.graph.initializer}
    given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in given]


def has_integers(model: onnx.ModelProto) -> bool:
    """Return whether an input that a caller must supply holds integers, which may be indices."""
    return any(_dtype(value).kind in "iu" for value in list_inputs(model))


def find_masks(model: onnx.ModelProto) -> set[str]:
    """Find the inputs from which a model may count lengths or compute indices.

    These are floats and booleans on which a length, a size or an index depends, and integers that
    are summed for it.
    """
    nodes = list(list_nodes(model.graph.node))
    counts = [
        node.input[place]
        for node in nodes
        for place in _COUNTS.get(node.op_type, ())
        if place < len(node.input)
    ]
    used = _find_sources(nodes, counts)
    sums = [node for node in nodes if node.op_type in _SUMS and not used.isdisjoint(node.output)]
    summed = _find_sources(nodes, [name for node in sums for name in node.input])
    return {
        value.name
        for value in list_inputs(model)
        if value.name in (summed if _dtype(value).kind in "iu" else used)
    }


def _find_sources(nodes: Sequence[onnx.NodeProto], names: Iterable[str]) -> set[str]:
    """Find the tensors whose numbers decide those of the tensors named, and these themselves."""
    found = set(names) - {""}
    known = 0
    while known < len(found):  # a body's nodes come after the node that returns their results
        known = len(found)
        for node in reversed(nodes):
            if node.op_type not in _SIZES and not found.isdisjoint(node.output):
                found.update(name for name in node.input if name)
                found.update(value.name for body in list_bodies(node) for value in body.output)
    return found


def _find_lengths(model: onnx.ModelProto) -> set[str]:
    """Find the inputs that hold the lengths of sequences of an LSTM, GRU or RNN: at least 1."""
    nodes = list(list_nodes(model.graph.node))
    found = {node.input[4] for node in nodes if node.op_type in _RECURRENT and len(node.input) > 4}
    for node in reversed(nodes):
        if node.op_type in _RENAMING and not found.isdisjoint(node.output):
            found.add(node.input[0])
    return found & {v.name for v in list_inputs(model) if _dtype(v).kind in "iu"}


def _draw(
    random: np.random.Generator,
    value: onnx.ValueInfoProto,
    rows: Collection[str],
    batch: int,
    length: int,
    limit: int,
    scale: float,
) -> np.ndarray:
    shape = []
    for axis, dim in enumerate(_dims(value)):
        is_batch = not axis or dim.dim_param in rows
        open_size = batch if is_batch else length
        shape.append(open_size if _is_symbolic(value, axis) else dim.dim_value)
    dtype = _dtype(value)
    if dtype.kind == "b":
        return random.random(shape) < 0.5
    if dtype.kind in "iu":
        return random.integers(0, limit, shape).astype(dtype)
    return (random.standard_normal(shape) * scale).astype(dtype)


def _draw_mask(random: np.random.Generator, usual: np.ndarray) -> np.ndarray:
    """Draw zeros and ones, with a one at least in each row and each column.

    All are ones where each row holds one number, since this may be a length itself.
    """
    drawn = random.random(usual.shape) < 0.7
    if usual.ndim < 2 or usual.shape[-1] == 1:
        return np.ones(usual.shape, usual.dtype)
    for axis in range(usual.ndim):
        if usual.shape[axis] > 1:
            np.moveaxis(drawn, axis, 0)[0] = True
    return drawn.astype(usual.dtype)


def _draw_near(random: np.random.Generator, usual: np.ndarray, end: float) -> np.ndarray:
    """Draw numbers like ``usual``, but most of them between 0.9 ``end`` and ``end``."""
    drawn = random.uniform(0.9 * end, end, usual.shape).astype(usual.dtype)
    return np.where(random.random(usual.shape) < 0.9, drawn, usual)


def _list_batches(inputs: Sequence[onnx.ValueInfoProto]) -> set[str]:
    """List the symbols on the first axes of the inputs."""
    firsts = [_dims(value)[0] for value in inputs if len(_dims(value))]
    return {dim.dim_param for dim in firsts if dim.dim_param}


def _dims(value: onnx.ValueInfoProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    dims: Sequence[onnx.TensorShapeProto.Dimension] = value.type.tensor_type.shape.dim
    return dims


def _is_symbolic(value: onnx.ValueInfoProto, axis: int) -> bool:
    dims = _dims(value)
    return axis < len(dims) and (not dims[axis].HasField("dim_value") or dims[axis].dim_value < 0)


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _is_numeric(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return False
    if tensor.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return False
    return _dtype(value).kind in "biuf" or tensor.elem_type == onnx.TensorProto.BFLOAT16
