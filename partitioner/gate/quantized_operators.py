"""Recognize the operators of ONNX Runtime's domain that its quantization tools write.

The gate accepts them only if the user wants a model to be dequantized
(:mod:`splitonnx.partitioner.normalization.dequantized`).
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gate.walks import label_node

_DYNAMIC = "onnxruntime.quantization.quantize_dynamic"
_STATIC = "onnxruntime.quantization.quantize_static with QuantFormat.QOperator"
_OPTIMIZER = "ONNX Runtime's optimizer"
_BLOCKWISE = "onnxruntime.quantization.matmul_bnb4_quantizer"

TOOLS: Mapping[str, str] = {
    "DynamicQuantizeLSTM": _DYNAMIC,
    "DynamicQuantizeMatMul": f"{_OPTIMIZER}, after {_DYNAMIC},",
    "MatMulIntegerToFloat": f"{_OPTIMIZER}, after {_DYNAMIC},",
    "QAttention": _DYNAMIC,
    "QEmbedLayerNormalization": _DYNAMIC,
    "QGemm": _STATIC,
    "QLinearAdd": _STATIC,
    "QLinearAveragePool": _STATIC,
    "QLinearConcat": _STATIC,
    "QLinearConv": _STATIC,
    "QLinearGlobalAveragePool": _STATIC,
    "QLinearLeakyRelu": _STATIC,
    "QLinearMul": _STATIC,
    "QLinearSigmoid": _STATIC,
    "QLinearSoftmax": _STATIC,
    "QLinearWhere": _STATIC,
}
"""Map each operator that can be dequantized to the tool that writes it."""
STANDARD_TOOLS: Mapping[str, str] = {
    "ConvInteger": _DYNAMIC,
    "MatMulInteger": _DYNAMIC,
    "QLinearConv": _STATIC,
    "QLinearMatMul": _STATIC,
}
"""As :data:`TOOLS`, for operators of ONNX's own domain."""
_STUCK: Mapping[str, str] = {"MatMulBnb4": _BLOCKWISE}
"""Operators of a quantization tool that cannot be dequantized."""


def refuse_quantized(node: NodeProto) -> UnsupportedModel | None:
    """Return the error for a node that a quantization tool has written, or ``None``."""
    label = label_node(node)
    if (tool := TOOLS.get(node.op_type)) is not None:
        return UnsupportedModel(
            label,
            f"it computes with integers, as {tool} writes it",
            "turn its weights back into floats with --dequantize (in Python dequantize=True)",
        )
    if (tool := _STUCK.get(node.op_type)) is not None:
        return UnsupportedModel(
            label,
            f"its weight is in a format of {tool}, which is not dequantized",
            "train the float model that was quantized",
        )
    return None
