"""Residual networks (arXiv 1512.03385) in ONNX, and a server for them: what benchmarks share.

Weights are random: time does not depend on them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks of each stage, by the network's depth."""
BOTTLENECK = 50
"""The depth from which a block is a bottleneck: 1x1, 3x3 and 1x1, the last four times as wide."""


class _Network:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def add(self, name: str, kind: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def keep(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def draw(self, name: str, *shape: int) -> str:
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        return self.keep(name, self._random.standard_normal(shape) * deviation)

    def convolve(
        self, name: str, source: str, channels: tuple[int, int], kernel: int, stride: int
    ) -> str:
        """Convolution and BatchNormalization in training mode."""
        inputs, outputs = channels
        weight = self.draw(f"{name}.weight", outputs, inputs, kernel, kernel)
        value = self.add(
            f"{name}.conv", "Conv", source, weight,
            strides=[stride, stride], pads=[kernel // 2] * 4,
        )  # fmt: skip
        norm = [
            self.keep(f"{name}.{part}", np.full(outputs, start))
            for part, start in (("scale", 1), ("bias", 0), ("mean", 0), ("var", 1))
        ]
        running = [f"{name}.mean_next", f"{name}.var_next"]
        self.nodes.append(
            helper.make_node(
                "BatchNormalization", [value, *norm], [f"{name}.norm", *running],
                name=f"{name}.norm", training_mode=1,
            )
        )  # fmt: skip
        return f"{name}.norm"

    def block(
        self, name: str, value: str, channels: tuple[int, int], stride: int, end: str
    ) -> tuple[str, int]:
        """Add a basic block of two convolutions; return where it ends and its channels."""
        inputs, outputs = channels
        inner = self.convolve(f"{name}c1", value, (inputs, outputs), 3, stride)
        inner = self.add(f"{name}r1", "Relu", inner)
        inner = self.convolve(f"{name}c2", inner, (outputs, outputs), 3, 1)
        return self._join(name, value, inner, (inputs, outputs), stride, end)

    def bottleneck(
        self, name: str, value: str, channels: tuple[int, int], stride: int, end: str
    ) -> tuple[str, int]:
        """Add a bottleneck of three convolutions, the stride in the middle one."""
        inputs, inside = channels
        outputs = 4 * inside
        inner = self.convolve(f"{name}c1", value, (inputs, inside), 1, 1)
        inner = self.add(f"{name}r1", "Relu", inner)
        inner = self.convolve(f"{name}c2", inner, (inside, inside), 3, stride)
        inner = self.add(f"{name}r2", "Relu", inner)
        inner = self.convolve(f"{name}c3", inner, (inside, outputs), 1, 1)
        return self._join(name, value, inner, (inputs, outputs), stride, end)

    def _join(
        self,
        name: str,
        value: str,
        inner: str,
        channels: tuple[int, int],
        stride: int,
        end: str,
    ) -> tuple[str, int]:
        if channels[0] != channels[1]:
            value = self.convolve(f"{name}skip", value, channels, 1, stride)
        return self.add(end, "Relu", self.add(f"{name}sum", "Add", inner, value)), channels[1]


def build_resnet18(width: int) -> onnx.ModelProto:
    """ResNet-18 for 32x32 images; stage ``i`` ends in ``stage<i>``."""
    net = _Network()
    net.add("stem", "Relu", net.convolve("conv0", "x", (3, width), 3, 1))
    return _finish(net, "stem", depth=18, width=width, side=32)


def build_resnet(depth: int, *, width: int = 64, side: int = 224) -> onnx.ModelProto:
    """Build the network of a ``depth`` in ``BLOCKS`` as for ImageNet, with ten classes.

    Its first layers, a 7x7 convolution and a pooling, end in ``stem``; stage ``i`` ends in
    ``stage<i>``.
    """
    net = _Network()
    value = net.add("relu0", "Relu", net.convolve("conv0", "x", (3, width), 7, 2))
    net.add("stem", "MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    return _finish(net, "stem", depth=depth, width=width, side=side)


def _finish(net: _Network, value: str, *, depth: int, width: int, side: int) -> onnx.ModelProto:
    """Add the four stages and the classifier, and make the model."""
    add_block = net.block if depth < BOTTLENECK else net.bottleneck
    inputs = width
    for stage, blocks in enumerate(BLOCKS[depth]):
        for block in range(blocks):
            name = f"s{stage}b{block}"
            end = f"stage{stage}" if block == blocks - 1 else f"{name}end"
            stride = 2 if stage and not block else 1
            value, inputs = add_block(name, value, (inputs, width * 2**stage), stride, end)
    value = net.add("flat", "Flatten", net.add("pool", "GlobalAveragePool", value))
    net.add("logits", "Gemm", value, net.draw("fc", 10, inputs), net.draw("fcb", 10), transB=1)
    graph = helper.make_graph(
        net.nodes,
        f"resnet{depth}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@contextmanager
def serve(folder: Path, *, threads: int | None = None) -> Iterator[str]:
    """Serve a folder from a process of its own, an operator in so many threads."""
    with start_server(folder, *([] if threads is None else ["--threads", str(threads)])) as server:
        yield server[1]


@contextmanager
def start_server(folder: Path, *options: str) -> Iterator[tuple[int, str]]:
    """Serve a folder from a process of its own; its number and its address."""
    command = [sys.executable, "-m", "splitonnx", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            yield process.pid, "ws://" + line.split("ws://")[1].split(",")[0].strip()
        finally:
            process.terminate()
            process.communicate()
