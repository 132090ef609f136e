"""The operators that the graphs of a bundle may contain.

``cut`` writes no other operators, and the runtimes do not run any others.  ONNX Runtime has
hundreds more, and some of them call Python, load libraries or connect to other machines.  Tests
compare these lists with those of the onnx package and the partitioner.
"""

from __future__ import annotations

import re

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
TRAINING_DOMAIN = "com.microsoft"
DOMAINS = STANDARD_DOMAINS | {TRAINING_DOMAIN}

HIGHEST_OPSET = 21
"""The highest opset of the standard operators that onnxruntime-training 1.19.2 accepts."""
HIGHEST_TRAINING_OPSET = 1
HIGHEST_IR_VERSION = 10

_STANDARD = """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool
    BatchNormalization Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
    BlackmanWindow Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Compress Concat
    ConcatFromSequence Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum
    DFT DeformConv DepthToSpace DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum
    Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If
    ImageDecoder InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool
    MaxRoiPool MaxUnpool Mean MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul
    Multinomial Neg NegativeLogLikelihoodLoss NonMaxSuppression NonZero Not OneHot Optional
    OptionalGetElement OptionalHasElement Or PRelu Pad Pow QLinearConv QLinearMatMul
    QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare RegexFullMatch Relu Reshape Resize ReverseSequence
    RoiAlign Round STFT Scan Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct
    SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap Shape Shrink Sigmoid
    Sign Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth
    Split SplitToSequence Sqrt Squeeze StringConcat StringNormalizer StringSplit Sub Sum Tan
    Tanh TfIdfVectorizer ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Upsample
    Where Xor
"""
STANDARD_OPERATORS = frozenset(_STANDARD.split())
"""All operators that were ever in ONNX's default domain, up to the highest opset."""

_TRAINING = """
    AveragePoolGrad BatchNormInternal BatchNormalizationGrad BroadcastGradientArgs ConcatTraining
    ConvGrad DivGrad FastGelu FastGeluGrad FusedMatMul GatherElementsGrad GatherGrad GatherNDGrad
    Gelu GeluGrad LayerNormalizationGrad LeakyReluGrad LogSoftmaxGrad_13 MaxPoolGrad QuickGelu
    QuickGeluGrad ReluGrad Scale SigmoidGrad SimplifiedLayerNormalization
    SimplifiedLayerNormalizationGrad SinGrad SliceGrad SoftmaxCrossEntropyLossGrad SoftmaxGrad_13
    SplitTraining TanhGrad Trilu
"""
TRAINING_OPERATORS = frozenset(_TRAINING.split())
"""Operators that onnxruntime-training's gradient builder creates; some are in ONNX's domain."""

_CONTRIBUTED = "FastGelu FusedMatMul Gelu QuickGelu SimplifiedLayerNormalization Trilu"
TRAINING_ONLY = TRAINING_OPERATORS - frozenset(_CONTRIBUTED.split())
"""The training operators that only onnxruntime-training can run."""


def is_known(operator: str, domain: str) -> bool:
    """Return whether the given operator is allowed in a bundle's graph."""
    if operator in TRAINING_OPERATORS:
        return domain in DOMAINS
    return is_standard(operator, domain)


def is_standard(operator: str, domain: str) -> bool:
    """Return whether an operator is defined by the ONNX standard.

    A part that was cut for the target ``portable`` contains no other operators.
    """
    return operator in STANDARD_OPERATORS and domain in STANDARD_DOMAINS


WINDOWS = frozenset({"dilations", "kernel_shape", "strides"})
"""Attributes that ONNX Runtime divides by, so that numbers below 1 crash the process."""
AXES = frozenset({"axes", "axis", "batch_axis", "time_axis"})
"""Attributes that name an axis; if no tensor has such an axis, ONNX Runtime reads out of bounds."""
KINDS = frozenset(
    {"dtype", "output_datatype", "output_dtype", "softmax_precision", "stash_type", "to"}
)
"""Attributes that name an element type."""
SCAN, SEQUENCES = "Scan", "num_scan_inputs"
"""The operator, and its attribute that says how many of its inputs are sequences."""
EINSUM = "Einsum"
EQUATION = re.compile(rb"(?:[A-Za-z, ]|\.\.\.)*(?:->(?:[A-Za-z ]|\.\.\.)*)?")
"""The pattern of a valid Einsum equation; onnx's shape inference may loop forever on others."""
