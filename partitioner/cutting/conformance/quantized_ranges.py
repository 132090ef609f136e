"""Find inputs for which the integers in a quantized model reach the upper end of their range.

Random inputs from a normal distribution rarely reach it.  But mistakes of integer kernels, such as
sums that saturate, appear only with large integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from splitonnx.partitioner.gate.walks import list_nodes

_QUANTIZERS = frozenset({"DynamicQuantizeLinear", "QuantizeLinear"})
_READERS = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
    }
)
"""Operators whose first input is quantized."""
_WIDE = 10.0
"""The end of the range of a float that is not quantized itself, in standard deviations."""


def find_upper_ends(model: onnx.ModelProto) -> Mapping[str, float]:
    """Map each input of a quantized model to the value that gives the largest integers.

    An input that is quantized only after other operators gets a large value.  The map is empty for
    models that are not quantized, and does not contain integer inputs that may be indices.
    """
    nodes = list(list_nodes(model.graph.node))
    if not any(node.op_type in _QUANTIZERS | _READERS and not node.domain for node in nodes):
        return {}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    ends = {}
    for value in model.graph.input:
        if value.name in constants or not value.type.HasField("tensor_type"):
            continue
        kind = value.type.tensor_type.elem_type
        readers = [node for node in nodes if node.input and node.input[0] == value.name]
        if kind in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8):
            if any(node.op_type in _READERS for node in readers):
                dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
                ends[value.name] = float(np.iinfo(dtype).max)
        elif kind in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            found = [_find_end(node, constants) for node in readers]
            ends[value.name] = next((end for end in found if end is not None), _WIDE)
    return ends


def _find_end(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> float | None:
    """Return the largest float that a QuantizeLinear with constant settings can represent."""
    if node.op_type != "QuantizeLinear" or node.domain or len(node.input) < 3:
        return None
    scale, zero = (constants.get(name) for name in node.input[1:3])
    if scale is None or zero is None:
        return None
    zeros = onnx.numpy_helper.to_array(zero)
    if zeros.dtype.kind not in "iu":
        return None
    steps = float(np.iinfo(zeros.dtype).max) - zeros.astype(np.float64)
    ends = steps * onnx.numpy_helper.to_array(scale).astype(np.float64)
    return float(ends.max())
