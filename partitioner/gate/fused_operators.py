"""Recognize fused operators, which ONNX Runtime's optimizers write into models.

A fused operator of the domain ``com.microsoft`` replaces several nodes of a model.  The optimizers
put layer normalization into ONNX's own domain, even for opsets without this operator.  The
operators in :data:`FUSED` are later replaced by standard operators
(:mod:`splitonnx.partitioner.normalization.fused`).  The gate refuses all other operators that only
ONNX Runtime has.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto

from splitonnx.errors import UnsupportedModel
from splitonnx.operators import STANDARD_DOMAINS
from splitonnx.partitioner.gate.quantized_operators import refuse_quantized
from splitonnx.partitioner.gate.walks import label_node, list_nodes

DOMAIN = "com.microsoft"
FUSED = frozenset(
    {
        "Attention",
        "BiasGelu",
        "EmbedLayerNormalization",
        "FastGelu",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "Gelu",
        "LayerNormalization",
        "MatMulNBits",
        "MultiHeadAttention",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "TransposeMatMul",
    }
)
"""The fused operators that can be replaced by standard operators."""

WITHOUT = (
    "export the model without the optimizer: take the file that it read, or have it write standard "
    "operators, a session with graph_optimization_level ORT_ENABLE_BASIC, optimize_model of "
    "onnxruntime.transformers with only_onnxruntime=True and opt_level=1"
)
"""The advice on operators that cannot be replaced."""

_MISPLACED = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})
"""Operators that ONNX Runtime accepts in ONNX's own domain, whatever the opset."""


def claim_fused(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """Move layer normalizations to the domain ``com.microsoft`` if the model's opset lacks them.

    ``version`` is the model's opset.  Return a changed copy of ``proto``, or ``proto`` itself if
    there is nothing to move.
    """
    if not any(_is_misplaced(node, version) for node in list_nodes(proto.graph.node)):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in list_nodes(copy.graph.node):
        if _is_misplaced(node, version):
            node.domain = DOMAIN
    if all(entry.domain != DOMAIN for entry in copy.opset_import):
        copy.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return copy


def _is_misplaced(node: NodeProto, version: int) -> bool:
    if node.op_type not in _MISPLACED or node.domain not in STANDARD_DOMAINS:
        return False
    return not onnx.defs.has(node.op_type, version, "")


def is_fused(node: NodeProto) -> bool:
    """Return whether a node has one of the operators in :data:`FUSED`, in their domain."""
    return bool(node.domain == DOMAIN and node.op_type in FUSED)


def refuse_domain(node: NodeProto) -> UnsupportedModel:
    """Return the error to raise for a node if its domain is not one of ONNX's own."""
    if node.domain == DOMAIN and (error := refuse_quantized(node)) is not None:
        return error
    if node.domain.split(".")[:2] == DOMAIN.split("."):
        return UnsupportedModel(
            label_node(node),
            f"it is an operator of ONNX Runtime ({node.domain}), so this is an optimized model",
            WITHOUT,
        )
    return UnsupportedModel(
        label_node(node),
        f"its domain '{node.domain}' is not one of ONNX's own",
        "export the model with standard operators",
    )
