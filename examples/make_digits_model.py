"""Write ``digits.onnx``: a small residual network for 8x8 images of handwritten digits.

    python examples/make_digits_model.py [PATH]

It is what an exporter in training mode writes: BatchNormalization on batch statistics with its
running ones as outputs, Dropout switched on, untrained weights.  The same bytes come out each
time.  The script knows onnx alone; the model in the repository was made by it.

    block1   conv 1->24, norm, relu                            (N, 24, 8, 8)
    block2   conv, norm, relu, conv, norm, + block1, relu      (N, 24, 8, 8)
    block3   max-pool, conv 24->48, norm, relu, max-pool       (N, 48, 2, 2)
    head     flatten, dropout, linear 192->10                  (N, 10)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

OPSET, IR_VERSION = 18, 10
CLASSES = 10
WIDTH = 24
DROPOUT_RATIO = 0.25
MOMENTUM = 0.9
"""Of BatchNormalization: the share of a running statistic that a step keeps."""


class Network:
    """A graph that grows node by node; names are those of torch's exporter."""

    def __init__(self, seed: int) -> None:
        # RandomState's stream is frozen for good, and uniform draws need no platform's logarithm.
        self._random = np.random.RandomState(seed)
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []

    def add(
        self,
        name: str,
        *inputs: str,
        outputs: int = 1,
        **attributes: int | float | list[int],
    ) -> str:
        """Append the node ``/block/Operator`` and return its first output's name."""
        operator = name.rsplit("/", 1)[1].split("_")[0]
        results = [f"{name}_output_{index}" for index in range(outputs)]
        node = helper.make_node(operator, list(inputs), results, name)
        node.attribute.extend(helper.make_attribute(*item) for item in attributes.items())
        self.nodes.append(node)
        return results[0]

    def keep(self, name: str, array: np.ndarray) -> str:
        """Add an initializer and return its name."""
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def fill(self, name: str, value: float, *shape: int) -> str:
        """Add an initializer of one value."""
        return self.keep(name, np.full(shape, value, np.float32))

    def draw(self, name: str, *shape: int) -> str:
        """Add a weight of He's initialization, uniform (arXiv 1502.01852)."""
        bound = np.sqrt(6 / np.prod(shape[1:]))  # a variance of 2 / fan-in
        return self.keep(name, self._random.uniform(-bound, bound, shape).astype(np.float32))

    def convolve(self, x: str, block: str, layer: int, inputs: int, outputs: int) -> str:
        """Add a 3x3 convolution without bias and its BatchNormalization."""
        weight = self.draw(f"{block}.conv{layer}.weight", outputs, inputs, 3, 3)
        x = self.add(f"/{block}/conv{layer}/Conv", x, weight, kernel_shape=[3, 3], pads=[1] * 4)
        norm = f"{block}.norm{layer}"
        return self.add(
            f"/{block}/norm{layer}/BatchNormalization",
            x,
            self.fill(f"{norm}.weight", 1, outputs),
            self.fill(f"{norm}.bias", 0, outputs),
            self.fill(f"{norm}.running_mean", 0, outputs),
            self.fill(f"{norm}.running_var", 1, outputs),
            outputs=3,
            momentum=MOMENTUM,
            training_mode=1,
        )


def make_model(seed: int = 0) -> ModelProto:
    """Make the network: "image" F32 (N, 1, 8, 8) to "logits" F32 (N, 10)."""
    net = Network(seed)
    x = skip = net.add("/block1/Relu", net.convolve("image", "block1", 1, 1, WIDTH))
    x = net.add("/block2/Relu", net.convolve(x, "block2", 1, WIDTH, WIDTH))
    x = net.add("/block2/Add", net.convolve(x, "block2", 2, WIDTH, WIDTH), skip)
    x = net.add("/block2/Relu_1", x)
    x = net.add("/block3/MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.add("/block3/Relu", net.convolve(x, "block3", 1, WIDTH, 2 * WIDTH))
    x = net.add("/block3/MaxPool_1", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.add("/head/Flatten", x)
    ratio = net.fill("head.dropout.ratio", DROPOUT_RATIO)
    mode = net.keep("head.dropout.training_mode", np.array(True))
    x = net.add("/head/dropout/Dropout", x, ratio, mode)
    weight = net.draw("head.linear.weight", CLASSES, 2 * WIDTH * 2 * 2)
    net.add("/head/linear/Gemm", x, weight, net.fill("head.linear.bias", 0, CLASSES), transB=1)
    net.nodes[-1].output[0] = "logits"

    graph = helper.make_graph(
        net.nodes,
        "digits",
        [_declare("image", "N", 1, 8, 8)],
        [_declare("logits", "N", CLASSES)],
        net.weights,
    )
    model = helper.make_model(
        graph,
        producer_name="splitonnx-examples",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    checker.check_model(model, full_check=True)
    return model


def _declare(name: str, *shape: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def main() -> None:
    """Write the model to the path given, or beside this script."""
    default = Path(__file__).with_name("digits.onnx")
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    path.write_bytes(make_model().SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
