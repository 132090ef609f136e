/**
 * The operators of a bundle's graphs; the gate refuses every other.
 *
 * Written by `python -m tests.support.typescript_tables`; a test checks that it is fresh.
 */

export const STANDARD_DOMAINS: readonly string[] = ["", "ai.onnx"];
export const TRAINING_DOMAIN = "com.microsoft";

/** Of the standard operators. */
export const HIGHEST_OPSET = 21;
export const HIGHEST_TRAINING_OPSET = 1;
export const HIGHEST_IR_VERSION = 10;

/** All that ONNX ever had in its own domain, up to the highest opset. */
export const STANDARD_OPERATORS: ReadonlySet<string> = new Set(
  `
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool
    BatchNormalization Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow
    Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Compress Concat ConcatFromSequence Constant
    ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DFT DeformConv DepthToSpace
    DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow
    HardSigmoid HardSwish Hardmax Identity If ImageDecoder InstanceNormalization IsInf IsNaN LRN
    LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool
    MatMul MatMulInteger Max MaxPool MaxRoiPool MaxUnpool Mean MeanVarianceNormalization
    MelWeightMatrix Min Mish Mod Mul Multinomial Neg NegativeLogLikelihoodLoss NonMaxSuppression
    NonZero Not OneHot Optional OptionalGetElement OptionalHasElement Or PRelu Pad Pow QLinearConv
    QLinearMatMul QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare RegexFullMatch Relu Reshape Resize ReverseSequence
    RoiAlign Round STFT Scan Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct
    SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap Shape Shrink Sigmoid Sign
    Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split
    SplitToSequence Sqrt Squeeze StringConcat StringNormalizer StringSplit Sub Sum Tan Tanh
    TfIdfVectorizer ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Upsample Where Xor
  `
    .trim()
    .split(/\s+/),
);

/** What the gradient builder of onnxruntime-training makes; some of it is in ONNX's domain. */
export const TRAINING_OPERATORS: ReadonlySet<string> = new Set(
  `
    AveragePoolGrad BatchNormInternal BatchNormalizationGrad BroadcastGradientArgs ConcatTraining
    ConvGrad DivGrad FastGelu FastGeluGrad FusedMatMul GatherElementsGrad GatherGrad GatherNDGrad
    Gelu GeluGrad LayerNormalizationGrad LeakyReluGrad LogSoftmaxGrad_13 MaxPoolGrad QuickGelu
    QuickGeluGrad ReluGrad Scale SigmoidGrad SimplifiedLayerNormalization
    SimplifiedLayerNormalizationGrad SinGrad SliceGrad SoftmaxCrossEntropyLossGrad SoftmaxGrad_13
    SplitTraining TanhGrad Trilu
  `
    .trim()
    .split(/\s+/),
);

/** Attributes whose numbers below 1 ONNX Runtime divides by. */
export const WINDOWS: readonly string[] = ["dilations", "kernel_shape", "strides"];
/** Attributes whose numbers may lead it beyond its shapes. */
export const AXES: readonly string[] = ["axes", "axis", "batch_axis", "time_axis"];
/** Attributes that name an element type. */
export const KINDS: readonly string[] = ["dtype", "output_datatype", "output_dtype", "softmax_precision", "stash_type", "to"];
/** Of an Einsum; with another one, onnx's inference may search without end. */
export const EQUATION = /^(?:[A-Za-z, ]|\.\.\.)*(?:->(?:[A-Za-z ]|\.\.\.)*)?$/;
