"""Run by the tests in an environment with stock onnxruntime alone: run stage graphs on their feeds.

    python portable_stages.py FOLDER

FOLDER holds ``NAME.onnx`` and ``NAME.npz`` with the inputs; ``NAME.out.npz`` with the outputs is
written beside them, or ``NAME.err`` with what ONNX Runtime said.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

from splitonnx.errors import StageFailed
from splitonnx.runtime.engine.builds.installed import installed_runtime
from splitonnx.runtime.engine.engines import Engine


def run(path: Path, engine: Engine) -> None:
    """Run one graph as a training stage runs."""
    feeds = dict(np.load(path.with_suffix(".npz")))
    try:
        stage = engine.load(path.stem, path.read_bytes(), training=True)
        found = engine.run(stage, {name: engine.from_array(a) for name, a in feeds.items()})
    except StageFailed as error:
        path.with_suffix(".err").write_text(str(error))
        return
    outputs: dict[str, Any] = {name: engine.to_array(value) for name, value in found.items()}
    np.savez(path.with_suffix(".out.npz"), **outputs)


if __name__ == "__main__":
    assert importlib.util.find_spec("onnx") is None, "onnx is installed"
    assert not installed_runtime().training, "the training wheel is installed"
    for graph in sorted(Path(sys.argv[1]).glob("*.onnx")):
        run(graph, Engine(threads=1))
