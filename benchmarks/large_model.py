"""How long it takes, and how much memory, to cut a model of several gigabytes.

Makes a deep perceptron whose weights lie outside the model's file, cuts it with the command line
in a process of its own, and prints for each command the seconds and the peak of resident memory
(``ru_maxrss``: mapped pages of files count).  ``--shape wide`` makes one weight of over 2 GiB
instead of many.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH = 4096
CHUNK = 4 << 20
"""Elements that are drawn and written at a time."""


def write_model(folder: Path, sizes: Sequence[int]) -> Path:
    """Write a perceptron with layers of these sizes, its weights in one file beside it."""
    path, random = folder / "model.onnx", np.random.default_rng(0)
    noise = (random.standard_normal(CHUNK, np.float32) / 64).tobytes()
    weights, nodes, source = [], [], "x"
    with (folder / "model.onnx.data").open("wb") as file:
        for index, (width, size) in enumerate(pairwise(sizes)):
            start, length = file.tell(), 4 * width * size
            for begin in range(0, length, len(noise)):
                file.write(noise[: min(len(noise), length - begin)])
            weights.append(declare_external(f"w{index}", [width, size], start, length))
            nodes += [
                helper.make_node("MatMul", [source, f"w{index}"], [f"m{index}"], f"matmul{index}"),
                helper.make_node("Relu", [f"m{index}"], [f"r{index}"], f"relu{index}"),
            ]
            source = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", sizes[0]])],
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, ["N", sizes[-1]])],
        weights,
    )
    imports = [helper.make_opsetid("", 18)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    )
    return path


def declare_external(name: str, dims: Sequence[int], offset: int, length: int) -> TensorProto:
    """Declare a weight whose bytes lie in the file beside the model."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": "model.onnx.data", "offset": str(offset), "length": str(length)}
    tensor.external_data.extend(
        onnx.StringStringEntryProto(key=key, value=value) for key, value in entries.items()
    )
    return tensor


def measure(*arguments: str | Path) -> tuple[int, float, float]:
    """Run a command of splitonnx; return its exit code, seconds, and peak of memory in GB."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "splitonnx", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Make the model, run the commands, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--shape", choices=["deep", "wide"], default="deep")
    options = parser.parse_args()
    elements = int(options.gigabytes * 1e9 / 4)
    if options.shape == "deep":
        sizes = [WIDTH] * (1 + round(elements / WIDTH**2))
        cut = f"r{len(sizes) // 2}"
    else:
        sizes, cut = [64, WIDTH, elements // WIDTH, 8], "r0"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder, sizes)
        size = (folder / "model.onnx.data").stat().st_size
        print(f"{size / 1e9:.2f} GB in {len(sizes) - 1} weights")
        commands: list[tuple[str | Path, ...]] = [
            ("inspect", model),
            (
                "cut",
                model,
                "--at",
                cut,
                "--send-labels",
                "--loss",
                "mse",
                "-o",
                folder / "bundle",
            ),
            ("merge", folder / "bundle", "-o", folder / "trained.onnx"),
        ]
        print(f"{'command':10} {'exit':>4} {'seconds':>8} {'GB':>6}")
        for command in commands:
            code, seconds, memory = measure(*command)
            print(f"{command[0]:10} {code:4} {seconds:8.1f} {memory:6.2f}")


if __name__ == "__main__":
    main()
