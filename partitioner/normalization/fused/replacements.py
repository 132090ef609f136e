"""Replace the fused operators of ONNX Runtime with their formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.gate.fused_operators import DOMAIN
from splitonnx.partitioner.gate.ml_operators import normalize_ml_operators
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_nodes
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.normalization.fused import (
    activations,
    attentions,
    layer_norms,
    products,
)
from splitonnx.partitioner.normalization.fused.operands import NotYet, refuse

_Formula = Callable[[NodeBuilder, ir.Node], Sequence[ir.Value | None]]

FORMULAS: Mapping[str, _Formula] = {
    "Attention": attentions.write_attention,
    "BiasGelu": activations.write_bias_gelu,
    "EmbedLayerNormalization": layer_norms.write_embedding,
    "FastGelu": activations.write_fast_gelu,
    "FusedConv": products.write_conv,
    "FusedGemm": products.write_gemm,
    "FusedMatMul": products.write_matmul,
    "Gelu": activations.write_gelu,
    "LayerNormalization": layer_norms.write_layer_norm,
    "MultiHeadAttention": attentions.write_multi_head,
    "QuickGelu": activations.write_quick_gelu,
    "RotaryEmbedding": attentions.write_rotary,
    "SimplifiedLayerNormalization": layer_norms.write_simplified,
    "SkipLayerNormalization": layer_norms.write_skip,
    "SkipSimplifiedLayerNormalization": layer_norms.write_skip_simplified,
    "TransposeMatMul": products.write_matmul,
}
"""Maps each fused operator except MatMulNBits to the function that writes its formula."""


def replace_foreign(model: ir.Model) -> None:
    """Replace operators of ``ai.onnx.ml`` and fused operators with standard operators, in place."""
    normalize_ml_operators(model.graph)
    replace_fused(model)
    model.opset_imports.pop(DOMAIN, None)


def replace_fused(model: ir.Model) -> None:
    """Replace the fused operators of a model with their formulas, in place.

    Some formulas need shapes that can be inferred only after other operators have been replaced,
    because onnx infers no shapes for the results of operators that it does not know.  Therefore,
    shapes are inferred again after each round of replacements.

    Raises:
        UnsupportedModel: an operator cannot be written in standard operators, or its formula needs
            a type or shape that cannot be inferred.
    """
    waiting = _list_fused(model.graph)
    while waiting:
        infer_shapes(model)
        reasons = {node: reason for node in waiting if (reason := _replace(node))}
        if len(reasons) == len(waiting):
            node, reason = next(iter(reasons.items()))
            raise refuse(node, f"{reason} is not known")
        waiting = list(reasons)


def _list_fused(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in list_nodes(graph) if node.domain == DOMAIN]


def _replace(node: ir.Node) -> str:
    """Replace a node; return what is not known yet, or an empty string if the node was replaced."""
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/plain")
    with attribute_errors_to(node, "written in standard operators"):
        try:
            made = FORMULAS[node.op_type](builder, node)
        except NotYet as missing:
            return str(missing)
        builder.replace(node, made)
    return ""
