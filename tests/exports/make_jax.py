"""Export small JAX models with jax2onnx: a function with its parameters, and Flax modules.

    python make_jax.py FOLDER

Needs jax, flax and jax2onnx; the README beside this file names the versions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax2onnx import to_onnx
from strips import strip

Call = Callable[[jax.Array], jax.Array]


def build_mlp() -> Call:
    """A perceptron written by hand: its parameters are closed over."""
    random = np.random.default_rng(0)
    sizes = [6, 8, 7, 5]
    layers = [
        (jnp.asarray(random.normal(size=(a, b)) / a**0.5, jnp.float32), jnp.full((b,), 0.1))
        for a, b in pairwise(sizes)
    ]

    def call(rows: jax.Array) -> jax.Array:
        for weight, bias in layers[:-1]:
            rows = jax.nn.gelu(rows @ weight + bias)
        weight, bias = layers[-1]
        return rows @ weight + bias

    return call


class Convolutional(nnx.Module):
    """Conv, BatchNorm, ReLU, pooling, Dropout, Linear."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
        self.second = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs, deterministic=True)
        self.last = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """(N, 8, 8, 1) to (N, 5)."""
        hidden = nnx.relu(self.norm(self.first(image)))
        hidden = nnx.max_pool(hidden, window_shape=(2, 2), strides=(2, 2))
        hidden = nnx.silu(self.second(hidden)).mean((1, 2))
        return self.last(self.drop(hidden))


class Attentive(nnx.Module):
    """An embedding and a block of attention."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Linear(3, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, series: jax.Array) -> jax.Array:
        """(N, 6, 3) to (N, 5)."""
        hidden = self.embedding(series)
        hidden = self.norm(hidden + self.attention(hidden))
        return self.last(hidden.mean(1))


SUBJECTS: dict[str, tuple[Callable[[], Call], tuple[str | int, ...]]] = {
    "mlp": (build_mlp, ("N", 6)),
    "cnn": (lambda: Convolutional(nnx.Rngs(0)), ("N", 8, 8, 1)),
    "transformer": (lambda: Attentive(nnx.Rngs(0)), ("N", 6, 3)),
}


def main(folder: Path) -> None:
    """Write every model."""
    folder.mkdir(parents=True, exist_ok=True)
    for subject, (build, shape) in SUBJECTS.items():
        path = folder / f"jax-{subject}.onnx"
        try:
            to_onnx(build(), [shape], return_mode="file", output_path=str(path))
            print(path.name, strip(path), flush=True)
        except Exception as error:  # noqa: BLE001 - an exporter's own failure is a finding
            print(path.name, "failed:", repr(error)[:300])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
