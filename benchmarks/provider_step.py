"""What an execution provider gives: an unsplit step on it against one on the CPU, in one process.

The parts are cut here, with the target portable, and run by the python of an environment that has
the provider's build of ONNX Runtime, which holds no onnx.  Steps alternate, so that a drifting
machine strikes both alike; the ratio is the median of the pairs' ratios.  Weights and data are
random: time does not depend on them.

    python benchmarks/provider_step.py PYTHON PROVIDER [--pairs 15] [--threads 2]

For example with ``.venv/tools/openvino/bin/python openvino``, after ``make test-openvino``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from splitonnx.runtime.client.clients import Client

if TYPE_CHECKING:
    import onnx

ROOT = Path(__file__).parent.parent
NETWORKS = ("MLP 784-1024-1024-10", "ResNet-18, width 16")
BATCH = 32


def cut_network(number: int, folder: Path) -> None:
    """Write a network, left whole, and a batch for it."""
    from resnets import build_resnet18

    from splitonnx.partitioner.partitions import cut

    random = np.random.default_rng(1)
    shape = (3, 32, 32) if number else (784,)
    model = build_resnet18(16) if number else build_mlp()
    cut(model, at=None, client_target="portable").save(folder / "bundle")
    np.savez(
        folder / "data.npz",
        x=random.standard_normal((BATCH, *shape), np.float32),
        labels=random.integers(0, 10, BATCH),
    )


def build_mlp() -> onnx.ModelProto:
    """A perceptron with two hidden layers of 1024."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    sizes = (784, 1024, 1024, 10)
    for index, (one, other) in enumerate(pairwise(sizes)):
        drawn = random.standard_normal((one, other), np.float32) / np.sqrt(one, dtype=np.float32)
        weights.append(numpy_helper.from_array(drawn, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [f"m{index}"]))
        value = f"m{index}"
        if index < 2:
            nodes.append(helper.make_node("Relu", [value], [f"r{index}"]))
            value = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 784])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", 10])],
        weights,
    )
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, ir_version=8, opset_imports=[opset])


def compare(folder: Path, provider: str, *, pairs: int, threads: int) -> None:
    """Time steps on the CPU and on a provider, and print a row of the table."""
    data = dict(np.load(folder / "data.npz"))
    clients = [
        Client(folder / "bundle" / "client", threads=threads, provider=name)
        for name in ("cpu", provider)
    ]
    times = np.zeros((pairs, 2))
    for row in range(-3, pairs):  # the first ones are warming up
        for column, client in enumerate(clients):
            begun = time.perf_counter()
            client.step(data)
            if row >= 0:
                times[row, column] = time.perf_counter() - begun
    (cpu, other), ratio = np.median(times, axis=0) * 1e3, np.median(times[:, 1] / times[:, 0])
    placement = clients[1].placement
    print(
        f"cpu {cpu:.1f} ms, {provider} {other:.1f} ms, {ratio:.2f} times; "
        f"{'' if placement is None else placement.describe()}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("python", type=Path, help="the python of the provider's environment")
    parser.add_argument("provider", help="the provider, such as openvino")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps that count")
    parser.add_argument("--threads", type=int, default=2, help="threads of one operator")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        pairs, threads = options.pairs, options.threads
        compare(options.folder, options.provider, pairs=pairs, threads=threads)
        return
    for number, name in enumerate(NETWORKS):
        with tempfile.TemporaryDirectory() as folder:
            cut_network(number, Path(folder))
            print(f"{name}, batch {BATCH}, {options.threads} threads: ", end="", flush=True)
            given = ["--folder", folder, "--pairs", str(options.pairs)]
            given += ["--threads", str(options.threads)]
            subprocess.run(
                [options.python, __file__, options.python, options.provider, *given],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=True,
            )


if __name__ == "__main__":
    main()
