"""Differentiate a model with onnxruntime-training, which is called through :mod:`natives`.

This module does not depend on cuts.  Ports, the Identity nodes that mark where the parties exchange
tensors, are treated like any other Identity node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from splitonnx.errors import NotDifferentiable
from splitonnx.partitioner.differentiation.derived.derivations import ADVICE, add_gradients
from splitonnx.partitioner.differentiation.scans.scans import supply_gradients
from splitonnx.partitioner.graphs.builders import DIFFERENTIABLE
from splitonnx.partitioner.graphs.traversals import find_moving, is_float, list_inputs, walk_back
from splitonnx.partitioner.inference.control_flows import KEPT

WITHOUT_GRADIENT = frozenset(
    [
        "Acos",
        "Acosh",
        "AffineGrid",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BlackmanWindow",
        "Celu",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "ConvTranspose",
        "Cosh",
        "CumSum",
        "DFT",
        "DeformConv",
        "DepthToSpace",
        "DequantizeLinear",
        "Det",
        "Einsum",
        "Elu",
        "GRU",
        "GlobalLpPool",
        "GlobalMaxPool",
        "GridSample",
        "GroupNormalization",
        "HardSigmoid",
        "HardSwish",
        "Hardmax",
        "If",
        "InstanceNormalization",
        "LRN",
        "LSTM",
        "Loop",
        "LpNormalization",
        "LpPool",
        "MaxRoiPool",
        "MaxUnpool",
        "Mean",
        "MeanVarianceNormalization",
        "Mish",
        "Mod",
        "NegativeLogLikelihoodLoss",
        "Optional",
        "OptionalGetElement",
        "PRelu",
        "QuantizeLinear",
        "RNN",
        "ReduceL1",
        "ReduceLogSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceSumSquare",
        "Resize",
        "ReverseSequence",
        "RoiAlign",
        "Round",
        "STFT",
        "Scan",
        "Selu",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceErase",
        "SequenceInsert",
        "SequenceMap",
        "Shrink",
        "Sinh",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "SplitToSequence",
        "Sum",
        "Tan",
        "ThresholdedRelu",
        "Upsample",
    ]
)
"""Operators for which onnxruntime-training 1.19.2 has no gradient or no gradient kernel.

On an ``If`` its gradient builder aborts the process.
"""


def list_undifferentiable(
    graph: ir.Graph, parameters: Sequence[str], loss: str
) -> Iterator[NotDifferentiable]:
    """Yield an error for each node that is between a parameter and the loss but has no gradient.

    Call this before running the gradient builder, which aborts the process on some of these nodes.
    """
    trained = set(parameters)
    moving = find_moving(graph, [v for v in graph.inputs if v.name in trained])
    ends = [value for value in graph.outputs if value.name == loss]
    needed, _ = walk_back(ends)
    for node in graph:
        if node not in needed or node.op_type not in WITHOUT_GRADIENT or node.domain:
            continue
        if DIFFERENTIABLE in node.metadata_props:
            continue
        if any(v in moving and is_float(v) for v in list_inputs(node)):
            reason = node.metadata_props.get(KEPT)
            link = "; otherwise " if "--" in (reason or "") else ": "  # an option settles it
            advice = f"{reason}{link}{ADVICE}" if reason else ADVICE
            yield NotDifferentiable(node.name or "", node.op_type, advice)


def differentiate(model: ir.Model, parameters: Sequence[str], loss: str) -> ir.Model:
    """Return the joint graph: ``model`` extended by the gradients of ``loss``.

    The parameters must be graph inputs.  For each parameter, the result has an additional output
    ``<name>_grad``.  The result may contain ONNX Runtime's own operators: training-mode
    BatchNormalization becomes BatchNormInternal, and some patterns (GELU, LayerNormalization) are
    fused into one node.

    Raises:
        NotDifferentiable: an operator has no gradient.
        UnsupportedModel: the builder refuses the model for another reason.
        MissingExtra, WrongRuntime: onnxruntime-training is not installed.
    """
    for fault in list_undifferentiable(model.graph, parameters, loss):
        raise fault
    supplied = supply_gradients(model, parameters, loss)
    return add_gradients(model, parameters, [], supplied, loss=loss)
