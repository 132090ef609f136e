"""The zoo's models of images: convolutions, normalizations and pools."""

from __future__ import annotations

import numpy as np
import onnx

from tests.support.nets import FLOAT, Net


def _convolutional(*, training: bool, dropout: bool = False) -> onnx.ModelProto:
    net = Net()
    value = net.op("Conv", "x", net.weight("w1", 4, 2, 3, 3), out="c1", pads=[1, 1, 1, 1])
    value = net.op("Relu", net.batchnorm(value, 4, out="n1", training=training), out="r1")
    if dropout:
        value = net.dropout(value, 0.3, out="d1")
    skip = value
    value = net.op("Conv", value, net.weight("w2", 4, 4, 3, 3), out="c2", pads=[1, 1, 1, 1])
    value = net.batchnorm(value, 4, out="n2", training=training)
    value = net.op("Relu", net.op("Add", value, skip, out="sum"), out="r2")
    value = net.op("Flatten", net.op("GlobalAveragePool", value, out="pool"), out="flat")
    if dropout:
        value = net.dropout(value, 0.25, out="d2")
    output = net.op("Gemm", value, net.weight("w3", 3, 4), net.weight("b3", 3), out="y", transB=1)
    return net.finish({"x": (FLOAT, ["N", 2, 5, 5])}, output, 3)


def build_batchnorm_trained() -> onnx.ModelProto:
    """BatchNormalization that normalises by the batch, around a residual connection."""
    return _convolutional(training=True)


def build_batchnorm_frozen() -> onnx.ModelProto:
    """The same with running statistics, as exported for inference."""
    return _convolutional(training=False)


def build_dropout() -> onnx.ModelProto:
    """BatchNormalization and two Dropouts that are on."""
    return _convolutional(training=True, dropout=True)


def build_convolutions() -> onnx.ModelProto:
    """Strided, grouped, depthwise, dilated and asymmetrically padded convolutions."""
    net = Net()
    value = net.op(
        "Conv", "x", net.weight("w1", 4, 3, 3, 3), net.weight("b1", 4), out="strided",
        strides=[2, 2], pads=[1, 1, 1, 1],
    )  # fmt: skip
    value = net.op("Relu", value, out="r1")
    value = net.op(
        "Conv", value, net.weight("w2", 6, 2, 3, 3), out="grouped", group=2, pads=[1, 0, 1, 2]
    )
    value = net.op("Tanh", value, out="t2")
    value = net.op(
        "Conv", value, net.weight("w3", 6, 1, 3, 3), net.weight("b3", 6), out="depthwise",
        group=6, pads=[2, 2, 2, 2], dilations=[2, 2],
    )  # fmt: skip
    value = net.op("Relu", value, out="r3")
    value = net.op("Conv", value, net.weight("w4", 3, 6, 1, 1), out="pointwise", strides=[3, 2])
    value = net.op("Conv", value, net.weight("w5", 3, 3, 2, 2), out="same", auto_pad="SAME_UPPER")
    value = net.op("Flatten", value, out="flat")
    output = net.op("MatMul", value, net.weight("w6", 3 * 2 * 3, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 3, 9, 9])}, output, 3)


def build_wide_convolutions() -> onnx.ModelProto:
    """Convolutions with as many channels as run in blocks: from few, depthwise, dense, strided."""
    net = Net()
    value = net.op("Conv", "x", net.weight("w1", 16, 3, 3, 3), out="stem", pads=[1, 1, 1, 1])
    value = net.op("Relu", value, out="r1")
    value = net.op(
        "Conv", value, net.weight("w2", 16, 1, 3, 3), net.weight("b2", 16), out="depthwise",
        group=16, pads=[1, 1, 1, 1],
    )  # fmt: skip
    value = net.op("Conv", value, net.weight("w3", 32, 16, 1, 1), out="pointwise")
    value = net.op("Tanh", value, out="t3")
    skip = value
    value = net.op(
        "Conv", value, net.weight("w4", 32, 32, 3, 3), out="dense", pads=[2, 2, 2, 2],
        dilations=[2, 2],
    )  # fmt: skip
    value = net.op("Relu", net.op("Add", value, skip, out="sum"), out="r4")
    value = net.op(
        "Conv", value, net.weight("w5", 16, 32, 3, 3), net.weight("b5", 16), out="strided",
        strides=[2, 2], pads=[1, 0, 0, 1],
    )  # fmt: skip
    value = net.op("Flatten", net.op("GlobalAveragePool", value, out="pool"), out="flat")
    output = net.op("MatMul", value, net.weight("w6", 16, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 3, 6, 6])}, output, 3)


def build_pools() -> onnx.ModelProto:
    """Overlapping, padded and rounded-up pooling of both kinds."""
    net = Net()
    value = net.op("Conv", "x", net.weight("w1", 3, 2, 3, 3), out="c1", pads=[1, 1, 1, 1])
    value = net.op("Relu", value, out="r1")
    value = net.op(
        "MaxPool", value, out="max", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
    )
    value = net.op("Conv", value, net.weight("w2", 4, 3, 2, 2), out="c2")
    value = net.op(
        "AveragePool", value, out="mean", kernel_shape=[2, 3], strides=[1, 1], pads=[0, 1, 0, 1]
    )
    value = net.op("Tanh", value, out="t2")
    value = net.op(
        "AveragePool", value, out="padded", kernel_shape=[2, 2], strides=[2, 2],
        pads=[1, 1, 1, 1], count_include_pad=1,
    )  # fmt: skip
    value = net.op("Flatten", net.op("GlobalAveragePool", value, out="pool"), out="flat")
    output = net.op("MatMul", value, net.weight("w3", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 2, 9, 9])}, output, 3)


def build_upsampling() -> onnx.ModelProto:
    """What has no gradient of its own, as decoders have it: mirrored borders, images that grow."""
    net = Net()
    border = net.constant("border", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    value = net.op("Pad", "x", border, out="mirrored", mode="reflect")
    value = net.op("Conv", value, net.weight("w1", 4, 2, 3, 3), out="c1")
    value = net.op("Relu", value, out="r1")
    value = net.op(
        "ConvTranspose", value, net.weight("w2", 4, 3, 3, 3), net.weight("b2", 3), out="grown",
        strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1],
    )  # fmt: skip
    scales = net.constant("scales", np.array([1, 1, 1.5, 2], np.float32))
    value = net.op("Resize", value, "", scales, out="resized", mode="linear")
    value = net.op("GlobalMaxPool", net.op("Tanh", value, out="t2"), out="pool")
    output = net.op("MatMul", net.op("Flatten", value, out="flat"), net.weight("w3", 3, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 2, 6, 6])}, output, 3)
