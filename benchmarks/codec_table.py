"""What each codec saves and costs: bytes and time of a step, and the accuracy that is reached.

The demo's digits are trained U-shaped, client and server in one process with one thread each, once
for each seed and codec.  Bytes are those of the tensors of one step of 32 digits, both ways, as
the manifest declares them; the ratio is to ``fp32``.  Seconds are the median over the steps
of all seeds, without any network.  Accuracy is that of the 360 digits held out, after the epochs
given; its difference to ``fp32`` is over the means of the seeds.

Exit code 1 if ``int8`` sends less than 3.9 times fewer bytes, or loses more than 0.5 points.

    python benchmarks/codec_table.py [--seeds 5] [--epochs 12] [--codecs fp32 int8 ...]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from sklearn.datasets import load_digits

from splitonnx import Adam, Bundle, cut
from splitonnx.disclosures import list_sent
from splitonnx.names import CLIENT, SERVER, TRAIN
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory

MODEL = Path(__file__).resolve().parents[1] / "examples" / "digits.onnx"
HEAD_ENDS, TAIL_BEGINS = "/block1/Relu_output_0", "/block3/MaxPool_1_output_0"
BATCH, HELD_OUT = 32, 360
CODECS = ("fp32", "fp16", "bf16", "int8", "fwd=int8,bwd=bf16", "int4", "topk=0.1", "randtopk=0.1")
LEAST_RATIO, MOST_LOST = 3.9, 0.005


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of one codec, by seed where it was trained."""

    codec: str
    bytes: int
    seconds: float
    accuracies: tuple[float, ...]


def make_bundle(codec: str) -> Bundle:
    """Cut the digits' network U-shaped, with a codec."""
    return cut(
        MODEL,
        at=HEAD_ENDS,
        tail_at=TAIL_BEGINS,
        optimizer=Adam(lr=1e-3),
        check=False,
        wire=codec,
    )


def count_bytes(bundle: Bundle) -> int:
    """Count the bytes of the tensors of a step, in both directions."""
    sizes = [list_sent(bundle.client.manifest, TRAIN, s, BATCH).bytes for s in (CLIENT, SERVER)]
    return sum(size or 0 for size in sizes)


def load_halves() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the digits to train with, and those held out."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    data = {
        "image": (images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8),
        "labels": labels[order].astype(np.int64),
    }
    return (
        {name: array[HELD_OUT:] for name, array in data.items()},
        {name: array[:HELD_OUT] for name, array in data.items()},
    )


def train(
    bundle: Bundle, seed: int, epochs: int, halves: tuple[Mapping[str, np.ndarray], ...]
) -> tuple[float, list[float]]:
    """Train once, and return the accuracy and the seconds of each step."""
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1, seed=seed) as client:
        history = client.fit(dict(halves[0]), epochs=epochs, batch_size=BATCH)
        found = client.evaluate(dict(halves[1]), batch_size=BATCH)
    return float(found["accuracy"]), [record.seconds for record in history.steps]


def measure(codec: str, seeds: int, epochs: int) -> Row:
    """Train with a codec from each seed."""
    bundle, halves = make_bundle(codec), load_halves()
    runs = [train(bundle, seed, epochs, halves) for seed in range(seeds)]
    return Row(
        codec=codec,
        bytes=count_bytes(bundle),
        seconds=median(second for _, seconds in runs for second in seconds),
        accuracies=tuple(accuracy for accuracy, _ in runs),
    )


def print_rows(rows: list[Row]) -> Iterator[str]:
    """Print the table, and yield what breaks a bound."""
    plain = next((row for row in rows if row.codec == "fp32"), rows[0])
    print("| codec | bytes a step | fewer | ms a step | accuracy | points lost |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        ratio = plain.bytes / row.bytes
        lost = mean(plain.accuracies) - mean(row.accuracies)
        print(
            f"| `{row.codec}` | {row.bytes:,} | {ratio:.2f} | {1000 * row.seconds:.2f} | "
            f"{mean(row.accuracies):.2%} | {100 * lost:+.2f} |"
        )
        if row.codec == "int8" and ratio < LEAST_RATIO:
            yield f"int8 sends {ratio:.2f} times fewer bytes, not {LEAST_RATIO}"
        if row.codec == "int8" and lost > MOST_LOST:
            yield f"int8 loses {100 * lost:.2f} points, over {100 * MOST_LOST}"


def main() -> int:
    """Measure every codec, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    given = parser.parse_args()
    started = time.perf_counter()
    rows = [measure(codec, given.seeds, given.epochs) for codec in given.codecs]
    broken = list(print_rows(rows))
    print(f"\n{given.seeds} seeds, {given.epochs} epochs, {time.perf_counter() - started:.0f} s")
    for sentence in broken:
        print(sentence)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
