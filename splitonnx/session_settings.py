"""Settings that every ONNX Runtime session of splitonnx gets, so that it computes correctly.

ONNX Runtime replaces QuantizeLinear and DequantizeLinear around an operator with an integer kernel,
unless a session's settings forbid it.  On x86 processors without VNNI, such a kernel adds two
products of 8-bit numbers in 16 bits.  If the sum needs more bits, the result is too small by up to
half, without an error.  Other such kernels round differently: Softmax and AveragePool by several
percent of the largest value.  A MatMul by 4-bit weights is computed with 8-bit activations.
Without these settings, ONNX Runtime also merges two consecutive pairs of QuantizeLinear and
DequantizeLinear into one pair, which rounds once instead of twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FUSION = "session.disable_quant_qdq"
"""The setting that turns off integer kernels for quantized operators."""
MERGING = "session.disable_double_qdq_remover"
"""The setting that turns off the merging of consecutive pairs."""
EXACT_SETTINGS: Mapping[str, str] = MappingProxyType({FUSION: "1", MERGING: "1"})
"""The names and values of the settings; versions of ONNX Runtime ignore those they do not know."""
