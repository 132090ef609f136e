"""Replace operators that onnxruntime-training cannot differentiate, or differentiates wrongly.

Rewriting happens before differentiation.  It changes only nodes with an input that depends on a
trained parameter.  :data:`REWRITES` lists all supported operators.  Each entry is a small function
that takes a node and returns replacements for the node's outputs, or ``None`` if the node can stay
unchanged.  The formulas are the definitions of the operators at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.tables import count_constants
from splitonnx.partitioner.graphs.traversals import find_moving, is_float, list_inputs
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.rewrites import (
    activations,
    arithmetic,
    convolutions,
    deformations,
    einsums,
    layouts,
    losses,
    normalizations,
    pads,
    pools,
    products,
    recurrences,
    reductions,
    regions,
    resizes,
    samplings,
    scans,
    scatters,
    selections,
    steps,
    transforms,
    trigonometry,
)

Rewrite = Callable[[NodeBuilder, ir.Node], Sequence[ir.Value | None] | None]

REWRITES: Mapping[str, Rewrite] = {
    "Acos": trigonometry.rewrite_function,
    "Acosh": trigonometry.rewrite_function,
    "AffineGrid": samplings.rewrite_affine_grid,
    "Asin": trigonometry.rewrite_function,
    "Asinh": trigonometry.rewrite_function,
    "Atan": trigonometry.rewrite_function,
    "Atanh": trigonometry.rewrite_function,
    "AveragePool": pools.rewrite_average_pool,
    "Cast": arithmetic.rewrite_cast,
    "CastLike": arithmetic.rewrite_cast_like,
    "Ceil": steps.rewrite_step,
    "Celu": activations.rewrite_celu,
    "CenterCropPad": pads.rewrite_center_crop_pad,
    "Clip": activations.rewrite_clip,
    "Col2Im": convolutions.rewrite_col2im,
    "Compress": selections.rewrite_compress,
    "Concat": selections.rewrite_concat,
    "Conv": convolutions.rewrite_conv,
    "ConvTranspose": convolutions.rewrite_conv_transpose,
    "Cosh": trigonometry.rewrite_function,
    "CumSum": reductions.rewrite_running_sum,
    "DFT": transforms.rewrite_dft,
    "DeformConv": deformations.rewrite_deform_conv,
    "DepthToSpace": layouts.rewrite_depth_to_space,
    "Det": products.rewrite_determinant,
    "DynamicQuantizeLinear": steps.rewrite_dynamic_quantize,
    "Einsum": einsums.rewrite_einsum,
    "Elu": activations.rewrite_elu,
    "EyeLike": steps.rewrite_step,
    "Floor": steps.rewrite_step,
    "GRU": recurrences.rewrite_gru,
    "Gelu": activations.rewrite_gelu,
    "Gemm": products.rewrite_gemm,
    "GlobalLpPool": pools.rewrite_global_lp_pool,
    "GlobalMaxPool": pools.rewrite_global_max_pool,
    "GridSample": samplings.rewrite_grid_sample,
    "GroupNormalization": normalizations.rewrite_group_norm,
    "HardSigmoid": activations.rewrite_hard_sigmoid,
    "HardSwish": activations.rewrite_hard_swish,
    "Hardmax": steps.rewrite_step,
    "InstanceNormalization": normalizations.rewrite_instance_norm,
    "LRN": pools.rewrite_lrn,
    "LSTM": recurrences.rewrite_lstm,
    "LayerNormalization": normalizations.rewrite_layer_norm,
    "LeakyRelu": activations.rewrite_leaky_relu,
    "LogSoftmax": activations.rewrite_softmax,
    "LpNormalization": normalizations.rewrite_lp_norm,
    "LpPool": pools.rewrite_lp_pool,
    "MatMul": products.rewrite_matmul,
    "MaxPool": pools.rewrite_max_pool,
    "MaxRoiPool": regions.rewrite_max_roi_pool,
    "MaxUnpool": pools.rewrite_max_unpool,
    "Mean": arithmetic.rewrite_mean,
    "MeanVarianceNormalization": normalizations.rewrite_mean_variance_norm,
    "Mish": activations.rewrite_mish,
    "Mod": arithmetic.rewrite_mod,
    "NegativeLogLikelihoodLoss": losses.rewrite_nll_loss,
    "OneHot": selections.rewrite_one_hot,
    "PRelu": activations.rewrite_prelu,
    "Pad": pads.rewrite_pad,
    "Pow": arithmetic.rewrite_pow,
    "RMSNormalization": normalizations.rewrite_rms_norm,
    "RNN": recurrences.rewrite_rnn,
    "Range": selections.rewrite_range,
    "ReduceL1": reductions.rewrite_l1,
    "ReduceL2": reductions.rewrite_smooth,
    "ReduceLogSum": reductions.rewrite_log_sum,
    "ReduceLogSumExp": reductions.rewrite_smooth,
    "ReduceMax": reductions.rewrite_extreme,
    "ReduceMin": reductions.rewrite_extreme,
    "ReduceProd": reductions.rewrite_product,
    "ReduceSumSquare": reductions.rewrite_sum_square,
    "Reshape": selections.rewrite_reshape,
    "Resize": resizes.rewrite_resize,
    "ReverseSequence": selections.rewrite_reverse_sequence,
    "RoiAlign": regions.rewrite_roi_align,
    "Round": steps.rewrite_step,
    "STFT": transforms.rewrite_stft,
    "Scan": scans.rewrite_scan,
    "ScatterElements": scatters.rewrite_scatter,
    "ScatterND": scatters.rewrite_scatter,
    "Selu": activations.rewrite_selu,
    "Shrink": activations.rewrite_shrink,
    "Sign": steps.rewrite_step,
    "Sinh": trigonometry.rewrite_function,
    "Slice": selections.rewrite_slice,
    "Softmax": activations.rewrite_softmax,
    "SoftmaxCrossEntropyLoss": losses.rewrite_cross_entropy,
    "Softplus": activations.rewrite_softplus,
    "Softsign": activations.rewrite_softsign,
    "SpaceToDepth": layouts.rewrite_space_to_depth,
    "Sum": arithmetic.rewrite_sum,
    "Tan": trigonometry.rewrite_function,
    "ThresholdedRelu": activations.rewrite_thresholded_relu,
    "Transpose": selections.rewrite_transpose,
    "Unique": selections.rewrite_unique,
    "Where": arithmetic.rewrite_where,
}
"""Maps an operator to the function that rewrites it with operators that have a gradient."""

_MOST_ROUNDS = 8
"""The most rounds of rewriting.

A rewrite may use operators that must be rewritten themselves: an LSTM, its activation functions and
their parts take 3 rounds.
"""


_ADVICE = "freeze the parameters before it with --freeze"


def rewrite(model: ir.Model, trained: Collection[str]) -> None:
    """Rewrite, in place, all operators in :data:`REWRITES` that depend on a trained parameter.

    ``trained`` contains the names of the graph inputs that are trained parameters.  The outputs of
    rewritten nodes keep their names.  A rewrite may use operators that need a rewrite themselves,
    and therefore rewriting takes several rounds; types and shapes are inferred again after each
    round.

    Raises:
        UnsupportedModel: a node cannot be rewritten, for example because its rewrite needs a shape
            or a constant that is unknown.
    """
    with count_constants():
        for index in range(_MOST_ROUNDS):
            if not _rewrite_once(model.graph, trained, f"rewritten{index or ''}"):
                return
            infer_shapes(model)


def _rewrite_once(graph: ir.Graph, trained: Collection[str], label: str) -> bool:
    moving = find_moving(graph, [value for value in graph.inputs if value.name in trained])
    changed = False
    for node in list(graph):
        if not _is_due(node, moving):  # skips readers of nodes rewritten in this round
            continue
        rule = REWRITES[node.op_type]
        builder = NodeBuilder(f"{node.outputs[0].name or node.name}/{label}")
        with attribute_errors_to(node, "rewritten", "cannot be differentiated", _ADVICE):
            made = rule(builder, node)
            if made is not None:
                builder.replace(node, made)
                changed = True
    return changed


def _is_due(node: ir.Node, moving: Collection[ir.Value]) -> bool:
    """Return whether a node has an entry in REWRITES and a gradient passes through it."""
    if node.op_type not in REWRITES or node.domain not in ("", "ai.onnx"):
        return False
    passed = any(value in moving for value in list_inputs(node))
    return passed and any(is_float(value) for value in node.outputs)
