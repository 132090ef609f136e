"""Rewrite DFT as a multiplication by a constant matrix, and STFT as a convolution.

This is possible because Fourier transforms are linear.  The matrices are computed by applying
numpy.fft to unit vectors, so they already account for truncation, zero padding and one-sided
spectra.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, known_rank
from splitonnx.partitioner.graphs.tables import limit

Values = Sequence[ir.Value | None]


def rewrite_dft(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite DFT as a multiplication by the DFT matrix along the transformed axis.

    For this multiplication, that axis and the axis of real and imaginary parts are merged.
    onnxruntime-training has no gradient for DFT.
    """
    x = node.inputs[0]
    assert x is not None
    dims = known_dims(x)
    if dims is None:
        raise _refuse(node, f"the rank of '{x.name}'")
    rank = len(dims)
    axis = _read_axis(node) % rank
    length, parts = dims[axis], dims[-1]
    if length is None or parts is None:
        raise _refuse(node, f"the length of '{x.name}' along axis {axis}, or its last one,")
    inverse = bool(node.attributes.get_int("inverse", 0))
    onesided = bool(node.attributes.get_int("onesided", 0))
    size = _read_integer(node, 1)
    if size is None:
        size = 2 * (length - 1) if inverse and onesided else length
    _limit_matrix(node, length, parts, size)
    matrix = _make_matrix(length, parts, size, inverse=inverse, onesided=onesided)
    # (n, parts, m, parts') is applied to (..., n, parts)
    order = [a for a in range(rank - 1) if a != axis] + [axis, rank - 1]
    value = x if order == list(range(rank)) else builder.op("Transpose", x, perm=order)
    lead = [0] * (rank - 2)
    value = builder.op("Reshape", value, builder.integers([*lead, length * parts]))
    flat = matrix.reshape(length * parts, -1)
    value = builder.op("MatMul", value, _constant(builder, flat, x.dtype))
    value = builder.op("Reshape", value, builder.integers([*lead, *matrix.shape[2:]]))
    back = [int(place) for place in np.argsort(order)]
    return [value if back == list(range(rank)) else builder.op("Transpose", value, perm=back)]


def rewrite_stft(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite STFT as a convolution.

    The kernels of the convolution are the DFT matrix of one frame, multiplied by the window
    function.  The stride is the step between frames.  onnxruntime-training has no gradient for
    STFT.
    """
    given = [*node.inputs, *[None] * 4]
    x, window = given[0], given[2]
    assert x is not None
    step = _read_integer(node, 1)
    dims = known_dims(x)
    if step is None or dims is None or (len(dims) > 2 and dims[2] is None):
        raise _refuse(node, "the step between frames, or the shape of the signal,")
    parts = (dims[2] or 1) if len(dims) > 2 else 1
    size = _read_integer(node, 3)
    if size is None:
        size = (known_dims(window) or [None])[0] if window is not None else dims[1]
    if size is None:
        raise _refuse(node, "the length of a frame")
    onesided = bool(node.attributes.get_int("onesided", 1))
    _limit_matrix(node, size, parts, size)
    matrix = _make_matrix(size, parts, size, inverse=False, onesided=onesided)
    bins = matrix.shape[2]
    # (F, parts, K, 2) to kernels (2K, parts, F)
    kernels = _constant(builder, matrix.reshape(size, parts, 2 * bins).transpose(2, 1, 0), x.dtype)
    if window is not None:
        kernels = builder.op("Mul", kernels, window)
    if known_rank(x) == 2:
        signal = builder.op("Unsqueeze", x, builder.integers([1]))
    else:
        signal = builder.op("Transpose", x, perm=[0, 2, 1])
    found = builder.op("Conv", signal, kernels, strides=[step], kernel_shape=[size])  # (N, 2K, T)
    frames = builder.op("Transpose", found, perm=[0, 2, 1])
    return [builder.op("Reshape", frames, builder.integers([0, -1, bins, 2]))]


def _limit_matrix(node: ir.Node, length: int, parts: int, size: int) -> None:
    """Raise an error if the matrix, or the complex array from which it is made, is too large."""
    rows = length * parts
    limit(node, rows * rows + 2 * rows * size)


def _make_matrix(
    length: int, parts: int, size: int, *, inverse: bool, onesided: bool
) -> np.ndarray:
    """Transform each unit vector: (length, parts, frequencies, 2), or 1 for real results."""
    basis = np.eye(length * parts).reshape(length * parts, length, parts)
    signals = basis[..., 0] if parts == 1 else basis[..., 0] + 1j * basis[..., 1]
    if inverse and onesided:
        found = np.fft.irfft(signals, size, axis=1)[..., None]
    else:
        transformed = (np.fft.ifft if inverse else np.fft.fft)(signals, size, axis=1)
        if onesided:
            transformed = transformed[:, : size // 2 + 1]
        found = np.stack([transformed.real, transformed.imag], axis=-1)
    return np.asarray(found.reshape(length, parts, *found.shape[1:]))


def _constant(builder: NodeBuilder, array: np.ndarray, dtype: ir.DataType | None) -> ir.Value:
    assert dtype is not None
    return builder.tensor(ir.tensor(np.ascontiguousarray(array.astype(dtype.numpy()))))


def _read_axis(node: ir.Node) -> int:
    """Return the axis, which is an attribute up to opset 19 and an input since opset 20."""
    stated = node.attributes.get("axis")
    if stated is not None:
        return stated.as_int()
    given = _read_integer(node, 2)
    if given is not None:
        return given
    graph = node.graph
    return 1 if graph is not None and graph.opset_imports.get("", 20) < 20 else -2


def _read_integer(node: ir.Node, index: int) -> int | None:
    """Return a constant scalar input, or ``None`` if it is missing.

    Raises:
        UnsupportedModel: the input is not constant.
    """
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise _refuse(node, f"its input '{value.name}'")
    return int(tensor.numpy().reshape(-1)[0])


def _refuse(node: ir.Node, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        f"{what} is not known in advance",
        "fix it with --dim NAME=SIZE, or export the model with fixed lengths",
    )
