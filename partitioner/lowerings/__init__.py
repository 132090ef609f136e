"""Lowerings: replace training-only operators with standard ONNX operators.

A portable part of a model must run on every build of ONNX Runtime.  It must therefore not contain
operators that only onnxruntime-training has, such as AveragePoolGrad, the gradient of AveragePool.
:data:`LOWERINGS` lists all supported operators.  Each entry is a small function that takes a node
and returns replacements for the node's outputs.  The formulas are the textbook derivatives of the
forward operators, which are defined at onnx.ai/onnx/operators.

The package also works around faults of ONNX Runtime.  :mod:`fusions` and the modules that it uses
keep the optimizer from merging nodes wrongly, and :mod:`centred_normalizations` keeps normalization
kernels from losing precision.  Modules in this package may import :mod:`graphs` and
:mod:`inference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

import onnx
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_rank
from splitonnx.partitioner.graphs.faults import describe_node
from splitonnx.partitioner.graphs.tables import count_constants
from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.lowerings import (
    activations,
    convolutions,
    losses,
    normalizations,
    pools,
    shapes,
)

Lowering = Callable[[NodeBuilder, ir.Node], Sequence[ir.Value | None]]

LOWERINGS: Mapping[str, Lowering] = {
    "AveragePoolGrad": pools.lower_average_pool_grad,
    "BatchNormInternal": normalizations.lower_batch_norm,
    "BatchNormalizationGrad": normalizations.lower_batch_norm_grad,
    "BroadcastGradientArgs": shapes.lower_broadcast_axes,
    "ConcatTraining": shapes.lower_concat,
    "ConvGrad": convolutions.lower_conv_grad,
    "DivGrad": shapes.lower_div_grad,
    "FastGelu": activations.lower_fast_gelu,
    "FastGeluGrad": activations.lower_fast_gelu_grad,
    "FusedMatMul": shapes.lower_matmul,
    "GatherElementsGrad": shapes.lower_gather_elements_grad,
    "GatherGrad": shapes.lower_gather_grad,
    "GatherNDGrad": shapes.lower_gather_nd_grad,
    "Gelu": activations.lower_gelu,
    "GeluGrad": activations.lower_gelu_grad,
    "LayerNormalizationGrad": normalizations.lower_layer_norm_grad,
    "LeakyReluGrad": activations.lower_leaky_relu_grad,
    "LogSoftmaxGrad_13": activations.lower_log_softmax_grad,
    "MaxPoolGrad": pools.lower_max_pool_grad,
    "NegativeLogLikelihoodLoss": losses.lower_nll_loss,
    "QuickGelu": activations.lower_quick_gelu,
    "QuickGeluGrad": activations.lower_quick_gelu_grad,
    "ReluGrad": activations.lower_relu_grad,
    "Scale": shapes.lower_scale,
    "SigmoidGrad": activations.lower_sigmoid_grad,
    "SimplifiedLayerNormalization": normalizations.lower_rms_norm,
    "SimplifiedLayerNormalizationGrad": normalizations.lower_rms_norm_grad,
    "SinGrad": activations.lower_sin_grad,
    "SliceGrad": shapes.lower_slice_grad,
    "SoftmaxCrossEntropyLoss": losses.lower_cross_entropy,
    "SoftmaxCrossEntropyLossGrad": losses.lower_cross_entropy_grad,
    "SoftmaxGrad_13": activations.lower_softmax_grad,
    "SplitTraining": shapes.lower_split,
    "TanhGrad": activations.lower_tanh_grad,
    "Trilu": shapes.lower_trilu,
}
"""Maps an operator to the function that replaces it with standard operators."""

_MOST_READ = 32

_WITHOUT_KERNEL = frozenset({"NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"})
"""Standard operators for which mobile builds of ONNX Runtime have no kernel."""


def lower(graph: ir.Graph, *, defective: bool = False) -> None:
    """Replace, in place, all operators that standard ONNX Runtime or its mobile builds lack.

    Operators in the subgraph bodies of control-flow nodes are replaced as well.  If ``defective``
    is true, replace only the operators that :func:`is_defective` finds, because their kernels in
    onnxruntime-training 1.19.2 may fail.  The outputs of replaced nodes keep their names.  A
    dynamic batch size remains dynamic; other sizes are taken from the shapes that the graph
    declares, if it does.

    Raises:
        UnsupportedModel: an operator has no lowering, or its lowering needs an unknown shape.
    """
    _lower(graph, graph.opset_imports[""], defective=defective)


def _lower(graph: ir.Graph, opset: int, *, defective: bool) -> None:
    nodes = list(graph)
    with _reading_outputs(graph), count_constants():
        for node in nodes:
            for body in list_bodies(node):
                _lower(body, opset, defective=defective)
            if defective and node.op_type == "MaxPoolGrad" and not node.domain:
                _check_indices(graph, node)
            with attribute_errors_to(node, "looked up among standard operators", is_valid=True):
                if is_standard(node, opset) or (defective and not is_defective(node)):
                    continue
            _replace(node, _find_lowering(node))


def _check_indices(graph: ir.Graph, node: ir.Node) -> None:
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/checked")
    with attribute_errors_to(node, "given indices in its input", is_valid=True):
        for index, value in enumerate(pools.check_indices(builder, node)):
            node.replace_input_with(index, value)
        graph.insert_before(node, builder.nodes)


def _find_lowering(node: ir.Node) -> Lowering:
    lowering = LOWERINGS.get(node.op_type)
    if lowering is None:
        raise UnsupportedModel(
            describe_node(node),
            "it has no counterpart in standard operators",
            "choose the target training for the party that runs it",
        )
    return lowering


@contextmanager
def _reading_outputs(graph: ir.Graph) -> Iterator[None]:
    """Remove the outputs from the graph while nodes are replaced, and restore them afterwards.

    For each node that it removes, onnx-ir goes through all outputs of the graph, and there are as
    many outputs as gradients.  So nodes with at most 32 inputs hold the outputs meanwhile.
    """
    outputs = list(graph.outputs)
    readers = [
        ir.Node("", "Outputs", outputs[start : start + _MOST_READ], num_outputs=0, name="outputs")
        for start in range(0, len(outputs), _MOST_READ)
    ]
    graph.outputs.clear()
    graph.extend(readers)
    try:
        yield
    finally:
        outputs = [value for node in readers for value in node.inputs if value is not None]
        graph.remove(readers, safe=True)
        graph.outputs.extend(outputs)


def is_defective(node: ir.Node) -> bool:
    """Return whether the kernel of a node may fail in onnxruntime-training 1.19.2.

    AveragePoolGrad fails if the batch size is dynamic.  MaxPoolGrad writes outside its output if
    the graph does not declare all of its sizes.  ConvGrad with groups writes outside its
    output unless there are two spatial dimensions, because the kernel passes the size of all groups
    together to the function Col2imNd, which expects the size of one group.  This corrupts the heap:
    other values in the graph become wrong, or the process crashes.
    """
    if node.op_type == "ConvGrad":
        weights = node.inputs[2]
        rank = None if weights is None else known_rank(weights)
        return node.attributes.get_int("group", 1) > 1 and rank != 4
    if node.op_type == "MaxPoolGrad":
        return not pools.is_sized(node)
    return node.op_type == "AveragePoolGrad"


def is_standard(node: ir.Node, opset: int) -> bool:
    """Return whether every build of ONNX Runtime, including mobile builds, can run a node.

    ``opset`` is the opset of the node.
    """
    if node.domain not in ("", "ai.onnx") or node.op_type in _WITHOUT_KERNEL:
        return False
    return _has_schema(node.op_type, opset)


@lru_cache(maxsize=1 << 10)
def _has_schema(kind: str, opset: int) -> bool:
    try:
        onnx.defs.get_schema(kind, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def _replace(node: ir.Node, lowering: Lowering) -> None:
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/lowered")
    advice = "choose the target training for the party that runs it"
    lost = "cannot be written in standard operators"
    with attribute_errors_to(node, "lowered", lost, advice, is_valid=True):
        builder.replace(node, lowering(builder, node))
