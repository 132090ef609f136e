"""What splitting costs: a ResNet-18's split step against its unsplit step, in one run.

CIFAR's shape (3x32x32), batch 32, width 64, cut after the first stage; client and server are two
processes on loopback that share the machine's cores, the unsplit step runs in the client's
process.  Steps alternate, so that a drifting machine strikes both alike; the ratio is the median
of the pairs' ratios.  Weights and data are random: time does not depend on them.

    python benchmarks/resnet_step.py [--pairs 15] [--width 64] [--tail]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.clients import Client

BATCH = 32


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


def build_resnet18(width: int) -> onnx.ModelProto:
    """ResNet-18 (arXiv 1512.03385) for 32x32 images; stage ``i`` ends in ``stage<i>``."""
    net = _Network()
    value = net.add("stem", "Relu", net.convolve("conv0", "x", (3, width), 3, 1))
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        for block in range(2):
            name = f"s{stage}b{block}"
            stride = 2 if stage and not block else 1
            inner = net.convolve(f"{name}c1", value, (inputs, outputs), 3, stride)
            inner = net.add(f"{name}r1", "Relu", inner)
            inner = net.convolve(f"{name}c2", inner, (outputs, outputs), 3, 1)
            if inputs != outputs:
                value = net.convolve(f"{name}skip", value, (inputs, outputs), 1, stride)
            end = f"stage{stage}" if block else f"{name}r2"
            value = net.add(end, "Relu", net.add(f"{name}sum", "Add", inner, value))
            inputs = outputs
    value = net.add("flat", "Flatten", net.add("pool", "GlobalAveragePool", value))
    net.add("logits", "Gemm", value, net.draw("fc", 10, inputs), net.draw("fcb", 10), transB=1)
    graph = helper.make_graph(
        net.nodes,
        "resnet18",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder from a process of its own."""
    command = [sys.executable, "-m", "splitonnx", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield "ws://" + process.stderr.readline().split("ws://")[1].split(",")[0].strip()
        finally:
            process.terminate()
            process.communicate()


def measure(step: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps that count")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--tail", action="store_true", help="U-shaped: labels on the client")
    options = parser.parse_args()
    model = build_resnet18(options.width)
    random = np.random.default_rng(1)
    batch: dict[str, np.ndarray] = {
        "x": random.standard_normal((BATCH, 3, 32, 32), np.float32),
        "labels": random.integers(0, 10, BATCH),
    }
    bundle = cut(model, at="stage0", tail_at="pool" if options.tail else ())
    whole = cut(model, at=None).client
    with tempfile.TemporaryDirectory() as folder:
        bundle.save(Path(folder, "bundle"))
        with (
            serve(Path(folder, "bundle/server")) as url,
            Client(bundle.client, url) as split,
            Client(whole) as unsplit,
        ):
            for _ in range(2):
                split.step(batch), unsplit.step(batch)
            pairs = [
                (measure(lambda: split.step(batch)), measure(lambda: unsplit.step(batch)))
                for _ in range(options.pairs)
            ]
    times = np.array(pairs)
    ratios = times[:, 0] / times[:, 1]
    for name, column in (("split", times[:, 0]), ("unsplit", times[:, 1])):
        low, middle, high = np.percentile(column, [0, 50, 100]) * 1000
        print(f"{name:8} step  {middle:7.0f} ms  ({low:.0f} to {high:.0f})")
    print(
        f"split / unsplit  {np.median(ratios):.3f}  ({ratios.min():.3f} to {ratios.max():.3f}, "
        f"median of {options.pairs} pairs)"
    )


if __name__ == "__main__":
    main()
