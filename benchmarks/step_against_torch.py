"""An unsplit training step against PyTorch's: forward, backward and AdamW, in turns in one process.

For each network, the script prints the medians, and the median of the ratios of neighbouring steps,
for the targets ``training`` and ``portable``; it exits with 1 if a ratio is above what is wanted,
for ``portable`` above 1.1 times that.  It takes PyTorch: run it in the environment of
``make test-torch``, on a quiet machine.

With ``--bundles FOLDER``, bundles are kept there and taken from there the next time.  So they can
be measured on another ONNX Runtime, in an environment without the partitioner: on the stock build
only ``portable`` is measured.

    python benchmarks/step_against_torch.py [--threads 1] [--seconds 15] [--bundles FOLDER]
        [NETWORK ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch_networks import NETWORKS, Entry

from splitonnx.bundles import PartyBundle
from splitonnx.names import PORTABLE, TRAINING, Target
from splitonnx.optimizers import AdamW
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.builds.installed import installed_runtime

WARM, LEAST, RATE = 3, 5, 1e-3
PORTABLE_MORE = 1.1


def export(network: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    """Write the network as an ONNX model in training mode, with a free batch size."""
    warnings.filterwarnings("ignore")
    torch.onnx.export(
        network, (x,), str(path),
        training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False, opset_version=17,
        input_names=["x"], output_names=["scores"], dynamo=False,
        dynamic_axes={"x": {0: "N"}, "scores": {0: "N"}},
    )  # fmt: skip


def make_torch_step(
    network: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor
) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, foreach=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def measure(steps: Sequence[Callable[[], float]], seconds: float) -> np.ndarray:
    """Make the steps in turns; return their times in seconds, a row for each turn."""
    for _ in range(WARM):
        for step in steps:
            step()
    times: list[list[float]] = []
    end = time.monotonic() + seconds
    while len(times) < LEAST or time.monotonic() < end:
        row = []
        for step in steps:
            start = time.perf_counter()
            step()
            row.append(time.perf_counter() - start)
        times.append(row)
    return np.array(times)


def open_bundle(folder: Path, network: torch.nn.Module, x: torch.Tensor, target: Target) -> Path:
    """Return the client's folder of an unsplit bundle; cut it if it is not there."""
    kept = folder / target
    if not kept.exists():
        from splitonnx.partitioner.partitions import cut

        path = folder / "model.onnx"
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            export(network, x, path)
        cut(path, at=None, optimizer=AdamW(lr=RATE), client_target=target).save(kept)
    return kept / "client"


def compare(name: str, entry: Entry, threads: int, seconds: float, folder: Path) -> bool:
    """Measure one network and print its line; return whether the ratios are as wanted."""
    torch.manual_seed(0)
    network = entry.make().train()
    x, labels = entry.draw()
    batch: dict[str, np.ndarray] = {"x": x.numpy(), "labels": labels.numpy()}
    steps = [make_torch_step(network, x, labels)]
    targets: list[Target] = [TRAINING, PORTABLE] if installed_runtime().training else [PORTABLE]
    for target in targets:
        party = PartyBundle.load(open_bundle(folder / name, network, x, target))
        client = Client(party, threads=threads)
        steps.append(lambda client=client: float(client.step(batch)["loss"]))  # type: ignore[misc]
    first = [step() for step in steps]
    times = measure(steps, seconds)
    medians = np.median(times, axis=0) * 1000
    ratios = [float(np.median(times[:, column] / times[:, 0])) for column in range(1, len(steps))]
    shown = [
        f"{target} {own:7.1f} ms ({ratio:.2f})"
        for target, own, ratio in zip(targets, medians[1:], ratios, strict=True)
    ]
    print(
        f"{name:13} torch {medians[0]:7.1f} ms, {', '.join(shown)}, wanted {entry.most:.2f}; "
        f"{len(times)} turns; first losses {', '.join(f'{loss:.5f}' for loss in first)}",
        flush=True,
    )
    limits = {TRAINING: entry.most, PORTABLE: PORTABLE_MORE * entry.most}
    return all(ratio <= limits[target] for target, ratio in zip(targets, ratios, strict=True))


def main() -> int:
    """Read the options and measure each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--bundles", type=Path, help="a folder in which bundles are kept")
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS], default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"threads {options.threads}, torch {torch.__version__}, {installed_runtime()}", flush=True
    )
    names = options.networks or list(NETWORKS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.bundles or Path(temporary)
        good = [compare(n, NETWORKS[n], options.threads, options.seconds, folder) for n in names]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
